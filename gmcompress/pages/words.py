"""How the page writes fields, names and numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]

NOT_MEASURED = "not measured"
NAME = 32  # letters of a layer's name that a figure shows


def shown(value: Any) -> str:
    """A field as the page prints it.

    >>> shown(1234567), shown(0.12345), shown(0.00001), shown(None), shown("cpu")
    ('1,234,567', '0.123', '1.0e-05', 'not measured', 'cpu')
    """
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1e}" if 0 < abs(value) < 0.0005 else f"{value:,.3f}"


def layer_name(name: str) -> str:
    """The name of a layer, made visible.

    >>> layer_name(""), layer_name("fc"), layer_name(chr(10))
    ('(root)', 'fc', '\\\\n')
    """
    if not name:
        return "(root)"
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def short_name(name: str) -> str:
    """A long name without its middle."""
    name, tail = layer_name(name), NAME // 3
    return name if len(name) <= NAME else f"{name[: NAME - tail - 1]}…{name[-tail:]}"


def drawable(value: Any) -> float:
    """A number to draw; nan, which leaves a gap, for anything else."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fine else math.nan


def drawable_column(rows: Iterable[Row], key: str) -> list[float]:
    """The numbers of a column to draw."""
    return [drawable(row.get(key)) for row in rows]
