"""Runs under a budget: what they are calibrated on, how they go on after an interruption, and what a failure leaves."""

import shutil
import threading
from pathlib import Path

import pytest
import timm
import torch
from conftest import must_fail
from safetensors.torch import load_file, save_file
from test_data import write_images

import gmcompress as gm
from gmcompress import GMError
from gmcompress.data import Images, make_loader
from gmcompress.files import read_tensors
from gmcompress.runs import (
    WEIGHTS_ALONE,
    Settings,
    benchmark_run,
    compress_run,
    compressing,
    folders,
    plan_run,
    read_report,
    train_run,
    validate_run,
)
from gmcompress.runs.training import _started

NETWORK = {"model": "test_resnet", "num_classes": 10, "in_chans": 1, "model_kwargs": ["channels=(8, 12, 12, 16)"]}
QUICK = {"group": "C4", "exclude": ["conv1.*", "layer[123].*"], "samples": 32, "effort": 0.01, "budget": ["75%"]}
DIGITS = {"dataset": "digits", "img_size": 8}


def shorten(monkeypatch):
    """Few candidates, so that a table takes a second."""
    monkeypatch.setattr("gmcompress.subjects.SHARES", (0.11, 0.35))
    monkeypatch.setattr("gmcompress.adapted.GRIDS", (4,))
    monkeypatch.setattr("gmcompress.adapted.STEPS", 2)


def write_dense(file):
    """The weights of a small network."""
    torch.manual_seed(0)
    options = {"num_classes": 10, "in_chans": 1, "channels": (8, 12, 12, 16), "zero_init_last": False}
    save_file(timm.create_model("test_resnet", **options).state_dict(), file)
    return str(file)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    shorten(monkeypatch)
    (tmp_path / "weights").mkdir()
    return NETWORK | QUICK | DIGITS | {"checkpoint": write_dense(tmp_path / "weights" / "dense.safetensors")}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "runs" / "out"


def weights(folder):
    return load_file(Path(folder) / "model" / "model.safetensors")


def assert_same_weights(folder, other):
    """Bit by bit."""
    found, expected = weights(folder), weights(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())


def names_in(folder):
    return sorted(each.name for each in folder.iterdir())


def forbid(monkeypatch):
    """From here on, nothing may be compressed any more."""

    def refuse(*_, **__):
        raise AssertionError("compressed once more")

    monkeypatch.setattr(compressing, "compress", refuse)
    monkeypatch.setattr(compressing, "make_plan", refuse)


# ---------------------------------------------------------------------------------------------------------------------
# What decides


def by_hand(settings, *, seed=0, validation=False):
    """The same through the Python API, with images drawn by hand."""
    dense = timm.create_model("test_resnet", num_classes=10, in_chans=1, channels=(8, 12, 12, 16)).eval()
    dense.load_state_dict(load_file(settings["checkpoint"]))
    images = Images(dataset="digits", img_size=8, no_aug=True)
    pixels = make_loader(images, dense, training=not validation).dataset.images
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[: settings["samples"]]
    options = {"exclude": settings["exclude"], "effort": settings["effort"]}
    inputs = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return gm.compress(dense, "C4", budget="75%", data=pixels[order].split(32), inputs=inputs, **options)


def assert_same_fits(folder, result):
    found = weights(folder)
    for name, each in result.model.state_dict().items():
        torch.testing.assert_close(found[name], each, rtol=0, atol=1e-5)


def test_training_images_drawn_by_the_seed_decide(settings, out):
    report = compress_run(settings | {"seed": 3}, out)
    assert names_in(out) == ["args.yaml", "model", "report.html", "report.json"]
    assert report.settings["calibration"] == "calibrated on 32 training images"
    assert report.plan.optimum["measure"] == "divergence of the outputs"
    assert report.after.parameters <= 0.75 * report.before.parameters
    assert set(report.accuracy) == {"dense", "compressed"}
    assert_same_fits(out, by_hand(settings, seed=3))
    must_fail(assert_same_fits, out, by_hand(settings, seed=4))
    must_fail(assert_same_fits, out, by_hand(settings, seed=3, validation=True))


