"""Runs: accuracy, and a training that is killed and goes on as if nothing had happened."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import must_fail
from safetensors.torch import load_file, save_file
from torch import nn

import gmcompress as gm
from gmcompress import GMError
from gmcompress.files import file_digest, read_json, sealed, unsealed, write_json
from gmcompress.runs import (
    Settings,
    accuracy,
    benchmark_run,
    compress_run,
    demo_run,
    group_facts,
    plan_run,
    read_report,
    train_run,
    validate_run,
)
from gmcompress.runs.settings import write_yaml

NETWORK = {"model": "test_resnet", "num_classes": 10, "in_chans": 1, "group": "C4xC4", "rank": 1}
DIGITS = {"dataset": "digits", "img_size": 8, "epochs": 2, "seed": 1, "recalibrate": "never"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The weights of a dense network."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    dense = timm.create_model("test_resnet", num_classes=10, in_chans=1, zero_init_last=False)
    save_file(dense.state_dict(), file)
    return str(file)


@pytest.fixture
def settings(checkpoint):
    return NETWORK | DIGITS | {"checkpoint": checkpoint}


def weights(folder):
    return load_file(Path(folder) / "model" / "model.safetensors")


def assert_same_weights(folder, other):
    """Equal to 1e-6."""
    found, expected = weights(folder), weights(other)
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy


def counted(model, batches, best):
    """The slow twin: image by image, whether the label is among the best logits."""
    hits, total = 0, 0
    for inputs, labels in batches:
        for image, label in zip(inputs, labels, strict=True):
            logits = model(image[None])[0].tolist()
            ranked = sorted(range(len(logits)), key=lambda each: -logits[each])
            hits, total = hits + (int(label) in ranked[:best]), total + 1
    return 100 * hits / total


def assert_accuracy(model, batches, judged):
    found = accuracy(model, batches)
    assert found.images == sum(len(labels) for _, labels in batches)
    assert found.top1 == pytest.approx(counted(model, judged, 1))
    assert found.top5 == pytest.approx(counted(model, judged, 5))


@pytest.mark.parametrize("classes", [3, 12])
def test_accuracy_counts_over_everything(generator, classes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).train()
    sizes = (4, 4, 3)
    batches = [(torch.randn(n, 3, 2, 2), torch.randint(classes, (n,), generator=generator)) for n in sizes]
    assert_accuracy(model, batches, batches)
    assert model.training
    must_fail(assert_accuracy, model, batches, [(inputs, (labels + 1) % classes) for inputs, labels in batches])


@pytest.mark.parametrize(
    ("model", "label", "said"),
    [
        (nn.Linear(4, 3), 3, "a label is 3, but the model has 3 classes"),
        (nn.Linear(5, 3), 0, "does not run on inputs"),
        (nn.Unflatten(1, (2, 2)), 0, "needs a classifier"),
    ],
)
def test_accuracy_of_what_has_none(model, label, said):
    model.register_parameter("one", nn.Parameter(torch.zeros(1)))
    with pytest.raises(GMError, match=said):
        accuracy(model, [(torch.zeros(1, 4), torch.tensor([label]))])


def test_accuracy_of_nothing():
    with pytest.raises(GMError, match="loader is empty"):
        accuracy(nn.Linear(1, 1), [])


# ---------------------------------------------------------------------------------------------------------------------
# Compress and train


def test_compress_writes_a_model_and_a_report(settings, tmp_path):
    report = compress_run(settings, tmp_path / "out")
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        "args.yaml",
        "model",
        "report.html",
        "report.json",
    ]
    assert read_report(tmp_path / "out") == type(report).from_json(report.to_json())
    assert set(report.accuracy) == {"dense", "compressed"}
    small = gm.load(tmp_path / "out" / "model")
    assert sum(each.numel() for each in small.parameters()) == report.after.parameters < report.before.parameters
    _, _, found = validate_run({"compressed": str(tmp_path / "out")})
    assert found.top1 == report.accuracy["compressed"]


def summary_of(folder):
    """The cells of summary.csv."""
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.reader(file))


def test_train_writes_everything(settings, tmp_path):
    seen = []
    report = train_run(settings, tmp_path / "out", progress=lambda what, *_: seen.append(what))
    names = {"args.yaml", "before.json", "checkpoint-0002", "model", "report.html", "report.json", "start"}
    assert {each.name for each in (tmp_path / "out").iterdir()} == names | {"summary.csv"}
    trying = {"compressing", "validating the dense network", "trying learning rates"}
    assert trying | {"epoch 1 of 2", "epoch 2 of 2"} <= set(seen)
    assert set(report.accuracy) == {"dense", "compressed", "tuned"}
    assert [row["epoch"] for row in report.history] == [0, 1]
    assert report.accuracy["tuned"] == report.history[-1]["top1"]
    assert report.settings["seed"] == 1
    assert all(row["distance_tuned"] is not None for row in report.layers)
    rows = summary_of(tmp_path / "out")
    assert rows[0] == ["epoch", "loss", "lr", "seconds", "trial", "top1", "top5"]
    assert [row[0] for row in rows[1:]] == ["0", "1"]
    trial = json.loads(rows[1][4])
    assert trial["losses"][str(trial["lr"])] == min(filter(None, trial["losses"].values()))
    assert rows[2][4] == ""
    _, _, found = validate_run({"compressed": str(tmp_path / "out" / "model")})
    assert found.top1 == report.accuracy["tuned"]


def test_train_for_minutes_with_every_option(settings, tmp_path):
    seen = []
    del settings["epochs"]
    more = {"minutes": 0.02, "features": 0.1, "blocks": ["layer2.0"], "anneal": 0.5, "trial_lrs": [0.01], "workers": 0}
    report = train_run(settings | more, tmp_path / "out", progress=lambda what, *_: seen.append(what))
    assert "epoch 1" in seen
    assert report.history[-1]["lr"] < 0.01
    assert report.settings["minutes"] == 0.02
    assert read_report(tmp_path / "out").history == report.history


def test_train_goes_on_from_a_compressed_folder(settings, tmp_path):
    compress_run(settings, tmp_path / "small")
    folder = {"compressed": str(tmp_path / "small")}
    report = train_run(folder | {"epochs": 1, "seed": 1}, tmp_path / "tuned")
    again = train_run(folder | {"compressed": str(tmp_path / "tuned"), "epochs": 0}, tmp_path / "twice")
    assert report.accuracy["compressed"] == read_report(tmp_path / "small").accuracy["compressed"]
    assert again.accuracy["compressed"] == pytest.approx(report.accuracy["tuned"])
    for first, second in zip(report.layers, again.layers, strict=True):
        assert second["distance_compressed"] == pytest.approx(first["distance_tuned"])
        assert second["relative_error"] > first["relative_error"]  # away from the nearest weight


def test_another_run_does_not_go_over_this_one(settings, tmp_path):
    (tmp_path / "mine.txt").touch()
    for command in (compress_run, train_run):
        with pytest.raises(GMError, match="is not empty"):
            command(settings, tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"opt": "sdg"}, "timm knows no optimizer 'sdg'"),
        ({"lr": 1e30, "clip_grad": 0}, "the loss is nan"),
        ({"batch_size": 2000}, "fewer than one batch"),
        ({"group": "Y4"}, "unknown group family"),
    ],
)
def test_a_run_that_fails_at_once_leaves_nothing(settings, tmp_path, change, said):
    with pytest.raises(GMError, match=said):
        train_run(settings | change, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": ""}, "which network"),
        ({"model": "resnet1800"}, "timm knows no model 'resnet1800'; the nearest are 'resnet18'"),
        ({"checkpoint": None}, "it has no trained weights"),
        ({"pretrained": True}, "both pretrained and a checkpoint"),
        ({"checkpoint": "nowhere.pt"}, "nowhere.pt does not exist"),
        ({"num_classes": 7}, "does not fit test_resnet: size mismatch for fc.weight"),
        ({"model_kwargs": ["stem=3"]}, "timm cannot build 'test_resnet'.*stem"),
        ({"model_kwargs": ["stem"]}, "KEY=VALUE"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"compressed": "nowhere"}, "nowhere holds no compressed model"),
    ],
)
def test_networks_that_cannot_be_had(settings, tmp_path, change, said):
    with pytest.raises(GMError, match=said):
        train_run(settings | change, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_pretrained_weights_with_other_classes_are_refused_before_any_download(tmp_path):
    with pytest.raises(GMError, match="its classifier would be random"):
        compress_run({"model": "resnet18", "pretrained": True, "num_classes": 10}, tmp_path / "out")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(settings, tmp_path):
    with pytest.raises(GMError, match="torch finds no GPU"):
        train_run(settings | {"device": "cuda"}, tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Killed and resumed


def start(settings, folder):
    """A training in a process of its own."""
    flags = []
    for name, value in settings.items():
        flags += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two runs at once, on two cores
    command = [sys.executable, "-m", "gmcompress", "train", *flags, "--output", str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, checkpoint):
    """A run to its end, and one with the same settings that was killed in its second epoch."""
    place = tmp_path_factory.mktemp("runs")
    longer = {
        "epochs": 3,
        "batch_size": 32,
        "img_size": 16,
        "model_ema": True,
        "model_ema_decay": 0.9,
        "recalibrate": "auto",
    }
    settings = NETWORK | DIGITS | longer | {"checkpoint": checkpoint}
    through, killed = start(settings, place / "through"), start(settings, place / "killed")
    summary = place / "killed" / "summary.csv"
    while not summary.is_file():
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    finish(through)
    return place


def test_a_killed_run_was_in_the_middle(interrupted):
    names = {each.name for each in (interrupted / "killed").iterdir() if not each.name.startswith(".")}
    assert names == {"args.yaml", "before.json", "checkpoint-0001", "start", "summary.csv"}
    assert len((interrupted / "killed" / "summary.csv").read_text().splitlines()) == 2


def test_a_resumed_run_ends_as_if_it_had_not_been_killed(interrupted, tmp_path):
    for name in ("killed", "tampered"):
        shutil.copytree(interrupted / "killed", tmp_path / name)
    momentum = tmp_path / "tampered" / "checkpoint-0001" / "optimizer.safetensors"
    save_file({name: torch.zeros_like(each) for name, each in load_file(momentum).items()}, momentum)
    numbers = unsealed(read_json(momentum.with_name("checkpoint.json")), momentum)
    numbers["digests"]["optimizer"] = file_digest(momentum)
    write_json(momentum.with_name("checkpoint.json"), sealed(numbers))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other processes, so that sums are taken in the same order
    for name in ("killed", "tampered"):
        train_run({}, tmp_path / name, resume=True)
    torch.set_num_threads(threads)
    assert_same_weights(tmp_path / "killed", interrupted / "through")
    must_fail(assert_same_weights, tmp_path / "tampered", interrupted / "through")  # the control: momentum forgotten
    columns = [
        [row[:3] + row[5:] for row in summary_of(folder)] for folder in (tmp_path / "killed", interrupted / "through")
    ]
    assert columns[0] == columns[1]  # all but the seconds, of epochs and trial
    assert len(columns[0]) == 4


def test_the_summary_has_every_epoch_once_it_is_over(settings, tmp_path):
    def stop(what, *_):
        if what == "measuring displacement ranks":  # the first thing after the last epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(settings, tmp_path / "out", progress=stop)
    assert [row[0] for row in summary_of(tmp_path / "out")] == ["epoch", "0", "1"]


def test_a_run_that_is_over_can_be_resumed_to_the_same_end(settings, tmp_path):
    train_run(settings, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    (tmp_path / "again" / "summary.csv").write_text("epoch,lo")
    shutil.rmtree(tmp_path / "again" / "model")
    train_run({}, tmp_path / "again", resume=True)
    assert_same_weights(tmp_path / "again", tmp_path / "out")
    assert (tmp_path / "again" / "summary.csv").read_text() == (tmp_path / "out" / "summary.csv").read_text()


def test_a_resumed_run_keeps_its_settings(settings, tmp_path):
    write_yaml(tmp_path / "args.yaml", Settings.read(settings | {"lr": 0.01}))
    with pytest.raises(GMError, match=r"was begun with group=C4xC4, not C8"):
        train_run({"group": "C8"}, tmp_path, resume=True)
    report = train_run({"lr": 0.02, "workers": 0}, tmp_path, resume=True)  # nothing is trained yet: lr may change
    assert len(report.history) == 2
    assert report.settings["lr"] == 0.02
    assert yaml.safe_load((tmp_path / "args.yaml").read_text())["workers"] == 0
    with pytest.raises(GMError, match=r"was begun with lr=0\.02, not 0\.03"):
        train_run({"lr": 0.03}, tmp_path, resume=True)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(GMError, match=r"holds no run to resume: it has no args\.yaml"):
        train_run({}, tmp_path, resume=True)


# ---------------------------------------------------------------------------------------------------------------------
# The others


def test_the_plan_is_that_of_compress(settings):
    plan = plan_run({name: value for name, value in settings.items() if name != "checkpoint"})
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    assert plan == gm.plan(model, "C4xC4", rank=1, inputs=torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("from_folder", [False, True])
def test_benchmark_times_four_networks_at_two_sizes(settings, tmp_path, from_folder):
    if from_folder:
        compress_run(settings | {"batch_size": 3}, tmp_path / "out")
        settings = {"compressed": str(tmp_path / "out")}
    rows = benchmark_run(settings | {"batch_size": 3}, repeats=2)
    networks = ["dense", "compressed", "frozen", "densified"]
    assert [(row["batch"], row["network"]) for row in rows] == [(size, name) for size in (1, 3) for name in networks]
    for dense, small, frozen, back in (rows[:4], rows[4:]):
        assert frozen["parameters"] == small["parameters"]
        assert frozen["macs"] <= max(small["macs"], dense["macs"])  # a frozen layer may be on the dense path
        assert dense["ratio"] == 1.0
        assert small["parameters"] < dense["parameters"] == back["parameters"]
        assert small["ratio"] == pytest.approx(small["latency_ms"] / dense["latency_ms"])
    assert rows[4]["macs"] == 3 * rows[0]["macs"]


def test_facts_about_groups():
    assert group_facts("C2^3")["normal_subgroups"] == 16  # of a vector space over two elements, all of them
    assert group_facts("S4") | {"quotients": 0} == {
        "group": "S4",
        "order": 24,
        "abelian": False,
        "exponent": 12,
        "generators": 2,
        "normal_subgroups": 4,
        "quotients": 0,
    }
    assert group_facts("C32xC32")["normal_subgroups"] is None


def test_a_report_that_is_none(tmp_path):
    with pytest.raises(GMError, match="holds no report"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({"model": "x"}))
    with pytest.raises(GMError, match=r"report\.json: a report is an object"):
        read_report(tmp_path)


def test_the_demo(tmp_path):
    threads = torch.get_num_threads()
    report = demo_run(tmp_path / "demo", smoke=True)
    assert torch.get_num_threads() == threads
    assert list(report.accuracy) == ["dense", "compressed", "tuned", "frozen"]
    assert {row["path"] for row in report.layers} <= {"dense", "structured"}, "the last is frozen"
    assert report.accuracy["tuned"] > report.accuracy["compressed"]
    assert report.after.parameters < report.before.parameters / 4
    assert (tmp_path / "demo" / "report.html").read_text().startswith("<!")
    again = demo_run(tmp_path / "demo", smoke=True)  # over the one before
    assert again.accuracy == report.accuracy
