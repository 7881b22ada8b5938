"""The benchmark of coverage: what is known of a process that ends too early, and its tables."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_process_that_ends_leaves_what_was_known(tmp_path):
    """Within a second of the processor a model is built, and no ONNX file is written; its family is not tried again."""
    output = tmp_path / "coverage.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "coverage.py"), "--families", "mambaout", "--max-seconds", "1"]
    command += ["--output", str(output), "--resume"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Failures" in done.stdout
    (row,) = map(json.loads, output.read_text().splitlines())
    assert row["model"] == "test_mambaout"
    *passed, last = row["stages"].items()
    assert all(said == "ok" for _, said in passed)
    assert last[0] != "build"
    assert last[1].startswith(("took more than 1 s of the processor", "the process ended with"))  # some library aborts


def test_a_stage_that_failed_does_not_count(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = importlib.import_module("coverage").tables
    rows = [{"family": "a", "model": "m", "stages": {"build": "ok", "export": "took long"}}]
    found = {name: lines for name, (_, lines) in tables([*rows, {"family": "b", "model": None}], ["a", "b"]).items()}
    assert found["coverage"] == [("build", 1, 1), ("export", 0, 1)]
    assert found["coverage families"] == [(2, 1, "b", "-", "-")]
