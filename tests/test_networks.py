"""Laws of the small networks: shapes, symmetry of outputs, and that they learn what their symmetry allows."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import assert_close, must_fail
from market import blobs
from torch import Generator, Tensor, nn

from gmcompress.commutator import act, equivariance_error
from gmcompress.errors import GMError
from gmcompress.lieconv import LieConv
from gmcompress.networks import GMCNN, HEADS, LIE_HEADS, SAMPLINGS, LieCNN
from gmcompress.pipeline import compress


@pytest.mark.parametrize("pool", [None, "max", "mean"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("name", "strides"), [("C8xC8", ("C4xC4", "C2xC2")), ("D4", ([2], [2])), ("S3", (None, [2]))])
def test_outputs_and_their_symmetry(
    name: str, strides: tuple, head: str, pool: str | None, generator: Generator
) -> None:
    model = GMCNN(name, 2, 3, channels=(4, 5), radius=1, strides=strides, pool=pool, head=head).double()
    assert len(strides) == 2
    signal = torch.randn(2, 2, model.group.order, generator=generator, dtype=torch.float64)
    last = model.out_group.order
    assert model.eval()(signal).shape == ((2, 3, last) if head == "signal" else (2, 3))
    members = {"C8xC8": "C2xC2", "D4": [4], "S3": [2]}[name]
    found = equivariance_error(model, name, signal, stride=members)
    if head == "flatten":
        assert found["error"] > 1e-3
    else:
        assert found["error"] < 1e-12


def test_signals_keep_their_axes(generator: Generator) -> None:
    model = GMCNN("C8xC4", 1, 2, strides=("C4xC2", None), head="signal", norm=False, separable="separable").eval()
    signal = torch.randn(3, 1, 8, 4, generator=generator)
    assert model(signal).shape == (3, 2, 4, 2)
    assert torch.equal(model(signal).flatten(2), model(signal.flatten(2)))


def trained(model: nn.Module, inputs: Tensor, target: Tensor, *, rate: float) -> Tensor:  # ()
    """The loss of the last of 60 steps."""
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(60):
        optimiser.zero_grad()
        loss = F.mse_loss(model(inputs), target)
        loss.backward()
        optimiser.step()
    return loss.detach()


def assert_learns(model: nn.Module, signal: Tensor, target: Tensor) -> None:
    assert float(trained(model, signal, target, rate=0.02)) < 0.1 * float(target.var())


def test_learns_an_equivariant_map_and_with_rank_another(generator: Generator) -> None:
    torch.manual_seed(0)
    signal = torch.randn(64, 1, 12, generator=generator)
    symmetric = act("C12", 1, signal) - signal
    uneven = symmetric * torch.linspace(-1, 1, 12)
    options = {"channels": (8,), "radius": 1, "head": "signal", "norm": False, "activation": nn.Identity}
    assert_learns(GMCNN("C12", 1, 1, **options), signal, symmetric)
    must_fail(assert_learns, GMCNN("C12", 1, 1, **options), signal, uneven)
    assert_learns(GMCNN("C12", 1, 1, rank=1, **options), signal, uneven)


def test_what_goes_beside_a_layer_is_added(generator: Generator) -> None:
    signal = torch.randn(3, 4, 12, generator=generator)
    options = {"channels": (4, 4, 6), "strides": (None, [2], None), "head": "signal", "norm": False}
    options |= {"activation": nn.Identity}
    for skip, silent in (("none", torch.zeros(3, 6, 6)), ("same", torch.zeros(3, 6, 6)), ("linear", None)):
        model = GMCNN("C12", 4, 1, skip=skip, **options)
        for layer in (each.layer if hasattr(each, "layer") else each for each in model.features):
            for each in layer.parameters():
                nn.init.zeros_(each)
        if silent is None:  # layers that give nothing leave what went beside them
            first, second, third = (each.beside for each in model.features)
            assert isinstance(first, nn.Identity)
            silent = third(second(first(signal)))
        assert torch.equal(model.features(signal), silent)


def test_a_shared_kernel_reads_the_sum_of_the_channels(generator: Generator) -> None:
    signal = torch.randn(2, 3, 12, generator=generator)
    model = GMCNN("C12", 3, 5, channels=(4, 6), shared=True).eval()
    assert [tuple(each.shape[:2]) for each in model.parameters() if each.dim() == 3] == [(4, 1), (6, 1)]
    exchanged = signal[:, [1, 2, 0]]
    assert torch.allclose(model(signal), model(exchanged), atol=1e-6)
    other = GMCNN("C12", 3, 5, channels=(4, 6)).eval()
    assert not torch.allclose(other(signal), other(exchanged), atol=1e-6)


@pytest.mark.parametrize(
    ("factor", "inputs", "outputs", "bias", "published"),
    [
        ("C32", 3, 10, False, 13_681),  # CIFAR-10 in colour
        ("C32", 1, 10, False, 13_441),  # ten classes in grey
        ("C24", 1, 6, True, 12_967),  # the six categories of NORB
        ("D14", 1, 10, True, 48_731),  # rotated MNIST on the dihedral group
    ],
)
def test_parameters_that_the_paper_counts(
    factor: str, inputs: int, outputs: int, bias: bool, published: int, generator: Generator
) -> None:
    model = GMCNN.paper(factor, inputs, outputs, head_bias=bias)
    counted = sum(each.numel() for each in model.parameters())
    taps, wide = (14**2 if factor[0] == "D" else 7**2), 120
    assert counted == 2 * wide * (taps + 1) + wide * (inputs + 1) + 1 + outputs * wide + outputs * bias == published
    assert (
        sum(each.numel() for each in GMCNN.paper(factor, inputs, outputs, head_bias=not bias).parameters()) != published
    )
    narrow = GMCNN.paper(factor, inputs, outputs, channels=(2, 3), reach=1).eval().double()
    signal = torch.randn(2, inputs, narrow.group.order, generator=generator, dtype=torch.float64)
    assert equivariance_error(narrow, narrow.group, signal)["error"] < 1e-12


def test_neighbourhoods_of_the_paper() -> None:
    cyclic, dihedral = (GMCNN.paper(each, 1, 2, channels=(1,), reach=1).features[0].layer[1] for each in ("C5", "D5"))
    near = {0, 1, 4}
    assert {divmod(int(tap), 5) for tap in cyclic.stencil.taps} == {(a, b) for a in near for b in near}
    near = {0, 1, 2, 3, 8, 9}  # the powers −1, 0, 1 of the rotation, and these times the reflection
    assert {divmod(int(tap), 10) for tap in dihedral.stencil.taps} == {(a, b) for a in near for b in near}


def test_refused() -> None:
    for options, message in (
        ({"head": "sum"}, "head is one of"),
        ({"norm": "group"}, "norm is one of"),
        ({"skip": "dense"}, "skip is one of"),
        ({"channels": ()}, "at least one layer"),
        ({"radius": (1, 2, 3)}, "one for each of 2 layers"),
        ({"strides": ("C2",)}, "one for each of 2 layers"),
        ({"strides": ("C3", None)}, "no subgroup"),
        ({"strides": ("C2", None), "pool": "sum"}, "mode"),
    ):
        with pytest.raises(GMError, match=message):
            GMCNN("C4", 1, 1, **options)
    for factor in ("S3", "C4xC4", "D"):
        with pytest.raises(GMError):
            GMCNN.paper(factor, 1, 2)
    with pytest.raises(GMError, match="square of C_n or D_n"):
        GMCNN.paper("S3", 1, 2)
    with pytest.raises(GMError, match="has shape"):
        GMCNN("C4", 1, 1)(torch.ones(1, 1, 5))


# ---------------------------------------------------------------------------------------------------------- Lie groups


def centred(model: nn.Module, images: Tensor) -> nn.Module:
    """The network in evaluation, its outputs with mean zero over the images: errors are then not beside a constant."""
    for step in model.modules():
        if isinstance(step, nn.BatchNorm2d | nn.BatchNorm3d):
            step.momentum = None
    with torch.no_grad():
        model.train()(images)
        next(reversed([*model.modules()])).bias.sub_(model.eval()(images).mean(0))
    return model


ANGLES = [2 * math.pi * (each + 0.37) / 5 for each in range(5)]  # between the samples of all grids here


@pytest.mark.parametrize(("head", "kind"), [("mean", "nonseparable"), ("mean", "separable"), ("max", "nonseparable")])
def test_the_error_of_rotations_falls_with_the_samples(head: str, kind: str, generator: Generator) -> None:
    images = blobs(25, generator, count=6)
    errors, controls = [], []
    for number in (2, 4, 8):
        torch.manual_seed(0)
        model = LieCNN("SE(2)", 1, 8, samples=number, channels=(8, 8), separable=kind, head=head)
        errors.append(equivariance_error(centred(model, images), "SE(2)", images, elements=ANGLES)["error"])
        wide, layers = 4 * number, []
        for before in (1, wide):
            layers += [nn.Conv2d(before, wide, 5, padding=2), nn.BatchNorm2d(wide), nn.ReLU()]
        plain = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 8))
        controls.append(equivariance_error(centred(plain, images), "SE(2)", images, elements=ANGLES)["error"])
    assert_falls(errors)
    assert errors[-1] < (0.02 if head == "mean" else 0.1)
    must_fail(assert_falls, controls)
    assert min(controls) > 0.1


def assert_falls(errors: list[float]) -> None:
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.7 * errors[1]


def test_a_trained_network_is_finer_on_more_samples(generator: Generator) -> None:
    torch.manual_seed(0)
    images = blobs(21, generator, count=6)
    model = centred(LieCNN("SE(2)", 1, 8, samples=2, channels=(4, 4)), images)
    coarse, fine = (
        equivariance_error(each, "SE(2)", images, elements=ANGLES)["error"] for each in (model, model.resampled(8))
    )
    assert fine < 0.5 * coarse
    assert model.resampled(2)(images).equal(model(images))


@pytest.mark.parametrize("head", LIE_HEADS)
@pytest.mark.parametrize(("group", "samples"), [("SE(2)", 4), ("Sim(2)", (4, 2)), ("SE(2)", 6)])
def test_quarter_turns_are_exact(group: str, samples: Any, head: str, generator: Generator) -> None:
    torch.manual_seed(0)
    model = LieCNN(group, 2, 3, samples=samples, channels=(4, 4), separable="separable", shrink=(2, 1), head=head)
    images = torch.randn(3, 2, 12, 12, generator=generator)
    turns = [(each * math.pi / 2, 1.0) for each in (1, 2, 3)] if group == "Sim(2)" else [math.pi / 2, math.pi]
    found = equivariance_error(model, group, images, elements=turns)
    assert model(images).shape == ((3, 3, 6, 6) if head == "image" else (3, 3))
    assert found["outputs"] == ("equivariant" if head == "image" else "invariant")
    if samples == 6:
        assert found["error"] > 1e-4
    else:
        assert found["worst"] < 1e-5


def test_random_samples_are_drawn_in_training_alone(generator: Generator) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 1, 8, 8, generator=generator)
    options = {"samples": (4, 2), "channels": (3, 3), "kernel_size": 3, "norm": False}
    model = LieCNN("Sim(2)", 1, 2, sampling="random", **options)
    fixed = LieCNN("Sim(2)", 1, 2, **options)
    fixed.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert not torch.equal(model(images), model(images))
        assert torch.equal(fixed(images), fixed(images))
        assert torch.equal(model.eval()(images), fixed.eval()(images))
        seen = []
        convolutions = [each for each in model.features if isinstance(each, LieConv)]
        for each in convolutions:
            each.register_forward_pre_hook(lambda _, __, offsets: seen.append(offsets), with_kwargs=True)
        model.train()(images)
    assert seen[0]["source"] is None
    assert seen[1]["source"] is seen[0]["target"], "a layer reads the samples that the one before it made"
    assert not torch.equal(seen[1]["source"], seen[1]["target"])


def assert_learns_of_images(sampling: str, images: Tensor, target: Tensor) -> None:
    torch.manual_seed(0)
    options = {"head": "image", "norm": False, "activation": nn.Identity, "separable": "separable"}
    model = LieCNN("SE(2)", 1, 1, samples=4, channels=(8,), sampling=sampling, **options)
    loss = trained(model, images, target, rate=0.003)
    assert all(each.grad is not None and float(each.grad.abs().max()) > 0 for each in model.parameters())
    assert float(loss) < 0.5 * float(target.var())


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_learns_a_map_that_turns_with_images_and_no_other(sampling: str, generator: Generator) -> None:
    images = blobs(13, generator, count=12, width=2.0)
    inner = F.pad(images, (1, 1, 1, 1))
    left, right, above, below = inner[..., 1:-1, :-2], inner[..., 1:-1, 2:], inner[..., :-2, 1:-1], inner[..., 2:, 1:-1]
    assert_learns_of_images(sampling, images, 4 * images - left - right - above - below)
    must_fail(assert_learns_of_images, sampling, images, right - left)


def test_export_autocast_and_copies(generator: Generator) -> None:
    torch.manual_seed(0)
    model = LieCNN("Sim(2)", 1, 4, samples=(4, 2), channels=(3, 4), separable="separable", shrink=(2, 1)).eval()
    images = torch.randn(3, 1, 8, 8, generator=generator)
    with torch.no_grad():
        expected = model(images)
        program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        assert_close(program.module()(images), expected)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(images)
        assert found.dtype == torch.bfloat16
        assert_close(found, expected.bfloat16(), slack=2)
        assert_close(copy.deepcopy(model).bfloat16()(images.bfloat16()), expected.bfloat16(), slack=2)
        other = LieCNN("Sim(2)", 1, 4, samples=(8, 3), channels=(3, 4), separable="separable", shrink=(2, 1)).eval()
        other.load_state_dict(copy.deepcopy(model).state_dict())
        assert torch.equal(other.resampled((4, 2))(images), expected)


def test_compress_leaves_the_kernels(generator: Generator) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LieCNN("SE(2)", 1, 32, samples=4, channels=(4, 8)), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    model.append(nn.Linear(32, 3))
    images = torch.randn(2, 1, 8, 8, generator=generator)
    for inputs in (images, None):
        result = compress(model, group="C8", rank=1, inputs=inputs)
        small = result.model.eval()
        reasons = {layer: reason for layer, reason in result.plan.skipped.items() if ".kernel." in layer}
        assert len(reasons) == 6
        assert all("of Siren is not known to be a matrix" in each for each in reasons.values())
        assert torch.equal(small[0].features(images), model.eval()[0].features(images))
        assert small(images).shape == (2, 3)
        assert sum(each.numel() for each in small.parameters()) < sum(each.numel() for each in model.parameters())
    with pytest.raises(GMError, match="of Siren is not known to be a matrix"):
        compress(model[0], group="C5", rank=0, inputs=images)


def test_refused_on_lie_groups() -> None:
    for options, message in (
        ({"head": "flatten"}, "head is one of"),
        ({"sampling": "uniform"}, "sampling is one of"),
        ({"channels": ()}, "at least one layer"),
        ({"kernel_size": (3, 3, 3)}, "one for each of 2 layers"),
        ({"shrink": (2, 0)}, "shrink"),
        ({"samples": 0}, "rotations"),
    ):
        with pytest.raises(GMError, match=message):
            LieCNN("SE(2)", 1, 1, **{"samples": 4} | options)
    with pytest.raises(GMError, match="do not divide"):
        LieCNN("SE(2)", 1, 1, samples=4, shrink=2)(torch.ones(2, 1, 6, 6))
