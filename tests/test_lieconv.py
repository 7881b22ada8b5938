"""Laws of convolution on Lie groups by sampling: a twin of loops, exact quarter turns, dilations, and the measures."""

import copy
import math

import pytest
import torch
from conftest import assert_close, must_fail
from market import blobs
from torch import Generator, Tensor, nn

from gmcompress.errors import GMError
from gmcompress.lieconv import LieConv, fading
from gmcompress.motions import move
from gmcompress.structure import KINDS

GROUPS = {"SE(2)": 3, "R^2:R+": 3, "Sim(2)": (3, 2)}


def random_layer(*args: object, **options: object) -> LieConv:
    torch.manual_seed(0)
    layer = LieConv(*args, **options).double()
    for each in layer.parameters():
        if each.dim() == 1:
            nn.init.normal_(each, std=0.3)
    return layer


# --------------------------------------------------------------------------------------------------------- the twin


def line(layer: LieConv, name: str, coordinates: list[float]) -> Tensor:
    return getattr(layer, name)(torch.tensor(coordinates, dtype=torch.float64)).reshape(layer.channels[name])


def slow_kernel(
    layer: LieConv, pixel: tuple[int, int], target: tuple[float, float], source: tuple[float, float]
) -> Tensor:  # (o, i)
    """k(h⁻¹x, h⁻¹h̃) with all measures, from the sirens at one pair of samples (angle, logarithm of the scale)."""
    (angle, stretch), scale, radius = target, math.exp(target[1]), layer.kernel_size / 2
    x, y = pixel[1], -pixel[0]
    place = [
        (math.cos(angle) * x + math.sin(angle) * y) / scale / radius,
        (math.cos(angle) * y - math.sin(angle) * x) / scale / radius,
    ]
    gain = float(fading(torch.tensor(math.hypot(*place), dtype=torch.float64))) / scale**2
    turn, ratio = source[0] - angle, (source[1] - stretch) / math.log(layer.reach)
    if layer.grid.dilates and not layer.lift:
        gain *= math.cos(math.pi / 2 * min(1.0, abs(ratio))) ** 2
    logs = [turn + 2 * math.pi * each for each in range(-3, 4)] if layer.grid.rotates else [0.0]
    shares = {each: math.cos(each / 4) ** 2 for each in logs if abs(each) <= 2 * math.pi}  # 1 for the log 0 alone
    found = {}
    for name in layer.channels:
        if name == "mixing":
            found[name] = layer.mixing
        elif layer.lift or (name == "outer" and layer.kind != "dseparable"):
            found[name] = line(layer, name, place)
        else:
            before = [] if name == "inner" else place
            inside = {log: [log / math.pi] * layer.grid.rotates + [ratio] * layer.grid.dilates for log in shares}
            found[name] = sum(shares[log] * line(layer, name, before + inside[log]) for log in shares)
    wide = [each if each.dim() == 3 else each[:, :, None] for each in found.values()]
    return gain * (1.0 if layer.lift else layer.grid.cell) * math.prod(wide[1:], start=wide[0]).sum(0)


