"""What gmcompress reaches: one model of every timm family, from compress to ONNX, each in its own process.

python benchmarks/coverage.py --output coverage.jsonl --resume
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress_time import peak_gigabytes
from coverage_stages import Subject, attempt
from rich.console import Console
from rows import append_row, machine, prepare_device, read_rows, shown_command

from gmcompress.tables import make_table

STAGES = ("build", "compress", "forward", "backward", "save", "load", "densify", "export", "onnx", "dense onnx")
LEADS_ON = ("build", "compress", "forward", "save", "load")  # later stages need what these leave behind
LOW = 0.9  # share reached below which a family is listed with its reason
NOTES = "notes"  # the file that a process writes
UNSUITED = "no model small enough"


def families() -> dict[str, list[str]]:
    """The models of every family, which is a module of timm.models."""
    import timm

    found = {each: sorted(timm.list_models(module=each)) for each in timm.list_modules()}
    return {each: names for each, names in found.items() if names}


def smallest(names: Sequence[str], limit: int) -> tuple[str, int] | None:
    """The model of fewest parameters, counted on the meta device; None where even that has more than `limit`.

    Where none can be built there, the first one stands for all of them, with a size of 0.
    """
    import timm
    import torch

    found: list[tuple[int, str]] = []
    for name in names:
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found.append((sum(each.numel() for each in timm.create_model(name).parameters()), name))
        except Exception:  # some read values of tensors while they are built; another model of the family stands for it
            continue
    parameters, name = min(found, default=(0, names[0]))
    return (name, parameters) if parameters <= limit else None


def work(name: str, group: str, folder: Path, *, largest_image: int, seconds: float, gigabytes: float) -> None:
    """Take one model with random weights through the stages, in this process, up to the first that fails.

    Writes down every stage when it begins, and after it all that is known by then: a process may die in the next one.
    """
    import timm
    import torch

    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
    if gigabytes:
        resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 1e9), int(gigabytes * 1e9)))
    stages, seconds_of = dict[str, str](), dict[str, float]()
    subject = Subject(name, group, folder, largest_image=largest_image)
    same = {"seed": 0, **machine(torch.device("cpu"), amp="no", threads=1), "timm": timm.__version__}
    with (folder / NOTES).open("w") as notes:
        for stage in STAGES:
            if stage == "dense onnx" and stages["onnx"] == "ok":
                continue
            print(f"stage {stage}", file=notes, flush=True)
            begun = time.process_time()
            stages[stage] = attempt(getattr(subject, stage.replace(" ", "_")))
            seconds_of[stage] = round(time.process_time() - begun, 1)
            spent = {"seconds": round(time.process_time(), 1), "seconds_of": seconds_of}
            known = {**subject.facts, "stages": stages, **spent, "peak_gigabytes": round(peak_gigabytes(), 3), **same}
            print(json.dumps(known), file=notes, flush=True)
            if stages[stage] != "ok" and stage in LEADS_ON:
                break


def warm_up() -> None:
    """Import here what every process would import, and write a first ONNX file, on which tables are built."""
    import onnxruntime  # noqa: F401
    import timm  # noqa: F401
    import torch

    import gmcompress  # noqa: F401

    prepare_device("cpu", threads=1)
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)


def in_fresh_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The findings on one model, from a forked process that may fail, die, or take too long."""
    limits = {
        "seconds": options.max_seconds,
        "gigabytes": options.max_gigabytes,
        "largest_image": options.largest_image,
    }
    with tempfile.TemporaryDirectory() as folder:
        wanted = (name, options.group, Path(folder))
        process = multiprocessing.get_context("fork").Process(target=work, args=wanted, kwargs=limits)
        before = ended_seconds()
        process.start()
        process.join()
        notes = Path(folder) / NOTES
        lines = notes.read_text().splitlines() if notes.is_file() else []
    # the signal may end it in more ways than one: where it reaches a thread of a library, that may abort; it is sent
    # by a clock that is a little coarser than this one
    used = ended_seconds() - before
    late = process.exitcode == -signal.SIGXCPU or used >= 0.9 * options.max_seconds
    spent = f"took more than {options.max_seconds:g} s of the processor"
    return told(lines, spent if late else f"the process ended with {process.exitcode} after {used:.2f} s")


def ended_seconds() -> float:
    """Seconds of the processor that all processes which this one started and which have ended took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def told(lines: Sequence[str], killed: str) -> dict[str, Any]:
    """What a process wrote down of a model; `killed` is what is said of the stage in which it ended, if in one.

    >>> told(["stage build", '{"seconds": 1, "stages": {"build": "ok"}}', "stage compress"], "too late")
    {'seconds': 1, 'stages': {'build': 'ok', 'compress': 'too late'}}
    """
    known = next((json.loads(each) for each in reversed(lines) if each.startswith("{")), {"stages": {}})
    begun = next((each.removeprefix("stage ") for each in reversed(lines) if each.startswith("stage ")), STAGES[0])
    if begun not in known["stages"]:
        known["stages"][begun] = killed
    return known


def examine_family(family: str, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """The row of one family."""
    found = smallest(names, options.max_parameters)
    row: dict[str, Any] = {"benchmark": "coverage", "family": family, "group": options.group, "rank": 1}
    row["max_parameters"] = options.max_parameters
    if found is None:
        return row | {"model": None, "skipped": UNSUITED}
    return row | {"model": found[0], "parameters": found[1]} | in_fresh_process(found[0], options)


def reached_low(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows whose share reached is below the line, the lowest first.

    >>> reached_low([{"family": "a", "reached": 0.95}, {"family": "b", "reached": 0.1}, {"family": "c"}])
    [{'family': 'b', 'reached': 0.1}]
    """
    return sorted((row for row in rows if row.get("reached", 1.0) < LOW), key=lambda row: row["reached"])


