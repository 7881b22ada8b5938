"""What one layer may become: candidates of every size with their cost and the loss of a fit of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import gcd, prod

from .adapted import adapted_bases, grids_of
from .errors import GMError
from .factors import Metric, start_factors, views_of
from .groups import Group, quotients
from .projection import project
from .selection import Candidate, beats, undominated
from .structure import KINDS, MAX_TERMS, Separable, Structure, expand
from .subjects import Subject, ladder, rank_within, shares

LARGEST_QUOTIENT = 64  # order; larger ones keep less than 2 % of an unstructured weight


def candidates(subject: Subject, group: Group | None, *, effort: float = 1.0) -> list[Candidate]:
    """The candidates of one layer, dense among them, each with the relative loss of its fit; dominated ones left out.

    Low ranks in both views, adapted bases on the grid of blocks that suits the layer, separable kernels where the taps
    are known to lie on a grid of two subgroups, and the group matrices of every quotient of `group` that fits, with
    displacement ranks up to 2. Along each family the fits are nested: a larger rank starts from the smaller one's fit,
    so that more parameters never give a larger loss; of adapted bases some losses lie between those of fits. `effort`
    multiplies what the fits may take.
    """
    lower = [each for split in views_of(subject.shape) for each in _low_ranks(subject, split=split)]
    found = [subject.candidate(None, 0.0), *lower]
    found += adapted_bases(subject, lower, effort=effort)
    for structure in _separables(subject.shape, subject.taps):
        loss = subject.loss_of(structure, project(subject.weight, structure).tensors)
        found.append(subject.candidate(structure, loss))
    if group is not None:
        found += _group_matrices(subject, group, lower)
    return undominated(found)


def offered(
    shape: Sequence[int],
    group: Group | None,
    *,
    conv_groups: int = 1,
    grids: bool = True,
    taps: str = "",
) -> list[Structure | None]:
    """The structures among which `candidates` finds those of a weight of this shape, known before any fit; None: dense.

    Each is sure to be there, or one that is no larger, but for adapted bases, left out without `grids`: the fits tell
    which grid is kept.

    >>> [str(each) for each in offered((8, 8), None, grids=False)]
    ['None', 'lowrank:1', 'lowrank:2', 'lowrank:3']
    """
    found: list[Structure | None] = [None]
    for split in views_of(shape):
        found += [Structure.factors(rank, split=split) for rank in ladder(shape, split=split)]
    for grid in grids_of(shape) if grids else []:
        found += [Structure.factors(rank, grid=grid, split=split) for rank in ladder(shape, grid, split=split)]
    found += _separables(shape, taps)
    return found if group is None else [*found, *_group_structures(shape, group, conv_groups)]


def _low_ranks(subject: Subject, *, split: bool) -> Iterator[Candidate]:
    """Low ranks of rows × columns·taps or, split, of rows·ky × columns·kx."""
    for rank in ladder(subject.shape, split=split):
        yield subject.candidate(Structure.factors(rank, split=split), subject.low_rank_loss(rank, split=split))


def _group_matrices(subject: Subject, group: Group, lower: Sequence[Candidate]) -> Iterator[Candidate]:
    """The nearest group matrices of every quotient that fits, alone and with small displacement ranks.

    Under a metric, in which losses take long to find, those are left out that cannot be better than a low rank.
    """
    for structure in _group_structures(subject.shape, group, subject.conv_groups):
        fit = project(subject.weight, structure)
        if subject.metric == Metric():
            yield subject.candidate(structure, fit.loss)
            continue
        found = expand(fit.tensors, structure, subject.shape)
        at_best = subject.candidate(structure, subject.least_loss(found))
        if not any(beats(each, at_best) for each in lower):
            yield subject.candidate(structure, subject.relative_loss(found))


def _separables(shape: Sequence[int], taps: str) -> Iterator[Structure]:
    """Sums of separable kernels of every kind: of as many terms as each share of the dense numbers allows."""
    for kind in KINDS[1:] if taps else ():
        each = Separable(kind, 1).on(taps)
        alone = sum(map(prod, each.shapes(shape).values()))
        for terms in sorted({int(share * prod(shape)) // alone for share in shares()} - {0}):
            if terms <= MAX_TERMS:
                yield Structure.kernels(replace(each, terms=terms))


def _group_structures(shape: Sequence[int], group: Group, conv_groups: int) -> Iterator[Structure]:
    width = gcd(shape[0] // conv_groups, shape[1])
    for quotient in quotients(group):
        if quotient.order == 1 or quotient.order > LARGEST_QUOTIENT or width % quotient.order:
            continue
        for rank in range(min(3, quotient.order)):
            structure = Structure.regular(quotient, displacement=rank)
            if structure.parameters(shape) < prod(shape):
                yield structure


def plain_svd(subject: Subject, limit: int) -> tuple[Structure, float]:
    """The better view's low rank of at most `limit` stored numbers, by truncated (whitened) SVD, and its loss.

    Raises:
        GMError: not even rank 1 fits.
    """
    found = []
    for split in views_of(subject.shape):
        rank = rank_within(subject.shape, limit, grid=None, split=split)
        if rank:
            structure = Structure.factors(rank, split=split)
            tensors = start_factors(subject.weight, structure, subject.metric)
            found.append((subject.loss_of(structure, tensors), split, structure))
    if not found:
        raise GMError(f"a weight of shape {subject.shape} has no low rank of at most {limit} numbers")
    loss, _, structure = min(found, key=lambda each: each[:2])
    return structure, loss
