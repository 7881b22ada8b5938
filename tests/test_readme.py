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

from gmcompress import compress
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
    monkeypatch.setattr("gmcompress.subjects.SHARES", (0.11, 0.35))
    monkeypatch.setattr("gmcompress.adapted.GRIDS", (4,))
    monkeypatch.setattr("gmcompress.adapted.STEPS", 2)
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
    assert 'python -m pip install -e ".[dev]" && python -m pytest -n 2 --dist loadfile' in lines
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


@pytest.fixture
def tables(modules: Any) -> Any:
    """The module that makes the tables of the README."""
    return modules("readme_tables")


def test_the_tables_are_those_of_the_benchmarks(tables):
    text, bodies = (ROOT / "README.md").read_text(), tables.bodies()
    assert len(bodies) >= 6
    assert all(bodies.values())
    assert tables.filled(text, bodies) == text, "python benchmarks/readme_tables.py --write"
    for name, body in bodies.items():
        assert tables.filled(text, bodies | {name: body[1:]}) != text


def test_rows_are_in_order_and_have_their_spread(tables):
    row = {"arch": "resnet20", "recipe": {"epochs": 1}, "kept": 0.25, "raw": 80.0, "tuned": 90.1234}
    row |= {"seeds": [0], "spread": {"tuned": None}}
    rows = [{**row, "budget": "9%", "competitor": name} for name in ("svd", "dense", "ours")]
    rows.append({**row, "budget": "25%", "competitor": "ours", "seeds": [0, 1], "spread": {"tuned": 0.123}})
    assert tables.accuracy_lines(rows) == [
        "| 25% | ours | 25.0 % | 80.00 | 90.12 ± 0.12 | 2 |",
        "| 9% | ours | 25.0 % | 80.00 | 90.12 | 1 |",
        "| 9% | svd | 25.0 % | 80.00 | 90.12 | 1 |",
    ]
    longer = [{**row, "budget": "9%", "competitor": "ours", "recipe": {"epochs": 10}}]
    assert tables.longer_lines(rows + longer) == ["| resnet20 | 9% | ours | 25.0 % | 80.00 | 90.12 | 1 | 10 |"]
    assert tables.accuracy_lines(rows + longer) == tables.accuracy_lines(rows)


def test_the_verdict_of_dynamics_is_that_of_the_benchmark(modules, tables):
    rows = tables.read_rows(tables.RESULTS / "dynamics.jsonl")
    text = " ".join((ROOT / "README.md").read_text().split())
    for kind, won in modules("dynamics").verdict(rows).items():
        assert f"{kind}: {'ahead' if won else 'not ahead'}" in text
