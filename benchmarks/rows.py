"""Rows of results: the facts that every row states, the file that they are appended to, and means over seeds."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gmcompress import GMError

OF_THE_RUN = ("command", "device", "threads", "torch")  # facts in which a row to be taken over may differ


def shown_command(script: str, paths: Mapping[str, Path | None], arguments: Sequence[str]) -> str:
    """The command line with names in place of paths.

    >>> shown_command("accuracy.py", {"data": Path("/x"), "cache": None}, ["--data", "/x", "--epochs=1"])
    'python benchmarks/accuracy.py --data DATA --epochs=1'
    """
    words = list(arguments)
    for name, path in paths.items():
        if path is not None:
            words = [_named(word, path, name.upper()) for word in words]
    return shlex.join(["python", f"benchmarks/{script}", *words])


def _named(word: str, path: Path, name: str) -> str:
    flag, equals, value = word.rpartition("=")  # "--data=PATH", or "PATH" alone
    return flag + equals + name if value and Path(value) == path else word


def prepare_device(name: str, *, threads: int) -> torch.device:
    """The device, with torch set up alike for everything that is measured on it.

    Raises:
        GMError: CUDA is asked for, and there is none.
    """
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise GMError("torch sees no CUDA device here")
    return device


def machine(device: torch.device, *, amp: str, threads: int) -> dict[str, Any]:
    """What a row says of the machine."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{device} ({kind})",
        "dtype": "float32" if amp == "no" else amp,
        "threads": threads,
        "torch": torch.__version__,
    }


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """One more line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_table(path: Path, name: str, columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    """Write a table into a Markdown file between `<!-- name -->` and `<!-- end of name -->`, in place of the one there.

    Raises:
        GMError: the file has not these two marks.
    """
    text = path.read_text(encoding="utf-8")
    before, mark, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    if not mark or not end:
        raise GMError(f"{path} has no <!-- {name} --> with an <!-- end of {name} --> after it")
    written = [f"| {' | '.join(map(str, each))} |\n" for each in (columns, *lines)]
    written.insert(1, f"|{'---|' * len(columns)}\n")
    path.write_text("".join([before, mark, *written, end, after]), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results; none where there is no such file."""
    return [json.loads(each) for each in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def measured_before(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The latest row of a file with all these facts, those of the run itself left aside; None where there is none."""
    same = json.loads(json.dumps({key: value for key, value in wanted.items() if key not in OF_THE_RUN}))
    rows = (row for row in reversed(read_rows(path)) if all(row.get(key) == value for key, value in same.items()))
    return next(rows, None)


def summary(found: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds, and every value; None where nothing, or one, was measured.

    >>> summary({"raw": [90.0, 91.0], "tuned": []})["spread"]
    {'raw': 0.7071067811865476, 'tuned': None}
    """
    means = {key: statistics.fmean(each) if each else None for key, each in found.items()}
    spread = {key: statistics.stdev(each) if len(each) > 1 else None for key, each in found.items()}
    return {**means, "spread": spread, "each": {key: list(values) for key, values in found.items()}}


def cell(row: Mapping[str, Any], step: str) -> str:
    """A value with its spread, as printed.

    >>> cell({"raw": 90.5, "spread": {"raw": 0.7071}}, "raw")
    '90.50 ± 0.71'
    """
    value, spread = row[step], row["spread"].get(step)
    if value is None:
        return "-"
    return f"{value:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")
