"""The command line under a budget: its flags, what it prints, and what is said about the ones that do not fit."""

import json
import re
import shlex
from pathlib import Path

import pytest
from test_cli import assert_json, assert_refused
from test_runs_budget import DIGITS, NETWORK, QUICK, shorten, write_dense

import gmcompress as gm
from gmcompress.cli import main
from gmcompress.cli.flags import parse
from gmcompress.cli.line import make_parser

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, the weights of a dense network outside it."""
    shorten(monkeypatch)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_dense(tmp_path / "dense.safetensors")
    return tmp_path / "here"


def flags_of(settings):
    found = []
    for name, value in settings.items():
        found += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    return found


NET = [*flags_of(NETWORK | DIGITS), "--checkpoint", "../dense.safetensors"]
BUDGET = [*NET, *flags_of(QUICK)]


def understood(arguments):
    return parse(*make_parser(), arguments)


def test_budgets_as_flags():
    given = understood(["compress", "--budget", "params=100000", "bytes=25%", "--ties", "a", "b", "--no-calibrate"])
    assert given["budget"] == ["params=100000", "bytes=25%"]
    assert given["ties"] == ["a", "b"]
    assert given["calibrate"] is False
    assert understood(["sweep", "--budgets", "75%", "50%"])["budgets"] == ["75%", "50%"]


def test_a_way_to_choose_on_the_command_line_makes_that_of_a_file_void(place):
    (place / "a.yaml").write_text("budget: 25%\nties: [a]\nsamples: 7\n")
    (place / "b.yaml").write_text("rank: 1\nresidual: lowrank\n")
    assert understood(["compress", "-c", "a.yaml", "--rank", "2"]) == {"command": "compress", "rank": 2, "samples": 7}
    given = understood(["train", "-c", "a.yaml", "--budget", "50%"])
    assert given == {"command": "train", "budget": ["50%"], "ties": ["a"], "samples": 7}
    assert understood(["train", "-c", "b.yaml", "--rank", "3"])["residual"] == "lowrank"
    assert understood(["train", "-c", "b.yaml", "--plan", "x.json"]) == {"command": "train", "plan": "x.json"}
    assert understood(["compress", "-c", "a.yaml", "--effort", "2"])["budget"] == "25%"


def test_a_plan_says_what_decided(place, capsys):
    assert main(["plan", *BUDGET]) == 0
    printed = capsys.readouterr()
    assert "predicted divergence of the outputs" in printed.out
    assert "the weights alone" not in printed.out
    assert "reading training images: 32 to calibrate on" in printed.err
    assert main(["plan", *BUDGET, "--no-calibrate"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("no images were used, so the weights alone decided")
    assert main(["plan", *NET, "--rank", "1", "--group", "C4"]) == 0
    assert "the weights alone" not in capsys.readouterr().out
    assert not list(place.iterdir())


def test_a_plan_as_json_is_a_file_for_compress(place, capsys):
    assert main(["plan", *BUDGET, "--json"]) == 0
    printed = capsys.readouterr()
    assert_json(printed)
    (place / "plan.json").write_text(printed.out)
    plan = gm.Plan.from_json(printed.out)
    assert main(["compress", *NET, "--plan", "plan.json", "--no-calibrate", "--output", "small"]) == 0
    printed = capsys.readouterr()
    assert f"→ {plan.parameters:,} parameters" in printed.out
    assert "so the layers of the plan were fitted to their weights alone" in printed.out
    assert main(["report", "small"]) == 0
    assert "fitted to their weights alone" in capsys.readouterr().out


def test_an_interrupted_compression_is_told_how_to_go_on(place, capsys, monkeypatch):
    from gmcompress.runs import compressing

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compressing, "compress", interrupted)
        assert main(["compress", *BUDGET, "--output", "small"]) == 130
    assert "compress and train go on with --resume FOLDER" in capsys.readouterr().err
    assert main(["compress", "--resume", "small"]) == 0
    printed = capsys.readouterr()
    assert "planning" not in printed.err  # that was done
    assert "calibrated on 32 training images" in printed.out
    assert main(["train", "--compressed", "small", *flags_of(DIGITS), "--epochs", "0", "--output", "run"]) == 0
    assert json.loads((place / "run" / "report.json").read_text())["plan"]["optimum"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--model", "test_resnet"], "a budget is spent where the trained weights need it"),
        (["benchmark", "--model", "test_resnet"], "a budget is spent where the trained weights need it"),
        (["plan", *NET, "--budget", "25"], "25 of what? write params=25, or a share of the parameters such as 25%"),
        (["plan", *NET, "--budget", "25%", "--rank", "1"], "budget and rank do not go together"),
        (["plan", *NET, "--residual", "lowrank"], "it goes with rank"),
        (["compress", *NET, "--plan", "nowhere.json"], "nowhere.json: No such file or directory"),
        (["compress", *NET, "--plan", "x.json", "--budget", "5%"], "budget and plan do not go together"),
        (["compress", *NET, "--samples", "0"], "samples must be at least 1"),
        (["compress", "--resume", "."], "holds no run to resume"),
        (["compress", "--resume", ".", "--output", "x"], "--output and --experiment do not go with it"),
        (["compress", *NET, "--dataset", "", "--data-dir", "../data"], "../data holds no images"),
        (["sweep", *NET, "--budgets", "75"], "75 of what?"),
        (["sweep", *NET, "--budget", "75%"], "unknown flag --budget; the nearest are '--budgets'"),
        (["sweep", *NET, "--dataset", "", "--measure"], "accuracies are measured on images"),
        (["sweep", *NET, "--budgets"], "expected at least one argument"),
    ],
    ids=lambda value: " ".join(each for each in value if each not in NET) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(place, capsys, arguments, said):
    if "../data" in arguments:
        (place.parent / "data" / "val").mkdir(parents=True)
        said = "timm finds no images in"
    assert_refused(arguments, said, capsys, place)


def test_the_commands_in_the_readme_are_understood():
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```$", README.read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("gmcompress")]
    assert {shlex.split(line)[1] for line in lines} >= {"plan", "sweep", "compress", "train"}
    for line in lines:
        assert understood(shlex.split(line, comments=True)[1:])["command"]
