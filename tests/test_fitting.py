"""Laws of the fit: the loss is the formula's, derivatives are adjoint, steps descend and arrive, starts are best."""

import itertools
from math import prod

import pytest
import torch
from conftest import assert_close, must_fail
from market import STRUCTURES, random_tensors, slow_expand
from torch import Generator, Tensor

from gmcompress.errors import GMError
from gmcompress.factors import Metric, start_factors
from gmcompress.fitting import _Problem, refine
from gmcompress.projection import project
from gmcompress.structure import Structure, expand

REFINED = [(text, shape) for text, shape in STRUCTURES if Structure.parse(text).separable is None]
SUBJECTS = pytest.mark.parametrize(("text", "shape"), REFINED, ids=[f"{t}-{s}" for t, s in REFINED])
FLAT = [("lowrank:2", (6, 8)), ("lowrank:3", (8, 4, 2, 2)), ("lowrank:1", (12, 3))]
PLANTED = [("adapted:2:2x2", (8, 8)), ("adapted:2:4x2", (16, 16)), ("adapted:2:2x2:split", (8, 8, 3, 3))]


def randn(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def moment(size: int, generator: Generator) -> Tensor:
    """A random positive definite matrix, far from a multiple of the identity."""
    root = randn((size, size), generator)
    return root @ root.T / size + 0.05 * torch.eye(size, dtype=torch.float64)


def metric_for(shape: tuple[int, ...], generator: Generator, *, groups: int | None = None) -> Metric:
    size = prod(shape[1:])
    inputs = torch.stack([moment(size, generator) for _ in range(groups or 1)])
    return Metric(inputs if groups else inputs[0], moment(shape[0], generator))


def slow_loss(error: Tensor, metric: Metric) -> float:
    """Σ G[a, b] E[a, c] S[c, d] E[b, d], entry by entry, over rows a, b of one convolution group, with its own S."""
    flat = error.flatten(1)
    rows, size = flat.shape
    inputs = torch.eye(size, dtype=torch.float64) if metric.inputs is None else metric.inputs
    inputs = inputs if inputs.dim() == 3 else inputs[None]
    outputs = torch.eye(rows, dtype=torch.float64) if metric.outputs is None else metric.outputs
    each, total = rows // len(inputs), 0.0
    e, g, s = flat.tolist(), outputs.tolist(), inputs.tolist()
    for a, b in itertools.product(range(rows), repeat=2):
        if a // each == b // each:
            for c, d in itertools.product(range(size), repeat=2):
                total += g[a][b] * e[a][c] * s[a // each][c][d] * e[b][d]
    return total


def dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    return sum((a[name] * b[name]).sum() for name in a)


# ----------------------------------------------------------------------------------------------------------- the metric


@pytest.mark.parametrize(("shape", "groups"), [((4, 6), None), ((6, 4), 1), ((6, 4), 2), ((4, 2, 2, 1), 4)])
def test_the_loss_is_the_formula(shape: tuple[int, ...], groups: int | None, generator: Generator) -> None:
    metric, error = metric_for(shape, generator, groups=groups), randn(shape, generator)
    for each in (metric, Metric(metric.inputs), Metric(None, metric.outputs), Metric()):
        expected = slow_loss(error, each)
        assert_close(each.loss(error), expected, slack=10)
        assert_close(each.relative_loss(error + 2, torch.full_like(error, 2)), expected / each.loss(2 + 0 * error))
        assert expected > 0
        must_fail(assert_close, each.loss(error + 1e-3), expected)
    assert_close(metric.to(torch.float32).loss(error.float()), slow_loss(error, metric), slack=1e7)


@pytest.mark.parametrize("wrong", [{"inputs": (5, 5)}, {"outputs": (5, 5)}, {"inputs": (3, 6, 6)}, {"inputs": (6,)}])
def test_moments_that_do_not_fit_are_refused(wrong: dict[str, tuple[int, ...]]) -> None:
    Metric(torch.eye(6), torch.eye(4)).check((4, 6))
    with pytest.raises(GMError, match="does not fit a weight"):
        Metric(**{name: torch.ones(shape) for name, shape in wrong.items()}).check((4, 6))
    with pytest.raises(GMError, match="NaN"):
        Metric(outputs=torch.full((4, 4), float("nan"))).check((4, 6))


def test_a_metric_may_have_another_precision(generator: Generator) -> None:
    weight, metric = randn((6, 8), generator), metric_for((6, 8), generator)
    single = project(weight.float(), "lowrank:2", metric=metric.to(torch.float32))
    assert {each.dtype for each in single.tensors.values()} == {torch.float32}
    assert_close(single.loss, project(weight, "lowrank:2", metric=metric).loss, slack=1e8)


# ---------------------------------------------------------------------------------------------------------- derivatives


@SUBJECTS
def test_derivatives_are_those_of_autograd(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    structure = Structure.parse(text)
    problem = _Problem(randn(shape, generator), structure, metric_for(shape, generator))
    x = problem.load(random_tensors(structure, shape, generator))
    error = randn(tuple(problem.target.shape), generator)
    names = list(x)

    def residual(*values: Tensor) -> Tensor:
        return problem.error(dict(zip(names, values, strict=True)))

    given, backward = tuple(x[name] for name in names), problem.vjp(x, error)
    for name, expected in zip(names, torch.autograd.functional.vjp(residual, given, error)[1], strict=True):
        assert_close(backward[name], expected, slack=10)
        must_fail(assert_close, backward[name] + 1e-6, expected)


@SUBJECTS
def test_arranged_and_loaded_is_the_same_problem(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    structure, weight, metric = Structure.parse(text), randn(shape, generator), metric_for(shape, generator)
    problem, tensors = _Problem(weight, structure, metric), random_tensors(structure, shape, generator)
    expected = slow_loss(slow_expand(tensors, structure, shape) - weight, metric)
    x = problem.load(tensors)
    assert_close(problem.loss(x), expected, slack=10)
    assert_close(problem.loss(problem.balance(x)), expected, slack=10)
    stored = problem.store(problem.balance(x))
    assert {name: tuple(each.shape) for name, each in stored.items()} == structure.shapes(shape)
    assert_close(expand(stored, structure, shape), slow_expand(tensors, structure, shape), slack=10)


@pytest.mark.parametrize(("text", "shape"), [s for s in STRUCTURES if "lowrank" in s[0] or "adapted" in s[0]])
def test_what_is_stored_is_balanced(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    structure = Structure.parse(text)
    problem = _Problem(randn(shape, generator), structure, Metric())

    def assert_balanced(tensors: dict[str, Tensor]) -> None:
        left, right = tensors["left"].flatten(0, -2).norm(dim=0), tensors["right"].flatten(1).norm(dim=1)
        assert_close(left, right)
        if structure.grid:
            assert_close(tensors["scales"].square().mean((0, 1)), torch.ones(structure.lowrank, dtype=torch.float64))

    tensors = random_tensors(structure, shape, generator)
    assert_balanced(problem.store(problem.load(tensors)))
    must_fail(assert_balanced, tensors)


# --------------------------------------------------------------------------------------------------------- the descent


@SUBJECTS
def test_no_step_raises_the_loss(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    structure, weight = Structure.parse(text), randn(shape, generator)
    groups = 1 if shape[0] % 2 else 2
    for metric in (Metric(), metric_for(shape, generator), metric_for(shape, generator, groups=groups)):
        start = random_tensors(structure, shape, generator)
        losses = [metric.loss(expand(start, structure, shape) - weight)]
        for iterations in (1, 3):
            found = refine(weight, structure, start, metric=metric, iterations=iterations)
            losses.append(metric.loss(expand(found, structure, shape) - weight))
        assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(losses))
        assert losses[1] < losses[0]


@pytest.mark.parametrize("text", ["C4", "C4+displacement:1", "D2[G/<1>,G]"])
def test_the_group_part_arrives_at_the_minimum(text: str, generator: Generator) -> None:
    """Without residuals the problem is linear least squares, with one solution; with gates it still has no slope."""
    structure, shape = Structure.parse(text), (4, 8)
    weight, metric = randn(shape, generator), metric_for(shape, generator)
    start = random_tensors(structure, shape, generator)
    found = refine(weight, structure, start, metric=metric, iterations=2000, tolerance=1e-13)

    def assert_flat(tensors: dict[str, Tensor]) -> None:
        given = {name: each.clone().requires_grad_() for name, each in tensors.items()}
        flat = (expand(given, structure, shape) - weight).flatten(1)
        (flat * metric.apply(flat)).sum().backward()
        assert max(float(each.grad.abs().max()) for each in given.values()) < 1e-3

    assert_flat(found)
    must_fail(assert_flat, {name: each + 0.01 for name, each in found.items()})


@pytest.mark.parametrize(("text", "shape"), PLANTED)
def test_a_planted_structure_is_found(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    structure = Structure.parse(text)
    weight, metric = expand(random_tensors(structure, shape, generator), structure, shape), metric_for(shape, generator)

    def assert_found(weight: Tensor, metric: Metric) -> None:
        start = start_factors(weight, structure, metric)
        found = refine(weight, structure, start, metric=metric, iterations=2000, tolerance=1e-6)
        assert metric.relative_loss(expand(found, structure, shape), weight) < 1e-8

    assert_found(weight, Metric())
    assert_found(weight, metric)
    must_fail(assert_found, weight + 0.01 * randn(shape, generator), metric)


def descended(weight: Tensor, structure: Structure, start: dict[str, Tensor], metric: Metric) -> float:
    """The loss after 200 steps of torch's L-BFGS, a twin that knows nothing of the problem."""
    values = {name: each.contiguous().clone().requires_grad_() for name, each in start.items()}
    search = torch.optim.LBFGS(list(values.values()), max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        flat = (expand(values, structure, weight.shape) - weight).flatten(1)
        found = (flat * metric.apply(flat)).sum()
        found.backward()
        return found

    search.step(loss)
    return float(loss().detach())


@pytest.mark.parametrize(("text", "shape"), PLANTED)
def test_it_is_no_worse_than_a_general_search(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    """Local minima differ from weight to weight, so the sums are compared."""
    structure, ours, theirs = Structure.parse(text), [], []
    for _ in range(4):
        weight, metric = randn(shape, generator), metric_for(shape, generator)
        start = start_factors(weight, structure, metric)
        found = refine(weight, structure, start, metric=metric, iterations=400, tolerance=1e-6)
        ours.append(metric.relative_loss(expand(found, structure, shape), weight))
        theirs.append(descended(weight, structure, start, metric) / metric.loss(weight))
    assert sum(ours) <= 1.02 * sum(theirs)


# ------------------------------------------------------------------------------------------------------------ the start


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values**exponent @ vectors.T


@pytest.mark.parametrize(("text", "shape"), FLAT)
def test_a_low_rank_starts_at_the_minimum(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    """The tail of the singular values of G^½ W S^½."""
    structure, weight, metric = Structure.parse(text), randn(shape, generator), metric_for(shape, generator)
    identity = (torch.eye(prod(shape[1:]), dtype=torch.float64), torch.eye(shape[0], dtype=torch.float64))
    for each in (metric, Metric(metric.inputs), Metric(None, metric.outputs), Metric()):
        right, left = (a if a is not None else b for a, b in zip((each.inputs, each.outputs), identity, strict=True))
        values = torch.linalg.svdvals(power(left, 0.5) @ weight.flatten(1) @ power(right, 0.5))
        best = float(values[structure.lowrank :].square().sum())
        start = start_factors(weight, structure, each)

        def assert_best(tensors: dict[str, Tensor], metric: Metric = each, best: float = best) -> None:
            assert_close(metric.loss(expand(tensors, structure, shape) - weight), best, slack=1e3)

        assert_best(start)
        assert_best(refine(weight, structure, start, metric=each))
        must_fail(assert_best, {name: 1.01 * tensor for name, tensor in start.items()})
    plain = start_factors(weight, structure, Metric())
    must_fail(assert_close, metric.loss(expand(plain, structure, shape) - weight), metric.loss(weight) * 0 + best)


@pytest.mark.parametrize("text", ["adapted:2:2x2", "C4+displacement:1+lowrank:1"])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e18])
def test_weights_and_moments_of_any_size_are_fitted_alike(text: str, size: float, generator: Generator) -> None:
    """Such as those of a layer that weight decay has starved, in float32, which squares of them leave."""
    structure, weight = Structure.parse(text), torch.randn(8, 8, generator=generator)
    rows = torch.randn(20, 8, generator=generator)
    metric = Metric(rows.mT @ rows)
    start = {k: torch.randn(v, generator=generator) for k, v in structure.shapes((8, 8)).items()}
    expected = expand(refine(weight, structure, start, metric=metric), structure, (8, 8))
    grown = {k: v * size if k in ("kernel", "filters", "left") else v for k, v in start.items()}
    found = refine(size * weight, structure, grown, metric=Metric(metric.inputs / max(size, 1e-20)))
    ours, theirs = (metric.relative_loss(each, weight) for each in (expand(found, structure, (8, 8)) / size, expected))
    assert abs(ours - theirs) < 0.02
