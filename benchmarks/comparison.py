"""Competitors at equal size and with equal care: every start measured, tuned by one recipe, and put in one table."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from competitors import COMPETITORS, RANDOM, Case, Start, size, torch_pruning
from rich.console import Console
from rows import append_row, cell, measured_before, summary
from torch import nn

from gmcompress import GMError
from gmcompress.tables import make_table, percent
from gmcompress.tuning import Recipe, fine_tune
from gmcompress.tuning.recipe import optimizer_name

STEPS = ("raw", "recalibrated", "tuned")
TRAINED = ("optimizer", "lr", "trial", "tune_seconds")  # facts of every training


@dataclass(frozen=True)
class Bench:
    """What all competitors share. `judge` gives the numbers of a model by name, the one to compare first.

    `still` are the batches on which BatchNorm is recalibrated for the step of that name; none leave the step out.
    """

    name: str
    case: Case
    judge: Callable[[nn.Module], Mapping[str, float]]
    loader: Any
    still: Sequence[Any]
    recipe: Recipe
    seeds: Sequence[int]
    facts: Mapping[str, Any]
    console: Console
    output: Path
    resume: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)

    def write(self, row: Mapping[str, Any]) -> None:
        """Keep a row for the tables, append it to the file of results, and show it."""
        whole = {"benchmark": self.name, **row, **self.facts}
        self.rows.append(whole)
        append_row(self.output, whole)
        self.console.print(line(whole))

    def take_over(self, competitor: str, budget: str) -> bool:
        """Whether the file of results has this row already, with `--resume`; then it is in the tables."""
        wanted = {"benchmark": self.name, "competitor": competitor, "budget": budget, **self.facts}
        row = measured_before(self.output, wanted) if self.resume else None
        if row is None:
            return False
        self.rows.append(row)
        self.console.print(f"{line(row)} (measured before)")
        return True

    @property
    def training(self) -> bool:
        return bool(self.recipe.epochs or self.recipe.minutes)


def recalibrated(bench: Bench, model: nn.Module) -> nn.Module:
    """A copy with BatchNorm statistics of the batches that hold still, where these bring it nearer to dense."""
    same = {"amp": bench.recipe.amp, "device": bench.recipe.device}
    recipe = Recipe(recalibrate="auto", recalibration_batches=len(bench.still), **same)
    return fine_tune(model, bench.still, recipe, teacher=bench.case.dense)[0]


def tuned(bench: Bench, model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """A copy after distillation from the dense model; the learning rate, the losses of its trial, and the seconds."""
    recipe, begun = replace(bench.recipe, seed=seed), time.perf_counter()
    with bench.console.status("tuning") as status:

        def show(epoch: int, step: int, steps: int, loss: float) -> None:
            which = "trial" if epoch < 0 else f"epoch {epoch + 1}"
            status.update(f"seed {seed}, {which}, step {step}/{steps}, loss {loss:.3f}")

        found, history = fine_tune(model, bench.loader, recipe, teacher=bench.case.dense, progress=show)
    trial = json.loads(history[0]["trial"]) if "trial" in history[0] else {"lr": recipe.lr, "losses": None}
    seconds = round(time.perf_counter() - begun, 1)
    name = optimizer_name(model, recipe)
    return found, {"optimizer": name, "lr": trial["lr"], "trial": trial["losses"], "tune_seconds": seconds}


def measure(bench: Bench, competitor: str, budget: str) -> None:
    """The row of one competitor at one budget; only a random start is made anew for every seed.

    Raises:
        GMError: the start has more parameters than the budget allows, or its training diverges.
    """
    judged: dict[str, list[Mapping[str, float]]] = {step: [] for step in STEPS}
    trainings: list[dict[str, Any]] = []
    starts: list[Start] = []
    for seed in bench.seeds:
        if not starts or competitor in RANDOM:
            starts.append(COMPETITORS[competitor](bench.case, budget, seed))
            check_size(bench.case, starts[-1], budget)
            judged["raw"].append(bench.judge(starts[-1].model))
            if bench.still:
                judged["recalibrated"].append(bench.judge(recalibrated(bench, starts[-1].model)))
        if bench.training:
            model, facts = tuned(bench, starts[-1].model, seed)
            judged["tuned"].append(bench.judge(model))
            trainings.append(facts)
            bench.console.print(f"{budget}, {competitor}, seed {seed}: {judged['tuned'][-1]}, {facts}")
    together = {key: [each[key] for each in trainings] for key in TRAINED}
    bench.write({"competitor": competitor, "budget": budget, **described(bench, starts), **together, **means(judged)})


def check_size(case: Case, start: Start, budget: str) -> None:
    """No competitor may have a parameter more than the budget allows."""
    if size(start.model) > case.limit(budget):
        raise GMError(f"{size(start.model):,} parameters are more than the {case.limit(budget):,} of {budget}")


def described(bench: Bench, starts: Sequence[Start]) -> dict[str, Any]:
    """What a start stores, and how it came about; seconds are less where notes of an earlier call were there."""
    first = starts[0]
    return {
        "parameters": size(first.model),
        "kept": size(first.model) / size(bench.case.dense),
        "kinds": dict(first.kinds),
        "optimum": first.optimum,
        "compress_seconds": [round(each.seconds, 2) for each in starts],
    }


def means(judged: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Mean, spread and every value of what is compared, which `metric` names; everything else under `beside`.

    >>> means({"raw": [{"agreement": 70.0, "top1": 60.0}]})["beside"]
    {'top1': {'raw': [60.0]}}
    """
    first, *others = next(iter(judged.values()))[0]
    beside = {name: {step: [each[name] for each in found] for step, found in judged.items()} for name in others}
    compared = {step: [each[first] for each in found] for step, found in judged.items()}
    return {"metric": first, **summary(compared), "beside": beside}


