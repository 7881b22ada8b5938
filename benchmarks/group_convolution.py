"""How long a GroupConv takes, and its peak memory, against the same product by gathering what every output reads.

python benchmarks/group_convolution.py                      # C32xC32, 120 -> 120 channels, radius 3, batch 8
python benchmarks/group_convolution.py --group D512 --channels 32 --radius 2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gmcompress as gm

STATUS = Path("/proc/self/status")  # of Linux; ru_maxrss would start at the peak of the parent process


def gather(layer: gm.GroupConv, signal: Tensor) -> Tensor:
    """The control: (batch, in, positions, taps), then one product."""
    reads = torch.from_numpy(layer.stencil.reads.T.copy())
    return torch.einsum("bcht,oct->boh", signal[:, :, reads], layer.kernel) + layer.bias[:, None]


def cases(args: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """What is compared, by name: every way that the layer could take, and the control."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    layer = gm.GroupConv(args.group, args.channels, args.channels, radius=args.radius)
    signal = torch.randn(args.batch, args.channels, layer.group.order).requires_grad_(args.backward)
    stencil, chosen = layer.stencil, layer.methods["main"]

    def by(method: str) -> Tensor:
        layer.methods, layer._buffers["_main"] = {"main": method}, torch.tensor(stencil.table(method))
        return layer(signal)

    ways = {
        f"{each} (chosen)" if each == chosen else each: each for each in stencil.costs(args.channels, args.channels)
    }
    found: dict[str, Callable[[], Tensor]] = {name: lambda each=each: by(each) for name, each in ways.items()}
    found["gather"] = lambda: gather(layer, signal)
    return found


def once(case: Callable[[], Tensor], backward: bool) -> float:
    """Seconds of one pass."""
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        found = case()
        if backward:
            found.square().mean().backward()
    return time.perf_counter() - start


def memory(field: str) -> float:
    """The memory of this process now (VmRSS) or at its peak (VmHWM), in 10⁶ bytes."""
    line = next(each for each in STATUS.read_text().splitlines() if each.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def peak_megabytes(name: str) -> float:
    """Peak memory of a pass above what the process had before, in a process of its own."""
    command = [sys.executable, __file__, "--only", name, *sys.argv[1:]]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def alone(args: argparse.Namespace) -> None:
    """What `peak_megabytes` runs."""
    case = cases(args)[args.only]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    once(case, args.backward)
    print(memory("VmHWM") - before)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", default="C32xC32")
    parser.add_argument("--channels", type=int, default=120)
    parser.add_argument("--radius", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--backward", action="store_true", help="forward and backward, in place of forward alone")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.only:
        return alone(args)
    compared = cases(args)
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    for repeat in range(args.repeats + 1):
        for name, case in compared.items():  # side by side
            taken = once(case, args.backward)
            seconds[name] += [taken] if repeat else []
    median = {name: sorted(each)[len(each) // 2] for name, each in seconds.items()}
    peaks = {name: peak_megabytes(name) for name in compared}
    for name, each in seconds.items():
        row: dict[str, Any] = {"way": name, "milliseconds": round(1e3 * median[name], 2)}
        row |= {"spread": [round(1e3 * min(each), 2), round(1e3 * max(each), 2)], "megabytes": round(peaks[name], 1)}
        row |= {"faster": round(median["gather"] / median[name], 2)}
        row |= {"lighter": round(peaks["gather"] / max(peaks[name], 1e-9), 2)}
        settings = {key: value for key, value in vars(args).items() if key != "only"}
        print(json.dumps(row | settings | {"device": "cpu", "dtype": "float32", "seed": 0}))
    return None


if __name__ == "__main__":
    main()
