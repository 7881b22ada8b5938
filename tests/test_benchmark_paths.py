"""The benchmark of unfrozen layers: both ways are measured, and the rule's choice is one of them."""

import json
from pathlib import Path
from typing import Any

import pytest


def test_every_layer_is_measured_both_ways(
    modules: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = modules("paths")
    for name, value in {"WIDTHS": (64,), "ROWS": (2,), "GROUPS": ("C2", "C8xC8"), "IMAGES": ((16, 4),)}.items():
        monkeypatch.setattr(paths, name, value)
    monkeypatch.setattr(paths, "SECONDS", 0.0)
    output = tmp_path / "paths.jsonl"
    assert paths.main(["--output", str(output), "--threads", "1"]) == 0
    rows = [json.loads(each) for each in output.read_text().splitlines()]
    assert len(rows) == 2 * (8 * 1 + 10 * 2)
    assert {row["part"] for row in rows} == {"group", "adapted", "low rank"}
    for row in rows:
        assert row["chosen_ms"] == row[f"{row['chosen']}_ms"] >= min(row["dense_ms"], row["structured_ms"]) > 0
    assert "linear, low rank" in capsys.readouterr().out
