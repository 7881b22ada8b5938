"""Training by the fast product where it takes far fewer multiply-adds: the same training, then the dense path again."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gmcompress as gm
from gmcompress.errors import GMError
from gmcompress.layers import GMConv2d, GMLinear
from gmcompress.tuning import Recipe, fine_tune, running
from gmcompress.tuning.quick import gain, quick_layers

RECIPE = Recipe(epochs=2, lr=0.01, device="cpu")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        GMLinear(32, 32, "lowrank:4"), nn.ReLU(), GMLinear(32, 32, "C2"), nn.ReLU(), GMLinear(32, 3, "lowrank:1")
    )


def loader() -> DataLoader:
    inputs = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), 16, shuffle=True)


@pytest.mark.parametrize(
    ("layer", "quick"),
    [
        (GMLinear(64, 64, "lowrank:16"), True),
        (GMLinear(64, 64, "lowrank:17"), False),
        (GMLinear(1024, 1024, "C16xC16"), True),
        (GMLinear(64, 64, "adapted:8:4x4"), False),
        (GMConv2d(64, 64, 3, "lowrank:16", padding=1), True),
        (GMConv2d(64, 64, 3, "C2", padding=1), False),
        (GMConv2d(64, 64, 3, "lowrank:4", padding=1, groups=2), False),
    ],
    ids=str,
)
def test_what_takes_far_fewer_multiply_adds_is_quick(layer: GMLinear | GMConv2d, quick: bool) -> None:
    assert bool(quick_layers(nn.Sequential(layer))) is quick
    assert layer.groups > 1 if isinstance(layer, GMConv2d) and not quick and gain(layer) > 6 else True


def test_a_frozen_layer_keeps_its_path() -> None:
    frozen = gm.freeze(nn.Sequential(GMLinear(64, 64, "lowrank:4")), "dense")
    assert quick_layers(frozen) == []


def test_the_training_is_the_same_and_ends_on_the_dense_path(monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[str] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        paths.append("".join(each.path[0] for each in model if isinstance(each, GMLinear)))
        return {}

    tuned, history = fine_tune(network(), loader(), RECIPE, evaluate=evaluate)
    monkeypatch.setattr(running, "quick_layers", lambda _model: [])
    slow, slow_history = fine_tune(network(), loader(), RECIPE, evaluate=evaluate)
    assert paths == ["sds", "sds", "ddd", "ddd"]
    assert [each.path for each in tuned if isinstance(each, GMLinear)] == ["dense"] * 3
    assert history[-1]["loss"] == pytest.approx(slow_history[-1]["loss"], rel=1e-4)
    for ours, theirs in zip(tuned.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_where_the_fast_product_does_not_run_it_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_given: object, **_named: object) -> None:
        raise RuntimeError("nested tensors have no strides")

    expected, _ = fine_tune(network(), loader(), RECIPE)
    monkeypatch.setattr("gmcompress.layers.linear.linear", refuse)
    tuned, _ = fine_tune(network(), loader(), RECIPE)
    for ours, theirs in zip(tuned.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_resumed_training_takes_the_same_paths(tmp_path: Path) -> None:
    whole, _ = fine_tune(network(), loader(), RECIPE)

    calls: list[nn.Module] = []

    def stop(model: nn.Module) -> dict[str, float]:
        calls.append(model)
        if len(calls) > 1:
            raise GMError("interrupted")
        return {}

    with pytest.raises(GMError, match="interrupted"):
        fine_tune(network(), loader(), RECIPE, folder=tmp_path, evaluate=stop)
    resumed, _ = fine_tune(network(), loader(), RECIPE, folder=tmp_path, resume=True)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
