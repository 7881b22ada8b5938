"""Fine-tuning: it learns, it is reproducible, it resumes exactly, and it names what it cannot work with."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import zoo
from conftest import assert_close
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gmcompress as gm
from gmcompress.tuning import Recipe, distillation_loss, fine_tune


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
    small = gm.compress(trained, "C4").model
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


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw"}, {"ema": 0.8}], ids=["sgd", "adamw", "ema"])
def test_an_interrupted_training_resumes_exactly(options, tmp_path, trained):
    small = gm.compress(trained, "C4").model
    recipe = Recipe(epochs=4, **options)
    whole, history = fine_tune(small, loader(), recipe, teacher=trained, folder=tmp_path / "whole")

    def stop(epoch, step, _steps, _loss):
        if (epoch, step) == (2, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(small, loader(), recipe, teacher=trained, folder=tmp_path / "cut", progress=stop)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint-0002"]
    (tmp_path / "cut" / ".checkpoint-0003.half").mkdir()  # as a kill in the middle of writing leaves it
    resumed, again = fine_tune(small, loader(), recipe, teacher=trained, folder=tmp_path / "cut", resume=True)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint-0004"]
    assert [row["loss"] for row in again] == [row["loss"] for row in history]
    for key, each in whole.state_dict().items():
        assert torch.equal(each, resumed.state_dict()[key]), key


def test_checkpoints_of_another_kind_are_refused(tmp_path, trained):
    small = gm.compress(trained, "C4").model
    recipe = Recipe(epochs=2)
    fine_tune(small, loader(), recipe, teacher=trained, folder=tmp_path)
    with pytest.raises(gm.GMError, match=r"another recipe \(seed: 0 there, 1 here\)"):
        fine_tune(small, loader(), replace(recipe, seed=1), folder=tmp_path, resume=True)
    with pytest.raises(gm.GMError, match="does not fit this training"):
        fine_tune(trained, loader(), recipe, folder=tmp_path, resume=True)
    weights = tmp_path / "checkpoint-0002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(gm.GMError, match="no complete safetensors"):
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
