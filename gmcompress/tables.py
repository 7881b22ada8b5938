"""Plain-text tables, for everything that prints itself."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 140  # columns of a table in a file or a pipe


def make_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table for rich: columns whose name ends in '#' hold numbers and are set right."""
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(name.rstrip("#"), justify="right" if name.endswith("#") else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(each) for each in row))
    return table


def page_width() -> int:
    """Columns of what prints itself: those of the terminal that standard output is, or 140 where it is none."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return shutil.get_terminal_size().columns if terminal else WIDTH


def table_text(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, width: int | None = None
) -> str:
    """The same table as text, without colours, of at most `width` columns; by default those of `page_width`.

    >>> print(table_text("", ["layer", "kept#"], [["fc", "50 %"]]))  # doctest: +ELLIPSIS
     layer   kept
    ...
     fc      50 %
    """
    page = io.StringIO()
    Console(file=page, width=width or page_width(), color_system=None, highlight=False, markup=False).print(
        make_table(title, columns, rows)
    )
    return "\n".join(line.rstrip() for line in page.getvalue().split("\n") if line.strip())


def percent(part: float, whole: float) -> str:
    """A share to one decimal.

    >>> percent(1, 8)
    '12.5 %'
    """
    return f"{100 * part / whole:.1f} %" if whole else "-"
