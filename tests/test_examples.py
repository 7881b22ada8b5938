"""The examples run."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, monkeypatch, capsys):
    text = path.read_text()
    monkeypatch.setattr(sys, "argv", [str(path)] + ["--smoke"] * ("--smoke" in text))
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()
