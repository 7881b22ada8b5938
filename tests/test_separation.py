"""Laws of separable kernels: factorisations, the kernel of the tensors, and that the nearest one is the nearest."""

import itertools
from math import prod

import numpy as np
import pytest
import torch
from conftest import assert_close, must_fail
from market import GROUPS
from torch import Generator, Tensor

from gmcompress.errors import GMError
from gmcompress.groups import group, is_normal
from gmcompress.separation import factorise, grid_of, nearest_separable, separate, tap_grid
from gmcompress.structure import KINDS, Separable, TapGrid, combine, separable_shapes

NAMED = [name for name in GROUPS if group(name).factors or name[0] == "D" or (":" in name and name[0] != "<")]


@pytest.mark.parametrize("name", NAMED)
def test_every_element_is_a_product_in_one_way(name: str) -> None:
    whole = group(name)
    normal, acting = factorise(whole)
    assert sorted(int(whole.table[x, h]) for x in normal for h in acting) == list(range(whole.order))
    assert is_normal(whole, normal)
    for part in (normal, acting):
        assert set(whole.table[np.ix_(part, part)].ravel()) == set(part), "a factor is a subgroup"
    rows, columns = grid_of(whole, np.arange(min(3, whole.order)))
    assert {0, 1, 2} & set(range(whole.order)) <= set(whole.table[np.ix_(rows, columns)].ravel())
    assert set(rows) <= set(normal)
    assert set(columns) <= set(acting)


def slow_combine(tensors: dict[str, Tensor], kind: str, sizes: tuple[int, int, int, int]) -> Tensor:
    """Entry by entry, from the formulas."""
    kernel = torch.zeros(sizes, dtype=torch.float64)
    terms = len(next(iter(tensors.values())))
    for o, i, x, h, k in itertools.product(*map(range, sizes), range(terms)):
        mixing, outer, inner = (tensors.get(name) for name in ("mixing", "outer", "inner"))
        if kind == "separable":
            kernel[o, i, x, h] += outer[k, o, x] * inner[k, o, i, h]
        elif kind == "gseparable":
            kernel[o, i, x, h] += outer[k, o, i, x] * inner[k, o, i, h]
        elif kind == "dseparable":
            kernel[o, i, x, h] += mixing[k, o, i] * outer[k, o, x, h]
        else:
            kernel[o, i, x, h] += mixing[k, o, i] * outer[k, o, x] * inner[k, o, h]
    return kernel


def random_of(kind: str, sizes: tuple[int, int, int, int], terms: int, generator: Generator) -> dict[str, Tensor]:
    o, i, x, h = sizes
    wanted = separable_shapes(kind, o, i, (x, h), terms)
    return {name: torch.randn(each, generator=generator, dtype=torch.float64) for name, each in wanted.items()}


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("terms", [1, 2])
def test_combine_and_back(kind: str, terms: int, generator: Generator) -> None:
    sizes = (3, 4, 5, 2)
    tensors = random_of(kind, sizes, terms, generator)
    kernel = combine(tensors, kind)
    assert_close(kernel, slow_combine(tensors, kind, sizes))
    must_fail(assert_close, kernel, slow_combine(tensors, kind, sizes) + 1e-6)
    again = separate(kernel, kind, terms=terms)
    if kind == "dgseparable" and terms > 1:  # alternating least squares: a local optimum
        assert float((combine(again, kind) - kernel).norm()) < 0.1 * float(kernel.norm())
    else:
        assert_close(combine(again, kind), kernel, slack=1e4)
    assert separate(kernel.float(), kind)[next(iter(again))].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("terms", [1, 2])
