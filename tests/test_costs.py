"""The cheaper way to multiply by a structured weight: chosen by shapes, the same numbers, never where not safe."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gmcompress as gm
from gmcompress.factored import Window
from gmcompress.layers import GMConv2d, GMLinear, base
from gmcompress.metrics import layer_macs
from gmcompress.tuning import Recipe, fine_tune

BUILD: dict[str, Callable[[], tuple[GMLinear | GMConv2d, Tensor]]] = {
    "large group": lambda: (GMLinear(768, 768, "C16xC16+displacement:1"), torch.randn(5, 768)),
    "low rank": lambda: (GMLinear(512, 256, "lowrank:8"), torch.randn(2, 3, 512)),
    "adapted": lambda: (GMLinear(768, 768, "adapted:24:4x4"), torch.randn(9, 768)),
    "images": lambda: (GMConv2d(256, 256, 3, "C8", padding=1), torch.randn(2, 256, 14, 14)),
    "split, circular": lambda: (
        GMConv2d(128, 64, 3, "lowrank:4:split", padding=1, padding_mode="circular"),
        torch.randn(2, 128, 12, 12),
    ),
    "one image": lambda: (GMConv2d(128, 128, 3, "lowrank:4", padding="same"), torch.randn(128, 12, 12)),
}
SLOW: dict[str, Callable[[], tuple[GMLinear | GMConv2d, Tensor]]] = {
    "small group": lambda: (GMLinear(64, 64, "C2"), torch.randn(100, 64)),
    "as many numbers": lambda: (GMLinear(64, 64, "lowrank:32"), torch.randn(1000, 64)),
    "grouped": lambda: (GMConv2d(64, 64, 3, "lowrank:4", padding=1, groups=2), torch.randn(2, 64, 8, 8)),
    "half precision": lambda: (
        GMLinear(768, 768, "C16xC16", dtype=torch.bfloat16),
        torch.randn(5, 768, dtype=torch.bfloat16),
    ),
}


@pytest.fixture
def fast_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fast products of linear layers, as they happen."""
    happened: list[str] = []
    product = base.prepare

    def noted(*given: object) -> object:
        happened.append("fast")
        return product(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(base, "prepare", noted)
    return happened


@pytest.mark.parametrize("name", BUILD)
def test_a_layer_that_nobody_froze_takes_the_fast_product(name: str, fast_calls: list[str]) -> None:
    torch.manual_seed(0)
    layer, given = BUILD[name]()
    for part in layer.parts().values():
        nn.init.normal_(part, std=0.1)
    twin = layer.dense()
    ours, theirs = layer(given), twin(given)
    assert fast_calls == ["fast"]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.detach().abs().max()))
    ours.square().sum().backward()
    dense_gradient = torch.autograd.grad(twin(given).square().sum(), twin.weight)[0]
    expected = torch.autograd.grad(layer.weight, list(layer.parts().values()), dense_gradient)
    for part, wanted in zip(layer.parts().values(), expected, strict=True):
        assert part.grad is not None
        torch.testing.assert_close(part.grad, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert layer_macs(layer, ours, given) == layer.fast_macs(given)


@pytest.mark.parametrize("name", SLOW)
def test_where_it_is_not_faster_or_as_exact_it_is_not_taken(name: str, fast_calls: list[str]) -> None:
    layer, given = SLOW[name]()
    layer(given)
    assert not fast_calls


def test_more_inputs_make_the_dense_product_worth_its_weight() -> None:
    layer = GMLinear(768, 768, "C4")
    assert layer.takes_fast_product(torch.randn(16, 768))
    assert GMLinear(256, 256, "C2").takes_fast_product(torch.randn(2, 256)) is False
    assert gm.freeze(nn.Sequential(layer), "dense")[0].takes_fast_product(torch.randn(16, 768)) is False
    conv = GMConv2d(64, 64, 3, "C8", padding=1)
    assert conv._moves(torch.randn(2, 64, 9, 7)) == ((2, 9, 7), Window(padding=(1, 1)), 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
def test_inside_of_transformations_the_weight_is_computed(fast_calls: list[str]) -> None:
    layer, given = BUILD["low rank"]()
    expected = layer.dense()(given)
    parameters = {name: each.detach() for name, each in layer.named_parameters()}
    found = [
        torch.vmap(layer)(given),
        torch.func.functional_call(layer, parameters, (given,)),
        torch.jit.trace(layer, given, check_trace=False)(given),
        torch.fx.symbolic_trace(layer)(given),
        torch.export.export(layer, (given,)).module()(given),
    ]
    nested = torch.nested.nested_tensor(list(given), layout=torch.jagged)
    found.append(torch.stack(list(layer(nested).unbind())))
    assert not fast_calls
    for each in found:
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [torch.randn(3, 511), torch.randn(3, 512).double(), torch.randn(0, 512)])
def test_what_the_dense_layer_says_of_an_input_is_said(given: Tensor) -> None:
    layer, _ = BUILD["low rank"]()
    twin = layer.dense()
    try:
        expected = twin(given)
    except RuntimeError as problem:
        with pytest.raises(RuntimeError, match=str(problem)[:20]):
            layer(given)
    else:
        assert torch.equal(layer(given), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2, "padding": 0},
        {"stride": [2, 1], "padding": [2, 1], "dilation": [1, 2]},
        {"stride": (2,), "dilation": (2,)},
        {"padding": "valid"},
        {"padding": "same", "dilation": 2, "kernel_size": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["images", "one image"])
def test_settings_that_were_changed_are_read_as_torch_reads_them(
    name: str, settings: dict[str, object], fast_calls: list[str]
) -> None:
    layer, given = BUILD[name]()
    twin = layer.dense()
    for key, value in ({"padding": 1} | settings).items():
        setattr(layer, key, value)
        setattr(twin, key, value)
    expected = twin(given)
    torch.testing.assert_close(layer(given), expected, rtol=1e-3, atol=1e-4)
    assert fast_calls == ["fast"]
    layer.freeze_("structured")
    torch.testing.assert_close(layer.eval()(given), expected, rtol=1e-3, atol=1e-4)
    layer.thaw_()
    layer.padding, layer.stride = "same", (2, 2)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="strided"):
        layer(given)


def test_training_by_either_way_is_the_same_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(GMLinear(256, 256, "lowrank:4"), nn.ReLU(), GMLinear(256, 3, "lowrank:1"))

    inputs = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), 16)
    recipe = Recipe(epochs=1, lr=0.01, device="cpu")
    fast, _ = fine_tune(network(), loader, recipe)
    monkeypatch.setattr(base, "is_fast", lambda *_given: False)
    slow, _ = fine_tune(network(), loader, recipe)
    for ours, theirs in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
