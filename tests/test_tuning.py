"""Fine-tuning: it learns, it is reproducible, it resumes exactly, and it names what it cannot work with."""

import copy
import json
import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812
import zoo
from conftest import assert_close, must_fail
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gmcompress as gm
from gmcompress.checkpoints import read_history
from gmcompress.tuning import Recipe, distillation_loss, find_blocks, fine_tune
from gmcompress.tuning.losses import temperature_of
from gmcompress.tuning.running import Run
from gmcompress.tuning.trial import chosen


def dataset(n=96):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 8, generator=generator)
    return TensorDataset(inputs, (inputs[:, :3]).argmax(1))


def loader(batch_size=16, **options):
    return DataLoader(dataset(), batch_size, shuffle=True, **options)


def normed():
    """A small network with BatchNorm and dropout, so that state and random numbers matter."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 16), nn.Linear(16, 3)
    )


@pytest.fixture(scope="module")
def trained():
    """A dense model that has learnt the data."""
    return fine_tune(normed(), loader(), Recipe(epochs=12, lr=0.1))[0]


def accuracy(model):
    inputs, labels = dataset().tensors
    with torch.no_grad():
        return float((model.eval()(inputs).argmax(1) == labels).float().mean())


def test_tuning_recovers_what_compression_cost(trained):
    result = gm.compress(trained, "C4", rank=0)
    raw = accuracy(result.model)
    tuned = gm.tune(result, loader(), epochs=10, lr=0.05)
    assert accuracy(trained) > 0.9
    assert accuracy(tuned.model) > max(raw + 0.1, 0.8)
    assert accuracy(result.model) == raw  # the model given is not the one that is tuned
    assert len(tuned.report.history) == 10
    assert tuned.report.history[-1]["loss"] < tuned.report.history[0]["loss"]
    assert tuned.report.layers[0]["distance_tuned"] < 1e-6  # still a group matrix
    assert not tuned.model.training


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(trained):
    small = gm.compress(trained, "C4", rank=1).model
    recipe = Recipe(epochs=2, ema=0.9)
    first, again = (fine_tune(small, loader(), recipe, teacher=trained)[0] for _ in range(2))
    other = fine_tune(small, loader(), replace(recipe, seed=1), teacher=trained)[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_the_callers_random_numbers_stay_where_they_were():
    model = normed()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = (torch.rand(1).item(), np.random.rand(), random.random())
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    fine_tune(model, loader(), Recipe(epochs=1))
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 0.02}, {"optimizer": "adamw"}, {"ema": 0.8}, {"features": 0.5}, {"anneal": 0.9}],
    ids=["trial", "lr", "adamw", "ema", "features", "anneal"],
)
def test_an_interrupted_training_resumes_exactly(options, tmp_path, trained):
    small = gm.compress(trained, "C4", rank=1).model
    recipe = Recipe(epochs=4, **options)
    told = []

    def tell(row):
        told.append(row)
        assert read_history(tmp_path / "whole") == told, "the checkpoint is there before"

    whole, history = fine_tune(small, loader(), recipe, teacher=trained, folder=tmp_path / "whole", each_epoch=tell)
    assert told == history

    def stop(epoch, step, _steps, _loss):
        if (epoch, step) == (2, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(small, loader(), recipe, teacher=trained, folder=tmp_path / "cut", progress=stop)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint-0002"]
    (tmp_path / "cut" / ".checkpoint-0003.half").mkdir()  # as a kill in the middle of writing leaves it
    later = []
    options = {"teacher": trained, "resume": True, "each_epoch": later.append}
    resumed, again = fine_tune(small, loader(), recipe, folder=tmp_path / "cut", **options)
    assert later == again[2:], "those before were told before"
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint-0004"]
    assert [row["loss"] for row in again] == [row["loss"] for row in history]
    for key, each in whole.state_dict().items():
        assert torch.equal(each, resumed.state_dict()[key]), key


def test_checkpoints_of_another_kind_are_refused(tmp_path, trained):
    small = gm.compress(trained, "C4", rank=1).model
    recipe = Recipe(epochs=2)
    fine_tune(small, loader(), recipe, teacher=trained, folder=tmp_path)
    with pytest.raises(gm.GMError, match=r"another recipe \(seed: 0 there, 1 here\)"):
        fine_tune(small, loader(), replace(recipe, seed=1), folder=tmp_path, resume=True)
    with pytest.raises(gm.GMError, match="does not fit this training"):
        fine_tune(trained, loader(), recipe, folder=tmp_path, resume=True)
    weights = tmp_path / "checkpoint-0002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(gm.GMError, match="was changed, truncated or replaced"):
        fine_tune(small, loader(), recipe, folder=tmp_path, resume=True)
    with pytest.raises(gm.GMError, match="needs the folder"):
        fine_tune(small, loader(), recipe, resume=True)


def test_the_loss_is_that_of_hinton(generator):
    found, wanted = (torch.randn(5, 4, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3, 0])
    recipe = Recipe(epochs=1, temperature=3.0, distillation=0.7, task=0.3)
    p = (wanted / 3).softmax(1)
    kl = (p * (p.log() - (found / 3).softmax(1).log())).sum(1).mean()
    expected = 0.7 * 9 * kl + 0.3 * F.cross_entropy(found, labels)
    assert_close(distillation_loss(found, wanted, labels, recipe), expected)
    assert_close(distillation_loss(found, None, labels, recipe), F.cross_entropy(found, labels))
    assert_close(distillation_loss(found, found, None, recipe), torch.tensor(0.0))


@pytest.mark.parametrize(("classes", "scale"), [(10, 8.0), (1000, 6.0), (3, 8.0)])
def test_the_temperature_leaves_a_quarter_of_the_entropy(classes, scale, generator):
    logits = scale * torch.randn(64, classes, generator=generator)
    found = temperature_of(logits)
    share = torch.distributions.Categorical(logits=logits / found).entropy().mean() / math.log(classes)
    assert 1 < found < 8
    assert abs(share - 0.25) < 0.005
    assert temperature_of(logits.reshape(8, 8, classes), torch.zeros(8, 8, dtype=torch.int64)) == found
    assert temperature_of(logits.T.reshape(1, classes, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int64)) == found
    assert (temperature_of(0.1 * logits), temperature_of(100 * logits)) == (1.0, 8.0)  # its ends


def test_the_temperature_is_found_from_the_teachers_answers(trained, tmp_path):
    sure = copy.deepcopy(trained)
    sure[-1].weight.data *= 5
    small, recipe = gm.compress(sure, "C4", rank=1).model, Recipe(epochs=2, lr=0.02)
    found, _ = fine_tune(small, loader(), recipe, teacher=sure, folder=tmp_path)
    checkpoint = json.loads((tmp_path / "checkpoint-0002" / "checkpoint.json").read_text())
    temperature = checkpoint["decided"]["temperature"]
    assert 1 < temperature < 8
    given, _ = fine_tune(small, loader(), replace(recipe, temperature=temperature), teacher=sure)
    assert_same_weights(found, given)
    other, _ = fine_tune(small, loader(), replace(recipe, temperature=8.0), teacher=sure)
    must_fail(assert_same_weights, found, other)


def test_the_axis_of_classes(generator):
    recipe = Recipe(epochs=1)
    tokens = torch.randn(2, 5, 7, generator=generator)
    expected = F.cross_entropy(tokens.reshape(10, 7), torch.zeros(10, dtype=torch.int64))
    assert_close(distillation_loss(tokens, None, torch.zeros(2, 5, dtype=torch.int64), recipe), expected)
    places = tokens.movedim(-1, 1)
    assert_close(distillation_loss(places, None, torch.zeros(2, 5, dtype=torch.int64), recipe), expected)


def test_recalibration_restores_batch_norm_and_keeps_what_is_better(trained):
    broken = copy.deepcopy(trained)
    broken[1].running_mean.fill_(7.0)
    recalibrated, _ = fine_tune(broken, loader(), Recipe(epochs=0), teacher=trained)
    assert accuracy(recalibrated) > accuracy(broken) + 0.1
    assert (recalibrated[1].running_mean - trained[1].running_mean).abs().max() < 1
    assert recalibrated[1].momentum == trained[1].momentum
    kept, _ = fine_tune(trained, loader(), Recipe(epochs=0), teacher=trained)  # at a loss of zero nothing is better
    assert torch.equal(kept[1].running_mean, trained[1].running_mean)
    untouched, _ = fine_tune(broken, loader(), Recipe(epochs=0, recalibrate=False), teacher=trained)
    assert torch.equal(untouched[1].running_mean, broken[1].running_mean)


def test_batches_of_every_kind():
    pairs = [(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))]
    fine_tune(zoo.mlp(), pairs, Recipe(epochs=1))
    fine_tune(zoo.mlp(), [torch.randn(4, 8)], Recipe(epochs=1), teacher=zoo.mlp())
    named = [{"x": torch.randn(4, 8), "scale": torch.ones(4, 1), "labels": torch.tensor([0, 1, 2, 0])}]
    tuned, history = fine_tune(zoo.ControlFlow(), named, Recipe(epochs=1), evaluate=lambda _: {"top1": 50.0})
    assert history[0]["top1"] == 50.0
    assert isinstance(tuned, zoo.ControlFlow)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loader": []}, "the loader is empty"),
        ({"loader": iter([torch.zeros(2, 8)])}, "needs a length"),
        ({"loader": [torch.zeros(2, 8)]}, "neither a teacher nor labels"),
        ({"loader": [("a", "b")]}, "a batch is"),
        ({"loader": [(torch.zeros(2, 8), torch.zeros(3, dtype=torch.int64))]}, r"labels of shape \(3,\) do not fit"),
        ({"teacher": nn.Linear(8, 4)}, r"teacher's outputs have shape \(16, 4\), the model's \(16, 3\)"),
        ({"optimizer": "sgdd"}, "timm knows no optimizer 'sgdd'; the nearest are 'sgd"),
        ({"lr": 1e9, "clip": None}, "the loss is (nan|inf)"),
        ({"epochs": -1}, "epochs must be at least 0"),
        ({"minutes": 1}, "epochs or minutes, not both: 2 and 1"),
        ({"epochs": 0, "minutes": -1}, "minutes must be positive"),
        ({"trial_lrs": (1e30, 1e35), "clip": None}, r"not finite at any of the learning rates tried, 1e\+30, 1e\+35"),
        ({"trial_lrs": (0.1, 0)}, "trial_lrs must be positive"),
        ({"trial_lrs": 0.1}, "trial_lrs is a sequence"),
        ({"trial_steps": 0}, "trial_steps must be positive"),
        ({"features": 1}, "features=1 compares with a teacher"),
        ({"blocks": ("0",), "features": 0}, "only where features"),
        ({"blocks": "0"}, "blocks is a sequence"),
        ({"features": 1, "blocks": ("9",), "teacher": normed()}, "no module '9'"),
        ({"anneal": 1.5}, "at most 1"),
        ({"anneal": 0.5}, "anneal=0.5 needs a teacher with layers"),
        ({"anneal": 0.5, "teacher": normed()}, "anneal=0.5 needs a teacher with layers"),  # the student has none
        ({"decay": "kernel"}, 'decay is "weight" or "factors"'),
        ({"temperature": 0}, "temperature must be positive"),
        ({"ema": 1.5}, "between 0 and 1"),
        ({"amp": "int8"}, 'amp is "no"'),
        ({"recalibrate": "maybe"}, "recalibrate is True"),
        ({"learning_rate": 1}, "tune has no option 'learning_rate'; the nearest are"),
    ],
)
def test_bad_input_is_named(change, message):
    options = {"loader": loader(), "epochs": 2, "optimizer": "sgd", **change}
    with pytest.raises(gm.GMError, match=message):
        gm.tune(normed(), options.pop("loader"), **options)


def test_a_frozen_model_has_nothing_to_learn():
    with pytest.raises(gm.GMError, match="frozen"):
        gm.tune(zoo.mlp().requires_grad_(False), loader(), epochs=1)


# ---------------------------------------------------------------------------------------------------------------------
# The trial of learning rates


def assert_same_weights(first, second):
    for key, each in first.state_dict().items():
        assert torch.equal(each, second.state_dict()[key]), key


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw"}, {"ema": 0.8}], ids=["sgd", "adamw", "ema"])
@pytest.mark.parametrize("absurd", [1e-9, 1e6], ids=["too small", "too large"])
def test_the_trial_picks_the_good_rate_and_leaves_no_trace(options, absurd, trained):
    small = gm.compress(trained, "C4", rank=1).model
    recipe = Recipe(epochs=2, trial_lrs=(absurd, 0.02), trial_steps=12, **options)
    found, history = fine_tune(small, loader(), recipe, teacher=trained)
    trial = json.loads(history[0]["trial"])
    assert trial["lr"] == 0.02
    assert set(trial["losses"]) == {"0.02", str(absurd)}
    assert trial["seconds"] > 0
    assert "trial" not in history[1]
    given, plain = fine_tune(small, loader(), replace(recipe, lr=0.02), teacher=trained)
    assert "trial" not in plain[0]
    assert_same_weights(found, given)
    other, _ = fine_tune(small, loader(), replace(recipe, lr=0.03), teacher=trained)
    must_fail(assert_same_weights, found, other)


@pytest.mark.parametrize(
    ("rates", "tried"),
    [
        ((1e5, 0.05, 1e6), ["0.05", "100000.0"]),  # the middle does harm: down from there, and no further up
        ((0.01, 0.02, 1e5), ["0.01", "0.02", "100000.0"]),  # one too far, so one back
        ((1e-9, 0.02), ["1e-09", "0.02"]),
    ],
)
def test_the_climb(rates, tried):
    _, history = fine_tune(normed(), loader(), Recipe(epochs=1, trial_lrs=rates, recalibrate=False))
    trial = json.loads(history[0]["trial"])
    assert list(trial["losses"]) == tried
    assert 1e-6 < trial["lr"] < 1
    assert trial["losses"][str(trial["lr"])] < trial["start"]


@pytest.mark.parametrize(
    ("losses", "start", "rate"),
    [
        ({0.1: 1.0, 0.2: 0.5, 0.4: 0.75}, 1.0, 0.4),  # half of the fall is enough
        ({0.1: 1.0, 0.2: 0.5, 0.4: 0.76}, 1.0, 0.2),
        ({0.1: 0.99, 0.2: 0.98, 0.4: 1.04}, 1.0, 0.4),  # so little is won back
        ({0.1: 0.99, 0.2: 0.98, 0.4: 1.06}, 1.0, 0.2),
        ({0.1: 1.2, 0.2: 1.1, 0.4: 1.1}, 1.0, 0.2),  # nothing helps: the least harm, the smaller of equals
        ({0.1: 0.5, 0.2: math.inf}, math.inf, 0.1),
    ],
)
def test_the_rate_chosen(losses, start, rate):
    assert chosen(losses, start) == rate
    assert chosen(losses, start, slack=0.0) == min(losses, key=lambda each: losses[each])


@pytest.mark.parametrize(("steps", "rate"), [(5, 0.4), (6, 0.2)])
def test_where_batches_recur_in_the_trial_the_best_rate_is_taken(steps, rate, monkeypatch):
    """Of 6 batches one judges, so that 5 steps see each of the others once, and 6 see one of them twice."""
    losses = iter([1.0, 0.5, 0.6, 0.7])  # at the start, at 0.2, at 0.4, and at 0.1 where 0.4 was not taken
    monkeypatch.setattr(Run, "loss_on", lambda *_args, **_options: next(losses))
    recipe = Recipe(epochs=1, trial_lrs=(0.1, 0.2, 0.4), trial_steps=steps, recalibrate=False)
    _, history = fine_tune(normed(), loader(), recipe)
    assert json.loads(history[0]["trial"])["lr"] == rate


def test_a_resumed_training_tries_nothing(tmp_path):
    seen = []
    recipe = Recipe(epochs=2)

    def follow(epoch, *_rest):
        seen.append(epoch)
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(normed(), loader(), recipe, folder=tmp_path, progress=follow)
    assert set(seen) == {-1, 0, 1}
    file = tmp_path / "checkpoint-0001" / "checkpoint.json"
    decided = json.loads(file.read_text())["decided"]
    assert (decided["lr"], decided["steps"]) == (decided["trial"]["lr"], 12)
    seen.clear()
    _, history = fine_tune(
        normed(), loader(), recipe, folder=tmp_path, resume=True, progress=lambda epoch, *_: seen.append(epoch)
    )
    assert set(seen) == {1}
    assert json.loads(history[0]["trial"]) == decided["trial"]


class Watched(nn.Linear):
    """Writes down which inputs it saw, and in which mode."""

    seen: list[tuple[bool, float]] = []  # noqa: RUF012 outside the module, whose copies share it

    def forward(self, input):
        self.seen.append((self.training, float(input[0, 0])))
        return super().forward(input)


def test_the_trial_judges_on_batches_that_it_did_not_train_on():
    batches = [(torch.full((2, 4), float(number)), torch.tensor([0, 1])) for number in range(12)]
    fine_tune(Watched(4, 2), batches, Recipe(epochs=1, trial_lrs=(0.01, 0.02), trial_steps=5))
    trial = Watched.seen[: 3 + 2 * (5 + 3)]
    assert {number for training, number in trial if not training} == {0, 1, 2}
    assert [number for training, number in trial if training] == [3, 4, 5, 6, 7] * 2
    assert [number for _, number in Watched.seen[19:]] == list(range(12))


# ---------------------------------------------------------------------------------------------------------------------
# A run of minutes


class Slow:
    """Batches that take their time."""

    def __len__(self):
        return 10

    def __iter__(self):
        for _ in range(10):
            time.sleep(0.03)
            yield torch.ones(4, 8)


def test_minutes_are_kept(tmp_path):
    recipe = Recipe(minutes=0.05, trial_lrs=(0.01, 0.02), trial_steps=3)
    begun = time.perf_counter()
    _, history = fine_tune(normed(), Slow(), recipe, teacher=normed(), folder=tmp_path)
    assert 1.5 < time.perf_counter() - begun < 9  # seconds, of 3 asked for
    numbers = json.loads(next(tmp_path.glob("*/checkpoint.json")).read_text())
    steps = numbers["decided"]["steps"]
    assert 10 < steps < 100
    assert len(history) == math.ceil(steps / 10)
    assert history[-1]["lr"] < 0.05 * json.loads(history[0]["trial"])["lr"]  # the cosine is at its end
    _, again = fine_tune(normed(), Slow(), recipe, teacher=normed(), folder=tmp_path, resume=True)
    assert again == history  # nothing is measured again
    hasty = replace(recipe, minutes=1e-9, lr=0.01, recalibrate=False)
    assert fine_tune(normed(), Slow(), hasty, teacher=normed())[0][1].num_batches_tracked == 1  # at least one step


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


def test_blocks_are_found():
    resnet = timm.create_model("test_resnet", num_classes=10)
    vit = timm.create_model("test_vit", num_classes=10)
    assert find_blocks(resnet)[-4:] == [f"layer{n}.0" for n in (1, 2, 3, 4)]
    assert find_blocks(gm.compress(resnet, "C4", rank=1, overrides={"layer[23].*": None}).model)[-2:] == [
        "layer1.0",
        "layer4.0",
    ]
    assert find_blocks(vit) == [f"blocks.{n}" for n in range(6)]
    assert find_blocks(nn.Linear(2, 2)) == []


def far(model, teacher):
    """The slow twin: the relative squared error of the output of the first structured layer."""
    inputs = dataset().tensors[0]
    with torch.no_grad():
        ours, theirs = model.eval()[0](inputs), teacher.eval()[0](inputs)
    return float(((ours - theirs) ** 2).sum() / ((theirs - theirs.mean()) ** 2).sum())


def test_blocks_come_nearer_to_the_teachers(trained):
    small = gm.compress(trained, "C4", rank=0).model
    recipe = Recipe(epochs=4, lr=0.02, features=5.0, blocks=("0",), recalibrate=False)
    near, history = fine_tune(small, loader(), recipe, teacher=trained)
    control, plain = fine_tune(small, loader(), replace(recipe, features=0.0, blocks=()), teacher=trained)
    assert far(near, trained) < 0.95 * far(control, trained)
    assert history[0]["loss"] > plain[0]["loss"] + 5 * 0.5 * far(near, trained)
    found, _ = fine_tune(small, loader(), replace(recipe, blocks=()), teacher=trained)
    must_fail(assert_same_weights, found, near)  # the blocks found are more than one
    for model in (near, trained):
        assert not any(each._forward_hooks for each in model.modules())


def test_blocks_that_cannot_be_compared_are_named_or_left_out():
    wide = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 3))
    narrow = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 8), nn.Linear(8, 3))
    recipe = Recipe(epochs=1, lr=0.01, features=1.0)
    fine_tune(narrow, loader(), recipe, teacher=wide)
    with pytest.raises(gm.GMError, match=r"block '0' gave \(16, 5\), in the teacher \(16, 4\)"):
        fine_tune(narrow, loader(), replace(recipe, blocks=("1", "0")), teacher=wide)
    with pytest.raises(gm.GMError, match="found no blocks"):
        fine_tune(nn.Linear(8, 3), loader(), recipe, teacher=wide)
