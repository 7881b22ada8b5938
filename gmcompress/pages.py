"""The HTML page of a report: one self-contained file, figures inside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def render_html(report: Mapping[str, Any]) -> str:
    """The page for the data of a report."""
    raise NotImplementedError
