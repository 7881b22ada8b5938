"""Laws of sampled Lie groups: a twin that loops over the samples, the measure, and functions on the circle."""

import itertools
import math

import pytest
import torch
from conftest import assert_close, must_fail
from torch import Generator, Tensor

from gmcompress.errors import GMError
from gmcompress.liegrids import LieGrid, taper

GRIDS = (LieGrid("SE(2)", 5), LieGrid("R^2:R+", 3, 3.0), LieGrid("Sim(2)", (4, 3)), LieGrid("Sim(2)", (1, 1)))


def slow_samples(grid: LieGrid, offset: Tensor) -> list[tuple[float, float]]:
    """Angle and scale of every sample."""
    angles, scales = grid.counts
    return [
        (
            2 * math.pi * a / angles * ("R+" not in grid.group) + float(offset[0]),
            math.exp(float(offset[1])) * (grid.max_scale ** (s / max(scales - 1, 1)) if grid.group != "SE(2)" else 1.0),
        )
        for a in range(angles)
        for s in range(scales)
    ]


def matrix(angle: float, scale: float) -> Tensor:
    """An element of H on points (x, y)."""
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    return torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)


def assert_pulled(grid: LieGrid, offset: Tensor, points: Tensor, samples: list[tuple[float, float]]) -> None:
    pulled, change = grid.pull_back(points, offset)
    assert pulled.shape == (grid.size, len(points), 2)
    for number, (angle, scale) in enumerate(samples):
        assert_close(pulled[number] @ matrix(angle, scale).T, points)
        assert_close(float(change[number]), 1 / float(torch.linalg.det(matrix(angle, scale))))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_samples_are_those_of_the_twin(grid: LieGrid, generator: Generator) -> None:
    points = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    for offset in (torch.zeros(2), grid.draw(generator=generator)):
        samples = slow_samples(grid, offset)
        assert_pulled(grid, offset, points, samples)
        must_fail(assert_pulled, grid, offset, points, [(angle + 0.1, 1.1 * scale) for angle, scale in samples])
        logs = grid.logarithms(offset)
        for (angle, scale), (first, second) in zip(samples, logs.tolist(), strict=True):
            assert (first, second) == pytest.approx((angle, math.log(scale)), abs=1e-12)
        within = torch.tensor([each / 2 + 1e-12 for each in grid.steps])
        assert bool((offset.abs() <= within).all())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_logarithms_between_samples(grid: LieGrid, generator: Generator) -> None:
    source, target = grid.draw(generator=generator), grid.draw(generator=generator)
    logs, shares, measure = grid.between(source, target, reach=2.5)
    assert logs.shape == (grid.size, grid.size, 1 if grid.group == "R^2:R+" else 2, grid.dimension)
    assert_close(shares.sum(2), torch.ones(grid.size, grid.size, dtype=torch.float64))
    pairs = itertools.product(enumerate(slow_samples(grid, target)), enumerate(slow_samples(grid, source)))
    for (row, (angle, scale)), (column, (turned, larger)) in pairs:
        for log in logs[row, column].tolist():
            ratio = 1.0 if grid.group == "SE(2)" else math.exp(log[-1] * math.log(2.5))
            turn = 0.0 if grid.group == "R^2:R+" else math.pi * log[0]
            assert_close(matrix(angle, scale) @ matrix(turn, ratio), matrix(turned, larger))  # h·exp(v) = h̃
        expected = grid.cell * float(taper(torch.tensor(abs(math.log(larger / scale)) / math.log(2.5))))
        assert float(measure[row, column]) == pytest.approx(expected, abs=1e-7)


def assert_smooth(values: Tensor) -> None:
    """No step between neighbours is much larger than the others, around the circle."""
    steps = (values - values.roll(1)).abs()
    assert float(steps.max()) < 0.05


def test_functions_on_the_circle_do_not_jump() -> None:
    grid = LieGrid("SE(2)", 400)
    logs, shares, _ = grid.between()
    line = torch.sin(2.3 * logs[..., 0] + 0.4)  # on the line no function of period 2π
    assert_smooth((shares * line)[0].sum(1))
    nearest = logs[..., 0].gather(2, logs[..., 0].abs().argmin(2, keepdim=True))[0, :, 0]
    must_fail(assert_smooth, torch.sin(2.3 * nearest + 0.4))


def assert_integral(grid: LieGrid, cell: float, exact: float) -> None:
    """Sums over samples, averaged over all offsets, are the integral over the window of the samples."""
    found = []
    for place in (torch.arange(64, dtype=torch.float64) + 0.5) / 64 - 0.5:
        angle, stretch = grid.logarithms(place * torch.tensor(grid.steps, dtype=torch.float64)).unbind(1)
        found.append(cell * float((angle.sin().exp() * (1 + stretch.square())).sum()))
    assert sum(found) / len(found) == pytest.approx(exact, rel=1e-4)


def test_the_measure_gives_integrals() -> None:
    turn = float(torch.special.i0(torch.tensor(1.0)))  # the mean of exp(sin)
    step = math.log(3) / 2
    window = [-step / 2, math.log(3) + step / 2]
    stretch = (window[1] - window[0]) + (window[1] ** 3 - window[0] ** 3) / 3
    for grid, exact in (
        (LieGrid("SE(2)", 8), turn),
        (LieGrid("R^2:R+", 3, 3.0), stretch),
    ):
        assert_integral(grid, grid.cell, exact)
        must_fail(assert_integral, grid, grid.cell * 1.01, exact)
    assert LieGrid("Sim(2)", (8, 3), 3.0).cell == pytest.approx(step / 8)


def test_refused() -> None:
    for arguments, message in (
        (("SE(3)", 4), "no Lie group known here.*'SE\\(2\\)'"),
        ((7, 4), "no Lie group"),
        (("SE(2)", 0), "a number of rotations"),
        (("SE(2)", (4, 2)), "a number of rotations"),
        (("SE(2)", True), "a number of rotations"),
        (("Sim(2)", 8), "rotations and a number of scales"),
        (("R^2:R+", 3, 1.0), "max_scale"),
        (("R^2:R+", 3, float("nan")), "max_scale"),
    ):
        with pytest.raises(GMError, match=message):
            LieGrid(*arguments)
