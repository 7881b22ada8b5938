"""Layers that nobody froze: the way that their shapes choose, beside the faster of both and the dense product.

python benchmarks/paths.py --output paths.jsonl             # some 320 layers and sizes of input, a few minutes
python benchmarks/paths.py --kinds convolution --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rows import append_row, machine, prepare_device, shown_command
from torch import Tensor

from gmcompress.costs import kind_of_cost
from gmcompress.layers import GMConv2d, GMLinear
from gmcompress.tables import make_table

KINDS = ("linear", "convolution")
WIDTHS, ROWS = (64, 256, 768, 2048), (1, 16, 197, 2048)
LARGEST = 768 * 2048  # numbers of an input
IMAGES = ((16, 32), (64, 8), (64, 56), (256, 14))  # channels and side
BATCHES = (1, 16)
GROUPS = ("C2", "C4", "C8", "C16", "C4xC4", "C2^4", "C8xC8", "D4", "C4+displacement:1", "C8xC8+displacement:1")
SECONDS = 0.1  # on one way of one layer, at least

Case = tuple[GMLinear | GMConv2d, Tensor]


def linear_cases() -> Iterator[Case]:
    """Linear layers of every width and structure, at every number of inputs."""
    for width in WIDTHS:
        factors = [f"lowrank:{width // 4}", f"lowrank:{width // 8}", f"adapted:{width // 8}:4x4"]
        factors += [f"adapted:{width // 16}:4x4", f"adapted:{width // 32}:8x8", "C4+lowrank:8"]
        for structure in (*factors, *GROUPS):
            layer = GMLinear(width, width, structure)
            for rows in ROWS:
                if width * rows <= LARGEST:
                    yield layer, torch.randn(rows, width)


def convolution_cases() -> Iterator[Case]:
    """3 × 3 convolutions of every width and structure, at every number of images."""
    for channels, side in IMAGES:
        factors = [f"lowrank:{channels // 4}", f"lowrank:{channels // 4}:split", f"lowrank:{channels // 2}:split"]
        factors += [f"adapted:{channels // 8}:2x2", f"adapted:{channels // 8}:4x4:split"]
        for structure in (*factors, "C2", "C4", "C8", "C16", "C4+displacement:1"):
            layer = GMConv2d(channels, channels, 3, structure, padding=1)
            for batch in BATCHES:
                yield layer, torch.randn(batch, channels, side, side)


@contextmanager
def on(layer: GMLinear | GMConv2d, path: str) -> Iterator[None]:
    """The layer on one of the two ways, whatever its shapes say."""
    layer.takes_fast_product = lambda _given: path == "structured"  # type: ignore[method-assign]
    try:
        yield
    finally:
        del vars(layer)["takes_fast_product"]


def once(layer: GMLinear | GMConv2d, given: Tensor, *, backward: bool) -> float:
    """Seconds of one pass."""
    layer.zero_grad()
    begun = time.perf_counter()
    with torch.set_grad_enabled(backward):
        found = layer(given)
        if backward:
            found.square().sum().backward()
    return time.perf_counter() - begun


def measured(layer: GMLinear | GMConv2d, given: Tensor, *, backward: bool) -> dict[str, float]:
    """The median seconds of both ways, which take turns."""
    found: dict[str, list[float]] = {"dense": [], "structured": []}
    begun = time.perf_counter()
    while len(found["dense"]) < 4 or time.perf_counter() - begun < 2 * SECONDS:
        for path, seconds in found.items():
            with on(layer, path):
                seconds.append(once(layer, given, backward=backward))
    return {path: statistics.median(seconds[1:]) for path, seconds in found.items()}


def mean_ratio(rows: Sequence[dict[str, Any]], over: Callable[[dict[str, Any]], float]) -> float:
    """The geometric mean of the chosen way's time over another."""
    return exp(statistics.fmean(log(row["chosen_ms"] / over(row)) for row in rows))


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Means over the layers of one kind."""
    lines = []
    for kind in sorted({(row["kind"], row["part"], row["pass"]) for row in rows}):
        own = [row for row in rows if (row["kind"], row["part"], row["pass"]) == kind]
        faster = mean_ratio(own, lambda row: min(row["dense_ms"], row["structured_ms"]))
        dense = mean_ratio(own, lambda row: row["dense_ms"])
        share = f"{sum(row['chosen'] == 'structured' for row in own)} of {len(own)}"
        lines.append((f"{kind[0]}, {kind[1]}", kind[2], f"{faster:.2f}", f"{dense:.2f}", share))
    columns = ["layers", "pass", "chosen / faster", "chosen / dense", "fast product#"]
    table = make_table("Unfrozen layers", columns, lines)
    Console(width=None if sys.stdout.isatty() else 100, highlight=False).print(table)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("paths.jsonl"))
    options = parser.parse_args(arguments)
    device = prepare_device("cpu", threads=options.threads)
    torch.manual_seed(0)
    facts = {
        "benchmark": "paths",
        "seed": 0,
        "command": shown_command("paths.py", {"output": options.output}, arguments),
        **machine(device, amp="no", threads=options.threads),
    }
    rows = []
    for kind, cases in (("linear", linear_cases), ("convolution", convolution_cases)):
        for layer, given in cases() if kind in options.kinds else ():
            chosen = "structured" if layer.takes_fast_product(given) else "dense"
            for way, backward in (("forward", False), ("forward and backward", True)):
                seconds = measured(layer, given, backward=backward)
                row = {"kind": kind, "structure": str(layer.structure), "part": kind_of_cost(layer.structure)}
                row |= {"shape": list(layer.weight_shape), "input": list(given.shape), "pass": way, "chosen": chosen}
                row |= {f"{path}_ms": round(1e3 * each, 4) for path, each in seconds.items()}
                row["chosen_ms"] = row[f"{chosen}_ms"]
                append_row(options.output, facts | row)
                rows.append(row)
    print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
