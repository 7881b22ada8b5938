"""Laws of structured weights: labels, the average over the group, closure, distances and displacement."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import assert_close, must_fail
from market import (
    ALONE,
    GROUPED,
    GROUPS,
    STRUCTURES,
    random_tensors,
    slow_diagonals,
    slow_expand,
    slow_move,
    slow_nearest,
    slow_orbits,
    slow_view,
)
from torch import Generator, Tensor

from gmcompress.errors import GMError
from gmcompress.groups import diagonal, group
from gmcompress.structure import (
    Structure,
    diagonals,
    displacement,
    displacement_rank,
    distance,
    expand,
    generator_displacement,
    generator_displacement_rank,
    nearest,
)

SUBJECTS = pytest.mark.parametrize(("text", "shape"), STRUCTURES, ids=[f"{t}-{s}" for t, s in STRUCTURES])
WITH_GROUP = pytest.mark.parametrize(("text", "shape"), GROUPED, ids=[f"{t}-{s}" for t, s in GROUPED])
WITHOUT_GROUP = pytest.mark.parametrize(("text", "shape"), ALONE, ids=[f"{t}-{s}" for t, s in ALONE])
REGULAR = [name for name in GROUPS if 1 < group(name).order <= 12]


def randn(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def group_matrix(structure: Structure | str, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """A random structured weight, without residuals."""
    plain = Structure.parse(structure).with_rank(0, residual="lowrank")
    return expand(random_tensors(plain, shape, generator), plain, shape)


def with_gates(group_part: Tensor, text: str, rank: int, generator: Generator) -> Tensor:
    """The weight plus a random residual of this displacement rank."""
    structure, shape = Structure.parse(text, rank=rank), tuple(group_part.shape)
    tensors = random_tensors(structure, shape, generator)
    return group_part + expand({**tensors, "kernel": 0 * tensors["kernel"]}, structure, shape)


def assert_structured(weight: Tensor, structure: Structure | str) -> None:
    """W[gx, gy] = W[x, y] for every g, which is distance zero."""
    structure = Structure.parse(structure)
    for g in range(structure.group.order):
        assert_close(slow_move(weight, structure, g), weight, slack=10)
    assert distance(weight, structure) <= 1e-11 * float(weight.norm())


# ------------------------------------------------------------------------------------------------- strings and labels


@SUBJECTS
def test_strings_round_trip(text: str, shape: tuple[int, ...]) -> None:
    structure = Structure.parse(text)
    assert str(structure) == text
    assert eval(repr(structure)) == structure
    assert Structure.parse(structure) is structure
    assert structure != Structure.parse("C3+lowrank:1"), "the control"
    if structure.group is None:
        assert "kernel" not in structure.shapes(shape)
    else:
        assert structure.shapes(shape)["kernel"][0] * structure.rows.size == shape[0]


def test_rank_and_residual_add_to_a_string() -> None:
    assert str(Structure.parse("C4", rank=2)) == "C4+displacement:2"
    assert str(Structure.parse(group("C4"), rank=2, residual="lowrank")) == "C4+lowrank:2"
    assert str(Structure.parse(" C4 [G, G/<2>] + lowrank:1")) == "C4[G,G/<2>]+lowrank:1"
    assert str(Structure.parse("C4+lowrank:3:split+displacement:1")) == "C4+displacement:1+lowrank:3:split"
    assert str(Structure.parse("C4[G,G]")) == "C4"
    assert str(Structure.parse(" adapted:02:4x02:split ")) == "adapted:2:4x2:split"
    assert str(Structure.parse("C4 + adapted:2:4x2 + displacement:1")) == "C4+displacement:1+adapted:2:4x2"


@pytest.mark.parametrize("text", dict(GROUPED))
def test_labels_are_the_orbits(text: str) -> None:
    structure = Structure.parse(text)
    expected = slow_orbits(structure)
    np.testing.assert_array_equal(structure.labels, expected)
    assert structure.orbits == expected.max() + 1
    assert structure.labels.shape == (structure.rows.size, structure.points)
    if structure.orbits > 1:
        must_fail(np.testing.assert_array_equal, np.roll(structure.labels, 1), expected)


@SUBJECTS
def test_expand_equals_the_formula(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    structure = Structure.parse(text)
    tensors = random_tensors(structure, shape, generator)
    expected = slow_expand(tensors, structure, shape)
    assert_close(expand(tensors, structure, shape), expected)
    for name, tensor in tensors.items():
        must_fail(assert_close, expand({**tensors, name: tensor + torch.rand_like(tensor)}, structure, shape), expected)


@SUBJECTS
def test_parameters_are_the_numbers_stored(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    structure = Structure.parse(text)
    assert structure.parameters(shape) == sum(
        each.numel() for each in random_tensors(structure, shape, generator).values()
    )
    if structure.group is None:
        return
    # Burnside: the number of orbits is the mean number of entries that an element fixes
    entries = torch.arange(float(np.prod(shape))).reshape(shape)
    fixed = [int((slow_move(entries, structure, g) == entries).sum()) for g in range(structure.group.order)]
    plain = structure.with_rank(0, residual="lowrank")
    assert plain.parameters(shape) == sum(fixed) / len(fixed)


@SUBJECTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_expand_in_other_dtypes(text: str, shape: tuple[int, ...], dtype: torch.dtype, generator: Generator) -> None:
    structure = Structure.parse(text)
    tensors = {name: each.to(dtype) for name, each in random_tensors(structure, shape, generator).items()}
    weight = expand(tensors, structure, shape)
    assert (weight.dtype, tuple(weight.shape), weight.is_contiguous()) == (dtype, shape, True)
    assert_close(weight, slow_expand(tensors, structure, shape).to(dtype))
    must_fail(assert_close, -weight, slow_expand(tensors, structure, shape).to(dtype))


# ------------------------------------------------------------------------------------------------------- factor part


@WITHOUT_GROUP
def test_a_factor_part_has_its_rank_block_by_block(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    """Every row of blocks and every column of blocks has rank r; the whole matrix more where there are scales."""
    structure = Structure.parse(text)
    high, wide = structure.grid or (1, 1)

    def assert_ranks(weight: Tensor) -> None:
        view = slow_view(weight, structure)
        for block in (*view.chunk(high, 0), *view.chunk(wide, 1)):
            assert torch.linalg.matrix_rank(block) == min(structure.lowrank, *block.shape)

    weight = expand(random_tensors(structure, shape, generator), structure, shape)
    assert_ranks(weight)
    whole = torch.linalg.matrix_rank(slow_view(weight, structure))
    assert (whole > structure.lowrank) == (structure.grid is not None)
    must_fail(assert_ranks, weight + 1e-6 * randn(shape, generator))


@pytest.mark.parametrize("power", [1, 2, 3])
def test_adapted_bases_contain_the_group_matrices(power: int, generator: Generator) -> None:
    """Characters as bases and the Fourier transform of every block's kernel as scales: Walsh–Hadamard for C2^k."""
    n, name = 2**power, "x".join(["C2"] * power)
    walsh = torch.tensor([[(-1.0) ** (g & h).bit_count() for h in range(n)] for g in range(n)], dtype=torch.float64)
    kernel = randn((2, 3, n), generator)
    weight = expand({"kernel": kernel}, name, (2 * n, 3 * n))

    def assert_contained(bases: Tensor) -> None:
        tensors = {"left": bases.repeat(2, 1) / n, "right": bases.repeat(3, 1).T, "scales": kernel @ bases}
        assert_close(expand(tensors, f"adapted:{n}:2x3", (2 * n, 3 * n)), weight)

    assert_contained(walsh)
    must_fail(assert_contained, walsh.roll(1, 0))