def line(row: Mapping[str, Any]) -> str:
    """One row in one line, for whoever waits."""
    steps = ", ".join(f"{step} {cell(row, step)}" for step in STEPS)
    return f"{row['budget']}, {row['competitor']}: {row['parameters']:,} parameters, {row['metric']} {steps}"


def last_step(rows: Iterable[Mapping[str, Any]]) -> str:
    """The last step that was measured of all these rows."""
    rows = list(rows)
    return [step for step in STEPS if all(row[step] is not None for row in rows)][-1]


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether `ours` is ahead of every control by more than the spread, the larger of its own and of the control's.

    >>> ours = {"competitor": "ours", "raw": 91.0, "recalibrated": None, "tuned": None, "spread": {"raw": 0.1}}
    >>> verdict([ours, ours | {"competitor": "svd", "raw": 90.0}])
    'ours − svd +1.00 (spread 0.10): ahead of every control by more than the spread'
    """
    step = last_step(rows)
    own = next((row for row in rows if row["competitor"] == "ours"), None)
    controls = [row for row in rows if not row["competitor"].startswith("ours")]
    if own is None or not controls:
        return "no verdict: it needs ours and a control"
    parts, ahead = [], []
    for row in controls:
        spreads = [each["spread"][step] for each in (own, row) if each["spread"][step] is not None]
        lead = own[step] - row[step]
        parts.append(f"ours − {row['competitor']} {lead:+.2f}" + (f" (spread {max(spreads):.2f})" if spreads else ""))
        ahead.append(lead > max(spreads, default=0.0))
    known = any(row["spread"][step] is not None for row in rows)
    by = "by more than the spread" if known else "on this one measurement, without a spread"
    return "; ".join(parts) + f": {'' if all(ahead) else 'NOT '}ahead of every control {by}"


def print_tables(bench: Bench, title: str) -> None:
    """One table per budget, the best in bold, and the verdict below it."""
    dense = bench.rows[0]
    columns = ["competitor", "parameters#", "kept#", "layers", "raw#", "BN#", "tuned#", "lr", "last − dense#"]
    for budget in dict.fromkeys(row["budget"] for row in bench.rows[1:]):
        rows = [row for row in bench.rows[1:] if row["budget"] == budget]
        step = last_step(rows)
        best = max(row[step] for row in rows)
        cells = []
        for row in [dense, *rows]:
            shown = {each: cell(row, each) for each in STEPS}
            if row is not dense and row[step] == best:
                shown[step] = f"[bold]{shown[step]}[/bold]"
            layers = ", ".join(f"{count} {kind}" for kind, count in row["kinds"].items())
            rates = " ".join(f"{each:g}" for each in row["lr"]) or "-"
            difference = "-" if row is dense else f"{row[step] - dense['raw']:+.2f}"
            kept = percent(row["parameters"], dense["parameters"])
            cells.append(
                (row["competitor"], f"{row['parameters']:,}", kept, layers, *shown.values(), rates, difference)
            )
        bench.console.print(make_table(f"{title} at {budget} of the parameters", columns, cells))
        bench.console.print(verdict(rows) + "\n")


def add_options(add: Callable[..., Any], *, competitors: Sequence[str], budgets: Sequence[str]) -> None:
    """The options that do not depend on model and data."""
    add("--budgets", nargs="+", default=list(budgets), help="shares of the model's parameters")
    add("--competitors", nargs="+", choices=competitors, default=[each for each in competitors if "-" not in each])
    add("--calibration-seed", type=int, default=0, help="draws the calibration images")
    add("--epochs", type=int, default=0, help="of distillation; 0 measures the starts alone")
    add("--minutes", type=float, help="of distillation, in place of epochs")
    add("--lr", type=float, help="the peak of the learning rate (default: found by a trial, for everybody)")
    add("--trial-lrs", type=float, nargs="+", default=[], help="rates of the trial (default: the package's)")
    add("--opt", default="auto", help="optimizer, as timm calls it")
    add("--temperature", type=float, help="of the distillation (default: found from the dense model's answers)")
    add("--features", type=float, help="weight of the loss between the outputs of the blocks (default: the package's)")
    add("--seeds", type=int, nargs="+", default=[0], help="of the tuning")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--amp", choices=["no", "bf16", "fp16"], default="no")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--notes", type=Path, help="folder in which tables and fits are kept (default: kept until the end)")
    add("--output", type=Path, help="rows are appended to this file")
    add("--resume", action="store_true", help="rows that --output has, with the same settings, are not measured again")


def recipe_of(options: argparse.Namespace, **fixed: Any) -> Recipe:
    """The recipe of everybody; an optimizer that is left open is chosen for each model, as the package does."""
    chosen = {"epochs": options.epochs, "minutes": options.minutes, "lr": options.lr, "optimizer": options.opt}
    chosen |= {"temperature": options.temperature, "features": options.features, "amp": options.amp}
    return Recipe(**chosen, trial_lrs=tuple(options.trial_lrs), device=options.device, **fixed)


def shared_facts(options: argparse.Namespace, recipe: Recipe, case: Case) -> dict[str, Any]:
    """The facts of recipe and calibration."""
    return {
        "recipe": {key: value for key, value in asdict(recipe).items() if key not in ("seed", "device")},
        "calibration": {"samples": case.samples, "seed": case.seed},
        "seeds": options.seeds,
    }


def write_dense(bench: Bench) -> None:
    """The row of the dense model, against which all others are held."""
    nothing: dict[str, list[Any]] = {key: [] for key in TRAINED}
    judged = {"raw": [bench.judge(bench.case.dense)], "recalibrated": [], "tuned": []}
    about = described(bench, [Start(bench.case.dense, {}, 0.0)])
    bench.write({"competitor": "dense", "budget": "100%", **about, **nothing, **means(judged)})


def compare(bench: Bench, budgets: Sequence[str], competitors: Sequence[str]) -> int:
    """Every competitor at every budget; the number of those that failed.

    Raises:
        GMError: a budget that cannot be read, or a package is missing; said before anything is measured.
    """
    for budget in budgets:
        bench.case.limit(budget)
    if "pruning" in competitors:
        torch_pruning()
    if not bench.take_over("dense", "100%"):
        write_dense(bench)
    failed = 0
    for budget in budgets:
        for competitor in competitors:
            if bench.take_over(competitor, budget):
                continue
            try:
                measure(bench, competitor, budget)
            except GMError as problem:
                failed += 1
                bench.console.print(f"{budget}, {competitor} FAILED: {problem}", markup=False)
    return failed
