"""The commands: what each takes, the one public call that it makes, and what is printed of its answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ..copies import count_parameters
from ..errors import GMError
from ..files import usable
from ..reporting import Report
from ..runs import (
    BUDGETS,
    FAMILIES,
    WEIGHTS_ALONE,
    Progress,
    benchmark_run,
    compress_run,
    demo_run,
    doctor_run,
    export_run,
    group_facts,
    plan_run,
    read_report,
    setting_kinds,
    sweep_run,
    train_run,
    typed,
    validate_run,
)
from ..tables import percent
from . import flags, sharded
from .printing import Table, demo_table

Given = dict[str, Any]
Answer = tuple[Any, list[str | Table]]  # for --json, and for people


class Command(NamedTuple):
    """A command: what it does in a line, the flags it takes, an example, and the function behind it."""

    run: Callable[[Given, Progress], Answer]
    text: str
    settings: dict[str, dict[str, str]]
    examples: tuple[str, ...]
    more: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = ()
    status: Callable[[Any], int] = lambda _found: 0  # the exit code, from what --json prints


def _settings(given: Given) -> Given:
    """What was given of the settings, without the command's own flags."""
    return {name: value for name, value in given.items() if name in setting_kinds()}


def _output(given: Given) -> Path:
    name = str(given.get("model") or "model").rsplit("/", 1)[-1].replace(":", "-")
    folder = usable(given.get("output") or f"gmcompress-{name}")
    return folder / given["experiment"] if given.get("experiment") else folder


def _reported(report: Report, folder: Path) -> Answer:
    """A report as JSON, and its main table for people."""
    data = {"folder": str(folder), "summary": report.summary, "report": json.loads(report.to_json())}
    saved = Table("", ["", "dense#", "compressed#", "kept#"], report.savings())
    written = f"written to {folder}: model/, report.html, report.json"
    return data, [report.summary, saved, *_decided(report), written]


def _decided(report: Report) -> list[str | Table]:
    """What decided under a budget: the calibration, or the weights alone."""
    return [report.settings["calibration"]] if "calibration" in report.settings else []


def _plan(given: Given, progress: Progress) -> Answer:
    plan = plan_run(_settings(given), progress=progress)
    return plan.to_dict(), [str(plan), *_alone(plan.optimum)]


def _alone(row: Mapping[str, Any] | None) -> list[str | Table]:
    """The line that a plan deserves whose losses are those of the weights."""
    return [WEIGHTS_ALONE] if row is not None and row["measure"] == "squared relative error" else []


def _sweep(given: Given, progress: Progress) -> Answer:
    budgets, folder = typed("budgets", tuple[str, ...], given.get("budgets", BUDGETS)), given.get("output")
    measure = given.get("measure", False)
    rows = sweep_run(_settings(given), budgets, folder, measure=measure, progress=progress)
    return {"rows": rows}, _swept(rows, folder, measure=measure)


def _swept(rows: Sequence[Mapping[str, Any]], folder: str | None, *, measure: bool) -> list[str | Table]:
    """The table of a sweep, and what its columns mean."""
    columns = ["budget", "parameters#", "kept#", "bytes#", "multiply-adds#", "loss#", "gap#"]
    columns += ["top-1, %#", "whitened SVD#", "plain SVD#"] if measure else []
    cells = []
    for row in rows:
        sizes = [f"{row['parameters']:,}", percent(row["parameters"], rows[0]["parameters"])]
        sizes += [f"{row['bytes']:,}", f"{row['macs']:,}"]
        losses = [f"{row['loss']:.3g}", percent(row["gap"], 1)] if "loss" in row else ["", ""]
        measured = [row.get(name, "") for name in ("top1", "svd_whitened", "svd")] if measure else []
        cells.append((row["budget"], *sizes, *losses, *map(_accuracy, measured)))
    parts: list[str | Table] = [Table("", columns, cells)]
    parts.append(f"loss: predicted {rows[1]['measure']}; gap: how far it may be above the least of any plan")
    parts.append("multiply-adds: of the stored factors, for one image; the layers as they run today need more")
    if measure:
        parts.append(
            "top-1: before any training; of SVD too, in low ranks of at most as many parameters, alike for all layers"
        )
    parts += _alone(rows[1])
    if folder is not None:
        parts.append(
            f"plans written to {folder}; carry one out with: gmcompress compress --plan {rows[-1]['file']} ..."
        )
    return parts


def _accuracy(value: float | str | None) -> str:
    return f"{value:.2f}" if isinstance(value, float) else value or "-"


def _compress(given: Given, progress: Progress) -> Answer:
    if sharded.asked(given):
        return sharded.compress(given, _settings(given), progress)
    folder, resume = _place(given)
    return _reported(compress_run(_settings(given), folder, resume=resume, progress=progress), folder)


def _train(given: Given, progress: Progress) -> Answer:
    folder, resume = _place(given)
    return _reported(train_run(_settings(given), folder, resume=resume, progress=progress), folder)


