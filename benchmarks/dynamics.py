"""The dynamics table: smoke forecast by group matrices, by a plain CNN and by a relaxed group convolution.

python benchmarks/dynamics.py --seeds 0 1 2 --output dynamics.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from dynamics_models import ROWS, Forecaster, Row
from dynamics_training import JUDGED, Data, DivergenceError, Recipe, errors, judged, train, unchanged
from rich.console import Console
from rows import append_row, cell, machine, measured_before, prepare_device, shown_command, summary

from gmcompress import GMError
from gmcompress.tables import make_table

SIMULATIONS = (24, 8)  # to learn from, and of each kind to judge by
HORIZON = 10  # steps of a forecast that is judged
KINDS = {f"{name}, {part.title()}": (part, name) for name in ("velocity", "density") for part in JUDGED}


@dataclass
class Bench:
    """What all rows share, what was measured so far, and the error of every rate tried, by row."""

    data: Data
    recipe: Recipe
    device: torch.device
    options: argparse.Namespace
    facts: Mapping[str, Any]
    console: Console
    tried: dict[str, dict[str, float]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", nargs="+", choices=[row.name for row in ROWS], default=[row.name for row in ROWS])
    add("--seeds", nargs="+", type=int, default=[0])
    add("--steps", type=int, help="of training, in place of the recipe's")
    add("--imperfection", type=float, default=0.5, help="by how much of itself buoyancy differs from its mean")
    add("--device", default="cpu")
    add("--threads", type=int, default=1)
    add("--output", type=Path, default=Path("dynamics.jsonl"))
    add("--resume", action="store_true", help="take over what the output already has with the same settings")
    add("--smoke", action="store_true", help="a few steps on a few simulations, to see that all runs")
    return parser.parse_args(arguments)


def settings(bench: Bench, row: Row) -> dict[str, Any]:
    """What the errors of a row depend on, besides the seed."""
    data = {"learned": len(bench.data.learned), "judged": len(bench.data.domain)}
    data |= {"imperfection": bench.data.imperfection}
    shared = {"simulations": data, "recipe": asdict(bench.recipe), "horizon": HORIZON, "smoke": bench.options.smoke}
    return {"benchmark": "dynamics", "row": row.name, "model": row.model, **shared}


def learn(bench: Bench, row: Row, lr: float, *, seed: int, steps: int) -> tuple[Forecaster, dict[str, Any]]:
    """One network trained, and the facts of its training.

    Raises:
        GMError: it has more parameters than its row allows.
    """
    torch.manual_seed(seed)
    model = Forecaster(row.build(), bench.data.training).to(bench.device)
    parameters = sum(each.numel() for each in model.parameters())
    if parameters > row.most:
        raise GMError(f"{row.name} has {parameters:,} parameters, more than {row.most:,}")
    with bench.console.status(row.name) as status:

        def show(step: int, loss: float) -> None:
            status.update(f"{row.name}, seed {seed}, rate {lr:g}, step {step}/{steps}, loss {loss:.3f}")

        loss, seconds = train(model, bench.data.training, bench.recipe, lr, seed=seed, steps=steps, progress=show)
    return model, {"parameters": parameters, "loss": loss, "train_seconds": round(seconds, 1)}


def rates(bench: Bench, row: Row) -> dict[str, float]:
    """The velocity's error on simulations held out, after short trials of every rate with seed 0; infinite if lost."""
    if row.name in bench.tried:
        return bench.tried[row.name]
    before = measured_before(bench.options.output, settings(bench, row)) if bench.options.resume else None
    found: dict[str, float] = {} if before is None else before["tried"]
    for lr in bench.recipe.rates if before is None else ():
        try:
            model, _ = learn(bench, row, lr, seed=0, steps=max(1, round(bench.recipe.trial * bench.recipe.steps)))
        except DivergenceError:
            continue
        found[f"{lr:g}"] = errors(model, bench.data.held_out, HORIZON)["velocity"]
    if not found:
        raise GMError(f"{row.name} learns at none of the rates {', '.join(f'{each:g}' for each in bench.recipe.rates)}")
    bench.tried[row.name] = found
    return found


