"""What appears on the screen: tables by rich on a terminal and as plain text elsewhere, and progress beside them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from ..reporting import Report
from ..runs import Progress, silent
from ..tables import make_table, percent, table_text

EVERY = 30.0  # seconds between two lines of plain progress on one step


class Table(NamedTuple):
    """A table to be shown; columns whose name ends in '#' hold numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


def demo_table(report: Report) -> Table:
    """What the demo's networks are: the dense one, and the compressed one before and after training, and frozen."""
    metrics = {name: report.before if name == "dense" else report.after for name in report.accuracy}
    rows = []
    for name, top1 in report.accuracy.items():
        each, latency = metrics[name], metrics[name].latency_ms if name in ("dense", "frozen") else None
        kept = percent(each.parameters, report.before.parameters)
        shown = "–" if latency is None else f"{latency:.2f}"
        rows.append((name, f"{each.parameters:,}", kept, f"{top1:.2f}", shown))
    return Table("", ["network", "parameters#", "kept#", "top-1 on 360 digits, %#", "latency, ms#"], rows)


def show(parts: Sequence[str | Table]) -> None:
    """Print lines and tables on standard output."""
    terminal = sys.stdout.isatty()
    for part in parts:
        if isinstance(part, str):
            print(part)
        elif terminal:
            Console(highlight=False, markup=False).print(make_table(*part))
        else:
            print(table_text(*part))


@contextmanager
def watching(*, quiet: bool) -> Iterator[Progress]:
    """A progress to hand to a run, shown on standard error: bars on a terminal, lines elsewhere, or nothing."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        columns = (
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bars(TextColumn("{task.description}"), *columns, console=Console(stderr=True), transient=True) as bars:
            yield _Bars(bars)
    else:
        yield _Lines()


class _Bars:
    """One bar for what is going on; what is done becomes a line above it."""

    def __init__(self, bars: Bars) -> None:
        self.bars, self.what = bars, ""
        self.task: TaskID | None = None

    def __call__(self, what: str, done: int, of: int, note: str) -> None:
        if self.task is None or what != self.what:
            if self.task is not None:
                self.bars.remove_task(self.task)
            self.task, self.what = self.bars.add_task(what, total=of, note=note), what
        self.bars.update(self.task, completed=done, note=note)
        if done >= of:
            self.bars.console.print(_line(what, note), highlight=False, markup=False)
            self.bars.remove_task(self.task)
            self.task = None


class _Lines:
    """A line for everything that is done, and now and then one for what takes long."""

    def __init__(self) -> None:
        self.what, self.last = "", 0.0

    def __call__(self, what: str, done: int, of: int, note: str) -> None:
        now = time.monotonic()
        if what != self.what:
            self.what, self.last = what, now
        if done >= of:
            self.what = ""
            print(_line(what, note), file=sys.stderr, flush=True)
        elif now - self.last >= EVERY:
            self.last = now
            print(_line(f"{what}, {done} of {of}", note), file=sys.stderr, flush=True)


def _line(what: str, note: str) -> str:
    return f"{what}: {note}" if note else what
