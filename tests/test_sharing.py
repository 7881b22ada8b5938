"""Layers on groups that read alike hold one index array on each device, through copies, moves, pickles and loading."""

import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from conftest import COPIES, assert_close, assert_own_weights, must_fail
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import gmcompress as gm
from gmcompress import GroupConv
from gmcompress.groups import Group
from gmcompress.stencils import Stencil

OPTIONS: tuple[dict[str, Any], ...] = (
    {"rank": 1},
    {"rank": 2, "residual": "row"},
    {"rank": 2, "residual": "diagonal"},
    {"separable": "separable"},
    {"separable": "dgseparable"},
)


def network(device: str | None = None, group: str = "C4xC4") -> nn.Sequential:
    """Two layers of every kind, for signals (batch, 2, 16)."""
    torch.manual_seed(0)
    every = [GroupConv(group, 2, 2, radius=1, device=device, **options) for options in OPTIONS for _ in range(2)]
    return nn.Sequential(*every).eval()


def arrays(*models: nn.Module) -> list[Tensor]:
    """The index arrays of all layers, each once."""
    found = [each for model in models for layer in model.modules() for each in layer._buffers.values()]
    return list({each.data_ptr() if each.device.type != "meta" else id(each): each for each in found}.values())


def stencils(*models: nn.Module) -> list[Stencil]:
    """What the layers read, each once."""
    layers = [each for model in models for each in model.modules() if isinstance(each, GroupConv)]
    return list({id(each): each for layer in layers for each in (layer.stencil, *layer._steps.values())}.values())


def assert_as_many(model: nn.Module, *models: nn.Module) -> None:
    """All of them hold no more than the first alone, and what one of its layers of each kind does."""
    kinds = nn.Sequential(*list(model)[::2])
    for found in (arrays, stencils):
        assert len(found(model, *models)) == len(found(kinds)) > 1


@pytest.mark.parametrize("way", COPIES)
def test_copies_share(way: str) -> None:
    model = network()
    assert_as_many(model)
    other = COPIES[way](model)
    assert_as_many(model, other)
    must_fail(assert_as_many, model, network(group="C8xC2"))
    assert_own_weights(other, model, torch.randn(3, 2, 16), at=0)


@pytest.mark.parametrize("way", ["made", *COPIES])
def test_eight_equal_layers_of_a_network_hold_what_one_does(way: str) -> None:
    net = gm.GMCNN("C8xC8", 8, 5, channels=(8,) * 8, radius=2, rank=1)
    held = net if way == "made" else COPIES[way](net)
    layers = [each for each in held.modules() if isinstance(each, GroupConv) and each.in_channels == 8]
    layers = [each for each in layers if each.out_channels == 8]
    assert len(layers) == 8
    assert len(arrays(*layers)) == len(stencils(*layers)) == 1


def test_a_pickle_holds_no_array() -> None:
    layer = GroupConv("C16xC16", 1, 1)
    layer(torch.randn(1, 1, 256))
    assert layer.stencil.labels.nbytes == 8 * 256**2
    ring = {"group": None, "out_group": None, "stencil": None, "_steps": None}
    assert len(pickle.dumps({**layer.__getstate__(), **ring})) < 16 * 1024
    assert not any(name.startswith("_") for name in layer.state_dict())


def test_arrays_go_with_their_last_layer() -> None:
    layer, again = GroupConv("C7", 1, 1), GroupConv("C7", 1, 1)
    assert layer._main is again._main
    kept = [weakref.ref(layer._main), weakref.ref(layer.stencil)]
    del layer
    gc.collect()
    assert [each() for each in kept] == [again._main, again.stencil]
    del again
    gc.collect()
    assert [each() for each in kept] == [None, None]


def test_groups_of_one_table_and_other_axes_do_not_share() -> None:
    """By their axes they convolve in other ways."""
    product = gm.group("C2xC2")
    flat = Group(product.table)
    assert product == flat
    one, other = (GroupConv(each, 1, 1, radius=1, generators=[1, 2]) for each in (product, flat))
    assert one.stencil is not other.stencil
    assert one.stencil.box is not None


def test_one_for_each_device_and_none_that_torch_did_not_make() -> None:
    here, there = network(), network("meta")
    assert len(arrays(there, here)) == 2 * len(arrays(here))
    with torch.device("meta"):
        assert all(each.is_meta for each in arrays(network()))
    there.load_state_dict(here.state_dict(), assign=True)
    x = torch.randn(2, 2, 16)
    assert_close(there(x), here(x))
    assert_as_many(here, there)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = network()
        assert fake(torch.empty(2, 2, 16)).shape == (2, 2, 16)
    assert all(type(each) is not Tensor for layer in fake for each in layer._buffers.values())
    assert_as_many(network())
