"""Laws of the structured layers: the dense layer's function, gradients, and everything a module of torch can do."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import assert_close, must_fail
from market import GROUPED, STRUCTURES, random_tensors, slow_expand
from torch import Generator, Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from gmcompress.errors import GMError
from gmcompress.layers import COUNTERPARTS, GMConv2d, GMLayer, GMLinear, GMWeight, counterpart
from gmcompress.structure import Structure, distance

LINEAR = [(text, shape) for text, shape in STRUCTURES if len(shape) == 2]
CONV = [(text, shape) for text, shape in STRUCTURES if len(shape) == 4]
SUBJECTS = pytest.mark.parametrize(("text", "shape"), STRUCTURES, ids=[f"{t}-{s}" for t, s in STRUCTURES])
WITH_GROUP = pytest.mark.parametrize(("text", "shape"), GROUPED, ids=[f"{t}-{s}" for t, s in GROUPED])
SMALL = [
    ("C3+displacement:1", (3, 6)),
    ("S3[G/<2>,G]+lowrank:1", (3, 6)),
    ("C2+displacement:1+lowrank:1", (4, 2, 1, 2)),
    ("C4[G,G,grid2x2]+displacement:1", (4, 4, 2, 2)),
    ("lowrank:2:split", (2, 3, 1, 2)),
    ("adapted:2:2x3", (4, 6)),
    ("adapted:1:2x1:split", (4, 2, 2, 2)),
    ("C2+adapted:1:1x2", (2, 4)),
]


def filled(layer: GMLayer, generator: Generator) -> GMLayer:
    """The layer with every tensor random, the residuals too."""
    with torch.no_grad():
        for tensor in layer.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return layer


def layer_of(text: str, shape: tuple[int, ...], generator: Generator, **options: Any) -> GMLayer:
    """A random layer, in float64 unless it says otherwise, whose weight has this structure and shape."""
    options = {"dtype": torch.float64, **options}
    if len(shape) == 2:
        return filled(GMLinear(shape[1], shape[0], text, **options), generator)
    return filled(GMConv2d(shape[1] * options.get("groups", 1), shape[0], shape[2:], text, **options), generator)


def input_of(layer: GMLayer, generator: Generator) -> Tensor:
    shape = (3, layer.in_features) if isinstance(layer, GMLinear) else (2, layer.in_channels, 6, 7)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(
        layer.bias.dtype if layer.bias is not None else layer.weight.dtype
    )


# ------------------------------------------------------------------------------------------------------------ function


@pytest.mark.parametrize(("text", "shape"), LINEAR)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_that_of_the_dense_twin(text: str, shape: tuple[int, ...], bias: bool, generator: Generator) -> None:
    layer = layer_of(text, shape, generator, bias=bias)
    weight = slow_expand(layer.parts(), layer.structure, shape)
    for batch in ((5,), (2, 3), ()):
        x = torch.randn(*batch, shape[1], generator=generator, dtype=torch.float64)
        assert_close(layer(x), F.linear(x, weight, layer.bias))
        must_fail(assert_close, layer(x), F.linear(x, weight + 1e-6, layer.bias))
    assert_close(layer.weight, weight)


@pytest.mark.parametrize(("text", "shape"), CONV)
def test_conv_is_that_of_the_dense_twin(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    layer = layer_of(text, shape, generator, padding=1)
    weight, x = slow_expand(layer.parts(), layer.structure, shape), input_of(layer, generator)
    assert_close(layer(x), F.conv2d(x, weight, layer.bias, padding=1), slack=10)
    must_fail(assert_close, layer(x), F.conv2d(x, weight + 1e-6, layer.bias, padding=1))


OPTIONS = [
    {"stride": 2},
    {"stride": (1, 3), "padding": (2, 0)},
    {"padding": "same"},
    {"padding": "valid", "bias": False},
    {"padding": "same", "dilation": (1, 2), "padding_mode": "circular"},
    {"padding": 2, "dilation": 2, "bias": False},
    {"groups": 2},
    {"groups": 2, "stride": 2, "padding": 1, "padding_mode": "reflect"},
    {"padding": (1, 2), "padding_mode": "replicate"},
    {"padding": 1, "padding_mode": "circular", "dilation": (2, 1)},
]
CONVOLUTIONS = pytest.mark.parametrize("options", OPTIONS, ids=str)


@CONVOLUTIONS
@pytest.mark.parametrize("text", ["C4+displacement:1", "C4[G,G,grid3x3]+lowrank:1", "adapted:2:4x2:split"])
def test_conv_options(text: str, options: dict[str, Any], generator: Generator) -> None:
    shape = (8, 4, 3, 3)
    layer = layer_of(text, shape, generator, **options)
    dense = nn.Conv2d(4 * options.get("groups", 1), 8, 3, dtype=torch.float64, **options)
    dense.weight.data = slow_expand(layer.parts(), layer.structure, shape)
    if layer.bias is not None:
        dense.bias.data = layer.bias.detach()
    x = input_of(layer, generator)
    assert_close(layer(x), dense(x), slack=10)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(layer, name) == getattr(dense, name)
    dense.weight.data += 1e-6
    must_fail(assert_close, layer(x), dense(x))


@SUBJECTS
def test_dense_has_the_same_function(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    layer = layer_of(text, shape, generator).eval()
    parts = list(layer.parts().values())
    for part in parts:
        assert layer.dense().weight.requires_grad, "the weight trains as long as one of its parts does"
        part.requires_grad_(False)
    dense, x = layer.dense(), input_of(layer, generator)
    assert type(dense) is (nn.Linear if len(shape) == 2 else nn.Conv2d)
    assert_close(dense(x), layer(x))
    assert dense.weight.is_contiguous()
    assert (dense.training, dense.weight.requires_grad, dense.bias.requires_grad) == (False, False, True)
    dense.weight.data.zero_()
    dense.bias.data.zero_()
    must_fail(assert_close, dense(x), layer(x))


@CONVOLUTIONS
def test_dense_and_counterpart_keep_the_options(options: dict[str, Any], generator: Generator) -> None:
    layer = layer_of("C4+displacement:1", (8, 4, 3, 3), generator, **options)
    dense, x = layer.dense(), input_of(layer, generator)
    assert_close(dense(x), layer(x))
    again = counterpart(dense, layer.structure)
    assert repr(again) == repr(eval(repr(layer))) == repr(layer)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


# ------------------------------------------------------------------------------------------------------------ gradient


@pytest.mark.parametrize(("text", "shape"), SMALL)
def test_gradients(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    layer = layer_of(text, shape, generator)
    names, tensors = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, shape[1], *shape[2:], generator=generator, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert gradcheck(call, (x, *tensors))
    assert gradgradcheck(call, (x, *tensors))
    layer.weight.square().sum().backward()
    assert all(float(part.grad.abs().sum()) > 0 for part in layer.parts().values())


@WITH_GROUP
def test_a_step_of_training_stays_in_the_structure(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    plain = Structure.parse(text).with_rank(0, residual="lowrank")
    layer = layer_of(str(plain), shape, generator)
    layer(input_of(layer, generator)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1e-3).step()
    assert distance(layer.weight, plain, relative=True) < 1e-14
    if plain.group.order > 1:
        assert distance(torch.randn(shape, generator=generator), plain, relative=True) > 1e-3, "the control"


def test_a_new_layer_is_a_group_matrix_with_trainable_residuals() -> None:
    layer = GMLinear(64, 32, "C8+displacement:2+lowrank:1")
    assert distance(layer.weight, "C8") < 1e-6
    spread, expected = (float(each.weight.detach().std()) for each in (layer, nn.Linear(64, 32)))
    assert 0.8 < spread / expected < 1.25
    layer(torch.ones(1, 64)).square().sum().backward()
    for trained in ("kernel", "filters", "left"):
        assert float(getattr(layer, trained).grad.abs().sum()) > 0
    must_fail(assert_close, layer.weight, GMLinear(64, 32, "C8").weight)


@pytest.mark.parametrize("text", ["lowrank:40", "lowrank:1", "adapted:24:4x4", "adapted:2:2x8"])
@pytest.mark.parametrize("taps", [(), (3, 3)], ids=str)
def test_a_new_layer_without_a_group_has_the_variance_of_torch(text: str, taps: tuple[int, ...]) -> None:
    """The mean over many draws: within one layer of low rank the entries depend on each other."""
    text += ":split" if taps and "2" in text else ""

    def variance(make: Callable[[], nn.Module]) -> float:
        return float(torch.stack([make().weight.detach().square().mean() for _ in range(60)]).mean())

    def structured() -> GMLayer:
        return GMConv2d(64, 32, taps, text) if taps else GMLinear(64, 32, text)

    def halved() -> GMLayer:
        layer = structured()
        with torch.no_grad():
            layer.left.mul_(0.7)
        return layer

    def assert_equal(make: Callable[[], nn.Module]) -> None:
        expected = variance(lambda: nn.Conv2d(64, 32, taps) if taps else nn.Linear(64, 32))
        assert 0.9 < variance(make) / expected < 1.1

    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert_equal(structured)
        must_fail(assert_equal, halved)


def test_a_new_layer_without_a_group_trains_in_all_parts() -> None:
    layer = GMLinear(8, 12, "adapted:2:3x2")
    assert layer.labels is None
    assert torch.equal(layer.scales, torch.ones(3, 2, 2))
    layer(torch.ones(1, 8)).square().sum().backward()
    assert all(float(part.grad.abs().sum()) > 0 for part in layer.parts().values())


# -------------------------------------------------------------------------------------------------- life as a module


@SUBJECTS
def test_state_copies_and_repr(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    layer = layer_of(text, shape, generator)
    assert set(layer.state_dict()) == {*Structure.parse(text).shapes(shape), "bias"}
    other = eval(repr(layer)).double()
    assert repr(other) == repr(layer)
    must_fail(assert_close, other.weight, layer.weight)
    other.load_state_dict(layer.state_dict())
    copied = copy.deepcopy(layer)
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(copied.weight, layer.weight)
    with torch.no_grad():
        next(copied.parameters()).add_(1)
    must_fail(assert_close, copied.weight, layer.weight)
    assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize(("text", "shape"), SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_another_dtype(text: str, shape: tuple[int, ...], dtype: torch.dtype, generator: Generator) -> None:
    layer = layer_of(text, shape, generator)
    exact, x = layer.weight, input_of(layer, generator)
    expected = layer(x)
    layer.to(dtype)
    assert {each.dtype for each in (layer.weight, layer.bias, layer(x.to(dtype)))} == {dtype}
    assert_close(layer.weight, exact.to(dtype))
    assert_close(layer(x.to(dtype)), expected.to(dtype))


@pytest.mark.parametrize(("text", "shape"), SMALL)
def test_autocast(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    layer = layer_of(text, shape, generator, dtype=torch.float32)
    x = input_of(layer, generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = layer(x), layer.dense()(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert_close(found, expected)
    assert_close(found, layer(x).bfloat16())
    found.float().square().sum().backward()
    assert {part.grad.dtype for part in layer.parts().values()} == {torch.float32}


@pytest.mark.parametrize(("text", "shape"), SMALL)
def test_export(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    layer = layer_of(text, shape, generator)
    x, other = (input_of(layer, generator) for _ in range(2))
    exported = torch.export.export(layer, (x,)).module()
    assert_close(exported(other), layer(other))
    must_fail(assert_close, exported(other), layer(x))


@pytest.mark.parametrize("text", ["C4+displacement:1+lowrank:1", "adapted:2:2x4"])
def test_compile(text: str, generator: Generator) -> None:
    """In one graph; the backend that generates no C++ takes 2 seconds in place of 20."""
    layer = layer_of(text, (4, 8), generator)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, other = (input_of(layer, generator) for _ in range(2))
    part = next(layer.parameters())
    expected = torch.autograd.grad(layer(x).square().sum(), part)[0]
    assert_close(compiled(x), layer(x))
    assert_close(torch.autograd.grad(compiled(x).square().sum(), part)[0], expected)
    must_fail(assert_close, compiled(other), layer(x))


def _under(mode: Callable[[], Any]) -> Callable[[GMLayer, Tensor], None]:
    def use(layer: GMLayer, x: Tensor) -> None:
        with mode():
            counterpart(nn.Linear(*layer.weight_shape), layer.structure)(torch.ones(x.shape))

    return use


FIRST_USES: dict[str, Callable[[GMLayer, Tensor], Any]] = {
    "plain": lambda layer, x: layer(x),
    "no_grad": _under(torch.no_grad),
    "inference_mode": _under(torch.inference_mode),
    "fake tensors": _under(FakeTensorMode),
    "meta": _under(lambda: torch.device("meta")),
    "vmap": lambda layer, x: torch.func.vmap(layer)(x),
    "fx": lambda layer, x: torch.fx.symbolic_trace(layer)(x),
    "export": lambda layer, x: torch.export.export(layer, (x,)),
    "compile": lambda layer, x: torch.compile(layer, fullgraph=True, backend="aot_eager")(x),
    "deepcopy": lambda layer, x: copy.deepcopy(layer)(x),
}


@pytest.mark.parametrize(
    "order", range(23, 23 + len(FIRST_USES)), ids=FIRST_USES
)  # met in no other test: nothing cached
def test_a_first_use_in_any_mode_leaves_no_trace(order: int, generator: Generator) -> None:
    """What a structure keeps for all of its layers must not be a tensor of the mode in which it was first asked for."""
    use = list(FIRST_USES.values())[order - 23]
    first, second = (layer_of(f"C{order}", (order, order), generator) for _ in range(2))
    x = input_of(first, generator)
    use(first, x)
    for layer in (first, second):
        assert type(layer.weight.clone()) is Tensor
        assert_close(layer.weight, slow_expand(layer.parts(), layer.structure, (order, order)))
        layer(x).sum().backward()
        assert float(layer.kernel.grad.abs().sum()) > 0


@pytest.mark.parametrize("text", ["D4+displacement:1", "adapted:2:2x4:split"])
def test_meta_device(text: str) -> None:
    layer = GMConv2d(8, 8, 3, text, device="meta")
    assert {each.device.type for each in (*layer.parameters(), layer.weight)} == {"meta"}


# -------------------------------------------------------------------------------------------------------- counterpart


@pytest.mark.parametrize("dense", [nn.Linear(8, 16), nn.Conv2d(8, 16, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("text", ["C4+displacement:1+lowrank:1", "adapted:3:4x2"])
def test_counterpart_keeps_dtype_flags_and_mode(dense: nn.Module, dtype: torch.dtype, text: str) -> None:
    def assert_kept(layer: GMLayer) -> None:
        assert layer.training == dense.training
        assert {each.dtype for each in layer.parameters()} == {dtype}
        assert {each.requires_grad for each in layer.parts().values()} == {dense.weight.requires_grad}
        assert layer.bias.requires_grad == dense.bias.requires_grad
        assert layer.weight.shape == dense.weight.shape

    dense = copy.deepcopy(dense).to(dtype)
    for training, weight_trains, bias_trains in ((True, True, True), (False, True, False), (True, False, True)):
        dense.train(training).weight.requires_grad_(weight_trains)
        dense.bias.requires_grad_(bias_trains)
        layer = counterpart(dense, text)
        assert_kept(layer)
        must_fail(assert_kept, copy.deepcopy(layer).train(not training))
        layer.bias.requires_grad_(not bias_trains)
        must_fail(assert_kept, layer)
    assert (
        counterpart(type(dense)(*((8, 8) if isinstance(dense, nn.Linear) else (8, 8, 1)), bias=False), "C2").bias
        is None
    )


def test_counterpart_leaves_the_random_stream_alone() -> None:
    dense = nn.Linear(8, 8)

    def assert_untouched(layer: type[GMLayer] | Any, *arguments: Any) -> None:
        before = torch.get_rng_state()
        layer(*arguments)
        assert torch.equal(torch.get_rng_state(), before)

    assert_untouched(counterpart, dense, "C8+displacement:1")
    must_fail(assert_untouched, GMLinear, 8, 8, "C8")


LAYOUTS = [
    ((4, 8), "oi", 1),
    ((8, 4), "io", 1),
    ((8, 4, 3), "iok", 2),
    ((4, 8, 2, 2), "oikk", 1),
    ((2, 2, 8), "ooi", 1),
]


@pytest.mark.parametrize(("shape", "layout", "groups"), LAYOUTS)
def test_a_weight_of_any_layout(shape: tuple[int, ...], layout: str, groups: int, generator: Generator) -> None:
    layer = filled(GMWeight(shape, "C4+lowrank:1", layout=layout, groups=groups, dtype=torch.float64), generator)
    rows = [at for at, letter in enumerate(layout) if letter == "o"]
    found = layer()
    assert tuple(found.shape) == shape
    assert_close(layer.weight, slow_expand(layer.parts(), layer.structure, layer.weight_shape))
    assert layer.weight_shape[0] == groups * math.prod(shape[at] for at in rows)
    assert_close(layer.view.matrix(found), layer.weight)
    assert repr(eval(repr(layer))) == repr(layer)
    names, tensors = zip(*layer.named_parameters(), strict=True)
    assert gradcheck(lambda *given: functional_call(layer, dict(zip(names, given, strict=True)), ()), tensors)
    like = GMWeight.like(torch.ones(shape, dtype=torch.bfloat16), layer.view, "C4")
    assert (like.kernel.dtype, like.kernel.requires_grad) == (torch.bfloat16, False)


def test_assign(generator: Generator) -> None:
    layer = layer_of("C4+displacement:1", (4, 8), generator)
    tensors = random_tensors(layer.structure, (4, 8), generator)
    layer.assign(tensors, bias=torch.ones(4))
    assert_close(layer.weight, slow_expand(tensors, layer.structure, (4, 8)))
    assert torch.equal(layer.bias, torch.ones(4, dtype=torch.float64))
    assert layer.kernel.requires_grad
    for wrong, bias in (
        (tensors, None),
        (tensors, torch.ones(5)),
        ({"kernel": tensors["kernel"]}, torch.ones(4)),
        ({**tensors, "left": torch.ones(4, 1)}, torch.ones(4)),
        ({**tensors, "kernel": torch.ones(1, 1, 4)}, torch.ones(4)),
    ):
        with pytest.raises(GMError, match="stores"):
            layer.assign(wrong, bias=bias)
    with pytest.raises(GMError, match="cannot be assigned"):
        layer.weight = torch.ones(4, 8)


def test_refused() -> None:
    assert set(COUNTERPARTS) == {nn.Linear, nn.Conv2d}
    for call in (
        lambda: GMLinear(6, 8, "C4"),
        lambda: GMLinear(8, 6, "C4"),
        lambda: GMLinear(8, 8, "Y4"),
        lambda: GMLinear(8, 8, "C4+lowrank:1", rank=1),
        lambda: GMConv2d(6, 8, 3, "C4"),
        lambda: GMConv2d(8, 6, 3, "C4"),
        lambda: GMConv2d(8, 12, 3, "C4", groups=2),
        lambda: GMConv2d(12, 8, 3, "C4", groups=2),
        lambda: GMConv2d(4, 4, 2, "C4[G,G,grid3x3]"),
        lambda: GMLinear(8, 6, "adapted:1:4x4"),
        lambda: GMLinear(8, 8, "lowrank:1:split"),
        lambda: GMConv2d(8, 8, 3, "adapted:1:2x4", groups=4),
        lambda: counterpart(nn.Linear(6, 8), "C4"),
        lambda: counterpart(nn.Conv2d(8, 8, 3, groups=8), "C4"),
        lambda: counterpart(nn.ReLU(), "C4"),
        lambda: counterpart(nn.Conv1d(4, 4, 3), "C4"),
        lambda: counterpart(nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4), "C4"),
    ):
        with pytest.raises(GMError):
            call()
