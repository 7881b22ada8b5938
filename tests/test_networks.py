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


def test_refused() -> None:
    for options, message in (
        ({"head": "sum"}, "head is one of"),
        ({"channels": ()}, "at least one layer"),
        ({"radius": (1, 2, 3)}, "one for each of 2 layers"),
        ({"strides": ("C2",)}, "one for each of 2 layers"),
        ({"strides": ("C3", None)}, "no subgroup"),
        ({"strides": ("C2", None), "pool": "sum"}, "mode"),
    ):
        with pytest.raises(GMError, match=message):
            GMCNN("C4", 1, 1, **options)
    with pytest.raises(GMError, match="has shape"):
        GMCNN("C4", 1, 1)(torch.ones(1, 1, 5))
