"""Every code block of the README runs: Python as it stands, the command line on a small folder of images."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from gmcompress import candidates, compress
from gmcompress.cli import main
from gmcompress.cli.printing import demo_table
from gmcompress.reporting import Report
from gmcompress.runs import demo, networks
from gmcompress.runs.settings import Settings
from gmcompress.tables import table_text

NETWORKS = ("dense", "compressed", "tuned", "frozen")  # of the demo
ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
COMMANDS = [
    line
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.startswith("gmcompress")
]
SHORTER = {
    "train": ["--epochs", "1", "--img-size", "32", "-b", "4", "-j", "0", "--seed", "1"],
    "export": ["--format", "dense", "--output", "small.safetensors"],
}


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, shorter in {"SHARES": (0.11, 0.35), "GRIDS": (4,), "STEPS": 2}.items():
        monkeypatch.setattr(candidates, name, shorter)
    scope = {}
    blocks = [block for language, block in BLOCKS if language == "python"]
    assert len(blocks) >= 3
    for block in blocks:
        small = block.replace('"resnet18"', '"test_resnet"')  # the same names of layers, in seconds
        exec(compile(small, "README.md", "exec"), scope)
    assert (tmp_path / "report.html").is_file()
    assert scope["layer"].structure.parameters((1024, 1024)) == 3072


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images of two classes and the checkpoint of a dense network."""
    folder = tmp_path_factory.mktemp("readme")
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        for label in ("cat", "dog"):
            (folder / "DATA" / split / label).mkdir(parents=True)
            for number in range(4):
                pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "DATA" / split / label / f"{number}.png")
    torch.manual_seed(0)
    save_file(timm.create_model("resnet18", num_classes=2).state_dict(), folder / "dense.safetensors")
    return folder


def test_commands_run_in_their_order(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert [shlex.split(each)[1] for each in COMMANDS] == [
        "doctor",
        "plan",
        "train",
        "validate",
        "benchmark",
        "report",
        "export",
        "groups",
    ]
    for command in COMMANDS:
        arguments = shlex.split(command)[1:]
        status = main([*arguments, *SHORTER.get(arguments[0], [])])
        assert not status, command
        assert capsys.readouterr().out.strip(), command
    assert (place / "report.html").is_file()


def test_the_demo_and_the_test_command_are_those_that_ci_runs():
    lines = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
    assert 'python -m pip install ".[demo]" && gmcompress demo' in lines
    assert 'python -m pip install -e ".[dev]" && python -m pytest' in lines
    assert "<!-- test command -->\n```bash\npython -m pip install -e" in (ROOT / "README.md").read_text()
    assert "test command" in (ROOT / ".ci" / "run").read_text()


def demo_lines(text: str, report: Report) -> list[str]:
    """What the demo would print of its networks, with the numbers that depend on the machine taken from this text."""
    rows = [line.split() for line in text.splitlines()]
    measured = {row[0]: (float(row[-2]), row[-1]) for row in rows if row and row[0] in NETWORKS}
    ratio = float(re.search(r"latency ×([\d.]+)", text)[1])
    shown = float(measured["frozen"][1]) / float(measured["dense"][1])
    assert abs(ratio - shown) < 0.005 + 0.005 * (1 + shown) / float(measured["dense"][1]), "both of one measurement"
    before = replace(report.before, latency_ms=float(measured["dense"][1]))
    after = replace(report.after, latency_ms=ratio * before.latency_ms)
    accuracy = {name: measured[name][0] for name in NETWORKS}
    summary = replace(report, before=before, after=after, accuracy=accuracy).summary
    after = replace(after, latency_ms=float(measured["frozen"][1]))
    table = demo_table(replace(report, before=before, after=after, accuracy=accuracy))
    return [summary, *table_text(*table).splitlines()]


def test_the_output_of_the_demo_is_what_it_prints():
    (shown,) = (block for language, block in BLOCKS if language == "text")
    settings = Settings.read(demo.DEMO)
    dense = networks.build(settings, trained=False)
    report = compress(dense, inputs=networks.example_inputs(settings.images, dense), **settings.compression()).report
    assert demo_lines(shown, report) == shown.splitlines()
    for wrong in ("2,811,274", "20 of 22", "frozen", "1.7 %", "kept"):
        other = shown.replace(wrong, wrong[::-1])
        assert other != shown
        with pytest.raises((AssertionError, KeyError)):
            assert demo_lines(other, report) == other.splitlines()


def test_the_measured_table_is_that_of_the_benchmark():
    lines = (ROOT / "benchmarks" / "results" / "accuracy.jsonl").read_text().splitlines()
    measured = set()
    for row in map(json.loads, lines):
        accuracies = ["-" if row[key] is None else f"{row[key]:.2f}" for key in ("raw", "recalibrated", "tuned")]
        share, energy = f"{100 * row['kept']:.1f} %", f"{row['energy']:.3f}"
        measured.add(" | ".join([row["structure"], row["variant"], share, energy, *accuracies]))
    shown = re.findall(r"^\| (C\S+ \| (?:structure|SVD|shuffled).*) \|$", (ROOT / "README.md").read_text(), re.M)
    assert len(shown) == 8
    assert set(shown) <= measured


def results(name: str) -> list[dict[str, Any]]:
    """The lines of one benchmark."""
    path = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(name: str) -> set[str]:
    """The rows of one table of the README."""
    text = (ROOT / "README.md").read_text()
    body = text.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0]
    return set(body.strip().splitlines()[2:])