def slow_forward(layer: LieConv, signal: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Over all samples, places and pixels of a kernel of the largest disc."""
    half = layer.kernel_size  # of a box that holds it
    inputs = [(0.0, 0.0)] if layer.lift else layer.grid.logarithms(source).tolist()
    given = signal[:, :, None] if layer.lift else signal
    outputs = layer.grid.logarithms(target).tolist()
    rows, columns = signal.shape[-2:]
    found = signal.new_zeros(len(signal), layer.out_channels, len(outputs), rows, columns)
    for a in range(-half, half + 1):
        for b in range(-half, half + 1):
            for h, element in enumerate(outputs):
                for g, other in enumerate(inputs):
                    kernel = slow_kernel(layer, (a, b), element, other)
                    for i in range(max(0, -a), min(rows, rows - a)):
                        for j in range(max(0, -b), min(columns, columns - b)):
                            found[:, :, h, i, j] += given[:, :, g, i + a, j + b] @ kernel.T
    return found + layer.bias[:, None, None, None]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", GROUPS)
def test_is_the_twin_of_loops(group: str, kind: str, generator: Generator) -> None:
    samples = (2, 2) if group == "Sim(2)" else 2
    options = {"samples": samples, "max_scale": 1.5, "hidden": 4, "separable": kind}
    layer = random_layer(group, 2, 1, 3, terms=1 if kind == "nonseparable" else 2, **options)
    signal = torch.randn(1, 2, layer.grid.size, 2, 3, generator=generator, dtype=torch.float64)
    source, target = layer.grid.draw(generator=generator), layer.grid.draw(generator=generator)
    expected = slow_forward(layer, signal, source, target)
    assert_close(layer(signal, source=source, target=target), expected)
    must_fail(assert_close, layer(signal, source=target, target=source), expected)
    must_fail(assert_close, layer(signal), expected)


@torch.no_grad()
@pytest.mark.parametrize("group", GROUPS)
def test_lifting_is_the_twin_of_loops(group: str, generator: Generator) -> None:
    layer = random_layer(group, 2, 3, 3, samples=GROUPS[group], max_scale=1.5, hidden=4, lift=True)
    image = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    target = layer.grid.draw(generator=generator)
    expected = slow_forward(layer, image, target, target)
    assert_close(layer(image, target=target), expected)
    must_fail(assert_close, layer(image), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_cheaper_steps_are_the_full_kernel(kind: str, generator: Generator) -> None:
    layer = random_layer("Sim(2)", 3, 2, 5, samples=(4, 2), separable=kind, terms=3)
    signal = torch.randn(2, 3, 8, 6, 7, generator=generator, dtype=torch.float64)
    weight = layer.full_kernel()
    assert weight.shape == (2, 8, 3, 8, 9, 9), "the box holds a disc of 5 pixels at scale 2"
    flat = nn.functional.conv2d(signal.flatten(1, 2), weight.flatten(2, 3).flatten(0, 1), padding=4)
    assert_close(layer(signal), flat.unflatten(1, (2, 8)) + layer.bias[:, None, None, None])


# ------------------------------------------------------------------------------------------------------ equivariance


def turned(signal: Tensor) -> Tensor:
    """A quarter turn counterclockwise of an image, or of a signal whose first quarter of rotations it carries on."""
    return signal.rot90(1, [-2, -1]) if signal.dim() == 4 else signal.rot90(1, [3, 4])


def assert_quarter_turns(layer: LieConv, signal: Tensor, tolerance: float = 1e-5) -> None:
    angles, scales = layer.grid.counts
    shift = angles // 4 * scales
    moved = turned(signal) if layer.lift else turned(signal).roll(shift, 2)
    expected = turned(layer(signal)).roll(shift, 2)
    assert float((layer(moved) - expected).abs().max()) < tolerance * float(expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "lift"])
@pytest.mark.parametrize(("group", "samples"), [("SE(2)", 4), ("SE(2)", 8), ("Sim(2)", (4, 2)), ("SE(2)", 6)])
def test_quarter_turns_are_exact(group: str, samples: int, kind: str, generator: Generator) -> None:
    torch.manual_seed(0)
    lift = kind == "lift"
    layer = LieConv(group, 2, 3, 5, samples=samples, lift=lift, separable=None if lift else kind)
    signal = torch.randn(1, 2, *([] if lift else [layer.grid.size]), 8, 8, generator=generator)
    if samples == 6:
        must_fail(assert_quarter_turns, layer, signal)
    else:
        assert_quarter_turns(layer, signal)
        exact = layer.double()
        assert_quarter_turns(exact, signal.double(), 1e-12)


def dilation_error(layer: nn.Module, images: Tensor, ratio: float, ends: int, *, power: float = 0.0) -> float:
    """The relative error of an enlargement by one step of the scales, `ends` samples at each end left out."""
    plain, moved = layer(images), layer(move(images, ratio=ratio))
    scales = torch.arange(plain.shape[2]).to(plain) * math.log(ratio)
    plain, moved = (each * (power * scales).exp()[:, None, None] for each in (plain, moved))
    found, expected = moved[:, :, 1:], torch.stack([move(each, ratio=ratio) for each in plain[:, :, :-1].unbind(2)], 2)
    inside = slice(ends, found.shape[2] - ends)
    return float((found - expected)[:, :, inside].norm() / expected[:, :, inside].norm())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["nonseparable", "separable"])
def test_dilations_move_scales(kind: str, generator: Generator) -> None:
    torch.manual_seed(0)
    options = {"samples": 5, "max_scale": 4.0, "bias": False}
    lift = LieConv("R^2:R+", 1, 4, 5, lift=True, **options)
    both = nn.Sequential(lift, nn.ReLU(), LieConv("R^2:R+", 4, 4, 5, separable=kind, **options))
    images, ratio = blobs(49, generator, width=3.0), math.sqrt(2)
    assert dilation_error(lift, images, ratio, 0) < 0.03
    assert dilation_error(lift, images, ratio, 0, power=2) > 0.2, "without the factor 1/scale² it is wrong"
    assert dilation_error(both, images, ratio, 1) < 0.03, "a reach of one step and more from the ends"
    assert dilation_error(both, images, ratio, 0) > 0.05, "at the ends scales are missing"


# ----------------------------------------------------------------------------------------------------------- measures


def constant(group: str, samples: object, max_scale: float = 2.0) -> Tensor:  # (targets, sources, side, side)
    """The kernel whose function is one everywhere."""
    layer = LieConv(group, 1, 1, 15, samples=samples, max_scale=max_scale, reach=1e300).double()
    nn.init.zeros_(layer.kernel.weight2)
    nn.init.ones_(layer.kernel.bias2)
    return layer.full_kernel().detach()[0, :, 0]


def test_the_mass_of_a_kernel_is_that_of_the_integral() -> None:
    distance = torch.linspace(0, 1, 20001, dtype=torch.float64)
    exact = 2 * math.pi * 7.5**2 * float(torch.trapezoid(fading(distance) * distance, distance))
    turns = constant("SE(2)", 6)
    assert turns.sum((1, 2, 3)).tolist() == pytest.approx([exact] * 6, rel=1e-3)
    assert_close(turns[0], turns[1])  # the disc is the same in all directions
    masses = constant("R^2:R+", 3).sum((2, 3))  # all scales have the same mass: 1/scale² undoes the area
    assert masses.flatten().tolist() == pytest.approx([exact * math.log(2) / 2] * 9, rel=1e-3)
    corners = turns[0, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert_close(corners, torch.zeros_like(corners))


def test_the_box_holds_the_largest_disc_and_no_more() -> None:
    for group, samples, max_scale, side in (
        ("SE(2)", 8, 2.0, 5),
        ("R^2:R+", 3, 2.0, 9),
        ("R^2:R+", 1, 2.0, 5),
        ("Sim(2)", (4, 2), 3.0, 15),
    ):
        layer = random_layer(group, 1, 1, 5, samples=samples, max_scale=max_scale, reach=10)
        kernel = layer.full_kernel().detach()
        assert kernel.shape[-1] == side
        assert float(kernel[..., 0, side // 2].abs().max()) > 0, "the outermost pixels are used"
        widest = torch.tensor([0.0, 0.5 * layer.grid.steps[1]], dtype=torch.float64)
        offset = layer.full_kernel(target=widest).detach()
        if layer.grid.dilates:
            assert offset.shape[-1] > side
            assert float(offset[..., 1:-1, 1:-1].sum() - offset.sum()) != 0


# ------------------------------------------------------------------------------------------------------------- modules


@pytest.mark.parametrize("kind", [*KINDS, "lift"])
@pytest.mark.parametrize("group", GROUPS)
def test_gradients_reach_every_parameter(group: str, kind: str, generator: Generator) -> None:
    torch.manual_seed(0)
    lift = kind == "lift"
    options = {"samples": GROUPS[group], "reach": 4.0, "separable": None if lift else kind, "lift": lift}
    layer = LieConv(group, 2, 3, 3, **options)
    signal = torch.randn(1, 2, *([] if lift else [layer.grid.size]), 5, 5, generator=generator)
    layer(signal, target=layer.grid.draw()).square().sum().backward()
    for name, each in layer.named_parameters():
        assert each.grad is not None, name
        assert bool(each.grad.isfinite().all()), name
        assert float(each.grad.abs().max()) > 0, name


@torch.no_grad()
def test_copies_and_other_numbers_of_samples(generator: Generator) -> None:
    for layer in (
        LieConv("SE(2)", 2, 3, 5, samples=4, separable="separable", terms=2, omega=5.0),
        LieConv("Sim(2)", 2, 3, 3, samples=(4, 2), max_scale=3.0, reach=1.5, bias=False, hidden=8, layers=1),
        LieConv("R^2:R+", 2, 3, 3, samples=2, lift=True),
    ):
        again = eval(repr(layer))
        assert repr(again) == repr(layer)
        again.load_state_dict(layer.state_dict())
        signal = torch.randn(1, 2, *([] if layer.lift else [layer.grid.size]), 6, 6, generator=generator)
        for same in (again, copy.deepcopy(layer), layer.resampled(layer.grid.samples)):
            assert torch.equal(same(signal), layer(signal))
        finer = layer.resampled((8, 3) if layer.grid.group == "Sim(2)" else 6)
        assert finer.state_dict().keys() == layer.state_dict().keys()
        assert finer.grid.size != layer.grid.size
    with torch.device("meta"):
        assert LieConv("SE(2)", 2, 3, 5, samples=4)(torch.ones(1, 2, 4, 6, 6)).shape == (1, 3, 4, 6, 6)


@torch.no_grad()
def test_types(generator: Generator) -> None:
    torch.manual_seed(0)
    layer = LieConv("SE(2)", 2, 3, 5, samples=4, separable="dgseparable")
    signal = torch.randn(2, 2, 4, 6, 6, generator=generator)
    expected = layer(signal)
    assert_close(layer.double()(signal.double()).float(), expected)
    assert_close(layer.bfloat16()(signal.bfloat16()), expected.bfloat16(), slack=2)
    layer = layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(signal)
    assert found.dtype == torch.bfloat16
    assert_close(found, expected.bfloat16(), slack=2)


def test_refused() -> None:
    for options, message in (
        ({"in_channels": 0}, "in_channels"),
        ({"terms": True}, "terms"),
        ({"kernel_size": 4}, "odd number"),
        ({"omega": 0}, "omega"),
        ({"reach": 1}, "reach"),
        ({"separable": "seperable"}, "no kind"),
        ({"group": "SO(3)"}, "no Lie group"),
        ({"samples": (4, 2)}, "rotations"),
        ({"lift": True, "separable": "separable"}, "no part in H"),
    ):
        usual = {"group": "SE(2)", "in_channels": 1, "out_channels": 1, "kernel_size": 3, "samples": 4}
        with pytest.raises(GMError, match=message):
            LieConv(**usual | options)
    layer, lift = LieConv("SE(2)", 1, 1, 3, samples=4), LieConv("SE(2)", 1, 1, 3, samples=4, lift=True)
    for each, shape in ((layer, (1, 1, 5, 5)), (layer, (1, 1, 8, 5, 5)), (lift, (1, 1, 4, 5, 5)), (lift, (1, 2, 5, 5))):
        with pytest.raises(GMError, match="has shape"):
            each(torch.ones(shape))
    with pytest.raises(GMError, match="no source"):
        lift(torch.ones(1, 1, 5, 5), source=torch.zeros(2))