def test_the_nearest_is_nearer_than_any_other(kind: str, terms: int, generator: Generator) -> None:
    sizes = (2, 3, 4, 3)
    kernel = torch.randn(sizes, generator=generator, dtype=torch.float64)
    found = separate(kernel, kind, terms=terms)
    error = float((combine(found, kind) - kernel).norm())
    assert sum(prod(each.shape) for each in found.values()) == sum(
        map(prod, separable_shapes(kind, 2, 3, (4, 3), terms).values())
    )
    for step in (1e-3, 1e-1, 1.0):
        for _ in range(20):
            noise = random_of(kind, sizes, terms, generator)
            other = {name: each + step * noise[name] for name, each in found.items()}
            assert float((combine(other, kind) - kernel).norm()) >= error - 1e-9
    tuned = {name: each.clone().requires_grad_() for name, each in random_of(kind, sizes, terms, generator).items()}
    optimiser = torch.optim.LBFGS(tuned.values(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = (combine(tuned, kind) - kernel).square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    slack = 1.1 if kind == "dgseparable" else 1 + 1e-9
    assert error <= slack * loss().detach().sqrt().item(), "descent from anywhere does no better"


def test_kinds_are_nested(generator: Generator) -> None:
    kernel = torch.randn(2, 3, 4, 3, generator=generator, dtype=torch.float64)
    error = {kind: (combine(separate(kernel, kind), kind) - kernel).norm().item() for kind in KINDS}
    assert error["nonseparable"] == 0 < error["gseparable"] < error["separable"] < error["dgseparable"]
    assert error["dseparable"] < error["dgseparable"]


def test_refused(generator: Generator) -> None:
    kernel = torch.randn(2, 3, 4, 3, generator=generator)
    for bad, options, message in (
        (kernel, {"kind": "depthwise"}, "no kind"),
        (kernel, {"kind": 3}, "no kind"),
        (kernel[0], {"kind": "separable"}, "has shape"),
        (kernel, {"kind": "separable", "terms": 0}, "terms"),
        (kernel / 0, {"kind": "separable"}, "NaN or infinity"),
    ):
        with pytest.raises(GMError, match=message):
            separate(bad, **options)
    for factors in ("C4", ["C4"], ("C2", "C2")):
        with pytest.raises(GMError):
            factorise(group("D4"), factors)
    assert [len(each) for each in factorise(group("D4"), ("C4", [1]))] == [4, 2]


@pytest.mark.parametrize("kind", ["separable", "gseparable", "dgseparable"])
def test_what_lies_beside_the_taps_is_free(kind: str, generator: Generator) -> None:
    """Zeros there would have to be met too; a kernel that is separable on its taps is found but for little."""
    grid, terms = TapGrid.parse("5x5<2,6-8,10-14,16-18,22>"), 2 if kind == "dgseparable" else 1
    structure, shape = Separable(kind, terms, grid), (3, 4, 13)
    tensors = {
        name: torch.randn(each, generator=generator, dtype=torch.float64)
        for name, each in structure.shapes(shape).items()
    }
    kernel = structure.weight(tensors, shape)

    def lost(found: dict[str, Tensor], wanted: Tensor) -> float:
        return float((structure.weight(found, shape) - wanted).norm() / wanted.norm())

    assert lost(tensors, kernel) == 0
    zeros = separate(grid.whole(kernel), kind, terms=terms)
    assert lost(nearest_separable(kernel, structure), kernel) < min(0.1, 0.5 * lost(zeros, kernel))
    other = torch.randn(shape, generator=generator, dtype=torch.float64)
    zeros = separate(grid.whole(other), kind, terms=terms)
    assert lost(nearest_separable(other, structure), other) < lost(zeros, other)


@pytest.mark.parametrize("name", ["C8xC8", "D4", "C5", "S3"])
def test_taps_on_their_grid(name: str) -> None:
    """The place of every tap is where the product of its row and column is that tap."""
    whole = group(name)
    taps = np.arange(1, min(whole.order, 9))
    grid = tap_grid(whole, taps)
    if name in NAMED:
        rows, columns = grid_of(whole, taps)
        assert grid.sizes == (len(rows), len(columns))
        found = whole.table[np.ix_(rows, columns)].ravel()
        places = range(prod(grid.sizes)) if grid.places is None else grid.places
        assert found[list(places)].tolist() == taps.tolist()
    else:
        assert str(grid) == f"{len(taps)}x1"
    assert TapGrid.parse(str(grid)) == grid
