"""The HTML page of a report: one self-contained file, figures inside it, from plain data alone."""

from .page import render_html
from .words import shown

__all__ = ["render_html", "shown"]
