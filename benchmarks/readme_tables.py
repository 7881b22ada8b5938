"""The tables of the README, made from the lines in results/; without --write, whether they are up to date.

python benchmarks/readme_tables.py --write
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import coverage
from dynamics import KINDS, by_network, over_seeds
from rows import cell, read_rows, summary

from gmcompress.tables import percent

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results"
COMPETITORS = ("ours", "random", "whitened", "svd", "pruning")  # the order of the rows of one budget

Row = Mapping[str, Any]


def line(*cells: object) -> str:
    """A row of a table.

    >>> line("ours", 3)
    '| ours | 3 |'
    """
    return f"| {' | '.join(map(str, cells))} |"


def by_budget(rows: Iterable[Row]) -> list[Row]:
    """The largest budget first, the dense model left out."""
    smaller = [row for row in rows if row["competitor"] != "dense"]
    return sorted(smaller, key=lambda row: (-float(row["budget"].rstrip("%")), COMPETITORS.index(row["competitor"])))


def accuracy_lines(rows: Iterable[Row]) -> list[str]:
    """ResNet-20 before training and after one epoch: accuracy of every competitor at every budget.

    >>> row = {"arch": "resnet20", "budget": "9%", "competitor": "svd", "kept": 0.09, "recipe": {"epochs": 1}}
    >>> accuracy_lines([{**row, "raw": 9.0, "tuned": None, "spread": {}, "seeds": [0]}])
    ['| 9% | svd | 9.0 % | 9.00 | - | 1 |']
    """
    return [line(*_accuracy_cells(row)) for row in by_budget(rows) if _is_usual(row)]


def longer_lines(rows: Iterable[Row]) -> list[str]:
    """The same of other networks and after more epochs, which are said."""
    others = (row for row in by_budget(rows) if not _is_usual(row))
    return [line(row["arch"], *_accuracy_cells(row), row["recipe"]["epochs"]) for row in others]


def _is_usual(row: Row) -> bool:
    return row["arch"] == "resnet20" and row["recipe"]["epochs"] == 1


def _accuracy_cells(row: Row) -> list[object]:
    steps = [cell(row, "raw"), cell(row, "tuned")]
    return [row["budget"], row["competitor"], percent(row["kept"], 1), *steps, len(row["seeds"])]


def agreement_lines(rows: Iterable[Row]) -> list[str]:
    """Agreement with the dense model before and after training."""

    def decimal(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    return [
        line(row["budget"], row["competitor"], percent(row["kept"], 1), decimal(row["raw"]), decimal(row["tuned"]))
        for row in by_budget(rows)
    ]


def speed_lines(rows: Iterable[Row], *, models: bool) -> list[str]:
    """Milliseconds of layers, or of whole models, dense and fast."""
    lines = []
    for row in (each for each in rows if (each["part"] == "model") == models):
        dense, ours = (row["competitors"][name]["ms"] for name in ("dense", "ours"))
        if models:
            layers = f"{row['structured']} of {row['layers']}"
            cells = [percent(row["kept"], 1), f"{dense:.0f}", f"{ours:.0f}", f"{row['speedup']:.2f}", layers]
        else:
            cells = [f"{dense:.3g}", f"{ours:.3g}", f"{row['speedup']:.1f}", f"{row['speedup_single']:.1f}"]
        lines.append(line(row["what"], row["batch"], *cells))
    return lines


def dynamics_lines(rows: Sequence[Row]) -> list[str]:
    """Errors of every network with their spread over the seeds, and those of a forecast that nothing changes."""
    lines = []
    for name, own in by_network(rows).items():
        found = over_seeds(own)
        cells = [f"{found[kind]:.1f} ± {found['spread'][kind]:.1f}" for kind in KINDS]
        lines.append(line(name, f"{own[0]['parameters']:,}", len(own), *cells))
    cells = [f"{1000 * rows[0]['unchanged'][part][field]:.1f}" for part, field in KINDS.values()]
    return [*lines, line("nothing changes", "–", "–", *cells)]


def paper_lines(rows: Iterable[Row]) -> list[str]:
    """Our networks on the tasks of the GM paper, over their seeds, each task with what others have published.

    >>> row = {"table": "noise", "row": "six layers", "parameters": 5780, "recipe": {"epochs": 9}, "accuracy": 96.0}
    >>> other = {"model": "GM-CNN", "parameters": 5915, "accuracy": 90.2}
    >>> paper_lines([{**row, "published": [other]}])
    ['| noise | ours, six layers | 5,780 | 96.00 | 9 | 1 |', '| noise | published, GM-CNN | 5,915 | 90.20 | - | - |']
    """
    tasks: dict[str, dict[tuple[str, int], list[Row]]] = {}
    for row in rows:
        own = tasks.setdefault(row["table"], {})
        own.setdefault((row["row"], row["recipe"]["epochs"]), []).append(row)
    lines = []
    for task, networks in tasks.items():
        for (name, epochs), each in networks.items():
            found = cell(summary({"accuracy": [row["accuracy"] for row in each]}), "accuracy")
            lines.append(line(task, f"ours, {name}", f"{each[0]['parameters']:,}", found, epochs, len(each)))
        for other in next(iter(networks.values()))[0]["published"]:
            counted = "-" if other["parameters"] is None else f"{other['parameters']:,}"
            lines.append(line(task, f"published, {other['model']}", counted, f"{other['accuracy']:.2f}", "-", "-"))
    return lines


def bodies(results: Path = RESULTS) -> dict[str, list[str]]:
    """The rows of every table, by the name that the README has for it."""
    found = {name: read_rows(results / f"{name}.jsonl") for name in ("accuracy_budgets", "transformer", "speed")}
    reached = coverage.tables(coverage.latest(read_rows(results / "coverage.jsonl")), sorted(coverage.families()))
    return {
        "accuracy_budgets": accuracy_lines(found["accuracy_budgets"]),
        "accuracy longer": longer_lines(found["accuracy_budgets"]),
        "transformer": agreement_lines(found["transformer"]),
        "speed layers": speed_lines(found["speed"], models=False),
        "speed models": speed_lines(found["speed"], models=True),
        "paper": paper_lines(read_rows(results / "tables.jsonl")),
        "dynamics": dynamics_lines(read_rows(results / "dynamics.jsonl")),
        **{name: [line(*each) for each in lines] for name, (_, lines) in reached.items()},
    }


def filled(text: str, tables: Mapping[str, Sequence[str]]) -> str:
    """The text with these rows below the heads of its tables.

    >>> print(filled("<!-- a -->\\n| x |\\n|---|\\n| 1 |\\n<!-- end of a -->", {"a": ["| 2 |", "| 3 |"]}))
    <!-- a -->
    | x |
    |---|
    | 2 |
    | 3 |
    <!-- end of a -->
    """
    for name, body in tables.items():
        before, rest = text.split(f"<!-- {name} -->\n")
        old, after = rest.split(f"<!-- end of {name} -->")
        head = old.splitlines()[:2]
        text = before + "\n".join([f"<!-- {name} -->", *head, *body, f"<!-- end of {name} -->"]) + after
    return text


def main(arguments: Sequence[str]) -> int:
    """Compare, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    wanted = filled(text, bodies())
    if options.write:
        README.write_text(wanted, encoding="utf-8")
    elif text != wanted:
        print("README.md has other tables than results/ says; --write makes them", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
