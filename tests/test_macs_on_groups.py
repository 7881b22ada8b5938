"""Multiply-adds of the layers on groups: by formula exactly those that torch's FlopCounterMode sees, on every path."""

import itertools
from typing import Any

import pytest
import torch
from conftest import must_fail
from torch import nn

import gmcompress as gm
from gmcompress.groups import axes_of, group
from gmcompress.metrics import count_macs
from gmcompress.stencils import METHODS

KINDS: list[dict[str, Any]] = [
    {},
    {"rank": 2},
    {"rank": 2, "residual": "row"},
    {"rank": 2, "residual": "diagonal"},
    {"separable": "separable", "terms": 2},
    {"separable": "gseparable"},
    {"separable": "gseparable", "terms": 3, "rank": 1},
    {"separable": "dseparable", "rank": 1, "residual": "row"},
    {"separable": "dgseparable", "terms": 2},
]


def assert_counted(model: nn.Module, *shape: int) -> None:
    by_formula, by_torch = count_macs(model.eval(), torch.randn(*shape))
    assert by_formula == by_torch > 0


def by_method(layer: gm.GroupConv, method: str) -> gm.GroupConv | None:
    """The layer multiplying in this way wherever it mixes channels, None where it cannot."""
    for step in layer.methods:
        if step == "outer" or (step == "inner" and layer.kind == "dgseparable"):
            continue
        if method not in layer._steps[step].costs(1, 1):
            return None
        layer.methods[step] = method
        layer._buffers[f"_{step}"] = torch.tensor(layer._steps[step].table(method))
    return layer


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("name", ["C8xC6", "C5", "C2xC4xC2", "D4"])
def test_group_convolutions(name: str, options: dict[str, Any]) -> None:
    subgroup = {"C8xC6": "C4xC3", "C5": None, "C2xC4xC2": "C2xC2xC2", "D4": [2]}[name]
    factors = {"factors": ([1], ())} if name == "C5" and "separable" in options else {}
    for radius, (stride, i, o, batch) in itertools.product((1, None), ((None, 3, 5, 2), (subgroup, 1, 4, 1))):
        for method in METHODS:
            layer = gm.GroupConv(name, i, o, radius=radius, stride=stride, **options, **factors)
            if by_method(layer, method) is not None:
                assert_counted(layer, batch, i, group(name).order)


def test_the_method_that_is_chosen_is_counted() -> None:
    layer = gm.GroupConv("C32xC32", 16, 16, radius=None)
    assert layer.methods == {"main": "fourier"}
    x = torch.randn(2, 16, 32, 32)
    fourier = count_macs(layer, x)
    assert fourier[0] == fourier[1] < 2 * 16 * 16 * 1024**2 / 10
    assert by_method(layer, "taps") is layer
    layer.multiply_adds = lambda _: fourier[0]  # type: ignore[method-assign]
    must_fail(assert_counted, layer, 2, 16, 32, 32)


@pytest.mark.parametrize("radius", [None, 1])
@pytest.mark.parametrize(("source", "target"), [([1], ()), ((), [1]), ([2], [1])], ids=str)
def test_homogeneous_convolutions(source: Any, target: Any, radius: int | None) -> None:
    layer = gm.HomogeneousConv("D4", 3, 5, source=source, target=target, radius=radius)
    assert_counted(layer, 2, 3, layer.columns.size)


@pytest.mark.parametrize("support", ["same", "full", "valid"])
@pytest.mark.parametrize(
    ("name", "lift"), [("Z", False), ("Z^2", False), ("Z^3", False), ("Z^2:C4", True), ("Z^2:D2", False)]
)
def test_lattice_convolutions(name: str, lift: bool, support: str) -> None:
    layer = gm.LatticeConv(name, 2, 3, 3, lift=lift, support=support)
    inner = () if layer.point is None or lift else (layer.point.order,)
    assert_counted(layer, 2, 2, *inner, *(5, 6, 4)[: layer.dimension])


def test_networks_on_a_group_and_their_pooling() -> None:
    options: dict[str, Any] = {"channels": (4, 8), "radius": 1, "strides": ("C4xC4", None), "rank": 1}
    network = gm.GMCNN("C8xC8", 1, 10, pool="mean", **options)
    assert_counted(network, 3, 1, *axes_of(group("C8xC8")))
    found = gm.measure(network, torch.randn(3, 1, 8, 8), repeats=2)
    assert found.macs == found.counted_macs
    assert count_macs(gm.GroupPool("C8", "C4", "mean"), torch.randn(1, 2, 8)) == (0, 0), "pooling multiplies nothing"
    must_fail(assert_counted, gm.GroupPool("C8", "C4"), 1, 2, 8)