def test_the_tables_of_budgets_are_those_of_the_benchmarks():
    def line(row, *numbers):
        return " | ".join(["", row["budget"], row["competitor"], f"{100 * row['kept']:.1f} %", *numbers, ""]).strip()

    def decimal(value):
        return "-" if value is None else f"{value:.2f}"

    rows = [row for row in results("accuracy_budgets") if row["competitor"] != "dense"]
    assert table("accuracy_budgets") == {line(row, decimal(row["raw"]), decimal(row["tuned"])) for row in rows}
    rows = [row for row in results("transformer") if row["competitor"] != "dense"]
    assert table("transformer") == {line(row, f"{row['raw']:.1f}") for row in rows}


def test_the_tables_of_speed_are_those_of_the_benchmark():
    layers, models = set(), set()
    for row in results("speed"):
        dense, ours = (row["competitors"][name]["ms"] for name in ("dense", "ours"))
        if row["part"] == "model":
            cells = [f"{100 * row['kept']:.1f} %", f"{dense:.0f}", f"{ours:.0f}", f"{row['speedup']:.2f}"]
            cells.append(f"{row['structured']} of {row['layers']}")
        else:
            cells = [f"{dense:.3g}", f"{ours:.3g}", f"{row['speedup']:.1f}"]
        (models if row["part"] == "model" else layers).add(f"| {row['what']} | {row['batch']} | {' | '.join(cells)} |")
    assert (table("speed layers"), table("speed models")) == (layers, models)


def stage_lines(rows: list[dict[str, Any]]) -> set[str]:
    """How many models pass each stage, of how many: of ONNX those that got there with a writable dense one."""
    lines = set()
    for stage in dict.fromkeys(stage for row in rows for stage in row["stages"] if stage != "dense onnx"):
        counted = [row["stages"].get(stage) for row in rows]
        if stage == "onnx":
            counted = [row["stages"][stage] for row in rows if stage in row["stages"]]
            for row in rows:
                if row["stages"].get("dense onnx", "ok") != "ok":
                    counted.remove(row["stages"][stage])
        lines.add(f"| {stage} | {counted.count('ok')} | {len(counted)} |")
    return lines


def test_stages_are_counted_with_and_without_onnx():
    exported, no = {"build": "ok", "export": "ok"}, {"build": "failed"}
    assert stage_lines([{"stages": exported}, {"stages": no}]) == {"| build | 1 | 2 |", "| export | 1 | 2 |"}
    differs = exported | {"onnx": "differs"}
    rows = [exported | {"onnx": "ok"}, differs, differs | {"dense onnx": "ok"}, differs | {"dense onnx": "failed"}]
    assert stage_lines([{"stages": each} for each in rows]) >= {"| export | 4 | 4 |", "| onnx | 1 | 3 |"}


def test_the_tables_of_coverage_are_those_of_the_benchmark():
    found: dict[str, Any] = {}
    for row in results("coverage"):
        if row["model"] or row["family"] not in found:  # a larger limit may have found a model later
            found[row["family"]] = row
    tried = [row for row in found.values() if row["model"]]
    assert table("coverage") == stage_lines(tried)
    families = {each for each in timm.list_modules() if timm.list_models(module=each)}
    left = ", ".join(sorted(families - {row["family"] for row in tried})) or "none"
    means = (100 * sum(row[key] for row in tried) / len(tried) for key in ("reached", "reached_by_default"))
    shares = [f"{mean:.1f} %" for mean in means]
    assert table("coverage families") == {f"| {len(families)} | {len(tried)} | {left} | {' | '.join(shares)} |"}
    low = set()
    for row in tried:
        if row["reached"] < 0.9:
            most = row["weighs_most"]
            others = most.get("layers", 1) - 1
            more = f", and {others} such layers more" if others else ""
            why = f"{most['reason']}{more} ({100 * most['share']:.1f} %)"
            low.add(f"| {row['family']} | {row['model']} | {100 * row['reached']:.1f} % | {why} |")
    assert table("coverage low") == low