@pytest.mark.parametrize("change", [{"calibrate": False}, {"dataset": ""}])
def test_without_images_the_weights_alone_decide_and_the_report_says_so(settings, out, change):
    report = compress_run(settings | change, out)
    assert report.settings["calibration"] == WEIGHTS_ALONE
    assert report.plan.optimum["measure"] == "squared relative error"
    assert bool(report.accuracy) == ("calibrate" in change)
    assert "calibration" in (out / "report.html").read_text()


def test_half_of_the_parameters_is_the_default(settings, out):
    del settings["budget"], settings["exclude"]
    report = compress_run(settings | {"calibrate": False, "samples": 1}, out)
    assert report.plan.optimum["budget"] == "50 % of the parameters"
    assert 0.4 < report.after.parameters / report.before.parameters <= 0.5


def test_with_a_rank_there_is_nothing_to_calibrate(settings, out):
    del settings["budget"]
    report = compress_run(settings | {"rank": 1}, out)
    assert "calibration" not in report.settings
    assert report.layers[0]["structure"] == "C4+displacement:1"


def test_calibration_on_what_is_judged_on_is_refused(settings, tmp_path):
    settings |= {"num_classes": 2, "dataset": "", "data_dir": str(tmp_path / "data"), "workers": 0}
    torch.manual_seed(0)
    dense = timm.create_model("test_resnet", num_classes=2, in_chans=1, channels=(8, 12, 12, 16))
    save_file(dense.state_dict(), settings["checkpoint"])
    write_images(tmp_path / "data" / "val", ["a", "b"])
    with pytest.raises(GMError, match=r"holds val, but no train .*--no-calibrate goes without"):
        compress_run(settings, tmp_path / "out")
    with pytest.raises(GMError, match=r"no training images apart from those for validation.*--no-calibrate"):
        plan_run(settings | {"data_dir": str(tmp_path / "data" / "val")})
    report = compress_run(settings | {"calibrate": False}, tmp_path / "out")
    assert report.settings["calibration"] == WEIGHTS_ALONE
    assert set(report.accuracy) == {"dense", "compressed"}


@pytest.mark.parametrize("run", [plan_run, benchmark_run])
def test_a_budget_needs_weights(settings, run):
    del settings["checkpoint"]
    with pytest.raises(GMError, match="a budget is spent where the trained weights need it"):
        run(settings)


def test_a_plan_is_that_of_compress_and_carried_out_gives_the_same(settings, out, tmp_path):
    plan = plan_run(settings)
    assert plan == compress_run(settings, out).plan
    (tmp_path / "plan.json").write_text(plan.to_json())
    del settings["budget"], settings["exclude"]
    report = compress_run(settings | {"plan": str(tmp_path / "plan.json")}, tmp_path / "again")
    assert report.plan == plan
    assert_same_weights(tmp_path / "again", out)
    (tmp_path / "plan.json").write_text(plan.edit({"layer4.0.conv2": None}).to_json())
    compress_run(settings | {"plan": str(tmp_path / "plan.json")}, tmp_path / "other")
    must_fail(assert_same_weights, tmp_path / "other", out)


