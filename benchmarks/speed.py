"""How fast the structured products are beside dense layers and other libraries, and whole models frozen "auto".

python benchmarks/speed.py --output speed.jsonl
python benchmarks/speed.py --device cuda --output speed.jsonl
python benchmarks/speed.py --parts models --models resnet50 vit_base_patch16_224 convnext_tiny mixer_b16_224
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rows import append_row, machine, prepare_device, read_rows, shown_command
from speed_cases import CONV, LINEAR, Makers, conv_competitors, linear_competitors
from speed_device import bandwidth, device_row
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gmcompress as gm
from gmcompress.metrics import latencies
from gmcompress.tables import make_table

MODELS = ("resnet50", "vit_base_patch16_224", "convnext_tiny", "mixer_b16_224")
NOISE = 1.03  # of the dense time that a frozen model may take at most
TURN = 1e-2  # seconds in which a quick call is repeated: of much shorter turns the first call is what counts
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=["linear", "conv", "device", "models"], help="linear conv, on a GPU device too")
    add("--models", nargs="+", default=list(MODELS), help="names of timm, with random weights")
    add("--budget", default="25%", help="of the parameters of the models, planned without data")
    add("--group", help="a literal structure for the models in place of a budget, such as C2^2")
    add("--batches", type=int, nargs="+", default=[1, 32], help="of the models")
    add("--device-batches", type=int, nargs="+", default=[1, 8192], help="of the part device")
    add("--repeats", type=int, default=50, help="rounds in which all competitors take turns")
    add("--seconds", type=float, default=30.0, help="after which no further round of one case begins")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=list(DTYPES), default="float32")
    add("--threads", type=int, default=2)
    add("--output", type=Path, default=Path("speed.jsonl"), help="rows are appended to this file")
    add("--resume", action="store_true", help="models that --output has are not measured again")
    options = parser.parse_args(arguments)
    options.parts = options.parts or ["linear", "conv", *(["device"] if options.device == "cuda" else [])]
    return options


def timed(
    calls: Mapping[str, Callable[[], object]], options: argparse.Namespace, *, turn: float = TURN
) -> dict[str, dict[str, float]]:
    """Median and distance between quartiles of every call in milliseconds, the calls taking turns."""
    found = latencies(list(calls.values()), repeats=options.repeats, seconds=options.seconds, turn=turn)
    return {name: {"ms": ms, "spread_ms": spread} for name, (ms, spread) in zip(calls, found, strict=True)}


def costs(module: nn.Module, x: Tensor) -> dict[str, int]:
    """Multiply-adds of one call as torch counts them, and the bytes of what it reads besides its input."""
    with FlopCounterMode(display=False) as counter:
        module(x)
    held = [*module.parameters(), *(each for name, each in module.named_buffers() if not name.endswith("labels"))]
    return {
        "multiply_adds": counter.get_total_flops() // 2,
        "parameters": sum(each.numel() for each in module.parameters()),
        "bytes": sum(each.numel() * each.element_size() for each in held),
    }


def compare(about: Mapping[str, Any], makers: Makers, x: Tensor, goal: float, bench: Bench) -> None:
    """One row: the times of all competitors on one input, and how much faster than dense ours is.

    Besides those of calls repeated in turns there are those of single calls, each after one of every competitor: the
    weights of the dense one have then gone through the caches, which hold little of what a quick one needs.
    """
    modules = {}
    for name, make in makers.items():
        try:
            modules[name] = make().to(x.device, x.dtype).eval()
        except gm.GMError as problem:
            bench.console.print(f"{name} left out: {problem}", markup=False)
    with torch.inference_mode():
        known = {name: costs(each, x) for name, each in modules.items()}
        calls = {name: lambda each=each: each(x) for name, each in modules.items()}  # type: ignore[misc]
        times, single = timed(calls, bench.options), timed(calls, bench.options, turn=0.0)
    ratio, ratio_single = (each["dense"]["ms"] / each["ours"]["ms"] for each in (times, single))
    competitors = {name: times[name] | {"single_ms": single[name]["ms"]} | known[name] for name in modules}
    row = {**about, "batch": x.shape[0], "speedup": ratio, "speedup_single": ratio_single}
    row |= {"goal": goal, "reached": ratio >= goal}
    bench.write({"benchmark": "speed", **row, "competitors": competitors})


class Bench:
    """Where rows go, and what each of them states."""

    def __init__(self, options: argparse.Namespace, arguments: Sequence[str]) -> None:
        self.options = options
        self.device = prepare_device(options.device, threads=options.threads)
        self.dtype = DTYPES[options.dtype]
        self.console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
        amp = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[options.dtype]
        self.facts = {
            "command": shown_command("speed.py", {"output": options.output}, arguments),
            **machine(self.device, amp=amp, threads=options.threads),
        }
        self.rows: list[dict[str, Any]] = []

    def write(self, row: Mapping[str, Any]) -> None:
        """Keep a row, append it to the file of results, and show it."""
        whole = {**row, **{key: each for key, each in self.facts.items() if key not in row}}
        self.rows.append(whole)
        append_row(self.options.output, whole)
        what = f"{whole['part']} {whole['what']}, batch {whole['batch']}"
        self.console.print(f"{what}: {whole['speedup']:.2f} times as fast as dense (asked {whole['goal']:g})")


def layers(bench: Bench, parts: Sequence[str]) -> None:
    """The rows of single layers."""
    place: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
    if "linear" in parts:
        for case in LINEAR:
            for batch, goal in case.goals.items():
                about = {"part": "linear", "what": f"{case.structure} {case.width}→{case.width}"}
                compare(about, linear_competitors(case), torch.randn(batch, case.width, **place), goal, bench)
    if "conv" in parts:
        for each in CONV:
            x = torch.randn(each.batch, each.width, each.size, each.size, **place)
            about = {"part": "conv", "what": f"{each.structure} {each.width}→{each.width} 3×3 at {each.size}²"}
            compare(about, conv_competitors(each), x, each.goal, bench)
    if "device" in parts:
        speed = bandwidth(bench.device)
        for batch in bench.options.device_batches:
            bench.write(device_row(batch, bench.device, lambda calls: timed(calls, bench.options), speed))


def whole_model(bench: Bench, name: str) -> None:
    """The rows of one model: dense against compressed and frozen "auto", for every batch."""
    import timm

    options = bench.options
    torch.manual_seed(0)
    dense = timm.create_model(name).to(bench.device, bench.dtype).eval()
    size = timm.data.resolve_model_data_config(dense)["input_size"]
    begun = time.perf_counter()
    how = {"group": options.group, "rank": 0} if options.group else {"budget": options.budget}
    result = gm.compress(dense, **how)
    seconds = time.perf_counter() - begun
    for batch in options.batches:
        x = torch.randn(batch, *size, device=bench.device, dtype=bench.dtype)
        model = gm.freeze(result.model, "auto", inputs=x)
        chosen = [each.path for each in gm.verdicts(model).values()]
        with torch.inference_mode():
            times = timed({"dense": lambda: dense(x), "ours": lambda: model(x)}, options)  # noqa: B023
        ratio = times["dense"]["ms"] / times["ours"]["ms"]
        bench.write(
            {
                "benchmark": "speed",
                "part": "model",
                "what": name,
                "batch": batch,
                "how": how,
                "compress_seconds": round(seconds, 1),
                "kept": result.report.after.parameters / result.report.before.parameters,
                "structured": chosen.count("structured"),
                "layers": len(chosen),
                "speedup": ratio,
                "goal": 1 / NOISE,
                "reached": ratio >= 1 / NOISE,
                "competitors": times,
            }
        )


def print_tables(bench: Bench) -> None:
    """One table for the layers, with every competitor, and one for the models."""
    single = [row for row in bench.rows if row["part"] in ("linear", "conv")]
    if single:
        names = list(dict.fromkeys(name for row in single for name in row["competitors"]))
        columns = ["layer", "batch#", *(f"{name}#" for name in names), "× dense#", "asked#", "numbers#"]
        shown = [
            (
                row["what"],
                row["batch"],
                *(f"{row['competitors'][n]['ms']:.3f}" if n in row["competitors"] else "-" for n in names),
                f"{row['speedup']:.1f}",
                f"{row['goal']:g}",
                f"{row['competitors']['ours']['parameters']:,}",
            )
            for row in single
        ]
        bench.console.print(make_table("Milliseconds of one call, median of interleaved runs", columns, shown))
    for row in (each for each in bench.rows if each["part"] == "device"):
        columns = [f"{row['what']}, batch {row['batch']}", "ms#", "spread#"]
        shown = [(name, f"{each['ms']:.4f}", f"{each['spread_ms']:.4f}") for name, each in row["competitors"].items()]
        bench.console.print(make_table("A layer on the device, median of interleaved runs", columns, shown))
        measured = {key: round(row[key], 3) for key in ("launches_graph", "share_of_floor", "gigabytes_per_second")}
        bench.console.print(f"{measured}, asked {row['asked']}; kernel: {row['kernel']}", markup=False)
    models = [row for row in bench.rows if row["part"] == "model"]
    if models:
        columns = ["model", "batch#", "kept#", "dense, ms#", "ours, ms#", "× dense#", "fast layers#"]
        shown = [
            (
                row["what"],
                row["batch"],
                f"{100 * row['kept']:.1f} %",
                *(
                    f"{row['competitors'][n]['ms']:.1f} ± {row['competitors'][n]['spread_ms']:.1f}"
                    for n in ("dense", "ours")
                ),
                f"{row['speedup']:.2f}",
                f"{row['structured']} of {row['layers']}",
            )
            for row in models
        ]
        bench.console.print(make_table("Whole models, frozen by measurement", columns, shown))


def main(arguments: Sequence[str]) -> int:
    """Measure; exit status 1 where something asked for is not reached."""
    options = parse(arguments)
    try:
        bench = Bench(options, arguments)
        layers(bench, options.parts)
        done = {(row.get("what"), row.get("batch")) for row in read_rows(options.output)} if options.resume else set()
        for name in options.models if "models" in options.parts else []:
            if not all((name, batch) in done for batch in options.batches):
                whole_model(bench, name)
    except gm.GMError as problem:
        print(f"speed.py: {problem}", file=sys.stderr)
        return 2
    print_tables(bench)
    return 0 if all(row["reached"] for row in bench.rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
