"""The fast product against the dense product with the computed weight, for every structure of the market."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import assert_close, must_fail
from market import STRUCTURES, random_tensors, slow_expand
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gmcompress import GMLinear, freeze
from gmcompress.costs import multiply_adds
from gmcompress.factored import Window
from gmcompress.fewrows import FFT_ROWS, LARGEST, ROWS, SPECTRUM, WAVES, cyclic_orders
from gmcompress.products import conv2d, keep, linear, prepare, why_slow
from gmcompress.shortcut import Shortcut
from gmcompress.structure import Structure, expand

LARGER = [
    ("C8", (32, 16, 3, 3)),
    ("C4xC4+displacement:1", (32, 48, 1, 1)),
    ("C32xC32", (1024, 2048)),
    ("C12xC12+displacement:2+adapted:3:2x2", (288, 144)),
    ("D4xC32", (256, 512)),
    ("Q8xC12+lowrank:2:split", (96, 96, 3, 3)),
    ("S3xD8", (96, 192)),
    ("C5xC16", (80, 160)),
]
FAST = [(text, shape) for text, shape in STRUCTURES + LARGER if why_slow(Structure.parse(text)) is None]
LINEAR = pytest.mark.parametrize(("text", "shape"), [each for each in FAST if len(each[1]) == 2])
CONV = pytest.mark.parametrize(("text", "shape"), [each for each in FAST if len(each[1]) == 4])
WINDOWS = pytest.mark.parametrize(
    "window", [Window(), Window((2, 1), (1, 2), (1, 1)), Window((1, 2), (2, 1), (2, 1))], ids=["plain", "a", "b"]
)


def tensors_of(structure: Structure, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    made = random_tensors(structure, shape, torch.Generator().manual_seed(1))
    return {name: each.to(dtype) for name, each in made.items()}


def shortcut_of(tensors: dict[str, Tensor], structure: Structure, columns: int) -> Shortcut:
    stored = {name: nn.Parameter(each) for name, each in tensors.items()}
    return Shortcut(stored, keep(stored, structure), structure, columns)


def assert_linear(tensors: dict[str, Tensor], weight: Tensor, text: str, rows: int) -> None:
    structure = Structure.parse(text)
    x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    bias = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for make in (prepare, keep):
        assert_close(linear(x, make(tensors, structure), structure, bias), x @ weight.T + bias)
    assert linear(x[:, None], keep(tensors, structure), structure, bias).shape == (rows, 1, weight.shape[0])
    shortcut = shortcut_of(tensors, structure, weight.shape[1])
    for each in (None, bias):
        if (found := shortcut.product(x[:, None], each)) is not None:
            assert_close(found[:, 0], x @ weight.T + (0 if each is None else bias))


@LINEAR
@pytest.mark.parametrize("rows", [1, ROWS, FFT_ROWS, FFT_ROWS + 1])
def test_linear(text, shape, rows):
    structure = Structure.parse(text)
    tensors = tensors_of(structure, shape)
    assert_linear(tensors, expand(tensors, structure, shape), text, rows)


@pytest.mark.parametrize(
    ("text", "shape", "helps"),
    [
        ("C32xC32", (1024, 2048), WAVES),
        ("C5+displacement:1", (10, 15), WAVES),
        ("C4xC4+displacement:1", (32, 16), SPECTRUM),  # one small product in place of two transforms
        ("C2xC2xC2+displacement:1", (8, 16), SPECTRUM),
        ("C2xC64", (128, 256), SPECTRUM),
        ("D4", (8, 8), None),  # irreducibles of two kinds
        ("C2", (1024, 1024), None),  # more than LARGEST
        ("C3", (3 * 640, 3 * 640), None),  # more than WIDEST
    ],
)
def test_what_is_kept_for_few_rows(text, shape, helps):
    structure = Structure.parse(text)
    kept = keep(tensors_of(structure, shape), structure)
    assert [name for name in (SPECTRUM, WAVES) if name in kept] == ([helps] if helps else [])
    if helps == SPECTRUM:
        assert kept[SPECTRUM].numel() == kept["spectrum0"].numel() <= LARGEST
    for rows in (0, 1):
        found = linear(torch.ones(rows, shape[1], dtype=torch.float64), kept, structure)
        assert found.shape == (rows, shape[0])


def test_groups_that_fast_fourier_transforms_know():
    orders = {text: cyclic_orders(Structure.parse(text).acting) for text in ("C12", "C4xC5xC3", "C2xC8", "D4", "S3xC4")}
    assert orders == {"C12": (12,), "C4xC5xC3": (4, 5, 3), "C2xC8": (), "D4": (), "S3xC4": ()}


@pytest.mark.parametrize(
    ("text", "most"),
    [("C8", FFT_ROWS), ("C2^3+displacement:1", ROWS), ("C8+lowrank:1", FFT_ROWS), ("lowrank:2", 99), ("D4", 0)],
)
def test_which_inputs_take_the_shortcut(text, most):
    structure = Structure.parse(text)
    tensors = tensors_of(structure, (16, 8), torch.float32)
    shortcut, weight = shortcut_of(tensors, structure, 8), expand(tensors, structure, (16, 8))
    x = torch.ones(99, 8)
    for rows in (0, 1, ROWS, ROWS + 1, FFT_ROWS, FFT_ROWS + 1, 99):
        found = shortcut.product(x[:rows], None)
        assert (found is not None) == (0 < rows <= most)
        if found is not None:
            assert_close(found, x[:rows] @ weight.T)
    others = [x[:1].double(), nn.Parameter(x[:1]), x[:1, :7], x[:2].to_sparse(), torch.tensor(1.0), x[:1].to("meta")]
    assert [shortcut.product(each, None) for each in others] == [None] * len(others)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert shortcut.product(x[:1], None) is None
    with FlopCounterMode(display=False):
        assert shortcut.product(x[:1], None) is None
    with pytest.raises(RuntimeError):  # as torch's own
        linear(x[:1].double(), keep(tensors, structure), structure)


def test_products_of_many_numbers_take_no_fast_fourier_transforms(monkeypatch):
    structure, x = Structure.parse("C8"), torch.ones(3, 8)
    tensors = tensors_of(structure, (16, 8), torch.float32)
    monkeypatch.setattr("gmcompress.fewrows.WIDEST", 2 * keep(tensors, structure)[WAVES].numel())
    assert [shortcut_of(tensors, structure, 8).product(x[:rows], None) is None for rows in (2, 3)] == [False, True]
    assert WAVES not in keep(tensors_of(structure, (16, 32), torch.float32), structure)


def test_multiply_adds_of_few_inputs_are_counted_on_the_way_of_matrix_products():
    layer = freeze(GMLinear(8, 16, "C8", bias=False).eval(), "structured")
    with FlopCounterMode(display=False) as counter:
        layer(torch.ones(1, 8))
    assert counter.get_total_flops() == 2 * multiply_adds(layer.structure, (16, 8), (1,))


@pytest.mark.parametrize("text", ["C3xC5", "C2^2+displacement:1", "C4+lowrank:1", "lowrank:2"])
def test_a_shortcut_follows_its_layer(text):
    def assert_right(layer: nn.Module, *, short: bool = True) -> None:
        assert_close(layer(x), layer.dense()(x))
        assert layer._shortcut.is_outdated(layer._parameters) is not short

    structure = Structure.parse(text)
    n = 2 * (1 if structure.group is None else structure.acting.order)
    layer = GMLinear(n, n, structure).double().eval()
    x = torch.randn(1, n, dtype=torch.float64)
    layer.freeze_("structured")
    assert_right(layer)
    for part in layer.parameters():
        nn.init.normal_(part)
    assert_right(layer)
    assert_right(copy.deepcopy(layer))
    assert_right(pickle.loads(pickle.dumps(layer)))
    layer.load_state_dict({name: each + 1 for name, each in layer.state_dict().items()})
    assert_right(layer)
    layer.train()
    assert_right(layer, short=False)
    layer.eval()
    others = {name: each + 1 for name, each in layer.state_dict().items()}
    before, wanted = layer(x), copy.deepcopy(layer)
    wanted.load_state_dict(others)
    assert_close(torch.func.functional_call(layer, others, x), wanted(x))
    assert torch.equal(layer(x), before)
    with torch.inference_mode():
        inner = copy.deepcopy(layer)
        assert inner.bias.is_inference()
        assert_close(inner(x), before)
    name = next(iter(layer.parts()))
    setattr(layer, name, nn.Parameter(getattr(layer, name) * 2))
    assert_right(layer)
    layer.thaw_()
    assert layer._shortcut is None


@pytest.mark.parametrize("text", ["C32xC32", "C4", "C4xC4", "C2^3", "C3+displacement:1"])
def test_inputs_of_another_width_are_refused(text):
    structure = Structure.parse(text)
    n = structure.acting.order
    layer = freeze(GMLinear(4 * n, 2 * n, structure, bias=False).eval(), "structured")
    for width in (4, 2 * n, 4 * (n + 1), 4 * n - 1, 8 * n):
        with pytest.raises(RuntimeError):
            layer(torch.ones(1, width))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("text", ["C5+displacement:1", "C8xC9"])
def test_fast_fourier_transforms_are_followed_by_torch(text):
    structure = Structure.parse(text)
    layer = GMLinear(structure.acting.order, 2 * structure.acting.order, structure).double().eval()
    for part in layer.parameters():
        nn.init.normal_(part)
    x = torch.randn(3, layer.in_features, dtype=torch.float64, requires_grad=True)
    plain, frozen = layer.dense(), freeze(layer, "structured")
    assert frozen._shortcut.product(x, None) is not None
    assert_close(frozen(x), plain(x))
    (wanted,) = torch.autograd.grad(plain(x).square().sum(), x)
    (found,) = torch.autograd.grad(frozen(x).square().sum(), x)
    assert_close(found, wanted)
    assert_close(torch.vmap(frozen)(x), plain(x))
    traced = torch.jit.trace(frozen, x[:1].detach(), check_trace=False)
    assert "complex" not in str(traced.inlined_graph).lower()
    assert_close(traced(x[:1]), plain(x[:1]))
    assert_close(torch.func.jvp(frozen, (x,), (x,))[1], plain(x) - plain.bias)


@pytest.mark.parametrize("text", ["C8", "D4", "lowrank:2", "adapted:2:2x2", "C4+displacement:1+lowrank:1"])
def test_empty_batches_are_as_those_of_torch(text):
    structure = Structure.parse(text)
    tensors = tensors_of(structure, (16, 8))
    x = torch.zeros(3, 0, 8, dtype=torch.float64, requires_grad=True)
    found = linear(x, prepare(tensors, structure), structure)
    assert found.shape == F.linear(x, expand(tensors, structure, (16, 8))).shape
    found.sum().backward()
    assert x.grad is not None
    images, tensors = torch.zeros(0, 8, 5, 5, dtype=torch.float64), tensors_of(structure, (16, 8, 3, 3))
    assert conv2d(images, prepare(tensors, structure), structure, window=Window()).shape == (0, 16, 3, 3)


@pytest.mark.parametrize(("text", "shape"), [each for each in FAST if len(each[1]) == 2 and max(each[1]) < 20])
def test_linear_against_the_slow_twin(text, shape):
    structure = Structure.parse(text)
    tensors = tensors_of(structure, shape)
    assert_linear(tensors, slow_expand(tensors, structure, shape), text, 2)


def test_control_the_weight_of_the_inverse_elements():
    structure = Structure.parse("C5")
    tensors = tensors_of(structure, (5, 10))
    weight = expand(tensors, structure, (5, 10))
    assert_linear(tensors, weight, "C5", 3)
    turned = {"kernel": tensors["kernel"].flip(2).roll(1, 2)}
    must_fail(assert_linear, turned, weight, "C5", 3)


@CONV
@WINDOWS
def test_conv2d(text, shape, window, generator):
    structure = Structure.parse(text)
    tensors = tensors_of(structure, shape)
    x = torch.randn(2, shape[1], 8, 7, generator=generator, dtype=torch.float64)
    found = conv2d(x, prepare(tensors, structure), structure, window=window)
    moves = (window.stride, window.padding, window.dilation)
    assert_close(found, F.conv2d(x, expand(tensors, structure, shape), None, *moves))
    assert_close(conv2d(x[0], prepare(tensors, structure), structure, window=window), found[0])


@LINEAR
@pytest.mark.parametrize("rows", [2, 7])
def test_multiply_adds_of_linear(text, shape, rows):
    structure = Structure.parse(text)
    ready = prepare(tensors_of(structure, shape), structure)
    with FlopCounterMode(display=False) as counter:
        linear(torch.zeros(rows, shape[1], dtype=torch.float64), ready, structure)
    assert counter.get_total_flops() == 2 * multiply_adds(structure, shape, (rows,))


@CONV
@WINDOWS
def test_multiply_adds_of_conv2d(text, shape, window):
    structure = Structure.parse(text)
    ready = prepare(tensors_of(structure, shape), structure)
    with FlopCounterMode(display=False) as counter:
        conv2d(torch.zeros(2, shape[1], 8, 7, dtype=torch.float64), ready, structure, window=window)
    assert counter.get_total_flops() == 2 * multiply_adds(structure, shape, (2, 8, 7), window)


@pytest.mark.parametrize(
    ("text", "shape"), [("C8xC8+displacement:1", (64, 128)), ("D4+lowrank:2", (16, 16)), ("adapted:3:2x2", (8, 12))]
)
def test_gradients_are_those_of_the_dense_product(text, shape, generator):
    structure = Structure.parse(text)
    tensors = {name: each.requires_grad_() for name, each in tensors_of(structure, shape).items()}
    x = torch.randn(6, shape[1], generator=generator, dtype=torch.float64, requires_grad=True)
    subjects = [x, *tensors.values()]
    fast = torch.autograd.grad(linear(x, prepare(tensors, structure), structure).square().sum(), subjects)
    slow = torch.autograd.grad((x @ expand(tensors, structure, shape).T).square().sum(), subjects)
    for found, wanted in zip(fast, slow, strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", ["C8xC8+displacement:1", "D4xC8", "lowrank:8", "adapted:4:2x2"])
def test_half_precision(text, dtype, generator):
    structure, shape = Structure.parse(text), (128, 64)
    tensors = tensors_of(structure, shape, dtype)
    x = torch.randn(5, 64, generator=generator, dtype=torch.float64)
    found = linear(x.to(dtype), prepare(tensors, structure), structure)
    exact = x @ expand({name: each.double() for name, each in tensors.items()}, structure, shape).T
    assert found.dtype == dtype
    assert_close(found, exact.to(dtype), slack=2)


@pytest.mark.parametrize("text", ["C8xC8+displacement:1", "lowrank:8"])
def test_autocast(text, generator):
    structure, shape = Structure.parse(text), (128, 64)
    tensors = tensors_of(structure, shape, torch.float32)
    x = torch.randn(5, 64, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ready = prepare(tensors, structure)
        found = linear(x, ready, structure, torch.ones(128))
    assert found.dtype == torch.bfloat16
    assert all(each.dtype == torch.float32 for each in ready.values())
    assert_close(found, (x @ expand(tensors, structure, shape).T + 1).to(torch.bfloat16), slack=2)


@pytest.mark.parametrize(
    ("text", "groups", "reason"),
    [
        ("C4", 2, "grouped"),
        ("D4[G/<1>,G]", 1, "not the group itself"),
        ("D4[G,G/<1,4>]", 1, "not the group itself"),
        ("C4[G,G,grid3x3]", 1, "acts on the taps"),
        ("C2048", 1, "limited to order"),
    ],
)
def test_why_slow(text, groups, reason):
    assert reason in str(why_slow(Structure.parse(text), groups))