def test_a_plan_is_timed_without_weights(settings, tmp_path):
    plan = plan_run(settings | {"calibrate": False})
    (tmp_path / "plan.json").write_text(plan.to_json())
    for name in ("budget", "exclude", "checkpoint"):
        del settings[name]
    rows = benchmark_run(settings | {"plan": str(tmp_path / "plan.json"), "batch_size": 2}, repeats=2)
    assert rows[1]["parameters"] == plan.parameters


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read the plan .*plan.json: No such file"),
        ("x", r"plan\.json: a plan is not readable as JSON"),
        ("{}", r"plan\.json: a plan is an object with the fields"),
    ],
)
def test_a_plan_that_is_none(settings, tmp_path, content, said):
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    del settings["budget"], settings["exclude"]
    with pytest.raises(GMError, match=said):
        compress_run(settings | {"plan": str(tmp_path / "plan.json")}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_of_another_network(settings, tmp_path):
    plan = plan_run({"model": "test_resnet", "rank": 1, "group": "C4"})
    (tmp_path / "plan.json").write_text(plan.to_json())
    del settings["budget"], settings["exclude"]
    with pytest.raises(
        GMError, match=r"for another network: 'layer1.0.conv1' has shape \(32, 32, 3, 3\) there, \(8, 32,"
    ):
        compress_run(settings | {"plan": str(tmp_path / "plan.json")}, tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted, and gone on


class Stop:
    """Progress that counts the layers told, and interrupts the run at one of them."""

    def __init__(self, what=None, at=0):
        self.what, self.at, self.told = what, at, []

    def __call__(self, what, done, _of, note):
        if what in ("planning", "compressing"):
            self.told.append((what, note))
            if (what, done) == (self.what, self.at):
                raise KeyboardInterrupt


@pytest.mark.parametrize(("what", "left"), [("planning", 4), ("compressing", 1)])
def test_an_interrupted_compression_goes_on(settings, out, tmp_path, what, left):
    compress_run(settings, tmp_path / "through")
    with pytest.raises(KeyboardInterrupt):
        compress_run(settings, out, progress=Stop(what, 2))
    assert names_in(out) == ["args.yaml", "notes"]
    seen = Stop()
    report = compress_run({}, out, resume=True, progress=seen)
    assert len(seen.told) == left  # of three layers planned and two compressed, those not done
    assert names_in(out) == ["args.yaml", "model", "report.html", "report.json"]
    assert_same_weights(out, tmp_path / "through")
    assert report.plan == read_report(tmp_path / "through").plan
    assert compress_run({}, out, resume=True) == read_report(out)  # over: nothing is done again


def test_a_resumed_compression_keeps_all_but_its_budget(settings, out):
    with pytest.raises(KeyboardInterrupt):
        compress_run(settings, out, progress=Stop("compressing", 1))
    with pytest.raises(GMError, match="was begun with seed=0, not 1"):
        compress_run({"seed": 1}, out, resume=True)
    report = compress_run({"budget": ["80%"]}, out, resume=True)
    assert report.plan.optimum["budget"] == "80 % of the parameters"
    assert report.settings["budget"] == ["80%"]


def test_a_budget_out_of_reach_is_refused_at_once(settings, out):
    with pytest.raises(GMError, match="cannot be reached: the smallest possible is"):
        compress_run(settings | {"budget": ["5%"]}, out)
    assert not out.parent.exists()


def test_limits_that_exclude_each_other_leave_the_table_for_another(settings, out, tmp_path, monkeypatch):
    monkeypatch.setattr("gmcompress.jobs.check_budgets", lambda *_given, **_named: None)  # which refuses them before
    with pytest.raises(GMError, match=f"--resume {out} goes on from it, also with another budget") as told:
        compress_run(settings | {"budget": ["5%"]}, out)
    assert "5 %" in str(told.value) or "1,288" in str(told.value)
    assert names_in(out) == ["args.yaml", "notes"]
    seen = Stop()
    compress_run({"budget": ["75%"]}, out, resume=True, progress=seen)
    assert {what for what, _ in seen.told} == {"compressing"}
    compress_run(settings, tmp_path / "through")
    assert_same_weights(out, tmp_path / "through")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budget": ["75%", "macs=0"]}, "a budget of multiply-adds is"),
        ({"effort": -1}, "effort is a positive"),
        ({"exclude": ["layer9"]}, "the rule 'layer9' matches no layer"),
        ({"features": 1, "blocks": ["layer9"], "budget": [], "rank": 1}, "no module 'layer9'"),
    ],
)
def test_what_fails_at_once_leaves_nothing(settings, out, change, said):
    for command in (compress_run, train_run) if "features" not in change else (train_run,):
        with pytest.raises(GMError, match=said):
            command(settings | change, out)
        assert not out.parent.exists()


def test_nothing_to_resume(out):
    with pytest.raises(GMError, match=r"holds no run to resume: it has no args\.yaml"):
        compress_run({}, out, resume=True)


