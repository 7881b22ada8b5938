"""Laws of the equivariance error: zero for what is equivariant, that of a slow twin for what is not."""

import math

import pytest
import torch
from conftest import assert_close
from market import GROUPS, blobs, slow_act
from torch import Generator, nn

from gmcompress import GMLinear
from gmcompress.commutator import act, equivariance_error, layer_distances
from gmcompress.errors import GMError
from gmcompress.groupconv import GroupConv
from gmcompress.groups import group
from gmcompress.lieconv import LieConv
from gmcompress.motions import disc, move
from gmcompress.networks import GMCNN
from gmcompress.pooling import GroupPool, LiePool

SMALL = [name for name in GROUPS if 1 < group(name).order <= 12]


@pytest.mark.parametrize("name", SMALL)
def test_the_action_and_the_error_of_equivariant_networks(name: str, generator: Generator) -> None:
    table = group(name).table
    signal = torch.randn(2, 1, len(table), generator=generator, dtype=torch.float64)
    for g in range(len(table)):
        assert torch.equal(act(name, g, signal), slow_act(table, g, signal))
    for model, outputs in ((GMCNN(name, 1, 3, head="signal"), "equivariant"), (GMCNN(name, 1, 3), "invariant")):
        found = equivariance_error(model.double(), name, signal)
        assert found["error"] <= found["worst"] < 1e-12
        assert (found["elements"], found["outputs"]) == (len(table) - 1, outputs)
        assert [each["distance"] for each in found["layers"]] == [0.0] * (3 if outputs == "equivariant" else 2)


@pytest.mark.parametrize("name", ["C6", "D4", "Q8", "C4xC2"])
def test_the_error_is_that_of_the_slow_twin(name: str, generator: Generator) -> None:
    table = group(name).table
    model = GroupConv(name, 1, 2, rank=2).double()
    nn.init.normal_(model.filters, generator=generator)
    signal = torch.randn(2, 1, len(table), generator=generator, dtype=torch.float64)
    plain = model(signal).detach()
    errors = [
        float((model(slow_act(table, g, signal)) - slow_act(table, g, plain)).detach().norm() / plain.norm())
        for g in range(1, len(table))
    ]
    found = equivariance_error(model, name, signal)
    assert found["worst"] == pytest.approx(max(errors))
    assert found["element"] == 1 + errors.index(max(errors))
    assert_close(found["error"], (sum(each**2 for each in errors) / len(errors)) ** 0.5)
    assert found["error"] > 0.01
    assert found["layers"][0]["distance"] > 0.01
    assert equivariance_error(model, name, signal, elements=[1])["worst"] == pytest.approx(errors[0])


def test_strides_are_named_and_the_wrong_subgroup_is_noticed(generator: Generator) -> None:
    model = nn.Sequential(GroupConv("C8", 1, 2, stride="C4"), nn.ReLU()).double()
    signal = torch.randn(2, 1, 8, generator=generator, dtype=torch.float64)
    assert equivariance_error(model, "C8", signal, stride="C4")["error"] < 1e-12
    with pytest.raises(GMError, match="stride="):
        equivariance_error(model, "C8", signal)
    with pytest.raises(GMError, match="cannot move"):
        equivariance_error(model, "C8", signal, invariant=False)
    assert equivariance_error(model, "C8", signal, invariant=True)["error"] > 0.01
    other = nn.Sequential(GroupConv("D4", 1, 2, stride=[2]), nn.Flatten(), nn.Linear(8, 8), nn.Unflatten(1, (2, 4)))
    assert equivariance_error(other.double(), "D4", torch.cat([signal, signal]), stride=[2])["error"] > 0.01
    pooled = nn.Sequential(GroupConv("D4", 1, 2, rank=1), GroupPool("D4", [2])).double()
    nn.init.normal_(pooled[0].filters, generator=generator)
    assert equivariance_error(pooled, "D4", signal, stride=[2])["error"] > 0.01


