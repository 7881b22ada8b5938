"""Candidates of one layer: exact costs, none dominated, losses of true fits, and what a planted structure picks."""

import itertools
from math import prod
from typing import Any

import pytest
import torch
from conftest import assert_close, must_fail
from market import random_tensors
from torch import Generator, Tensor
from torch.utils.flop_counter import FlopCounterMode

from gmcompress.adapted import fit_factors, grids_of
from gmcompress.candidates import candidates, offered, plain_svd
from gmcompress.costs import multiply_adds as window_macs
from gmcompress.errors import GMError
from gmcompress.factored import Window
from gmcompress.factors import Metric
from gmcompress.fitting import refine
from gmcompress.groups import group
from gmcompress.products import conv2d, linear, prepare
from gmcompress.projection import project
from gmcompress.selection import Candidate, undominated
from gmcompress.structure import Structure, expand
from gmcompress.subjects import Subject, multiply_adds, priced, rank_within

SHAPES = [((16, 12), 1), ((12, 32), 1), ((8, 8, 3, 3), 1), ((16, 4, 3, 3), 2), ((16, 16, 1, 1), 1)]
WEIGHTS = pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)


def randn(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def subject_of(
    shape: tuple[int, ...], groups: int, generator: Generator, *, data: bool = False, positions: int | None = None
) -> Subject:
    """A random weight; with `data` under a random metric."""
    roots = randn((groups, prod(shape[1:]), prod(shape[1:])), generator), randn((shape[0], shape[0]), generator)
    metric = Metric(*(each @ each.mT / each.shape[-1] for each in roots)) if data else Metric()
    return Subject(randn(shape, generator), metric, groups, positions, itemsize=2)


def refitted(subject: Subject, structure: Structure) -> float:
    """The loss of a fit made anew."""
    return project(subject.weight, structure, metric=subject.metric).loss


def counted_macs(structure: Structure, shape: tuple[int, ...], groups: int) -> int:
    """What torch counts of the fast product at one place, or the dense product where there is none."""
    if groups > 1:
        return prod(shape)
    ready = prepare(random_tensors(structure, shape, Generator().manual_seed(0)), structure)
    with FlopCounterMode(display=False) as counter:
        if len(shape) == 2:
            linear(torch.zeros(1, shape[1], dtype=torch.float64), ready, structure)
        else:
            window = Window(padding=(shape[2] // 2, shape[3] // 2))
            conv2d(torch.zeros(1, shape[1], 1, 1, dtype=torch.float64), ready, structure, window=window)
    return counter.get_total_flops() // 2


def test_patches_are_cut_by_kernels_of_even_size() -> None:
    # an image of one patch: its 4 × 4 places are transformed, and one place of the output
    structure, shape = Structure.parse("C2^3"), (64, 64, 4, 4)
    window = Window((4, 4))
    one = window_macs(structure, shape, (1, 4, 4), window)
    assert multiply_adds(structure, shape) == one == window_macs(structure, shape, (1, 8, 8), window) // 4


# ------------------------------------------------------------------------------------------------------------ the table


@WEIGHTS
@pytest.mark.parametrize("positions", [None, 7])
def test_costs_are_exact(shape: tuple[int, ...], groups: int, positions: int | None, generator: Generator) -> None:
    found = candidates(subject_of(shape, groups, generator, positions=positions), group("C8"))
    for each in found:
        stored, structure = prod(shape), None
        if each.structure is not None:
            structure = Structure.parse(each.structure)
            stored = sum(prod(one) for one in structure.shapes(shape).values())
            assert stored < prod(shape)
        assert (each.params, each.bytes) == (stored, 2 * stored)
        plain = structure is None or (structure.group is None and groups == 1)
        counted = stored if plain else counted_macs(structure, shape, groups)
        assert each.macs == (None if positions is None else positions * min(counted, prod(shape)))
        assert multiply_adds(structure, shape) <= prod(shape)
    (dense,) = (each for each in found if each.structure is None)
    assert dense.loss == 0


@WEIGHTS
def test_what_the_shape_alone_tells(shape: tuple[int, ...], groups: int, generator: Generator, monkeypatch) -> None:
    """Every structure of the table, and the least of every cost, give or take adapted bases; also of large weights."""

    def least(found: list[Candidate]) -> tuple[int, int]:
        return min(each.params for each in found), min(each.macs for each in found)

    def told(*, grids: bool) -> list[Candidate]:
        found = offered(shape, group("C8"), conv_groups=groups, grids=grids)
        return [priced(each, shape, 0.0, conv_groups=groups, positions=7, itemsize=2) for each in found]

    subject = subject_of(shape, groups, generator, positions=7)
    for effort in (1e30, 0.0):
        monkeypatch.setattr("gmcompress.adapted.EFFORT", dict.fromkeys((False, True), effort))
        found = candidates(subject, group("C8"))
        known = {(each.structure, each.params, each.bytes, each.macs) for each in told(grids=True)}
        assert {(each.structure, each.params, each.bytes, each.macs) for each in found} <= known
        sizes = zip(least(told(grids=True)), least(found), least(told(grids=False)), strict=True)
        assert all(least_of_all <= own <= sure for least_of_all, own, sure in sizes)


@WEIGHTS
@pytest.mark.parametrize("data", [False, True])
def test_more_parameters_never_lose_more(shape: tuple[int, ...], groups: int, data: bool, generator: Generator) -> None:
    found = candidates(subject_of(shape, groups, generator, data=data), group("C8"))

    def assert_falls(found: list[Candidate]) -> None:
        for smaller, larger in itertools.pairwise(found):
            assert smaller.params < larger.params
            assert smaller.loss > larger.loss

    assert_falls(found)
    assert 0 < found[0].loss <= 1 + 1e-9
    must_fail(assert_falls, found[::-1])


@pytest.mark.parametrize("data", [False, True])
def test_losses_are_those_of_fits(data: bool, generator: Generator) -> None:
    """A fit made anew of the same structure comes as near, give or take a local minimum."""
    subject = subject_of((12, 16), 1, generator, data=data)
    found = [each for each in candidates(subject, group("C4")) if each.structure]
    ratios = [each.loss / refitted(subject, Structure.parse(each.structure)) for each in found]
    assert len(ratios) > 4
    assert all(0.6 < each < 1.6 for each in ratios)
    for each in found:
        if each.structure.startswith("lowrank"):
            assert_close(each.loss, refitted(subject, Structure.parse(each.structure)), slack=1e4)


@pytest.mark.parametrize("limit", [1e30, 0.0], ids=["all fitted", "two fitted"])
def test_effort_multiplies_what_fits_may_take(limit: float, generator: Generator, monkeypatch) -> None:
    subject, taken = subject_of((64, 64), 1, generator, data=True), []

    def noted(*given: Any, **limits: Any) -> Any:
        taken[-1].append(limits.get("iterations", limits.get("effort")))
        return refine(*given, **limits | {"iterations": 1})

    monkeypatch.setattr("gmcompress.adapted.EFFORT", {True: limit})
    monkeypatch.setattr("gmcompress.adapted.refine", noted)
    for effort in (1.0, 0.1):
        taken.append([])
        candidates(subject, None, effort=effort)
    assert taken[0], "adapted bases are fitted"
    assert taken[1] == pytest.approx([0.1 * each for each in taken[0]], rel=0.02)


@pytest.mark.parametrize(("steps", "times"), [(0, [1, 2, 4]), (1e12, [1, 1, 1])], ids=["enough", "too few steps"])
def test_larger_adapted_bases_of_large_weights_are_fitted_longer(
    steps: float, times: list[int], generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, taken = subject_of((64, 64), 1, generator, data=True), []

    def noted(*given: Any, **limits: Any) -> Any:
        taken.append(limits["effort"])
        return refine(*given, **limits | {"iterations": 1})

    monkeypatch.setattr("gmcompress.adapted.EFFORT", {True: 0.0})
    monkeypatch.setattr("gmcompress.adapted.ANCHOR_STEPS", steps)
    monkeypatch.setattr("gmcompress.adapted.refine", noted)
    candidates(subject, None)
    assert [each / taken[0] for each in taken] == times


def slow_undominated(found: list[Candidate]) -> set[tuple[int, int, float]]:
    """Costs and losses than which no other is at most as large in all and smaller in one."""
    rows = {(each.params, each.macs, each.loss) for each in found}

    def beaten(row: tuple[int, int, float]) -> bool:
        return any(other != row and all(a <= b for a, b in zip(other, row, strict=True)) for other in rows)

    return {row for row in rows if not beaten(row)}


def test_undominated_is_that_of_all_pairs(generator: Generator) -> None:
    for size in range(1, 40):
        numbers = torch.randint(0, 8, (size, 3), generator=generator).tolist()
        found = [Candidate(str(n), params, 4 * params, macs, float(x)) for n, (params, macs, x) in enumerate(numbers)]
        kept = undominated(found)
        assert {(each.params, each.macs, each.loss) for each in kept} == slow_undominated(found)
        assert len(kept) == len(slow_undominated(found))


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize(("text", "shape"), [("C4", (16, 16)), ("D4", (16, 8)), ("C2xC2", (8, 8, 3, 3))])
def test_a_planted_group_matrix_picks_its_group(
    text: str, shape: tuple[int, ...], data: bool, generator: Generator
) -> None:
    structure = Structure.parse(text)
    weight = expand(random_tensors(structure, shape, generator), structure, shape)
    metric = subject_of(shape, 1, generator, data=data).metric

    def assert_picked(weight: Tensor) -> None:
        exact = [each for each in candidates(Subject(weight, metric), group(text)) if each.loss < 1e-20]
        assert {text, None} >= {each.structure for each in exact} >= {text}

    assert_picked(weight)
    must_fail(assert_picked, weight + 0.1 * randn(shape, generator))
    names = [each.structure for each in candidates(Subject(weight, Metric()), None) if each.structure]
    assert not any(each.startswith(("C", "D")) for each in names), "without a group there are no group matrices"


def test_the_least_loss_is_below_the_loss(generator: Generator) -> None:
    """With equality for multiples of the weight."""
    for groups in (1, 2):
        subject = subject_of((6, 5), groups, generator, data=True)
        for _ in range(20):
            found = subject.weight + randn((6, 5), generator)
            assert 0 <= subject.least_loss(found) <= subject.relative_loss(found)
        assert_close(subject.least_loss(0.3 * subject.weight), subject.relative_loss(0.3 * subject.weight))


def test_group_matrices_without_hope_cost_no_loss_under_a_metric(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weight is close to a low rank; the table is the same as with every loss found."""
    subject = subject_of((32, 32), 1, generator, data=True)
    near = randn((32, 2), generator) @ randn((2, 32), generator) + 0.01 * subject.weight
    measured: list[Tensor] = []
    known = Metric.loss
    monkeypatch.setattr(Metric, "loss", lambda metric, error: measured.append(error) or known(metric, error))
    tables, calls = [], []
    for _ in range(2):
        tables.append(candidates(Subject(near, subject.metric), group("C8")))
        calls.append(len(measured))
        measured.clear()
        monkeypatch.setattr(Subject, "least_loss", lambda *_: 0.0)
    assert tables[0] == tables[1]
    assert calls[0] < calls[1]


# ---------------------------------------------------------------------------------------------------------- the factors


@pytest.mark.parametrize("limit", [0, 1, 10, 57, 100, 300, 1000, 10**6])
@pytest.mark.parametrize(("grid", "split"), [(None, False), (None, True), ((2, 4), False), ((4, 2), True)])
def test_the_rank_within_a_limit_is_the_largest(limit: int, grid: tuple[int, int] | None, split: bool) -> None:
    shape = (8, 8, 3, 2)
    most = min(24, 16) if split else min(8, 48)

    def assert_largest(rank: int) -> None:
        assert 0 <= rank <= most
        each = Structure.factors(1, grid=grid, split=split).parameters(shape)
        assert rank * each <= limit
        assert rank == most or (rank + 1) * each > limit

    rank = rank_within(shape, limit, grid=grid, split=split)
    assert_largest(rank)
    must_fail(assert_largest, rank + 1)
    must_fail(assert_largest, rank - 1)


@pytest.mark.parametrize("shape", [(16, 12), (7, 64), (24, 10, 3, 3), (6, 9), (1, 5), (2, 3)])
def test_grids_divide_the_widths(shape: tuple[int, ...]) -> None:
    for p, q in grids_of(shape):
        assert p * q > 1
        assert (shape[0] % p, shape[1] % q) == (0, 0)
        Structure.factors(1, grid=(p, q)).parameters(shape)


@WEIGHTS
def test_plain_svd_is_the_better_view(shape: tuple[int, ...], groups: int, generator: Generator) -> None:
    subject, limit = subject_of(shape, groups, generator), prod(shape) // 2
    structure, loss = plain_svd(subject, limit)
    assert structure.parameters(shape) <= limit
    assert_close(loss, refitted(subject, structure))
    matrices = {False: subject.weight.flatten(1)}
    if len(shape) == 4 and shape[2] > 1:
        matrices[True] = subject.weight.transpose(1, 2).reshape(shape[0] * shape[2], -1)
    losses = {}
    for split, matrix in matrices.items():
        rank = limit // sum(matrix.shape)
        losses[split] = float(torch.linalg.svdvals(matrix)[rank:].square().sum() / matrix.square().sum())
    assert_close(loss, min(losses.values()))
    assert losses[structure.split] == min(losses.values())
    with pytest.raises(GMError, match="no low rank of at most 3 numbers"):
        plain_svd(subject, 3)


def test_a_fit_grows_from_a_smaller_one(generator: Generator) -> None:
    subject = subject_of((16, 16), 1, generator, data=True)
    small, large = (Structure.factors(rank, grid=(2, 2)) for rank in (2, 4))
    tensors, before = fit_factors(subject, small, None, iterations=3)
    grown, after = fit_factors(subject, large, tensors, iterations=0)
    assert after < before
    assert_close(subject.relative_loss(expand(grown, large, (16, 16))), after)
    assert fit_factors(subject, large, tensors, iterations=5)[1] < after
