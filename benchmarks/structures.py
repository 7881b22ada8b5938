"""What one structure on every layer costs: a CIFAR ResNet projected, recalibrated and tuned, beside its controls.

python benchmarks/structures.py --data DATA --weights WEIGHTS --structures C2 C4+lowrank:auto --budget 0.5 --epochs 1
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from cifar import ARCHITECTURES, Images, TrainLoader, accuracy, load_images, load_resnet, plain_batches
from controls import shuffled_model, svd_model
from rich.console import Console
from rows import append_row, cell, machine, prepare_device, shown_command, summary
from torch import Tensor, nn

import gmcompress as gm
from gmcompress import GMError
from gmcompress.tables import make_table, percent
from gmcompress.tuning import Recipe, fine_tune

PATHS = ("data", "weights", "output", "cache")
CALIBRATION = {"count": 40, "size": 250}  # batches of training images, as they are
STEPS = ("raw", "recalibrated", "tuned")


@dataclass(frozen=True)
class Variant:
    """One way to make the model smaller: a structure, or a control of its size.

    `build` takes a seed; where `random` is False it gives the same model for every seed. A variant that is not `tuned`
    is measured without training. `names` are the layers that it replaces, `seconds` what compressing them took.
    """

    structure: str
    name: str
    names: tuple[str, ...]
    build: Callable[[int], nn.Module]
    random: bool = False
    tuned: bool = True
    seconds: float | None = None


@dataclass(frozen=True)
class Bench:
    """Everything that all variants share: the dense model, the images, the recipe, the seeds and the facts printed."""

    dense: nn.Module
    train: Images
    test: Images
    loader: TrainLoader
    recipe: Recipe
    rates: Sequence[float]
    seeds: Sequence[int]
    facts: Mapping[str, Any]
    console: Console
    output: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def write(self, row: Mapping[str, Any]) -> None:
        """Keep a row for the table at the end and append it to the file of results."""
        whole = {"benchmark": "structures", **row, **self.facts}
        self.rows.append(whole)
        append_row(self.output, whole)


def with_largest_rank(
    structure: gm.Structure, residual: str, shape: tuple[int, ...], budget: float, *, split: bool = False
) -> gm.Structure:
    """The structure with the largest rank with which a weight of this shape stores at most `budget` of its numbers.

    Raises:
        GMError: the group matrix alone stores more.

    >>> with_largest_rank(gm.Structure.parse("C4"), "lowrank", (64, 64, 3, 3), 0.5)
    Structure.parse('C4+lowrank:14')
    >>> with_largest_rank(gm.Structure.parse("C4"), "lowrank", (64, 64, 3, 3), 0.5, split=True)
    Structure.parse('C4+lowrank:24:split')
    """
    bare = structure.with_rank(0, residual=residual).parameters(shape)
    one = structure.with_rank(1, residual=residual, split=split).parameters(shape)
    room = int(budget * prod(shape)) - bare
    if room < 0:
        raise GMError(f"{structure} alone stores {bare:,} of {prod(shape):,} numbers, more than a share of {budget}")
    limit = min(shape[0], prod(shape[1:])) if residual == "lowrank" else structure.rows.size - 1
    rank = min(room // (one - bare), limit)
    return structure.with_rank(rank, residual=residual, split=split and rank > 0)


def compress(model: nn.Module, text: str, budget: float) -> gm.Result:
    """The model with one structure on every layer but stem and classifier; "auto" is the rank that fits the budget.

    Raises:
        GMError: the structure is malformed or fits no layer, or stores more than the budget.
    """
    split = text.endswith(":auto:split")
    automatic = split or text.endswith(":auto")
    stem = text.removesuffix(":split").removesuffix(":auto")
    head, plus, residual = stem.rpartition("+") if automatic else (text, "+", "")
    if not plus:
        raise GMError(f'{text!r} names no residual; "C4+lowrank:auto" and "C4+displacement:auto" do')
    asked = gm.Structure.parse(head)
    names = gm.plan(model, asked.group, rank=0).layers
    plan = gm.plan(model, asked.group, rank=0, overrides=dict.fromkeys(names, head))
    if not automatic:
        return gm.compress(model, asked.group, rank=0, overrides=dict.fromkeys(plan.layers, text))
    overrides = {}
    for name, written in plan.layers.items():
        structure = gm.Structure.parse(written)
        shape = plan.site(name).shape
        overrides[name] = str(with_largest_rank(structure, residual, shape, budget, split=split and len(shape) == 4))
    return gm.compress(model, asked.group, rank=0, overrides=overrides)


def variants(model: nn.Module, text: str, budget: float) -> list[Variant]:
    """A structure and its controls: plain SVD in both views, of which the nearer is tuned, and shuffled labels."""
    start = time.perf_counter()
    result = compress(model, text, budget)
    seconds = time.perf_counter() - start
    names = tuple(result.plan.layers)
    stored = {name: result.plan.stored(name) for name in names}
    views = {"SVD out·ky × in·kx": True, "SVD out × in·taps": False}
    factored = {name: svd_model(model, stored, split=split) for name, split in views.items()}
    errors = {name: relative_error(model, each, names) for name, each in factored.items() if each is not None}
    found = [Variant(text, "structure", names, lambda _: result.model, seconds=seconds)]
    for view in errors:
        nearer = errors[view] == min(errors.values())
        found.append(Variant(text, view, names, lambda _, view=view: factored[view], tuned=nearer))
    shuffled = Variant(text, "shuffled labels", names, lambda seed: shuffled_model(model, result.plan, seed=seed), True)
    return [*found, shuffled]


def weights(model: nn.Module, names: Sequence[str]) -> Tensor:
    """The weights of some layers as one vector, in float64."""
    layers = dict(model.named_modules())
    return torch.cat([layers[name].weight.detach().double().flatten() for name in names])


def relative_error(dense: nn.Module, model: nn.Module, names: Sequence[str]) -> float:
    """‖Ŵ − W‖/‖W‖ over all replaced layers together, Frobenius."""
    old = weights(dense, names)
    return float((weights(model, names) - old).norm() / old.norm())


def describe(bench: Bench, variant: Variant, model: nn.Module) -> dict[str, Any]:
    """What a variant stores and how near its weights are; `kept` is of the model, `kept_layers` of what it replaces."""
    names = variant.names
    numbers = [sum(each.numel() for each in net.parameters()) for net in (bench.dense, model)]
    old = weights(bench.dense, names)
    return {
        "structure": variant.structure,
        "variant": variant.name,
        "layers": len(names),
        "parameters": numbers[1],
        "kept": numbers[1] / numbers[0],
        "kept_layers": 1 - (numbers[0] - numbers[1]) / old.numel(),
        "energy": float(weights(model, names).square().sum() / old.square().sum()),
        "relative_error": relative_error(bench.dense, model, names),
        "compress_seconds": None if variant.seconds is None else round(variant.seconds, 2),
    }


def recalibrated(bench: Bench, model: nn.Module, seed: int) -> nn.Module:
    """A copy with BatchNorm statistics of the training images as they are, and nothing trained."""
    same = {"amp": bench.recipe.amp, "device": bench.recipe.device}
    recipe = Recipe(epochs=0, recalibrate=True, recalibration_batches=CALIBRATION["count"], **same)
    batches = plain_batches(bench.train, CALIBRATION["count"], CALIBRATION["size"], seed=seed)
    return fine_tune(model, batches, recipe, teacher=bench.dense)[0]


def tuned(bench: Bench, model: nn.Module, seed: int, rate: float) -> nn.Module:
    """A copy after distillation from the dense model; in training BatchNorm forgets its statistics by itself."""
    recipe = Recipe(**(asdict(bench.recipe) | {"lr": rate, "seed": seed, "recalibrate": False}))
    with bench.console.status("tuning") as status:

        def show(epoch: int, step: int, steps: int, loss: float) -> None:
            status.update(f"seed {seed}, epoch {epoch + 1}/{recipe.epochs}, step {step}/{steps}, loss {loss:.3f}")

        return fine_tune(model, bench.loader, recipe, teacher=bench.dense, progress=show)[0]


def measure(bench: Bench, variant: Variant) -> None:
    """All rows of one variant, one for each learning rate, written as soon as they are known."""
    raw: list[float] = []
    starts: list[nn.Module] = []
    still: list[float] = []
    facts: list[dict[str, Any]] = []
    for seed in bench.seeds:
        model = variant.build(seed)
        if variant.random or not facts:
            facts.append(describe(bench, variant, model))
            raw.append(accuracy(model, bench.test))
        starts.append(recalibrated(bench, model, seed))
        still.append(accuracy(starts[-1], bench.test))
    shared = facts[0] | {key: statistics.fmean(each[key] for each in facts) for key in ("energy", "relative_error")}
    training = variant.tuned and bench.recipe.epochs > 0
    for rate in bench.rates if training else (None,):
        start = time.perf_counter()
        after = []
        if rate is not None:
            pairs = zip(starts, bench.seeds, strict=True)
            after = [accuracy(tuned(bench, each, seed, rate), bench.test) for each, seed in pairs]
        row = shared | {"lr": rate, **summary({"raw": raw, "recalibrated": still, "tuned": after})}
        row["tune_seconds"] = round(time.perf_counter() - start, 1) if after else None
        bench.write(row)
        bench.console.print(line(row))


def line(row: Mapping[str, Any]) -> str:
    """One row in one line, for whoever waits."""
    steps = ", ".join(f"{step} {cell(row, step)}" for step in STEPS)
    return f"{row['structure']}, {row['variant']}: kept {row['kept']:.3f}, energy {row['energy']:.3f}, {steps}"


def print_table(bench: Bench) -> None:
    """The readable table at the end; the last column is the last step that was measured against dense."""
    dense = bench.rows[0]["raw"]
    columns = ["structure", "variant", "lr#", "layers#", "kept#", "energy#", "raw#", "BN#", "tuned#", "last − dense#"]
    rows = []
    for row in bench.rows:
        last = [row[step] for step in STEPS if row[step] is not None][-1]
        rows.append(
            (
                row["structure"],
                row["variant"],
                "-" if row["lr"] is None else row["lr"],
                row["layers"],
                percent(row["kept"], 1),
                f"{row['energy']:.3f}",
                *(cell(row, step) for step in STEPS),
                f"{last - dense:+.2f}",
            )
        )
    title = (
        f"{bench.facts['arch']} on the {len(bench.test.labels):,} test images of CIFAR-10, top-1 accuracy in percent"
    )
    bench.console.print(make_table(title, columns, rows))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train.tar and validation.tar")
    add("--weights", type=Path, required=True, help="safetensors file of the dense model")
    add("--arch", choices=ARCHITECTURES, default="resnet20")
    add("--structures", nargs="*", default=[], help='such as "C2", "C4+displacement:1" or "C4+lowrank:auto"')
    add("--budget", type=float, default=0.5, help='share of each layer\'s numbers, for ":auto"')
    add("--epochs", type=int, default=0, help="of distillation, after recalibration")
    add("--images-per-epoch", type=int, help="random images in one epoch (default: all)")
    add("--lr", type=float, nargs="+", default=[0.01], help="each is tried on every variant")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--amp", choices=["no", "bf16", "fp16"], default="no")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--cache", type=Path, help="decoded images are kept beside this path")
    add("--output", type=Path, default=Path("structures.jsonl"), help="rows are appended to this file")
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace, arguments: Sequence[str]) -> Bench:
    """Model, images and recipe on the device, and the facts that every row states."""
    device = prepare_device(options.device, threads=options.threads)
    recipe = Recipe(epochs=options.epochs, optimizer="nesterov", amp=options.amp, device=options.device)
    train, test = (load_images(options.data, each, cache=options.cache) for each in ("train", "validation"))
    varying = {"lr", "seed", "device", "recalibrate", "recalibration_batches"}
    facts = {
        "arch": options.arch,
        "budget": options.budget,
        "images_per_epoch": options.images_per_epoch or len(train.labels),
        "recipe": {key: value for key, value in asdict(recipe).items() if key not in varying},
        "calibration": CALIBRATION,
        "seeds": options.seeds,
        "command": shown_command("structures.py", {name: getattr(options, name) for name in PATHS}, arguments),
        **machine(device, amp=options.amp, threads=options.threads),
    }
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    dense = load_resnet(options.arch, options.weights).to(device)
    loader = TrainLoader(train.to(device), images_per_epoch=options.images_per_epoch)
    shared = (recipe, options.lr, options.seeds, facts, console, options.output)
    return Bench(dense, loader.images, test.to(device), loader, *shared)


def main(arguments: Sequence[str]) -> int:
    """Measure the dense model, then every structure beside its controls."""
    options = parse(arguments)
    try:
        bench = prepare(options, arguments)
        planned = [each for text in options.structures for each in variants(bench.dense, text, options.budget)]
        nothing = {"layers": 0, "lr": None, "tune_seconds": None}
        dense = Variant("dense", "dense", ("linear",), lambda _: bench.dense)
        measured = summary({"raw": [accuracy(bench.dense, bench.test)], "recalibrated": [], "tuned": []})
        bench.write({**describe(bench, dense, bench.dense), **nothing, **measured})
        bench.console.print(line(bench.rows[0]))
        for variant in planned:
            measure(bench, variant)
    except GMError as problem:
        print(f"structures.py: {problem}", file=sys.stderr)
        return 2
    print_table(bench)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