def test_structured_layers_dropout_and_large_groups(generator: Generator) -> None:
    model = nn.Sequential(nn.Flatten(), GMLinear(8, 8, "C8", rank=1, bias=False), nn.Dropout(), nn.Unflatten(1, (1, 8)))
    signal = torch.randn(4, 1, 8, generator=generator)
    found = equivariance_error(model.train(), "C8", signal)
    assert model[2].training, "the mode is left as it was"
    assert found["error"] < 1e-6
    assert found["layers"][0]["layer"] == "1"
    assert layer_distances(nn.Linear(2, 2)) == []
    large = GroupConv("C16xC16", 1, 1, radius=1)
    assert equivariance_error(large, "C16xC16", torch.randn(1, 1, 16, 16, generator=generator))["elements"] >= 64


def test_refused() -> None:
    model, signal = GroupConv("C4", 1, 1), torch.ones(1, 1, 4)
    for wrong, message in ((torch.ones(1, 1, 5), "has shape"), (torch.ones(1, 2, 4), "does not run")):
        with pytest.raises(GMError, match=message):
            equivariance_error(model, "C4", wrong)
    for elements in ([], [1], [9]):
        with pytest.raises(GMError, match="elements are some"):
            equivariance_error(model, "C4", signal, stride="C2", elements=elements)
    with pytest.raises(GMError, match="gives tuple"):
        equivariance_error(nn.RNN(4, 4), "C4", signal)


@torch.no_grad()
def test_rotations_and_dilations_of_images(generator: Generator) -> None:
    torch.manual_seed(0)
    images, angles = blobs(21, generator), [0.3, 2.0]
    model = nn.Sequential(LieConv("SE(2)", 1, 2, 5, samples=8, lift=True), nn.ReLU(), LiePool())
    found = equivariance_error(model, "SE(2)", images, elements=angles)
    errors = []
    for angle in angles:  # the definition
        inside, expected = disc(images), move(model(images), angle)
        errors.append(float(((model(move(images, angle)) - expected) * inside).norm() / (expected * inside).norm()))
    assert found["error"] == pytest.approx((sum(each**2 for each in errors) / 2) ** 0.5, rel=1e-4)
    assert (found["worst"], found["element"]) == (
        pytest.approx(max(errors), rel=1e-4),
        angles[errors.index(max(errors))],
    )
    assert (found["elements"], found["outputs"], found["layers"]) == (2, "equivariant", [])
    assert found["error"] < 0.1
    still = equivariance_error(nn.Identity(), "SE(2)", images)
    assert still["error"] < 1e-6, "what moves with its input has none, whatever the interpolation"
    assert still["elements"] == 23
    assert equivariance_error(nn.Identity(), "SE(2)", images, invariant=True)["error"] > 0.1
    assert equivariance_error(model[:1], "SE(2)", images, elements=[math.pi / 4, math.pi / 2])["error"] < 0.1
    uneven = nn.Sequential(nn.Conv2d(1, 2, 5, padding=2, bias=False))
    assert equivariance_error(uneven, "SE(2)", images, elements=angles)["error"] > 0.3
    for name, count in (("R^2:R+", 4), ("Sim(2)", 28)):
        assert equivariance_error(nn.Identity(), name, images)["elements"] == count


def test_refused_on_lie_groups() -> None:
    images = torch.ones(1, 1, 5, 5)
    with pytest.raises(GMError, match="no strides"):
        equivariance_error(nn.Identity(), "SE(2)", images, stride="C4")
    with pytest.raises(GMError, match="are images"):
        equivariance_error(nn.Identity(), "SE(2)", images[0])
    with pytest.raises(GMError, match="no images, nor signals"):
        equivariance_error(nn.Flatten(2), "SE(2)", images)
    with pytest.raises(GMError, match="no images, nor signals"):
        equivariance_error(nn.Flatten(), "SE(2)", images, invariant=False)
    with pytest.raises(GMError, match="multiples of"):
        equivariance_error(LieConv("SE(2)", 1, 1, 3, samples=4, lift=True), "SE(2)", images)
    with pytest.raises(GMError, match="LiePool"):
        equivariance_error(LieConv("R^2:R+", 1, 1, 3, samples=2, lift=True), "R^2:R+", images)
