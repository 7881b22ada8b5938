"""Layers of equal structure read one table of labels on each device, through copies, moves, pickles and loading."""

import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights
from conftest import COPIES, assert_close, assert_own_weights
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import gmcompress as gm
from gmcompress.layers import GMLinear
from gmcompress.structure import Structure

TEXTS = ("C4xC2", "C4xC2+displacement:1", "C4xC2+lowrank:1", "D4", "D4[G/<1>,G]", "lowrank:2")


def network(device: str | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(GMLinear(8, 8, text, device=device) for text in TEXTS)).eval()


def tables(*models: nn.Module) -> list[Tensor]:
    """The tables of all their layers, each once."""
    found = [each.labels for model in models for each in model.modules() if isinstance(each, GMLinear)]
    return list({id(each): each for each in found if each is not None}.values())


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    **COPIES,
    "frozen dense": lambda model: gm.freeze(model, "dense"),
    "frozen structured": lambda model: gm.freeze(model, "structured"),
}


def assert_three_tables(*models: nn.Module) -> None:
    found = tables(*models)
    assert len(found) == 3, "C4xC2, D4 and D4 on cosets"
    for model in models:
        for layer in model.modules():
            if isinstance(layer, GMLinear) and layer.labels is not None:
                assert layer.labels.tolist() == layer.structure.labels.tolist()


@pytest.mark.parametrize("way", WAYS)
def test_copies_share(way: str) -> None:
    model = network()
    assert_three_tables(model)
    other = WAYS[way](model)
    assert_three_tables(model, other)
    assert_own_weights(other, model, torch.randn(3, 8), at=1)


def test_a_pickle_holds_no_table() -> None:
    layer = GMLinear(256, 256, "C16xC16")
    assert layer.labels is not None
    tensors = sum(each.nbytes for each in layer.parts().values())
    held = pickle.dumps({**layer.__getstate__(), "structure": None})
    assert tensors < len(held) < tensors + layer.labels.nbytes / 8
    assert "labels" not in "".join(layer.state_dict())


def test_a_table_goes_with_its_last_layer() -> None:
    layer, again = GMLinear(7, 7, "C7"), GMLinear(7, 7, "C7")
    assert layer.labels is again.labels is not None
    table = weakref.ref(layer.labels)
    del layer
    gc.collect()
    assert table() is again.labels
    del again
    gc.collect()
    assert table() is None


def test_one_for_each_device() -> None:
    here, there = network(), network("meta")
    assert {str(each.device) for each in tables(there)} == {"meta"}
    assert len(tables(here, there)) == 6
    with torch.device("meta"):
        assert tables(network())[0].is_meta
    assert_three_tables(here)


def test_weights_assigned_to_a_model_on_meta() -> None:
    model, x = network(), torch.randn(2, 8)
    for empty in (network("meta"), _empty()):
        empty.load_state_dict(model.state_dict(), assign=True)
        assert_close(empty(x), model(x))
        assert_three_tables(model, empty)


def _empty() -> nn.Module:
    with init_empty_weights():
        return network()


@pytest.mark.parametrize("buffers", [False, True])
def test_weights_that_come_for_one_call(buffers: bool) -> None:
    model, x = network(), torch.randn(2, 8)
    expected = model(x)
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=buffers)
    assert all(each.is_meta for each in model.parameters())
    assert_close(model(x), expected)


def test_tensors_that_are_not_torchs_own_are_not_shared() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = network()
        assert fake(torch.empty(2, 8)).shape == (2, 8)
    assert all(type(each) is not Tensor for each in tables(fake))
    assert_three_tables(network())


def test_made_in_inference_mode_and_trained_outside() -> None:
    gc.collect()
    with torch.inference_mode():
        made = Structure.parse("C9")
        table = GMLinear(9, 9, made).labels
    layer = GMLinear(9, 9, made)
    assert layer.labels is table
    layer(torch.randn(2, 9)).sum().backward()
    assert layer.kernel.grad is not None


def test_compiled_and_exported_with_a_shared_table() -> None:
    model, x = network(), torch.randn(2, 8)
    assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    program = torch.export.export(model, (x,))
    assert_close(program.module()(x), model(x))
    kept = [each for each in program.constants.values() if isinstance(each, Tensor) and each.dtype == torch.int32]
    assert len({each.data_ptr() for each in kept}) == 3


def test_saved_and_loaded_models_share(tmp_path) -> None:
    dense = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    result = gm.compress(dense, "C4", rank=1, inputs=torch.randn(2, 16))
    gm.save(result, tmp_path / "small")
    loaded = gm.load(tmp_path / "small", dense)
    assert len(tables(result.model, loaded)) == 1
