"""How long gm.compress takes, and its peak memory, on timm models of full size, each in a fresh process.

python benchmarks/compress_time.py --output compress_time.jsonl
python benchmarks/compress_time.py --sizes --plot cost.png --output compress_time.jsonl
python benchmarks/compress_time.py --models resnet50 --budget 25% --samples 256 --output compress_time.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rows import append_row

from gmcompress.tables import make_table

LIMITS: Mapping[str, tuple[float, float | None]] = {  # seconds and gigabytes that must not be passed
    "resnet50": (6.0, 3.0),
    "vit_base_patch16_224": (60.0, None),
    "vit_large_patch16_224": (40.0, None),
}
WITHIN_BUDGET = 60.0, 6.0  # the same, planned for a budget without data,
CALIBRATED = 360.0, 6.0  # and with 256 images
SIZES = [  # one architecture at five sizes, 6 to 304 million parameters
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_medium_patch16_gap_256",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
]
BATCH = 32  # images of a batch of data
UNITS = 1 if sys.platform == "darwin" else 1024  # bytes in one ru_maxrss


def peak_gigabytes() -> float:
    """Peak resident memory of this process until now, in 10⁹ bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNITS / 1e9


def fill_zero_norms(model: Any) -> None:
    """Scale by 1 where an initialisation lets a norm scale by 0, as no trained network has it.

    Behind such a norm no gradient arrives, and what calibration learns from gradients would be found by single runs.
    """
    import torch

    for module in model.modules():
        scale = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and isinstance(scale, torch.nn.Parameter) and not scale.any():
            torch.nn.init.ones_(scale)


def work(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compress one model with random weights in this process; `dense_gigabytes` is the peak before it began."""
    import timm
    import torch

    import gmcompress as gm

    torch.set_flush_denormal(True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = timm.create_model(name)
    fill_zero_norms(model)
    size = model.default_cfg["input_size"]
    inputs = torch.randn(1, *size) if options.inputs else None
    data = torch.randn(options.samples, *size).split(BATCH) if options.samples else None
    planned = {"budget": options.budget, "data": data, "effort": options.effort}
    how = {"rank": options.rank} if options.budget is None else planned
    before = peak_gigabytes()
    start = time.perf_counter()
    result = gm.compress(model, group=options.group, inputs=inputs, **how)
    seconds = time.perf_counter() - start
    return {
        "model": name,
        "group": options.group,
        "rank": options.rank if options.budget is None else None,
        "budget": options.budget,
        "effort": None if options.budget is None else options.effort,
        "samples": options.samples,
        "inputs": options.inputs,
        "seconds": round(seconds, 2),
        "peak_gigabytes": round(peak_gigabytes(), 3),
        "dense_gigabytes": round(before, 3),
        "layers": len(result.plan.layers),
        "parameters": [result.report.before.parameters, result.report.after.parameters],
        "device": f"cpu ({torch.backends.cpu.get_cpu_capability()})",
        "dtype": "float32",
        "seed": 0,
        "threads": options.threads,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def in_fresh_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one model, measured in a process that has done nothing else."""
    given = ["--group", options.group, "--rank", str(options.rank), "--threads", str(options.threads)]
    given += ["--inputs"] * options.inputs
    if options.budget is not None:
        given += ["--budget", options.budget, "--samples", str(options.samples)]
        given += ["--effort", str(options.effort)] * (options.effort != 1)
    command = [sys.executable, str(Path(__file__).resolve()), "--models", name, *given, "--here"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row = json.loads(done.stdout.splitlines()[-1])
    shown = " ".join(["python benchmarks/compress_time.py --models", name, *given])
    limits = LIMITS if options.budget is None else {"resnet50": CALIBRATED if options.samples else WITHIN_BUDGET}
    seconds, gigabytes = limits.get(name, (None, None))
    asked = {"limit_seconds": seconds, "limit_gigabytes": gigabytes}
    return {"benchmark": "compress_time", **row, **asked, "command": shown}


def within(row: Mapping[str, Any]) -> bool:
    """Whether a row keeps to its limits.

    >>> within({"seconds": 31, "limit_seconds": 30, "peak_gigabytes": 1, "limit_gigabytes": None})
    False
    """
    pairs = [("seconds", "limit_seconds"), ("peak_gigabytes", "limit_gigabytes")]
    return all(row[limit] is None or row[found] <= row[limit] for found, limit in pairs)


def exponent(parameters: Sequence[float], seconds: Sequence[float]) -> float:
    """The power of the parameters with which the seconds grow, by least squares of the logarithms.

    >>> round(exponent([1e6, 2e6, 4e6], [1.0, 2.0, 4.0]), 6)
    1.0
    """
    x, y = ([math.log(each) for each in values] for values in (parameters, seconds))
    slope, _ = statistics.linear_regression(x, y)
    return slope


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> float:
    """Seconds over parameters, beside a line of cost in proportion to them; returns the exponent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(rows, key=lambda row: row["parameters"][0])
    millions, seconds = [row["parameters"][0] / 1e6 for row in rows], [row["seconds"] for row in rows]
    found = exponent(millions, seconds)
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.loglog(millions, seconds, "o-", label=f"measured: exponent {found:.2f}")
    axes.loglog(millions, [seconds[-1] * each / millions[-1] for each in millions], "--", label="in proportion")
    axes.set(xlabel="parameters, millions", ylabel="seconds of gm.compress")
    axes.legend()
    figure.savefig(path, dpi=120)
    return found


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """The readable table at the end."""
    columns = ["model", "structure", "layers#", "seconds#", "limit#", "peak GB#", "limit#", "kept"]
    shown = [
        (
            row["model"],
            f"{row['group']}, {row['budget'] or 'rank ' + str(row['rank'])}",
            row["layers"],
            row["seconds"],
            row["limit_seconds"] or "-",
            row["peak_gigabytes"],
            row["limit_gigabytes"] or "-",
            "yes" if within(row) else "NO",
        )
        for row in rows
    ]
    title = f"gm.compress, {rows[0]['threads']} threads, peak of the whole process"
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(make_table(title, columns, shown))


def main(arguments: Sequence[str]) -> int:
    """Measure every model; exit status 1 where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(LIMITS))
    parser.add_argument("--sizes", action="store_true", help="one architecture at five sizes in place of --models")
    parser.add_argument("--plot", type=Path, help="draw the seconds over the parameters, and say how they grow")
    parser.add_argument("--inputs", action="store_true", help="compress with an example image: its rehearsal counts")
    parser.add_argument("--group", default="C32xC32")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--budget", help="a share of the parameters in place of one structure for all layers")
    parser.add_argument("--samples", type=int, default=0, help="random images that a budget is calibrated on")
    parser.add_argument("--effort", type=float, default=1.0, help="of planning and fits under a budget, of the usual")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="rows are appended to this file")
    parser.add_argument("--here", action="store_true", help="measure one model in this process and print its row")
    options = parser.parse_args(arguments)
    if options.samples and options.budget is None:
        parser.error("--samples calibrate a --budget")
    if options.here:
        print(json.dumps(work(options.models[0], options)))
        return 0
    rows = [in_fresh_process(name, options) for name in (SIZES if options.sizes else options.models)]
    if options.output is not None:
        for row in rows:
            append_row(options.output, row)
    print_table(rows)
    if options.plot is not None:
        print(f"seconds grow as the parameters to the power {draw(rows, options.plot):.2f}")
    return 0 if all(map(within, rows)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