def test_factors_are_built_without_a_string() -> None:
    assert Structure.factors(3) == Structure.factors(3, grid=(1, 1)) == Structure.parse("lowrank:3")
    assert Structure.factors(3, grid=(4, 2), split=True) == Structure.parse("adapted:3:4x2:split")
    assert Structure.factors(3).parameters((6, 5)) == 3 * (6 + 5)
    assert Structure.factors(3, grid=(2, 5)).parameters((6, 5)) == 3 * (6 + 5 + 2 * 5)
    assert Structure.factors(3, split=True).parameters((6, 5, 3, 2)) == 3 * (6 * 3 + 5 * 2)


@WITHOUT_GROUP
def test_what_needs_a_group_says_so(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    structure, weight = Structure.parse(text), randn(shape, generator)
    assert (structure.group, structure.rows, structure.columns, structure.taps) == (None, None, None, None)
    assert not structure.is_regular
    for refuses in (nearest, distance, diagonals, displacement, displacement_rank, generator_displacement_rank):
        with pytest.raises(GMError, match=f"^{text} has no group part"):
            refuses(weight, structure)
    for asked in ("acting", "labels", "orbits", "points"):
        with pytest.raises(GMError, match=f"^{text} has no group part"):
            getattr(structure, asked)
    with pytest.raises(GMError, match="no group part"):
        generator_displacement(weight, structure, 0)
    with pytest.raises(GMError, match="no group part"):
        structure.blocks(shape)
    with pytest.raises(GMError, match="without a group"):
        structure.with_rank(0, residual="lowrank")


# ------------------------------------------------------------------------------------------------------------ nearest


@WITH_GROUP
def test_nearest_is_the_average_over_the_group(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    structure, weight = Structure.parse(text), randn(shape, generator)

    def assert_nearest(found: Tensor) -> None:
        assert_close(found, slow_nearest(weight, structure))
        assert_structured(found, structure)
        assert_close(nearest(found, structure), found)
        assert_close((found * (weight - found)).sum(), 0.0, slack=weight.numel())
        assert_close(weight.square().sum(), found.square().sum() + distance(weight, structure) ** 2)

    found = nearest(weight, structure)
    assert_nearest(found)
    if structure.group.order > 1:
        must_fail(assert_nearest, weight)
        must_fail(assert_nearest, 0.9 * found)
        must_fail(assert_structured, weight, structure)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_nearest_keeps_the_dtype(dtype: torch.dtype, generator: Generator) -> None:
    weight = randn((8, 12), generator).to(dtype)
    found = nearest(weight, "C4")
    assert found.dtype == dtype
    assert_close(found, nearest(weight.double(), "C4").to(dtype))


# ------------------------------------------------------------------------------------------------------------ algebra


@pytest.mark.parametrize("name", REGULAR)
def test_group_diagonal_matrices_multiply_as_the_group(name: str) -> None:
    each, n = group(name), group(name).order
    one_hot = torch.eye(n, dtype=torch.float64)

    def assert_representation(matrices: Tensor) -> None:
        for g, x, y in itertools.product(range(n), repeat=3):
            assert matrices[g, x, y] == (each.table[each.inverse[x], y] == g)
        for g, h in itertools.product(range(n), repeat=2):
            assert torch.equal(matrices[g] @ matrices[h], matrices[each.table[g, h]])
        assert torch.equal(matrices.mT, matrices[torch.from_numpy(each.inverse)])

    matrices = torch.stack([expand({"kernel": row.reshape(1, 1, n)}, name, (n, n)) for row in one_hot])
    assert_representation(matrices)
    assert_representation(torch.stack([torch.from_numpy(diagonal(each, g)).double() for g in range(n)]))
    must_fail(assert_representation, matrices.roll(1, dims=0))


@pytest.mark.parametrize("name", REGULAR)
def test_group_matrices_are_closed(name: str, generator: Generator) -> None:
    n = group(name).order
    a, b = (group_matrix(name, (2 * n, 3 * n), generator) for _ in range(2))
    c = group_matrix(name, (3 * n, n), generator)
    square = group_matrix(name, (2 * n, 2 * n), generator) / n + 3 * torch.eye(2 * n, dtype=torch.float64)
    for weight in (a + b, a.T, a @ c, torch.linalg.inv(square), square.T @ square):
        assert_structured(weight, name)
    must_fail(assert_structured, a @ randn((3 * n, n), generator), name)
    must_fail(assert_structured, a.square() + randn((2 * n, 3 * n), generator), name)


@pytest.mark.parametrize(("first", "second"), [("C2", "C3"), ("S3", "C2"), ("C2", "Q8"), ("C2xC2", "D3")])
def test_kronecker_products(first: str, second: str, generator: Generator) -> None:
    n, m = group(first).order, group(second).order
    f, g = randn((n,), generator), randn((m,), generator)
    product = f"{first}x{second}"

    def assert_kronecker(kernel: Tensor) -> None:
        single = [
            expand({"kernel": each[None, None]}, name, (len(each),) * 2) for each, name in ((f, first), (g, second))
        ]
        weight = expand({"kernel": kernel[None, None]}, product, (n * m, n * m))
        assert_close(weight, torch.kron(*single))
        assert_structured(torch.kron(*single), product)

    assert_kronecker(torch.kron(f, g))
    must_fail(assert_kronecker, torch.kron(g, f))

    a, b = randn((n, n), generator), randn((m, m), generator)
    expected = a.norm() ** 2 * b.norm() ** 2 - nearest(a, first).norm() ** 2 * nearest(b, second).norm() ** 2
    assert_close(distance(torch.kron(a, b), product) ** 2, expected)
    must_fail(assert_close, distance(torch.kron(a, b), product) ** 2, distance(a, first) * distance(b, second))


# ---------------------------------------------------------------------------------------------------------- distances


@WITH_GROUP
def test_distance_is_half_the_mean_commutator(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    structure, weight = Structure.parse(text), randn(shape, generator)
    moved = [slow_move(weight, structure, g) for g in range(structure.group.order)]
    commutators = sum(float((weight - each).square().sum()) for each in moved) / len(moved)

    def assert_half(squared: float) -> None:
        assert_close(commutators, 2 * squared)

    assert_half(distance(weight, structure) ** 2)
    assert_close(distance(weight, structure, relative=True), distance(weight, structure) / float(weight.norm()))
    if structure.group.order > 1:
        must_fail(assert_half, float(weight.square().sum()))


@pytest.mark.parametrize("name", REGULAR)
def test_distance_inequalities(name: str, generator: Generator) -> None:
    n = group(name).order

    def assert_product(scale: float) -> None:
        m, w = randn((2 * n, n), generator), randn((n, 3 * n), generator)
        bound = torch.linalg.matrix_norm(m, 2) * distance(w, name) + torch.linalg.matrix_norm(w, 2) * distance(m, name)
        assert distance(m @ w, name) <= scale * float(bound)

    for _ in range(10):
        assert_product(1.0)
        weight = randn((n, 2 * n), generator)
        assert_close(distance(weight.T, name), distance(weight, name))
    must_fail(assert_product, 0.05)
    must_fail(assert_close, distance(weight.relu(), name), distance(weight, name))


def test_distance_of_zero() -> None:
    assert distance(torch.zeros(4, 4), "C4", relative=True) == 0.0


# ------------------------------------------------------------------------------------------------------- displacement


@WITH_GROUP
def test_diagonals_and_displacement(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    structure, weight = Structure.parse(text), randn(shape, generator)
    if not structure.rows.is_regular:
        for refused in (diagonals, displacement, displacement_rank):
            with pytest.raises(GMError, match="group itself"):
                refused(weight, structure)
        return
    rows = slow_diagonals(weight, structure)
    assert torch.equal(diagonals(weight, structure).flatten(2), rows)
    shifted = torch.stack([block[torch.arange(len(block)) - 1] for block in rows])
    assert torch.equal(displacement(weight, structure), rows - shifted)
    ranks = [torch.linalg.matrix_rank(block) for block in rows - shifted]
    assert displacement_rank(weight, structure) == max(ranks)

    structured = group_matrix(structure, shape, generator)
    assert float(displacement(structured, structure).abs().max()) == 0.0
    assert displacement_rank(structured, structure) == 0
    if structure.group.order > 1:
        assert displacement_rank(weight, structure) > 0, "the control"


def test_ranks_need_no_singular_values(generator: Generator, monkeypatch) -> None:
    """Of weights in float32, whose tolerance a Gram matrix in float64 resolves; in float64 it would not."""
    structure, shape = Structure.parse("C8xC4+displacement:2"), (256, 128)
    weight = expand(random_tensors(structure, shape, generator), structure, shape)
    wanted = displacement_rank(weight, structure), generator_displacement_rank(weight, structure)
    assert wanted[0] == 2 < wanted[1]

    def refuse(*_: object) -> None:
        raise AssertionError("singular values of a large matrix")

    for name in ("svdvals", "svd", "matrix_norm"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    assert (
        displacement_rank(weight.float(), structure),
        generator_displacement_rank(weight.float(), structure),
    ) == wanted
    with pytest.raises(AssertionError, match="of a large matrix"):
        displacement_rank(weight, structure)


@pytest.mark.parametrize("name", [name for name in REGULAR if group(name).order >= 4])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_displacement_rank_is_the_number_of_gates(name: str, rank: int, generator: Generator) -> None:
    n = group(name).order
    weight = with_gates(group_matrix(name, (2 * n, n), generator), name, rank, generator)
    assert displacement_rank(weight, name) == rank
    assert displacement_rank(weight.float(), name) == rank
    assert displacement_rank(weight + 1e-9 * randn((2 * n, n), generator), name, tolerance=1e-6) == rank
    assert displacement_rank(weight + 1e-9 * randn((2 * n, n), generator), name) > rank or rank == n - 1, "the control"


@WITH_GROUP
def test_generator_displacement(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    structure, weight = Structure.parse(text), randn(shape, generator)
    structured = group_matrix(structure, shape, generator)
    for s in range(structure.group.order):
        back = int(structure.group.inverse[s])
        assert torch.equal(generator_displacement(weight, structure, s), weight - slow_move(weight, structure, back))
        assert float(generator_displacement(structured, structure, s).abs().max()) == 0.0
    assert generator_displacement_rank(structured, structure) == 0
    if structure.group.order > 1:
        assert generator_displacement_rank(weight, structure) > 0, "the control"
    rank = 1
    low = (randn((shape[0], rank), generator) @ randn((rank, int(np.prod(shape[1:]))), generator)).reshape(shape)
    assert generator_displacement_rank(structured + low, structure) <= 2 * rank


@pytest.mark.parametrize("name", ["C8", "D4", "Q8", "C2^3", "C5:C4[2]"])
def test_which_rank_adds_up_under_products(name: str, generator: Generator) -> None:
    """The generator displacement rank does, under inverse and transpose it stays; the paper's rank does neither."""
    n = group(name).order

    def assert_adds_up(rank: Callable[[Tensor, str], int], a: Tensor, b: Tensor) -> None:
        assert rank(a @ b, name) <= rank(a, name) + rank(b, name)

    def plus_low_rank(rank: int) -> Tensor:
        low = randn((n, rank), generator) @ randn((rank, n), generator)
        return group_matrix(name, (n, n), generator) + 5 * torch.eye(n, dtype=torch.float64) + low

    for p, q in ((0, 1), (1, 1), (1, 2)):
        a, b = plus_low_rank(p), plus_low_rank(q)
        assert_adds_up(generator_displacement_rank, a, b)
        rank = generator_displacement_rank(b, name)
        assert 0 < rank <= 2 * q
        assert generator_displacement_rank(b.T.contiguous(), name) == rank
        assert generator_displacement_rank(torch.linalg.inv(b), name, tolerance=1e-11) == rank

    gate, convolution = torch.diag(randn((n,), generator)), group_matrix(name, (n, n), generator)
    assert (displacement_rank(gate, name), displacement_rank(convolution, name)) == (1, 0)
    must_fail(assert_adds_up, displacement_rank, convolution, gate)
    assert displacement_rank((gate @ convolution).T.contiguous(), name) > displacement_rank(gate @ convolution, name)
