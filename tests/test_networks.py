"""Laws of the small networks: shapes, symmetry of outputs, and that they learn what their symmetry allows."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import must_fail
from torch import Generator, Tensor, nn

from gmcompress.commutator import act, equivariance_error
from gmcompress.errors import GMError
from gmcompress.networks import GMCNN, HEADS


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


def assert_learns(model: nn.Module, signal: Tensor, target: Tensor) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimiser.zero_grad()
        loss = F.mse_loss(model(signal), target)
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.1 * float(target.var())


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
