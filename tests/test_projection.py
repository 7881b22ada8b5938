"""Laws of the projections: best of their kind, exact where the weight has the structure, honest about the error."""

import itertools
import re
from math import prod

import pytest
import torch
from conftest import TOLERANCE, assert_close, must_fail
from market import STRUCTURES, random_tensors, slow_diagonals, slow_expand, slow_nearest, slow_view
from torch import Generator, Tensor

from gmcompress import projection
from gmcompress.errors import GMError
from gmcompress.projection import Fit, fitted_distance, project, svd_error
from gmcompress.structure import Structure, displacement_rank, distance, expand

SUBJECTS = pytest.mark.parametrize(("text", "shape"), STRUCTURES, ids=[f"{t}-{s}" for t, s in STRUCTURES])
GATED = [("C4", (4, 4)), ("S3", (12, 6)), ("D4", (8, 16)), ("C4[G,G,grid3x3]", (4, 4, 3, 3)), ("C2^3", (16, 8, 1, 2))]
LOW = [("C8", (16, 16)), ("D4", (16, 24)), ("D4[G/<1>,G]", (8, 8, 3, 3)), ("C4[G,G,grid3x3]", (8, 4, 3, 3))]


def randn(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def centred_diagonals(weight: Tensor, text: str) -> Tensor:
    rows = slow_diagonals(weight, Structure.parse(text))
    return rows - rows.mean(1, keepdim=True)


@SUBJECTS
def test_relative_error_is_that_of_the_stored_tensors(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    structure, weight = Structure.parse(text), randn(shape, generator)
    fit = project(weight, text)
    assert {name: tuple(each.shape) for name, each in fit.tensors.items()} == structure.shapes(shape)
    assert sum(each.numel() for each in fit.tensors.values()) == structure.parameters(shape)
    error = (slow_expand(fit.tensors, structure, shape) - weight).norm() / weight.norm()
    assert_close(fit.relative_error, error)
    assert_close(fit.loss, error**2)
    if structure.group is None:
        assert fit.distance is None
        assert "distance=None" in repr(fit)
        return
    assert_close(fit.distance, (slow_nearest(weight, structure) - weight).norm() / weight.norm())
    assert_close(fit.distance, distance(weight, structure, relative=True))
    assert fit.relative_error <= fit.distance
    if structure.displacement or structure.lowrank:
        must_fail(assert_close, fit.distance, error)
    else:
        assert fit.relative_error == fit.distance


# ------------------------------------------------------------------------------------------------------- displacement


def alternating_least_squares(rows: Tensor, rank: int, generator: Generator) -> float:
    """The least ‖F − 1fᵀ − A B‖ that 30 random starts find by solving for (f, B) and for A in turn."""
    n = len(rows)
    gates = torch.randn(30, n, rank, generator=generator, dtype=torch.float64)
    ones = torch.ones(30, n, 1, dtype=torch.float64)
    for _ in range(400):
        gates = torch.linalg.qr(gates - gates.mean(1, keepdim=True))[0]  # the same span together with 1
        basis = torch.cat([ones / n**0.5, gates], 2)  # orthonormal
        f, b = (basis.mT @ rows).split([1, rank], 1)
        gates = torch.linalg.solve(b @ b.mT, b @ (rows - ones @ f / n**0.5).mT).mT
    return float((rows - basis @ (basis.mT @ rows)).flatten(1).norm(dim=1).min())


@pytest.mark.parametrize(("text", "shape"), [("C4", (4, 4)), ("S3", (6, 6)), ("D4", (8, 16)), ("C6", (6, 6, 1, 2))])
@pytest.mark.parametrize("rank", [1, 2])
def test_displacement_is_as_good_as_a_search(
    text: str, shape: tuple[int, ...], rank: int, generator: Generator
) -> None:
    weight = randn(shape, generator)
    best = alternating_least_squares(slow_diagonals(weight, Structure.parse(text))[0], rank, generator)

    def assert_best(structure: Structure) -> None:
        error = project(weight, structure).relative_error * float(weight.norm())
        assert abs(error - best) < 1e-9

    assert_best(Structure.parse(text, rank=rank))
    must_fail(assert_best, Structure.parse(text, rank=rank - 1))


@pytest.mark.parametrize(("text", "shape"), GATED)
def test_displacement_error_is_the_tail(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    weight = randn(shape, generator)
    values = torch.linalg.svdvals(centred_diagonals(weight, text))
    before = float("inf")
    for rank in range(Structure.parse(text).group.order):
        structure = Structure.parse(text, rank=rank)
        fit = project(weight, structure)
        squared = (fit.relative_error * weight.norm()) ** 2
        assert_close(squared, values[:, rank:].square().sum())
        assert displacement_rank(expand(fit.tensors, structure, shape), structure) == rank
        assert fit.relative_error < before
        must_fail(assert_close, squared, values[:, rank + 1 :].square().sum() - 1e-6)
        before = fit.relative_error
    assert before < 1e-14  # rank n − 1 holds every weight


# ------------------------------------------------------------------------------------------------------------ low rank


@pytest.mark.parametrize(("text", "shape"), LOW)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_alternation_never_grows(
    text: str, shape: tuple[int, ...], rank: int, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = randn(shape, generator)
    fits = []
    for sweeps in (1, 2, 3, 5, 10, 30, 100):
        monkeypatch.setattr(projection, "SWEEPS", sweeps)
        fits.append(project(weight, Structure.parse(text, rank=rank, residual="lowrank")))
    errors = [fit.relative_error for fit in fits]

    def assert_falls(errors: list[float]) -> None:
        assert errors[0] < fits[0].distance
        assert all(later <= earlier + 1e-15 for earlier, later in itertools.pairwise(errors))

    assert_falls(errors)
    must_fail(assert_falls, errors[::-1])
    # what is left is orthogonal to the group matrices: the group part is exact for the last low rank
    left = weight - expand(fits[-1].tensors, fits[-1].structure, shape)
    assert float(slow_nearest(left, Structure.parse(text)).norm()) < 1e-12 * float(weight.norm())


@pytest.mark.parametrize(("text", "shape"), [("C8", (8, 8)), ("D4[G/<1>,G]", (4, 8, 2, 2)), ("S3", (6, 12))])
def test_lowrank_never_worse_with_a_larger_rank(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    weight, full = randn(shape, generator), min(shape[0], prod(shape[1:]))
    structures = [Structure.parse(text, rank=rank, residual="lowrank") for rank in range(full + 1)]
    errors = [project(weight, each).relative_error for each in structures]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 1e-14


# ------------------------------------------------------------------------------------------------------- adapted bases

ADAPTED = [
    ("2:2x2", (8, 12)),
    ("3:2x4", (6, 16)),
    ("1:4x3", (8, 6)),
    ("2:2x3", (4, 6, 3, 2)),
    ("4:4x2:split", (8, 6, 3, 3)),
]
BOTH = pytest.mark.parametrize(("tail", "shape"), ADAPTED, ids=[f"{t}-{s}" for t, s in ADAPTED])


def low_rank_of(tail: str) -> str:
    """The low rank with as many columns of U and V as these adapted bases."""
    rank, _, *split = tail.split(":")
    return ":".join(["lowrank", rank, *split])


@pytest.mark.parametrize(
    ("text", "shape"), [("lowrank:2", (6, 9)), ("lowrank:2", (4, 6, 3, 3)), ("lowrank:3:split", (4, 6, 3, 2))]
)
def test_a_low_rank_alone_is_the_truncated_svd(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    structure, weight = Structure.parse(text), randn(shape, generator)
    values = torch.linalg.svdvals(slow_view(weight, structure))

    def assert_tail(rank: int) -> None:
        assert_close((project(weight, structure).relative_error * weight.norm()) ** 2, values[rank:].square().sum())

    assert_tail(structure.lowrank)
    must_fail(assert_tail, structure.lowrank + 1)
    left, right = (project(weight, structure).tensors[each] for each in ("left", "right"))
    left, right = left.flatten(0, -2), right.flatten(1)
    assert_close(left.square().sum(0), values[: structure.lowrank])  # each side carries half of every singular value
    assert_close(right.square().sum(1), values[: structure.lowrank])


@BOTH
def test_adapted_bases_are_never_worse_than_a_low_rank(tail: str, shape: tuple[int, ...], generator: Generator) -> None:
    weight = randn(shape, generator)

    def assert_never_worse(first: str, second: str) -> None:
        assert project(weight, first).relative_error <= project(weight, second).relative_error * (1 + 1e-12)

    for before in ("", "C2+"):
        adapted, low = f"{before}adapted:{tail}", before + low_rank_of(tail)
        assert_never_worse(adapted, low)
        must_fail(assert_never_worse, low, adapted)
    assert_never_worse(f"C2+adapted:{tail}", "C2")
    # with scales of 1 the two are the same weight
    fit = project(weight, low_rank_of(tail))
    structure = Structure.parse(f"adapted:{tail}")
    ones = torch.ones(structure.shapes(shape)["scales"], dtype=torch.float64)
    assert_close(expand({**fit.tensors, "scales": ones}, structure, shape), expand(fit.tensors, fit.structure, shape))


def adapted_by_turns(weight: Tensor, structure: Structure) -> float:
    """The error that alternating least squares reach: U, s and V solved for in turn, block by block, from the SVD."""
    (high, wide), rank = structure.grid, structure.lowrank
    blocks = [list(each.chunk(wide, 1)) for each in slow_view(weight, structure).chunk(high, 0)]
    u, s, v = torch.linalg.svd(slow_view(weight, structure), full_matrices=False)
    us, vs = list((u * s)[:, :rank].chunk(high, 0)), list(v[:rank].T.chunk(wide, 0))
    scales = torch.ones(high, wide, rank, dtype=torch.float64)
    for _ in range(300):
        for p in range(high):
            m = torch.cat([scales[p, q][:, None] * vs[q].T for q in range(wide)], 1)
            us[p] = torch.linalg.lstsq(m.T, torch.cat(blocks[p], 1).T).solution.T
        for p, q in itertools.product(range(high), range(wide)):
            gram = (us[p].T @ us[p]) * (vs[q].T @ vs[q])
            scales[p, q] = torch.linalg.lstsq(gram, (us[p].T @ blocks[p][q] @ vs[q]).diagonal()[:, None]).solution[:, 0]
        for q in range(wide):
            m = torch.cat([us[p] * scales[p, q] for p in range(high)], 0)
            vs[q] = torch.linalg.lstsq(m, torch.cat([blocks[p][q] for p in range(high)], 0)).solution.T
    left = [blocks[p][q] - us[p] * scales[p, q] @ vs[q].T for p, q in itertools.product(range(high), range(wide))]
    return float(sum(each.square().sum() for each in left).sqrt() / weight.norm())


@BOTH
def test_adapted_bases_come_near_alternating_least_squares(
    tail: str, shape: tuple[int, ...], generator: Generator
) -> None:
    """Both end in local minima, not always in the same: at least two thirds of the way down from the SVD."""
    weight, structure = randn(shape, generator), Structure.parse(f"adapted:{tail}")
    by_turns, start = adapted_by_turns(weight, structure), project(weight, low_rank_of(tail)).relative_error
    assert by_turns < start

    def assert_near(text: str) -> None:
        assert start - project(weight, text).relative_error >= 2 / 3 * (start - by_turns)

    assert_near(f"adapted:{tail}")
    must_fail(assert_near, low_rank_of(tail))


@pytest.mark.parametrize(
    ("text", "shape"),
    [("adapted:1:2x3", (8, 12)), ("adapted:1:4x2", (8, 4, 3, 2)), ("adapted:1:2x4:split", (4, 8, 3, 3))],
)
def test_recovers_adapted_bases_of_rank_1(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    structure = Structure.parse(text)
    weight = expand(random_tensors(structure, shape, generator), structure, shape)

    def assert_recovered(weight: Tensor) -> None:
        fit = project(weight, structure)
        assert fit.relative_error < 1e-12
        assert_close(expand(fit.tensors, structure, shape), weight)

    assert_recovered(weight)
    must_fail(assert_recovered, weight + 1e-6 * randn(shape, generator))
    must_fail(assert_recovered, weight.flip(0) + weight)


def test_adapted_bases_find_the_group(generator: Generator) -> None:
    """A group matrix of C2 has adapted bases of rank 2, the characters, which the fit is not told."""
    weight = expand(random_tensors(Structure.parse("C2"), (8, 8), generator), "C2", (8, 8))
    assert project(weight, "adapted:2:4x4").relative_error < 1e-12
    assert project(weight, "lowrank:2").relative_error > 0.1, "the control"
    assert project(randn((8, 8), generator), "adapted:2:4x4").relative_error > 0.1, "the control"


# ----------------------------------------------------------------------------------------------------------- recovery


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        *((text, shape) for text, shape in STRUCTURES if not re.search("lowrank|adapted|separable:.*<", text)),
        *(("lowrank:2", (6, 9)), ("lowrank:2", (4, 6, 3, 3)), ("lowrank:2:split", (4, 6, 3, 2))),
        *(
            ("C8+lowrank:1", (16, 16)),
            ("C8+lowrank:1:split", (8, 16, 3, 3)),
            ("C16+lowrank:2", (32, 32)),
            ("D4+lowrank:1", (16, 24)),
        ),
        *(("D4[G/<1>,G]+lowrank:1", (4, 8, 3, 3)), ("C4[G,G,grid3x3]+lowrank:1", (8, 8, 3, 3))),
    ],
)
def test_recovers_what_has_the_structure(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    structure = Structure.parse(text)
    weight = expand(random_tensors(structure, shape, generator), structure, shape)

    def assert_recovered(weight: Tensor) -> None:
        fit = project(weight, structure)
        assert fit.relative_error < 1e-13
        assert_close(expand(fit.tensors, structure, shape), weight)

    assert_recovered(weight)
    if structure.group is None or structure.group.order > 1:
        must_fail(assert_recovered, weight + 1e-6 * randn(shape, generator))


@pytest.mark.parametrize(("text", "shape"), LOW)
@pytest.mark.parametrize("rank", [1, 2])
def test_recovers_low_rank_without_group_part_in_one_sweep(
    text: str, shape: tuple[int, ...], rank: int, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, structure = Structure.parse(text), Structure.parse(text, rank=rank, residual="lowrank")
    left = randn((shape[0] // plain.rows.size, plain.rows.size, rank), generator)
    left -= left.mean(1, keepdim=True)  # sums to zero over every block, so that no orbit has a mean
    right = randn((shape[1] // plain.columns.size, rank), generator).repeat_interleave(plain.columns.size, 0)
    low = (left.reshape(-1, rank) @ right.T).reshape(*shape[:2], *(1 for _ in shape[2:])).expand(shape)
    weight = low + expand(random_tensors(plain, shape, generator), plain, shape)
    monkeypatch.setattr(projection, "SWEEPS", 1)
    assert project(weight, structure).relative_error < 1e-13
    assert project(weight, plain).relative_error > 0.01, "the control"


def test_zero_weight() -> None:
    for text in ("C4", "C4+displacement:1", "C4+lowrank:1"):
        fit = project(torch.zeros(4, 8), text)
        assert (fit.relative_error, fit.distance) == (0.0, 0.0)
        assert all(torch.isfinite(each).all() for each in fit.tensors.values())
    for text in ("lowrank:1", "adapted:1:2x2"):
        fit = project(torch.zeros(4, 8), text)
        assert (fit.relative_error, fit.distance) == (0.0, None)
        assert all(torch.isfinite(each).all() for each in fit.tensors.values())


# ---------------------------------------------------------------------------------------------------- types and errors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "text", ["C4", "C4+displacement:2", "C4+displacement:1+lowrank:1", "lowrank:2", "adapted:2:2x3"]
)
def test_dtype_comes_back(dtype: torch.dtype, text: str, generator: Generator) -> None:
    structure, weight = Structure.parse(text), randn((8, 12), generator).to(dtype)
    before = weight.clone()
    fit, exact = project(weight.requires_grad_(), text), project(weight.double(), text)
    assert {each.dtype for each in fit.tensors.values()} == {dtype}
    assert not any(each.requires_grad for each in fit.tensors.values())
    assert torch.equal(weight, before)
    assert_close(fit.relative_error, exact.relative_error)
    stored, wanted = (expand(each.tensors, structure, (8, 12)).double() for each in (fit, exact))
    assert float((stored - wanted).norm()) <= TOLERANCE[dtype] * float(wanted.norm())


@pytest.mark.parametrize("text", ["C4", "C4+displacement:1", "C4+lowrank:1", "adapted:1:4x4"])
def test_weights_refused(text: str) -> None:
    for weight in (torch.full((4, 4), float("nan")), torch.full((4, 4), float("inf")), torch.eye(4).long(), [[1.0]]):
        with pytest.raises(GMError):
            project(weight, text)
        with pytest.raises(GMError):
            svd_error(weight, 4)
    for shape in ((4, 6), (6, 4), (4,)):
        with pytest.raises(GMError):
            project(torch.zeros(shape), text)


@pytest.mark.parametrize(
    ("text", "rank", "residual", "shape", "limit"),
    [
        ("C4", 4, "displacement", (8, 8), 3),
        ("C4[G,fixed1]", 2, "displacement", (4, 1), 1),
        ("C4", 5, "lowrank", (4, 8), 4),
        ("C4", 5, "lowrank", (8, 4, 1, 1), 4),
    ],
)
def test_ranks_too_large_are_refused(text: str, rank: int, residual: str, shape: tuple[int, ...], limit: int) -> None:
    with pytest.raises(GMError, match=f"{residual} rank {rank} .*: {limit}$"):
        project(torch.ones(shape), Structure.parse(text, rank=rank, residual=residual))
    assert project(torch.ones(shape), Structure.parse(text, rank=limit, residual=residual)).relative_error < 1e-6


@pytest.mark.parametrize(
    ("text", "shape", "limit"),
    [
        ("lowrank:{}", (4, 8), 4),
        ("lowrank:{}", (8, 2, 3, 1), 6),
        ("lowrank:{}:split", (8, 2, 3, 3), 6),
        ("adapted:{}:2x2", (4, 8), 4),
        ("C2+adapted:{}:2x2:split", (2, 4, 3, 3), 6),
    ],
)
def test_ranks_too_large_for_a_factor_part_are_refused(text: str, shape: tuple[int, ...], limit: int) -> None:
    with pytest.raises(GMError, match=f"lowrank rank {limit + 1} .*: {limit}$"):
        project(torch.ones(shape), text.format(limit + 1))
    assert project(torch.ones(shape), text.format(limit)).relative_error < 1e-6


# ------------------------------------------------------------------------------------------------------------------ SVD


@pytest.mark.parametrize("text", ["C8", "C8+displacement:2", "C8+lowrank:2", "C8+adapted:2:2x2", "D4[G/<1>,G]"])
def test_the_distance_of_a_fit_is_that_of_its_weight(text: str, generator: Generator) -> None:
    fit = project(randn((16, 24), generator), text)
    if fit.structure.displacement:  # as after training, when gates have a mean
        fit = Fit(fit.structure, {name: each + 0.3 for name, each in fit.tensors.items()}, 0.0, 0.0, 0.0)
    weight = expand(fit.tensors, fit.structure, (16, 24))
    assert_close(fitted_distance(fit, (16, 24)), distance(weight, fit.structure, relative=True))
    assert fitted_distance(project(weight, "lowrank:1"), (16, 24)) is None


def views(part: Tensor) -> list[Tensor]:
    """A weight as a matrix: rows × columns·taps, and for two-sided kernels rows·ky × columns·kx."""
    if part.dim() < 4 or 1 in part.shape[2:]:
        return [part.flatten(1)]
    rows, columns, ky, kx = part.shape
    return [part.flatten(1), part.permute(0, 2, 1, 3).reshape(rows * ky, columns * kx)]


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((8, 12), 1), ((40, 50), 1), ((8, 4, 3, 3), 1), ((4, 16, 3, 5), 1), ((12, 2, 3, 1), 3), ((8, 3, 3, 3), 2)],
)
def test_svd_error_is_that_of_a_truncation(shape: tuple[int, ...], groups: int, generator: Generator) -> None:
    weight = randn(shape, generator)

    def assert_truncated(stored: int, more: int = 0) -> None:
        errors = []
        for parts in zip(*(views(part) for part in weight.chunk(groups)), strict=True):
            rank = stored // (groups * sum(parts[0].shape)) + more
            tails = [torch.linalg.svdvals(part)[rank:].square().sum() for part in parts]
            errors.append(float(torch.stack(tails).sum().sqrt() / weight.norm()))
        assert_close(svd_error(weight, stored, conv_groups=groups), min(errors))

    for stored in (1, weight.numel() // 3, weight.numel() // 2):
        assert_truncated(stored)
        must_fail(assert_truncated, stored, 1)
    assert_close(svd_error(weight, 1, conv_groups=groups), 1.0)
    assert svd_error(weight, 10 * weight.numel(), conv_groups=groups) < 1e-7
    assert svd_error(torch.zeros(shape), 1, conv_groups=groups) == 0.0


def test_split_taps_find_a_separable_kernel(generator: Generator) -> None:
    """A kernel that is a vertical filter followed by a horizontal one has rank 1 split, and more in one piece."""
    down, across = torch.randn(8, 3, generator=generator), torch.randn(8, 3, generator=generator)
    weight = torch.einsum("oy,ix->oiyx", down, across).double()
    assert project(weight, "C8+lowrank:1:split").relative_error < 1e-6
    assert project(weight, "C8+lowrank:1").relative_error > 0.1
    with pytest.raises(GMError, match="splits the taps of a convolution"):
        project(weight[:, :, 0, 0], "C8+lowrank:1:split")
    with pytest.raises(GMError, match="more than a weight"):
        project(weight, "C8+lowrank:25:split")