def _place(given: Given) -> tuple[Path, bool]:
    """The folder of a run, and whether it goes on there."""
    resumed = given.get("resume")
    if resumed and (given.get("output") or given.get("experiment")):
        raise GMError("--resume FOLDER goes on in that folder, so --output and --experiment do not go with it")
    return (usable(resumed), True) if resumed else (_output(given), False)


def _validate(given: Given, progress: Progress) -> Answer:
    name, model, found = validate_run(_settings(given), progress=progress)
    parameters = count_parameters(model)
    data = {"network": name, "parameters": parameters, **asdict(found)}
    row = (name, f"{parameters:,}", f"{found.images:,}", f"{found.top1:.2f}", f"{found.top5:.2f}")
    return data, [Table("", ["network", "parameters#", "images#", "top-1, %#", "top-5, %#"], [row])]


def _benchmark(given: Given, progress: Progress) -> Answer:
    rows = benchmark_run(_settings(given), repeats=given.get("repeats", 15), progress=progress)
    columns = ["batch#", "network", "parameters#", "multiply-adds#", "latency, ms#", "spread, ms#", "of dense#"]
    cells = [
        (
            row["batch"],
            row["network"],
            f"{row['parameters']:,}",
            f"{row['macs']:,}",
            f"{row['latency_ms']:.2f}",
            f"{row['latency_spread_ms']:.2f}",
            f"×{row['ratio']:.2f}",
        )
        for row in rows
    ]
    first = rows[0]
    how = f"medians over interleaved runs; {first['device']}, {first['dtype']}, threads: {first['threads']}"
    return {"rows": rows}, [Table("", columns, cells), how]


def _doctor(given: Given, progress: Progress) -> Answer:
    found = doctor_run(_settings(given), progress=progress)
    return found.to_dict(), [str(found)]


def _export(given: Given, _progress: Progress) -> Answer:
    how = {name: given[name] for name in ("format", "tolerance") if name in given}
    found = export_run(_settings(given), given["folder"], given["output"], **how)
    return asdict(found), [str(found)]


def _report(given: Given, _progress: Progress) -> Answer:
    report = read_report(given["folder"])
    if "html" not in given:
        return json.loads(report.to_json()), [str(report), *_decided(report)]
    report.save(given["html"])
    return {"html": given["html"]}, [f"written to {given['html']}"]


def _groups(given: Given, _progress: Progress) -> Answer:
    text = given.get("group_string")
    if text is None:
        facts = [group_facts(each) | {"what": what} for each, what in FAMILIES.items()]
        rows = [(each["group"], each["order"], "yes" if each["abelian"] else "no", each["what"]) for each in facts]
        return facts, [Table("Groups, as they are written", ["group", "order#", "abelian", "what it is"], rows)]
    found = group_facts(text)
    normal = found["normal_subgroups"]
    quotients = [f"{each} ({group_facts(each)['order']})" for each in found["quotients"]]
    lines = [
        ("order", found["order"]),
        ("abelian", "yes" if found["abelian"] else "no"),
        ("exponent", found["exponent"]),
        ("generators", found["generators"]),
        ("normal subgroups", "not counted, there may be very many" if normal is None else normal),
        ("quotients (order)", ", ".join(quotients)),
    ]
    return found, [Table(found["group"], ["", "value"], lines)]


def _demo(given: Given, progress: Progress) -> Answer:
    folder = Path(given.get("output") or "gmcompress-demo")
    report = demo_run(folder, smoke=given.get("smoke", False), seed=given.get("seed", 0), progress=progress)
    data, (summary, *_, written) = _reported(report, folder)
    return data, [summary, demo_table(report), written]


PLACES = {"report": ["FOLDER"], "export": ["FOLDER"], "doctor": ["MODEL"]}
SIZE = {"img_size": flags.IMAGES["img_size"]}
UNTRAINED = ("pretrained", "checkpoint")
DENSE = {name: text for name, text in flags.NETWORK.items() if name != "compressed"}

