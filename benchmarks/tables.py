"""Tables of the GM paper, measured: accuracy at few parameters, our networks beside what others have published.

python benchmarks/tables.py --data DATA --tables hidden cifar --seeds 0 1 2 --device cuda --output tables.jsonl
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from cifar import accuracy
from rich.console import Console
from rows import append_row, cell, machine, measured_before, prepare_device, shown_command, summary
from table_data import Sources, Task, from_folder, load_task, made_up
from table_models import PUBLISHED, ROWS, TABLES, Row, compressed
from table_training import train
from torch import nn

from gmcompress import GMError
from gmcompress.tables import make_table

PATHS = ("data", "output", "cache")
SMOKE = 40  # made-up images


@dataclass
class Bench:
    """What all rows share, and what was measured so far: tasks by name, trained networks by row and seed."""

    sources: Sources
    device: torch.device
    options: argparse.Namespace
    facts: Mapping[str, Any]
    console: Console
    tasks: dict[str, Task] = field(default_factory=dict)
    trained: dict[tuple[str, str, int], nn.Module] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def task(self, name: str) -> Task:
        """The images on the device; of all tasks the latest alone is kept."""
        if name not in self.tasks:
            self.tasks.clear()
            found = load_task(self.sources, name)
            held, some = self.options.held_out, self.options.train_images
            found = found.held_out(held) if held else found
            self.tasks[name] = (found.first(some) if some else found).to(self.device)
        return self.tasks[name]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder with cifar10/*.tar, mnist/mnist.npz and imagenet_sample/validation.tar")
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    add("--rows", nargs="+", help="only rows of these names, such as 'two layers' (default: all)")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--epochs", type=int, help="in place of the epochs of each row")
    add("--train-images", type=int, help="learn from this many only (default: all)")
    add("--held-out", type=int, help="judge on this many training images, which are then not learned from")
    add("--device", default="cpu")
    add("--threads", type=int, default=1)
    add("--amp", choices=("no", "bf16"), default="no")
    add("--cache", type=Path, help="decoded images of CIFAR-10 are kept beside this path")
    add("--output", type=Path, default=Path("tables.jsonl"))
    add("--resume", action="store_true", help="take over what the output already has with the same settings")
    add("--smoke", action="store_true", help="an epoch on a few made-up images, without data, to see that all runs")
    options = parser.parse_args(arguments)
    if options.data is None and not options.smoke:
        parser.error("--data is needed, except with --smoke")
    return options


def settings(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """What the accuracy of a row depends on, besides the seed."""
    recipe = row.recipe if options.epochs is None else replace(row.recipe, epochs=options.epochs)
    shared = {"train_images": options.train_images, "held_out": options.held_out, "smoke": options.smoke}
    shared |= {"start": row.start, "structure": row.structure}
    return {"table": row.table, "row": row.name, "model": row.model, "recipe": asdict(recipe), **shared}


def network(bench: Bench, row: Row, seed: int) -> tuple[nn.Module, nn.Module | None]:
    """The network to train, and its teacher if it has one."""
    torch.manual_seed(seed)
    if row.start is None or row.structure is None:
        return row.build().to(bench.device), None
    first = next(each for each in ROWS if (each.table, each.name) == (row.table, row.start))
    if (row.table, row.start, seed) not in bench.trained:
        learn(bench, first, seed)
    teacher = bench.trained[row.table, row.start, seed]
    return compressed(teacher, row.structure), teacher.eval()


def learn(bench: Bench, row: Row, seed: int) -> dict[str, Any]:
    """Trains one network and judges it after the last epoch.

    Raises:
        GMError: it has more parameters than its row allows.
    """
    task, recipe = bench.task(row.task), row.recipe
    recipe = recipe if bench.options.epochs is None else replace(recipe, epochs=bench.options.epochs)
    model, teacher = network(bench, row, seed)
    parameters = sum(each.numel() for each in model.parameters())
    if row.most is not None and parameters > row.most:
        raise GMError(f"{row.table}, {row.name} has {parameters:,} parameters, more than {row.most:,}")
    facts: dict[str, Any] = {"parameters": parameters}
    same = {"seed": seed, "amp": bench.options.amp, "teacher": teacher}
    with bench.console.status(f"{row.table}, {row.name}, seed {seed}") as status:

        def show(epoch: int, loss: float) -> None:
            status.update(f"{row.table}, {row.name}, seed {seed}, epoch {epoch + 1}/{recipe.epochs}, loss {loss:.3f}")
            facts["loss"] = loss

        scaling, seconds = train(model, task.train, recipe, progress=show, **same)
    found = accuracy(model, task.test, batch_size=500, prepare=scaling)
    if any(row.table == each.table and row.name == each.start for each in ROWS):
        bench.trained[row.table, row.name, seed] = copy.deepcopy(model)
    counts = {"learned_from": len(task.train.labels), "judged_on": len(task.test.labels), "images": task.made}
    return {**facts, "accuracy": found, **counts, "train_seconds": round(seconds, 1)}


def measure(bench: Bench, row: Row, seed: int) -> None:
    """The line of one row and seed, measured, or taken over with `--resume`."""
    wanted = {"benchmark": "tables", "seed": seed, **settings(row, bench.options), **bench.facts}
    before = measured_before(bench.options.output, wanted) if bench.options.resume else None
    if before is not None:
        bench.rows.append(before)
        return
    line = {**wanted, **learn(bench, row, seed), "most": row.most, "target": row.target}
    line |= {"published": [asdict(each) for each in PUBLISHED if each.table == row.table]}
    append_row(bench.options.output, line)
    bench.rows.append(line)
    said = f"{row.table}, {row.name}, seed {seed}: {line['accuracy']:.2f} % at {line['parameters']:,} parameters"
    bench.console.print(f"{said}, {line['train_seconds']} s")


def print_tables(bench: Bench, rows: Sequence[Row]) -> None:
    """Ours beside what was published, table by table, with how the images were made."""
    for name in dict.fromkeys(row.table for row in rows):
        shown = [
            (f"{each.model} ({each.source})", _counted(each.parameters), f"{each.accuracy:.2f}", "")
            for each in PUBLISHED
            if each.table == name
        ]
        lines = [each for each in bench.rows if each["table"] == name]
        for row in (row for row in rows if row.table == name):
            own = [each for each in lines if each["row"] == row.name]
            found = summary({"accuracy": [each["accuracy"] for each in own]})
            goal = (
                ""
                if row.target is None
                else f"{'reached' if found['accuracy'] >= row.target else 'missed'}: {row.target:g}"
            )
            shown.append((f"ours, {row.name}", _counted(own[0]["parameters"]), cell(found, "accuracy"), goal))
        columns = ("network", "parameters#", "accuracy#", "goal")
        bench.console.print(make_table(f"{name}: accuracy in percent after the last epoch", columns, shown))
        bench.console.print(f"Images: {lines[0]['images']}.\n")


def _counted(parameters: int | None) -> str:
    return "-" if parameters is None else f"{parameters:,}"


def main(arguments: Sequence[str]) -> int:
    """Measure every row asked for, with every seed."""
    options = parse(arguments)
    if options.smoke:
        options.epochs = 1
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    try:
        device = prepare_device(options.device, threads=options.threads)
        sources = made_up(SMOKE) if options.smoke else from_folder(options.data, options.cache)
        command = shown_command("tables.py", {name: getattr(options, name) for name in PATHS}, arguments)
        facts = {"command": command, **machine(device, amp=options.amp, threads=options.threads)}
        bench = Bench(sources, device, options, facts, console)
        rows = chosen(options.tables, options.rows)
        for row in rows:
            for seed in options.seeds:
                measure(bench, row, seed)
    except GMError as problem:
        print(f"tables.py: {problem}", file=sys.stderr)
        return 2
    print_tables(bench, rows)
    return 0


def chosen(tables: Sequence[str], names: Sequence[str] | None) -> list[Row]:
    """The rows of these tables and names.

    Raises:
        GMError: there is none of a name.
    """
    found = [row for row in ROWS if row.table in tables and (names is None or row.name in names)]
    unknown = set(names or ()) - {row.name for row in found}
    if unknown:
        known = ", ".join(sorted({row.name for row in ROWS if row.table in tables}))
        raise GMError(f"no row of {', '.join(tables)} is called {sorted(unknown)[0]!r}; there are {known}")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
