"""Laws of convolution on infinite groups: that of torch on Z^d, and on Z²⋊H a twin that knows only the product."""

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import assert_close, must_fail
from torch import Generator, Tensor
from torch.autograd import gradcheck

from gmcompress.errors import GMError
from gmcompress.lattice import LatticeConv

Motion = tuple[int, int, int]  # row, column, element of H
POINTS = {"C1": (1, 1), "C2": (2, 1), "C4": (4, 1), "D1": (1, 2), "D2": (2, 2), "D4": (4, 2)}


def turned(point: str, element: int, row: int, column: int) -> tuple[int, int]:
    """The place to which an element of H moves a place: first its mirror, left to right, then its turns."""
    turns, mirrors = POINTS[point]
    angle, mirror = divmod(element, mirrors)
    column = -column if mirror else column
    for _ in range(angle * (4 // turns if turns > 1 else 0)):
        row, column = -column, row  # a quarter turn counterclockwise, rows downwards
    return row, column


def times(point: str, g: Motion, u: Motion) -> Motion:
    """(x, g)·(u, h) = (x + g·u, g·h), the element of H found by what it does to two places."""
    row, column = turned(point, g[2], u[0], u[1])
    places = [(1, 0), (0, 1)]
    images = [turned(point, g[2], *turned(point, u[2], *each)) for each in places]
    order = POINTS[point][0] * POINTS[point][1]
    [product] = [h for h in range(order) if [turned(point, h, *each) for each in places] == images]
    return g[0] + row, g[1] + column, product


def slow_forward(layer: LatticeConv, signal: Tensor, point: str) -> Tensor:  # of support "full"
    """Over all elements g of the large box and u of the kernel's box, with the signal zero where it is not given."""
    height, width = layer.kernel_size
    order = POINTS[point][0] * POINTS[point][1]
    kernel = layer.kernel.detach()[:, :, None] if layer.lift else layer.kernel.detach()
    given = signal[:, :, None] if layer.lift else signal
    rows, columns = signal.shape[-2:]
    found = signal.new_zeros(len(signal), layer.out_channels, order, rows + height - 1, columns + width - 1)
    places = itertools.product(range(-(height // 2), height // 2 + 1), range(-(width // 2), width // 2 + 1))
    for a, b in places:
        for h, g in itertools.product(range(kernel.shape[2]), range(order)):
            for row, column in itertools.product(range(found.shape[3]), range(found.shape[4])):
                x = (row - height // 2, column - width // 2, g)
                i, j, element = times(point, x, (a, b, 0 if layer.lift else h))
                if 0 <= i < rows and 0 <= j < columns:
                    values = given[:, :, 0 if layer.lift else element, i, j]
                    found[:, :, g, row, column] += values @ kernel[:, :, h, a + height // 2, b + width // 2].T
    return found + layer.bias.detach()[:, None, None, None]


def random_layer(*args: object, generator: Generator, **options: object) -> LatticeConv:
    layer = LatticeConv(*args, **options).double()
    for each in layer.parameters():
        torch.nn.init.normal_(each, generator=generator)
    return layer


@pytest.mark.parametrize("lift", [True, False])
@pytest.mark.parametrize("point", POINTS)
def test_is_the_twin_that_knows_only_the_product(point: str, lift: bool, generator: Generator) -> None:
    layer = random_layer(f"Z^2:{point}", 2, 2, 3, lift=lift, support="full", generator=generator)
    order = POINTS[point][0] * POINTS[point][1]
    signal = torch.randn(1, 2, *([] if lift else [order]), 3, 4, generator=generator, dtype=torch.float64)
    expected = slow_forward(layer, signal, point)
    with torch.no_grad():
        assert_close(layer(signal), expected)
        must_fail(assert_close, layer(signal.flip(-1)), expected)
        layer.support = "same"
        assert_close(layer(signal), expected[..., 1:-1, 1:-1])
        layer.support = "valid"
        assert_close(layer(signal), expected[..., 2:-2, 2:-2])


@pytest.mark.parametrize(("group", "size"), [("Z", (5,)), ("Z^2", (3, 5)), ("Z^3", (3, 1, 3))])
@pytest.mark.parametrize("support", ["same", "full", "valid"])
def test_on_lattices_alone_it_is_the_convolution_of_torch(
    group: str, size: tuple, support: str, generator: Generator
) -> None:
    layer = random_layer(group, 2, 3, size, support=support, generator=generator)
    signal = torch.randn(2, 2, *[6] * len(size), generator=generator, dtype=torch.float64)
    padding = [{"same": each // 2, "full": each - 1, "valid": 0}[support] for each in size]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    assert_close(layer(signal), convolve(signal, layer.kernel, layer.bias, padding=padding))


def moved(point: str, g: int, signal: Tensor) -> Tensor:  # (batch, channels, |H|, side, side)
    """(g·f)(x) = f(g⁻¹x) for a motion around the middle of a square."""
    found, half = torch.empty_like(signal), signal.shape[-1] // 2
    for h in range(signal.shape[2]):
        for i, j in itertools.product(range(-half, half + 1), repeat=2):
            a, b, element = times(point, (0, 0, g), (i, j, h))
            found[:, :, element, a + half, b + half] = signal[:, :, h, i + half, j + half]
    return found


@pytest.mark.parametrize("point", POINTS)
def test_a_network_commutes_with_turns_and_mirrors(point: str, generator: Generator) -> None:
    first = random_layer(f"Z^2:{point}", 1, 2, 3, lift=True, generator=generator)
    second = random_layer(f"Z^2:{point}", 2, 2, 3, generator=generator)
    image = torch.randn(1, 1, 5, 5, generator=generator, dtype=torch.float64)
    order = POINTS[point][0] * POINTS[point][1]
    with torch.no_grad():
        plain = second(first(image).relu())
        for g in range(order):
            turned_image = moved(point, g, image[:, :, None].expand(-1, -1, order, -1, -1))[:, :, 0]
            assert_close(second(first(turned_image).relu()), moved(point, g, plain), slack=10)
            if g:
                must_fail(assert_close, second(first(turned_image).relu()), plain)


def test_full_support_commutes_with_translations(generator: Generator) -> None:
    layer = random_layer("Z^2:D4", 1, 2, 3, lift=True, support="full", generator=generator)
    image = torch.randn(1, 1, 4, 4, generator=generator, dtype=torch.float64)
    assert_close(layer(F.pad(image, (2, 0, 1, 0)))[..., 1:, 2:], layer(image))


def test_gradients_and_copies(generator: Generator) -> None:
    layer = random_layer("Z^2:D2", 1, 2, (3, 1), generator=generator)
    signal = torch.randn(1, 1, 4, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda x, kernel: torch.func.functional_call(layer, {"kernel": kernel}, (x,)), (signal, layer.kernel)
    )
    for each in (
        layer,
        LatticeConv("Z", 1, 2, 3, bias=False, support="full"),
        LatticeConv("Z^2:C4", 1, 2, 3, lift=True),
    ):
        again = eval(repr(each))
        assert repr(again) == repr(each)
        again.load_state_dict(each.state_dict())
    assert layer.weight.shape == (8, 4, 3, 1)


def test_refused() -> None:
    for args, message in (
        (("Z^4", 1, 1, 3), "no lattice"),
        (("Z^3:C4", 1, 1, 3), "no lattice"),
        (("Z^2:Q8", 1, 1, 3), "no lattice"),
        ((2, 1, 1, 3), "no lattice"),
        (("Z^2", 1, 1, 4), "odd numbers"),
        (("Z^2", 1, 1, (3,)), "odd numbers"),
        (("Z^2:C4", 1, 1, (3, 5)), "square"),
        (("Z", 0, 1, 3), "in_channels"),
    ):
        with pytest.raises(GMError, match=message):
            LatticeConv(*args)
    for options, message in (({"support": "circular"}, "support"), ({"lift": True}, "nothing to lift")):
        with pytest.raises(GMError, match=message):
            LatticeConv("Z^2", 1, 1, 3, **options)
    for layer, shape in ((LatticeConv("Z^2:C4", 1, 1, 3), (1, 1, 5, 5)), (LatticeConv("Z^2", 2, 1, 3), (1, 1, 5, 5))):
        with pytest.raises(GMError, match="has shape"):
            layer(torch.ones(shape))