COMMANDS = {
    "demo": Command(
        _demo,
        "train, compress and fine-tune a small network on handwritten digits; nothing to download",
        {},
        ("", "--output somewhere"),
        (
            (("--output",), {"metavar": "FOLDER", "help": "where to write (default: gmcompress-demo)"}),
            (("--seed",), {"type": int, "metavar": "N", "help": "seed of all random numbers (default: 0)"}),
            (("--smoke",), {"action": "store_true", "help": "a few seconds, to see that everything works"}),
        ),
    ),
    "plan": Command(
        _plan,
        "show what compress would do, layer by layer; with --rank no weights are needed",
        {
            "network": DENSE,
            "compression": flags.COMPRESSION,
            "calibration": flags.CALIBRATION,
            "images": flags.IMAGES | flags.TRAIN_SPLIT,
            "machine": flags.MACHINE,
        },
        (
            "--model resnet50 --pretrained --data-dir imagenet/ --budget 25%",
            "--model vit_base_patch16_224 --group C8xC8 --rank 2 --exclude 're:.*qkv'",
        ),
        (flags.CONFIG,),
    ),
    "sweep": Command(
        _sweep,
        "plan for several budgets at the price of one; with --measure, show the accuracy of each beside SVD",
        {
            "network": DENSE,
            "compression": flags.RULES,
            "calibration": flags.CALIBRATION,
            "images": flags.IMAGES | flags.TRAIN_SPLIT,
            "machine": flags.MACHINE,
        },
        (
            "--model resnet50 --pretrained --data-dir imagenet/ --budgets 75% 50% 25% --output plans",
            "--model resnet18 --checkpoint best.pth --data-dir DATA --budgets 50% params=1000000,macs=25% --measure",
        ),
        (flags.CONFIG, flags.BUDGET_LIST, flags.MEASURE, flags.PLANS),
    ),
    "compress": Command(
        _compress,
        "compress a trained network without training it, and report",
        {
            "network": DENSE,
            "compression": flags.COMPRESSION | flags.PLAN,
            "calibration": flags.CALIBRATION,
            "images": flags.IMAGES | flags.TRAIN_SPLIT,
            "machine": flags.MACHINE,
        },
        (
            "--model resnet50 --pretrained --data-dir imagenet/ --budget 25% --output small",
            "--model resnet50 --pretrained --data-dir imagenet/ --plan plans/plan_25%.json --output small",
            "--model resnet18 --checkpoint best.safetensors --group C8xC8 --rank 1",
            "--resume small",
            "--from-safetensors llama/ --to llama-small --group C32xC32 --rank 1",
        ),
        (flags.CONFIG, flags.OUTPUT, flags.EXPERIMENT, flags.RESUME, *sharded.FLAGS),
    ),
    "train": Command(
        _train,
        "compress a trained network, fine-tune it with the dense one as its teacher, and report",
        {
            "network": flags.NETWORK,
            "compression": flags.COMPRESSION | flags.PLAN,
            "calibration": flags.CALIBRATION,
            "images": flags.IMAGES | flags.TRAIN_SPLIT,
            "training images": flags.AUGMENTATION,
            "training": flags.TRAINING,
            "machine": flags.MACHINE,
        },
        (
            "--model resnet50 --pretrained --data-dir imagenet/ --budget 25% --epochs 10 --output small",
            "--resume small",
        ),
        (flags.CONFIG, flags.OUTPUT, flags.EXPERIMENT, flags.RESUME),
    ),
    "validate": Command(
        _validate,
        "measure the top-1 and top-5 accuracy of a network, dense or compressed",
        {"network": flags.NETWORK, "images": flags.IMAGES, "machine": flags.MACHINE},
        ("--compressed small --data-dir imagenet/", "--model resnet50 --pretrained --data-dir imagenet/"),
        (flags.CONFIG,),
    ),
    "benchmark": Command(
        _benchmark,
        "time a network dense, compressed, frozen and densified, in turns, at batch 1 and at a large batch",
        {
            "network": flags.NETWORK,
            "compression": flags.COMPRESSION | flags.PLAN,
            "images": SIZE | {"batch_size": "images in the large batch"},
            "machine": {"device": flags.MACHINE["device"]},
        },
        ("--model resnet50 --group C8xC8 --rank 1 -b 64", "--compressed small"),
        (flags.CONFIG, (("--repeats",), {"type": int, "metavar": "N", "help": "timed runs of each (default: 15)"})),
    ),
    "doctor": Command(
        _doctor,
        "show what can be done with every weight of a network, and try it; exit status 1 where it does not work",
        {
            "network": {name: text for name, text in DENSE.items() if name != "model"},
            "compression": {"group": flags.COMPRESSION["group"]},
            "images": SIZE,
            "machine": flags.MACHINE,
        },
        ("resnet18 --group C8xC8", "mypackage.models:make_network"),
        (flags.CONFIG, flags.EXAMINED),
        lambda found: 0 if found["works"] else 1,
    ),
    "export": Command(
        _export,
        "write a compressed network as one file for use elsewhere, and check that it computes the same",
        {"network": {name: text for name, text in DENSE.items() if name not in UNTRAINED}, "images": SIZE},
        ("small --format onnx --output small.onnx", "small --format dense --output dense.safetensors"),
        flags.EXPORT,
    ),
    "report": Command(
        _report,
        "print the report in the output of compress, train or demo, or write it as a page",
        {},
        ("small", "small --html report.html"),
        (
            (("folder",), {"metavar": "FOLDER", "help": "the output of a run"}),
            (("--html",), {"metavar": "FILE", "help": "write one self-contained HTML page, in place of printing"}),
        ),
    ),
    "groups": Command(
        _groups,
        "list the families of groups, or the facts about one",
        {},
        ("", "D4xC2"),
        ((("group_string",), {"nargs": "?", "metavar": "GROUP", "help": "a group, such as D4xC2 or C2^3"}),),
    ),
}
