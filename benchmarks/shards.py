"""How long, and in how much memory, a checkpoint is compressed straight from its shards, in a fresh process.

The checkpoint is synthetic: the shapes of a Llama of about so many parameters, random bfloat16, written shard by shard.

python benchmarks/shards.py --parameters 6738415616 --folder FOLDER --output shards.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress_time import UNITS
from rows import append_row, machine, shown_command

VOCABULARY = 32000
LIMIT = 6.0  # gigabytes that must not be passed
SHARD = 10**9  # bytes of a shard of the synthetic checkpoint


def sizes_of(parameters: int) -> tuple[int, int, int]:
    """Hidden width, intermediate width and layers of a Llama with about so many parameters.

    >>> sizes_of(6_738_415_616)
    (4096, 11008, 32)
    """
    hidden = 256 * max(1, round((parameters * 128 / 12.06) ** (1 / 3) / 256))
    inner = 256 * round(2.6875 * hidden / 256)
    layer = 4 * hidden**2 + 3 * hidden * inner + 2 * hidden
    return hidden, inner, max(1, round((parameters - 2 * VOCABULARY * hidden) / layer))


def tensors_of(parameters: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in the order of the model."""
    hidden, inner, layers = sizes_of(parameters)
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for at in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"model.layers.{at}.self_attn.{name}.weight", (hidden, hidden)
        yield f"model.layers.{at}.mlp.gate_proj.weight", (inner, hidden)
        yield f"model.layers.{at}.mlp.up_proj.weight", (inner, hidden)
        yield f"model.layers.{at}.mlp.down_proj.weight", (hidden, inner)
        yield f"model.layers.{at}.input_layernorm.weight", (hidden,)
        yield f"model.layers.{at}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCABULARY, hidden)


def write_checkpoint(folder: Path, parameters: int) -> None:
    """Write the checkpoint with its index; one shard is in memory at a time."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(held, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(held, name))
        held.clear()

    for name, shape in tensors_of(parameters):
        if sum(each.nbytes for each in held.values()) > SHARD:
            flush()
        held[name] = torch.randn(shape, generator=generator, dtype=torch.bfloat16).mul_(0.02)
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def compressed(source: Path, target: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of the command line in a process of its own, and what it says it did."""
    flags = ["--group", options.group, "--rank", str(options.rank), "--json"]
    command = [sys.executable, "-m", "gmcompress", "compress", "--from-safetensors", str(source), "--to", str(target)]
    threads = str(options.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    start = time.perf_counter()
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)  # of this child alone, in which the writer of the source is not
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"gmcompress failed with exit status {process.returncode}")
    found = json.loads(printed)
    errors = list(found["relative_errors"].values())
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gigabytes": round(usage.ru_maxrss * UNITS / 1e9, 3),
        "limit_gigabytes": LIMIT,
        "layers": len(found["layers"]),
        "parameters": found["parameters"],
        "gigabytes": [round(each / 1e9, 3) for each in found["bytes"]],
        "relative_error": [round(min(errors), 4), round(max(errors), 4)],
    }


def row_of(options: argparse.Namespace, arguments: Sequence[str]) -> Mapping[str, Any]:
    """Write the checkpoint, compress it, and remove both."""
    import torch

    source, target = options.folder / "dense", options.folder / "small"
    write = [sys.executable, str(Path(__file__).resolve()), "--parameters", str(options.parameters)]
    try:
        subprocess.run([*write, "--folder", str(source), "--write"], check=True)
        found = compressed(source, target, options)
    finally:
        for each in (source, target):
            shutil.rmtree(each, ignore_errors=True)
    facts = {"group": options.group, "rank": options.rank, "sizes": sizes_of(options.parameters), "seed": 0}
    about = machine(torch.device("cpu"), amp="bfloat16", threads=options.threads)
    paths = {"folder": options.folder, "output": options.output}
    return {"benchmark": "shards", **facts, **found, **about, "command": shown_command("shards.py", paths, arguments)}


def main(arguments: Sequence[str]) -> int:
    """Measure; exit status 1 where the limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=lambda text: int(float(text)), default=6_738_415_616)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoints stand while it runs")
    parser.add_argument("--group", default="C32xC32")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="the row is appended to this file")
    parser.add_argument("--write", action="store_true", help="only write the checkpoint, to FOLDER itself")
    options = parser.parse_args(arguments)
    if options.write:
        write_checkpoint(options.folder, options.parameters)
        return 0
    row = row_of(options, arguments)
    if options.output is not None:
        append_row(options.output, row)
    print(json.dumps(row, ensure_ascii=False))
    return 0 if row["peak_gigabytes"] <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
