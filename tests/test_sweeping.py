"""Sweeps: one table for several budgets, what each would leave, and the controls of the same size beside it."""

import json
from math import prod
from pathlib import Path

import pytest
import timm
import torch
from conftest import must_fail
from safetensors.torch import load_file
from test_runs_budget import DIGITS, NETWORK, QUICK, Stop, names_in, shorten, write_dense

import gmcompress as gm
from gmcompress import GMError
from gmcompress.cli import main
from gmcompress.data import Images, make_calibration_loader, make_loader
from gmcompress.runs import Settings, accuracy, compress_run, sweep_run, validate_run
from gmcompress.runs.sweeping import even_svd

BUDGETS = ["80%", "75%", "params=20000,macs=95%"]


@pytest.fixture
def settings(tmp_path, monkeypatch):
    shorten(monkeypatch)
    (tmp_path / "weights").mkdir()
    return NETWORK | QUICK | DIGITS | {"checkpoint": write_dense(tmp_path / "weights" / "dense.safetensors")}


def dense_of(settings):
    dense = timm.create_model("test_resnet", num_classes=10, in_chans=1, channels=(8, 12, 12, 16)).eval()
    dense.load_state_dict(load_file(settings["checkpoint"]))
    return dense


def test_one_row_for_each_budget(settings):
    seen = Stop()
    rows = sweep_run(settings, BUDGETS, progress=seen)
    assert len(seen.told) == 3  # one table, of the three layers that are not excluded
    dense = gm.measure(dense_of(settings), torch.zeros(1, 1, 8, 8))
    whole = {"parameters": dense.parameters, "bytes": dense.bytes, "macs": dense.macs}
    assert rows[0] == {"budget": "dense", **whole}
    assert [row["budget"] for row in rows[1:]] == BUDGETS
    for row, share in zip(rows[1:], (0.8, 0.75, 20000 / dense.parameters), strict=True):
        assert row["parameters"] <= share * dense.parameters
        assert row["measure"] == "divergence of the outputs"
        assert "top1" not in row
        assert row["gap"] >= 0
    assert rows[3]["macs"] <= 0.95 * dense.macs
    assert 0 < rows[1]["loss"] < rows[2]["loss"]


def test_what_a_budget_leaves_is_what_compress_makes_of_it(settings, tmp_path):
    row = sweep_run(settings, ["75%"], measure=True)[1]
    report = compress_run(settings, tmp_path / "out")
    assert (row["parameters"], row["bytes"]) == (report.after.parameters, report.after.bytes)
    assert row["loss"] == report.plan.optimum["loss"]
    assert row["top1"] == report.accuracy["compressed"]


def counted(plan, positions):
    """The slow twin: multiply-adds of every layer by what it stores."""
    total = 0
    for site in plan.sites:
        stored = min(plan.stored(site.name), prod(site.shape)) if site.name in plan.layers else prod(site.shape)
        total += positions[site.name] * stored
    return total


def test_multiply_adds_are_those_of_the_factors(settings, tmp_path):
    rows = sweep_run(settings, ["75%"], tmp_path / "plans")
    plan = gm.Plan.from_json((tmp_path / "plans" / "plan_75%.json").read_text())
    assert any(text.startswith(("adapted", "lowrank")) for text in plan.layers.values())
    positions, model = {}, dense_of(settings)
    for name in (site.name for site in plan.sites):
        hook = lambda _m, _i, output, name=name: positions.__setitem__(name, output[0, 0].numel())  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    model(torch.zeros(1, 1, 8, 8))
    positions["fc"] = 1
    assert rows[1]["macs"] == counted(plan, positions)


# ---------------------------------------------------------------------------------------------------------------------
# The controls


def assert_even(plan, control):
    """Low ranks only, not larger in all, and of equal shares but for the rounding of ranks."""
    assert control.parameters <= plan.parameters
    shares = []
    for name, text in control.layers.items():
        structure, shape = gm.Structure.parse(text), control.site(name).shape
        assert structure.group is None
        assert structure.grid is None
        each = gm.Structure.factors(1, split=structure.split).parameters(shape) / prod(shape)
        stored = control.stored(name) / prod(shape)
        shares.append((stored, stored + each))
    assert max(low for low, _ in shares) <= min(high for _, high in shares) + 1e-9


def test_the_control_has_the_same_share_of_every_layer(settings):
    dense = dense_of(settings)
    plan = gm.plan(dense, "C4", budget="80%", exclude=["conv1.*"], inputs=torch.zeros(1, 1, 8, 8))
    free = Settings.read(settings | {"exclude": ["conv1.*"]})
    control = even_svd(plan, dense, free)
    assert_even(plan, control)
    assert len(control.layers) == 13  # all but stem and classifier
    assert plan.parameters - control.parameters < 400  # what is left would buy a rank or two
    must_fail(assert_even, plan, plan)
    must_fail(assert_even, control, control.edit({"layer1.0.conv1": None, "layer4.0.conv2": "lowrank:1"}))


def test_without_even_rank_one_there_is_no_control():
    dense = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16))
    plan = gm.plan(dense, "C16", rank=0, include=["2"])
    assert even_svd(plan, dense, Settings(include=("2",))) is None