def measure(bench: Bench, row: Row, seed: int) -> None:
    """The line of one row and seed, measured, or taken over with `--resume`."""
    wanted = {**settings(bench, row), "seed": seed, **bench.facts}
    line = measured_before(bench.options.output, wanted) if bench.options.resume else None
    if line is None:
        tried = rates(bench, row)
        lr = float(min(tried, key=lambda each: tried[each]))
        model, facts = learn(bench, row, lr, seed=seed, steps=bench.recipe.steps)
        line = {**wanted, "tried": tried, "lr": lr, **facts, **judged(model, bench.data, HORIZON)}
        line |= {"most": row.most, "ours": row.ours, "unchanged": judged(unchanged, bench.data, HORIZON)}
        append_row(bench.options.output, line)
        said = ", ".join(f"{part} {line[part]['velocity']:.4f}" for part in JUDGED)
        bench.console.print(f"{row.name}, seed {seed}: {said}, {facts['train_seconds']} s")
    bench.rows.append(line)


def verdict(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Whether our first network is ahead of all that are not ours by more than the larger spread, by `KINDS`.

    Raises:
        GMError: there are no rows of ours, or none of others.
    """
    sides: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for own in by_network(rows).values():
        sides[own[0]["ours"]].append(over_seeds(own))
    if not sides[True] or not sides[False]:
        raise GMError("to compare, rows of ours and of others are needed")
    ours = sides[True][0]
    return {
        kind: all(
            other[kind] - ours[kind] > max(each["spread"][kind] or 0.0 for each in (ours, other))
            for other in sides[False]
        )
        for kind in KINDS
    }


def by_network(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of every network, in the order of their first ones."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["row"], []).append(row)
    return found


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and spread of the errors of one network, in thousandths, by `KINDS`."""
    return summary({kind: [1000 * row[part][name] for row in rows] for kind, (part, name) in KINDS.items()})


def print_table(bench: Bench) -> None:
    """All rows, beside the forecast that nothing changes."""
    shown = []
    for name, own in by_network(bench.rows).items():
        found = over_seeds(own)
        shown.append((name, f"{own[0]['parameters']:,}", *(cell(found, kind) for kind in KINDS)))
    still = bench.rows[0]["unchanged"]
    shown.append(("nothing changes", "-", *(f"{1000 * still[part][name]:.2f}" for part, name in KINDS.values())))
    title = f"dynamics: errors over {HORIZON} steps, in thousandths of a cell per step and of the density"
    columns = ("network", "parameters#", *(f"{kind}#" for kind in KINDS))
    bench.console.print(make_table(title, columns, shown))
    if {row["ours"] for row in bench.rows} == {True, False}:
        said = "; ".join(f"{kind}: {'ahead' if won else 'not ahead'}" for kind, won in verdict(bench.rows).items())
        bench.console.print(f"our first network beside all that are not ours, by more than the larger spread: {said}")


def main(arguments: Sequence[str]) -> int:
    """Measure every row asked for, with every seed."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    recipe = Recipe() if options.steps is None else replace(Recipe(), steps=options.steps)
    recipe = replace(recipe, steps=2, rates=recipe.rates[:1]) if options.smoke else recipe
    try:
        device = prepare_device(options.device, threads=options.threads)
        sizes = (2, 1) if options.smoke else SIMULATIONS
        data = Data.made(*sizes, imperfection=options.imperfection).to(device)
        command = shown_command("dynamics.py", {"output": options.output}, arguments)
        facts = {"command": command, **machine(device, amp="no", threads=options.threads)}
        bench = Bench(data, recipe, device, options, facts, console)
        for row in (row for row in ROWS if row.name in options.rows):
            for seed in options.seeds:
                measure(bench, row, seed)
    except GMError as problem:
        print(f"dynamics.py: {problem}", file=sys.stderr)
        return 2
    print_table(bench)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
