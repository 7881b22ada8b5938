"""Laws of the real Fourier transform: for every group of the market, its matrices fall into the blocks promised."""

from math import prod

import numpy as np
import pytest
import torch
from conftest import must_fail
from market import GROUPS
from torch import Tensor

from gmcompress.errors import GMError
from gmcompress.fourier import EXACT, MAX_AXIS, Fourier, defect, fourier, fourier_axes
from gmcompress.groups import Group, cyclic, direct, from_permutations, group

SMALL = [name for name in GROUPS if group(name).order <= 64]
EVERY = pytest.mark.parametrize("name", SMALL)


def slow_matrix(values: Tensor, acting: Group) -> Tensor:
    """W[x, x·g] = f(g), entry by entry."""
    matrix = torch.zeros(acting.order, acting.order, dtype=torch.float64)
    for x in range(acting.order):
        for g in range(acting.order):
            matrix[x, int(acting.table[x, g])] = values[g]
    return matrix


def assert_blocks(transform: Fourier, acting: Group, values: Tensor) -> None:
    """In this basis the group matrix has the blocks Σ f(g) D(g), and nothing else."""
    turned = transform.basis.T @ slow_matrix(values, acting) @ transform.basis
    for part in transform.parts:
        at = part.start
        for number in range(part.count):
            block = sum(values[g] * part.matrices[number, :, :, g] for g in range(acting.order))
            for _ in range(part.copies):
                inside = slice(at, at + part.size)
                torch.testing.assert_close(turned[inside, inside], block, rtol=0, atol=1e-9)
                turned[inside, inside] = 0
                at += part.size
        assert at == part.stop
    assert turned.abs().max() < 1e-9


def classes_up_to_inversion(acting: Group) -> int:
    """Conjugacy classes, one and that of the inverses taken as one: as many as real irreducible representations."""
    table, inverse = acting.table, acting.inverse
    classes = {
        frozenset(int(table[table[x, g], inverse[x]]) for g in (h, int(inverse[h])) for x in range(acting.order))
        for h in range(acting.order)
    }
    return len(classes)


@EVERY
def test_group_matrices_fall_into_blocks(name, generator):
    acting = group(name)
    values = torch.randn(acting.order, generator=generator, dtype=torch.float64)
    transform = fourier(acting)
    assert_blocks(transform, acting, values)
    assert defect(transform, acting) < EXACT


@EVERY
def test_there_are_as_many_blocks_as_real_irreducible_representations(name):
    acting = group(name)
    transform = fourier(acting)
    assert sum(part.count for part in transform.parts) == classes_up_to_inversion(acting)
    assert sum(part.count * part.copies * part.size for part in transform.parts) == acting.order
    identity = torch.eye(acting.order, dtype=torch.float64)
    torch.testing.assert_close(transform.basis.T @ transform.basis, identity, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "parts"),  # count, copies, size
    [("S3", [(1, 2, 2), (2, 1, 1)]), ("C3", [(1, 1, 1), (1, 1, 2)]), ("Q8", [(1, 1, 4), (4, 1, 1)])],
)
def test_real_complex_and_quaternionic_representations_are_told_apart(name, parts):
    assert sorted((part.count, part.copies, part.size) for part in fourier(group(name)).parts) == parts


@pytest.mark.parametrize(("name", "other"), [("C6", "S3"), ("D4", "Q8"), ("C8", "C4xC2")])
def test_control_another_group_of_the_same_order(name, other, generator):
    values = torch.randn(group(name).order, generator=generator, dtype=torch.float64)
    must_fail(assert_blocks, fourier(group(name)), group(other), values)
    assert defect(fourier(group(name)), group(other)) > 1e-3


def test_a_cyclic_group_written_as_permutations_has_the_same_blocks():
    written = from_permutations([tuple((x + 1) % 6 for x in range(6))])
    assert sorted((p.count, p.copies, p.size) for p in fourier(written).parts) == [(2, 1, 1), (2, 1, 2)]


@pytest.mark.parametrize(
    ("name", "orders"),
    [("C32xC32", [32, 32]), ("C2^10", [64, 16]), ("C8xC8", [64]), ("D4xC2", [16]), ("A5xC2", [60, 2])],
)
def test_small_factors_are_merged(name, orders):
    acting = group(name)
    axes = fourier_axes(acting)
    assert [axis.order for axis in axes] == orders
    assert prod(orders) == acting.order


def test_the_transform_of_a_product_is_the_kronecker_product(generator):
    acting = direct(cyclic(16), cyclic(5))
    first, second = fourier_axes(acting)
    values = torch.randn(acting.order, generator=generator, dtype=torch.float64)
    basis = torch.kron(first.basis, second.basis)
    turned = basis.T @ slow_matrix(values, acting) @ basis
    reals = np.flatnonzero(np.arange(16) < 2)  # the first two columns of C16, the first of C5, are real characters
    for at in (int(each) * 5 for each in reals):
        row = turned[at].clone()
        row[at] = 0
        assert row.abs().max() < 1e-9
    assert (turned - torch.diag(turned.diagonal())).abs().max() > 0.1  # the others are not


def test_too_large_an_axis():
    with pytest.raises(GMError, match=f"limited to order {MAX_AXIS}"):
        fourier(cyclic(2 * MAX_AXIS))
