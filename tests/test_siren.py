"""Laws of the small sinusoidal networks: a twin by loops, the start of Sitzmann et al., exactness under autocast."""

import math

import pytest
import torch
from conftest import assert_close, must_fail
from torch import Generator, Tensor

from gmcompress.siren import Siren


def slow_values(siren: Siren, coordinates: list[float]) -> list[float]:
    found = coordinates
    last = len(siren.sizes) - 2
    for number in range(last + 1):
        weight, bias = (getattr(siren, f"{name}{number}").tolist() for name in ("weight", "bias"))
        sums = [sum(w * x for w, x in zip(row, found, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        found = sums if number == last else [math.sin(siren.omega * each) for each in sums]
    return found


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_values_are_those_of_the_twin(layers: int, generator: Generator) -> None:
    torch.manual_seed(0)
    siren = Siren(3, 4, hidden=5, layers=layers, omega=7).double()
    points = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    expected = torch.tensor([slow_values(siren, each) for each in points.tolist()], dtype=torch.float64)
    assert_close(siren(points), expected)
    must_fail(assert_close, siren(points + 0.01), expected)
    shares = torch.rand(3, 2, generator=generator, dtype=torch.float64)
    shares = shares / shares.sum(1, keepdim=True)
    assert_close(siren(points.view(3, 2, 3), shares), (shares[..., None] * expected.view(3, 2, 4)).sum(1))


def test_the_start(generator: Generator) -> None:
    torch.manual_seed(0)
    siren = Siren(2, 64, hidden=256, layers=3, omega=30, std=0.3)
    assert siren.weight0.abs().max() <= 1 / 2
    bound = math.sqrt(6 / 256) / 30
    assert 0.95 * bound < siren.weight1.abs().max() <= bound
    points = 2 * torch.rand(2000, 2, generator=generator) - 1
    with torch.no_grad():
        values = siren(points)
        inner = Siren(2, 256, hidden=256, layers=2, omega=30)
        inner.weight2.copy_(siren.weight2)
        before = 30 * inner(points)  # what the third layer takes the sine of, but for its phases
    assert float(before.std()) == pytest.approx(1, rel=0.1)
    assert float(values.std()) == pytest.approx(0.3, rel=0.1)


def assert_precise(found: Tensor, expected: Tensor) -> None:
    assert float((found.float() - expected).abs().max()) < 0.02 * float(expected.abs().max())


def test_coordinates_are_not_rounded(generator: Generator) -> None:
    siren = Siren(2, 8, omega=30)
    points = torch.randn(50, 2, generator=generator)
    expected = siren(points).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(siren(points), expected)
    must_fail(assert_precise, siren(points.bfloat16()).detach(), expected)
    half = Siren(2, 8, omega=30).bfloat16()
    wide = Siren(2, 8, omega=30)
    wide.load_state_dict(half.state_dict())
    assert torch.equal(half(points), wide(points))