def test_a_training_starts_from_what_was_compressed_once(settings, out, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        train_run(settings | {"epochs": 1}, out, progress=Stop("compressing", 1))
    assert names_in(out) == ["args.yaml", "notes"]
    report = train_run({}, out, resume=True)
    names = ["args.yaml", "before.json", "checkpoint-0001", "model", "report.html", "report.json", "start"]
    assert names_in(out) == [*names, "summary.csv"]
    assert report.settings["calibration"] == "calibrated on 32 training images"
    assert set(report.accuracy) == {"dense", "compressed", "tuned"}
    must_fail(assert_same_weights, out, out / "start")
    assert validate_run({"compressed": str(out / "start")})[2].top1 == report.accuracy["compressed"]
    with pytest.raises(GMError, match=f"goes on with: gmcompress train --resume {out}"):
        compress_run({}, out, resume=True)
    forbid(monkeypatch)
    shutil.copytree(out, out.parent / "again")
    again = train_run({}, out.parent / "again", resume=True)
    assert again.accuracy == report.accuracy
    assert_same_weights(out.parent / "again", out)


def test_a_training_that_diverges_leaves_its_start_for_another_rate(settings, out, monkeypatch):
    with pytest.raises(
        GMError, match=r"the loss is nan.*--resume .* goes on from it, also with other settings of train"
    ):
        train_run(settings | {"epochs": 1, "lr": 1e30, "clip_grad": 0}, out)
    assert names_in(out) == ["args.yaml", "before.json", "start"]
    forbid(monkeypatch)
    with pytest.raises(GMError, match="was begun with budget"):
        train_run({"budget": ["60%"]}, out, resume=True)
    report = train_run({"lr": 0.01, "clip_grad": 5}, out, resume=True)
    assert report.settings["lr"] == 0.01
    assert len(report.history) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def test_the_other_processes_start_from_what_the_first_one_wrote(settings, out, monkeypatch):
    chosen = Settings.read(settings)
    dense = compressing.build(chosen)
    compressed = _started(chosen, dense, out, compressing.silent)
    forbid(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    before = sorted(out.rglob("*"))
    other = _started(chosen, dense, out, compressing.silent)
    assert sorted(out.rglob("*")) == before
    for (name, first), (same, second) in zip(
        compressed.model.state_dict().items(), other.model.state_dict().items(), strict=True
    ):
        assert name == same
        assert torch.equal(first, second)
    assert other.plan == compressed.plan


def test_another_process_waits_for_the_report(settings, out, monkeypatch):
    report = compress_run(settings, out)
    shutil.move(out, out.parent / "finished")
    forbid(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(folders, "WAIT", 0.01)
    found = []
    waiting = threading.Thread(target=lambda: found.append(compress_run(settings, out)))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    shutil.move(out.parent / "finished", out)
    waiting.join(30)
    assert found == [type(report).from_json(report.to_json())]


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with folders.begun(tmp_path / "out", Settings(), resume=False):
        pass
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# From a folder


def test_training_from_a_compressed_folder_fits_nothing_anew(settings, out, tmp_path, monkeypatch):
    first = compress_run(settings, out)
    forbid(monkeypatch)
    more = DIGITS | {"compressed": str(out), "epochs": 0, "recalibrate": "never"}
    report = train_run(more, tmp_path / "tuned")
    assert report.plan == first.plan
    for old, new in zip(first.layers, report.layers, strict=True):
        same = ("layer", "structure", "dense", "stored", "distance_before", "distance_compressed")
        assert {name: new[name] for name in same} == {name: old[name] for name in same}
        for name in ("relative_error", "svd_error"):
            assert new[name] == pytest.approx(old[name], rel=1e-4)
        assert new["loss"] == pytest.approx(new["relative_error"] ** 2)
    assert "calibration" not in report.settings


def test_a_compressed_folder_takes_no_budget(settings, out):
    del settings["samples"]
    with pytest.raises(GMError, match="budget and compressed do not go together"):
        compress_run(settings | {"compressed": "small"}, out)


def test_the_notes_are_those_of_the_api(settings, out):
    with pytest.raises(KeyboardInterrupt):
        compress_run(settings, out, progress=Stop("compressing", 2))
    fits = list((out / "notes" / "fits").glob("fit-*.safetensors"))
    assert len(fits) == 1
    assert read_tensors(fits[0])
