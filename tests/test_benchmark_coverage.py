"""The benchmark of coverage: what is known of a process that ends too early, and the tables for the README."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gmcompress import GMError

ROOT = Path(__file__).parent.parent
MARKED = """before
<!-- coverage -->
old
<!-- end of coverage -->
between
<!-- coverage families -->
<!-- end of coverage families -->
<!-- coverage low -->
<!-- end of coverage low -->
"""
STAGES = """before
<!-- coverage -->
| stage | models that pass | tried |
|---|---|---|
| build | 1 | 1 |
"""


def test_a_process_that_ends_leaves_what_was_known(tmp_path):
    """Within a second of the processor a model is built, and no ONNX file is written; its family is not tried again."""
    output, readme = tmp_path / "coverage.jsonl", tmp_path / "README.md"
    readme.write_text(MARKED)
    command = [sys.executable, str(ROOT / "benchmarks" / "coverage.py"), "--families", "mambaout", "--max-seconds", "1"]
    command += ["--output", str(output), "--resume", "--readme", str(readme)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Failures" in done.stdout
    (row,) = map(json.loads, output.read_text().splitlines())
    assert row["model"] == "test_mambaout"
    *passed, last = row["stages"].items()
    assert all(said == "ok" for _, said in passed)
    assert last[0] != "build"
    assert last[1] == "took more than 1 s of the processor"
    before, between = readme.read_text().split("<!-- end of coverage -->")
    assert before.startswith(STAGES)
    assert f"| {last[0]} | 0 | 1 |\n" in before
    assert "old" not in before
    assert between.startswith("\nbetween\n<!-- coverage families -->\n| families |")
    assert "\n| 1 | 1 | none |" in between


def test_a_table_goes_between_its_marks(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    rows = importlib.import_module("rows")
    path = tmp_path / "README.md"
    path.write_text(MARKED)
    rows.write_table(path, "coverage", ["a", "b"], [(1, "x"), (2, "y")])
    expected = MARKED.replace("old\n", "| a | b |\n|---|---|\n| 1 | x |\n| 2 | y |\n")
    assert path.read_text() == expected
    with pytest.raises(GMError, match=r"has no <!-- speed --> with"):
        rows.write_table(path, "speed", ["a"], [])
    assert path.read_text() == expected