def test_measured_beside_svd(settings, tmp_path):
    rows = sweep_run(settings, ["75%"], tmp_path / "plans", measure=True)
    assert set(rows[1]) > {"top1", "svd", "svd_whitened", "file"}
    dense = dense_of(settings)
    plan = gm.Plan.from_json((tmp_path / "plans" / "plan_75%.json").read_text())
    control = even_svd(plan, dense, Settings.read(settings))
    loader = make_loader(Images(**DIGITS), dense)
    assert accuracy(gm.compress(dense, plan=control).model, loader).top1 == rows[1]["svd"]
    seen = make_calibration_loader(Images(**DIGITS), dense, samples=32, seed=0)
    inputs = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    fitted = gm.compress(dense, plan=control, data=seen, samples=32, inputs=inputs, effort=0.01)
    assert accuracy(fitted.model, loader).top1 == rows[1]["svd_whitened"]
    assert validate_run(NETWORK | DIGITS | {"checkpoint": settings["checkpoint"]})[2].top1 == rows[0]["top1"]
    uncalibrated = sweep_run(settings | {"calibrate": False}, ["75%"], measure=True)
    assert uncalibrated[1]["svd_whitened"] is None
    assert uncalibrated[1]["measure"] == "squared relative error"


# ---------------------------------------------------------------------------------------------------------------------
# Folders, and what cannot be used


def test_plans_are_kept_and_an_interrupted_sweep_goes_on(settings, tmp_path):
    place = tmp_path / "plans"
    with pytest.raises(KeyboardInterrupt):
        sweep_run(settings, BUDGETS, place, progress=Stop("planning", 2))
    assert names_in(place) == ["notes"]
    seen = Stop()
    rows = sweep_run(settings, BUDGETS, place, progress=seen)
    assert len(seen.told) == 2
    assert names_in(place) == ["plan_75%.json", "plan_80%.json", "plan_params=20000,macs=95%.json"]
    for row in rows[1:]:
        plan = gm.Plan.from_json(Path(row["file"]).read_text())
        assert plan.parameters == row["parameters"]
        assert plan.optimum["loss"] == row["loss"]
    with pytest.raises(GMError, match="is not empty"):
        sweep_run(settings, BUDGETS, place)


def test_a_budget_out_of_reach_is_refused_before_the_table(settings, tmp_path):
    seen = Stop()
    with pytest.raises(GMError, match="cannot be reached: the smallest possible is"):
        sweep_run(settings, ["75%", "5%"], tmp_path / "plans", progress=seen)
    assert not seen.told
    assert names_in(tmp_path) == ["weights"]


def test_what_fails_after_the_table_leaves_it_for_others(settings, tmp_path, monkeypatch):
    def refuse(*_):
        raise GMError("these limits exclude each other")

    with monkeypatch.context() as patch:
        patch.setattr("gmcompress.pipeline.allocate", refuse)
        with pytest.raises(GMError, match="the same call goes on from it, also with other budgets"):
            sweep_run(settings, ["75%"], tmp_path / "plans")
    seen = Stop()
    sweep_run(settings, ["80%"], tmp_path / "plans", progress=seen)
    assert not seen.told
    assert names_in(tmp_path / "plans") == ["plan_80%.json"]


@pytest.mark.parametrize(
    ("change", "budgets", "said"),
    [
        ({}, [], "at least one budget"),
        ({}, ["10"], "10 of what"),
        ({}, ["75%", "parms=10%"], "no cost is called 'parms'"),
        ({"checkpoint": None}, ["75%"], "it has no trained weights"),
        ({"dataset": ""}, ["75%"], "measured on images: give data_dir or dataset"),
        ({"exclude": ["layer9"]}, ["75%"], "the rule 'layer9' matches no layer"),
    ],
)
def test_what_cannot_be_swept_leaves_nothing(settings, tmp_path, change, budgets, said):
    with pytest.raises(GMError, match=said):
        sweep_run(settings | change, budgets, tmp_path / "plans", measure=True)
    assert names_in(tmp_path) == ["weights"]


def test_the_settings_of_another_run_do_for_a_sweep(settings):
    del settings["budget"]
    rows = sweep_run(settings | {"rank": 1, "residual": "lowrank", "calibrate": False}, ["75%"])
    assert len(rows) == 2


# ---------------------------------------------------------------------------------------------------------------------
# On the command line


def flags_of(settings):
    found = []
    for name, value in settings.items():
        if name != "budget":
            found += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    return found


def test_on_the_command_line(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = ["sweep", *flags_of(settings), "--budgets", "80%", "75%"]
    assert main([*sweep, "--measure", "--output", "plans"]) == 0
    printed = capsys.readouterr()
    assert "whitened SVD" in printed.out
    assert "loss: predicted divergence of the outputs" in printed.out
    assert "--plan plans/plan_75%.json" in printed.out
    assert "the weights alone" not in printed.out
    assert "compressing, plain SVD for 75%" in printed.err
    assert main([*sweep, "--no-calibrate", "--json"]) == 0
    printed = capsys.readouterr()
    assert [row["budget"] for row in json.loads(printed.out)["rows"]] == ["dense", "80%", "75%"]
    assert not printed.err
    assert main([*sweep, "--no-calibrate"]) == 0
    assert "so the weights alone decided" in capsys.readouterr().out
    network = [each for each in flags_of(settings) if each not in ("--exclude", *QUICK["exclude"])]
    assert main(["compress", *network, "--plan", "plans/plan_75%.json", "--output", "small"]) == 0
    assert "calibrated on 32 training images" in capsys.readouterr().out