def latest(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last row of every family that has a model in it: a larger limit may have found one later.

    >>> latest([{"family": "a", "model": "m"}, {"family": "a", "model": None}, {"family": "b", "model": None}])
    [{'family': 'a', 'model': 'm'}, {'family': 'b', 'model': None}]
    """
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["model"] or row["family"] not in found:
            found[row["family"]] = row
    return list(found.values())


def stage_counts(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """For every stage how many models passed, of how many: of ONNX those whose dense model can be written, else all.

    >>> failed = {"build": "ok", "export": "ok", "onnx": "no"}
    >>> stage_counts([{"stages": failed}, {"stages": failed | {"dense onnx": "no"}}, {"stages": {"build": "no"}}])
    [('build', 2, 3), ('export', 2, 3), ('onnx', 0, 1)]
    """
    found = []
    for stage in STAGES:
        outcomes = [row["stages"][stage] for row in rows if stage in row["stages"]]
        unfit = sum(row["stages"].get("dense onnx", "ok") != "ok" for row in rows)
        count = len(outcomes) - unfit if stage == "onnx" else len(rows)
        if outcomes and stage != "dense onnx":
            found.append((stage, sum(each == "ok" for each in outcomes), count))
    return found


def low_lines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Family, model, share reached, and what leaves most of the rest dense, of the families below the line."""
    lines = []
    for row in reached_low(rows):
        most = row["weighs_most"]
        more = most.get("layers", 1) - 1  # not every row counts them
        others = f", and {more} such layers more" if more else ""
        why = f"{most['reason']}{others} ({100 * most['share']:.1f} %)"
        lines.append((row["family"], row["model"], f"{100 * row['reached']:.1f} %", why))
    return lines


def mean_share(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """The mean of a share over the rows that have it.

    >>> mean_share([{"reached": 0.5}, {"reached": 1.0}, {}], "reached"), mean_share([], "reached")
    ('75.0 %', '-')
    """
    shares = [row[key] for row in rows if key in row]
    return f"{100 * statistics.fmean(shares):.1f} %" if shares else "-"


def tables(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, tuple[list[str], Sequence[Sequence[Any]]]]:
    """By name the columns and lines of what is shown of these families: how many, the stages, those least reached.

    >>> found = tables([{"family": "a", "model": "m", "stages": {"build": "ok"}, "reached": 0.95}], ["a", "b"])
    >>> found["coverage families"][1], found["coverage"][1], found["coverage low"][1]
    ([(2, 1, 'b', '95.0 %', '-')], [('build', 1, 1)], [])
    """
    tried = [row for row in rows if row["model"]]
    left = set(names) - {row["family"] for row in tried}
    means = (mean_share(tried, "reached"), mean_share(tried, "reached_by_default"))
    counts = (len(names), len(tried), ", ".join(sorted(left)) or "none", *means)
    columns = ["families", "measured", "not measured", "parameters reached", "with the classifier left dense"]
    return {
        "coverage families": (columns, [counts]),
        "coverage": (["stage", "models that pass", "tried"], stage_counts(tried)),
        "coverage low": (["family", "model", "reached", "left dense"], low_lines(tried)),
    }


def print_tables(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """How far the families came, what failed, and which weights are out of reach."""
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)
    failures = [
        (row["family"], row["model"], stage, said)
        for row in rows
        for stage, said in row.get("stages", {}).items()
        if said != "ok"
    ]
    if failures:
        console.print(make_table("Failures", ["family", "model", "stage", "error"], failures))
    for name, (columns, lines) in tables(rows, names).items():
        console.print(make_table(name, columns, lines))


def main(arguments: Sequence[str]) -> int:
    """Take the families of this shard through the stages, or print the tables of the rows that there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", help="only these")
    parser.add_argument("--group", default="C8xC8")
    parser.add_argument("--max-parameters", type=int, default=450_000_000)
    parser.add_argument("--max-seconds", type=float, default=300.0, help="of the processor, for one model")
    parser.add_argument("--max-gigabytes", type=float, default=0.0, help="of address space for one model; 0: no limit")
    sizes = "pixels along a side; models that take smaller images than their own get such, 0: their own"
    parser.add_argument("--largest-image", type=int, default=0, help=sizes)
    parser.add_argument("--shard", default="1/1", help="k/n: every n-th family, from the k-th on")
    parser.add_argument("--output", type=Path, help="rows are appended to this file")
    parser.add_argument("--resume", action="store_true", help="leave out the families that --output has")
    options = parser.parse_args(arguments)
    first, of = map(int, options.shard.split("/"))
    if not 1 <= first <= of:
        parser.error(f"--shard is k/n with k from 1 to n, not {options.shard}")
    known = families()
    wanted = (options.families or sorted(known))[first - 1 :: of]
    if unknown := [each for each in wanted if each not in known]:
        parser.error(f"timm has no family {unknown[0]}")
    rows = read_rows(options.output) if options.resume and options.output else []
    done = {row["family"] for row in rows if row["group"] == options.group}
    shown = shown_command("coverage.py", {"output": options.output}, arguments)
    missing = [each for each in wanted if each not in done]
    if missing:
        warm_up()
    for family in missing:
        row = examine_family(family, known[family], options) | {"command": shown}
        rows.append(row)
        if options.output is not None:
            append_row(options.output, row)
        failed = [f"{stage}: {said}" for stage, said in row.get("stages", {}).items() if said != "ok"]
        print(family, row["model"], "; ".join(failed) or row.get("skipped", "ok"), file=sys.stderr, flush=True)
    print_tables([row for row in latest(rows) if row["family"] in wanted], wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
