"""The competitors: every way to bring a whole model to a number of parameters that is compared at equal size.

All but pruning are models of the package's own structures, so that all are trained by the same code.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from controls import matrix_view
from torch import Tensor, nn

import gmcompress as gm
from gmcompress import GMError
from gmcompress.budgets import parse_budget
from gmcompress.calibration import norms_after
from gmcompress.planning import eligible
from gmcompress.subjects import rank_within
from gmcompress.surgery import Site, trace

HALVINGS = 30  # of an interval of shares, or of ratios
STEP = 0.05  # of the pruning ratio, up to the first that fits


@dataclass(frozen=True)
class Case:
    """What all competitors are given: the dense model in evaluation mode, calibration batches, a folder for notes.

    `seed` is that of the calibration: every start but a random one depends on it alone.
    """

    dense: nn.Module
    data: Sequence[Tensor]
    notes: Path
    seed: int
    group: str = "C8xC8"

    @property
    def samples(self) -> int:
        return sum(len(each) for each in self.data)

    def limit(self, budget: str) -> int:
        """Parameters of the whole model within a budget."""
        (found,) = parse_budget(budget)
        return found.absolute(size(self.dense))

    def free(self) -> tuple[Site, ...]:
        """The layers that a plan may choose for: all but stem and classifier."""
        return eligible(trace(self.dense, self.data[0][:1])).free

    def compress(self, model: nn.Module, name: str, *, data: bool = True, **options: Any) -> gm.Result:
        """`gm.compress` with the same group, data and kind of notes for everybody."""
        known: dict[str, Any] = {"data": self.data, "samples": self.samples} if data else {}
        return gm.compress(model, self.group, checkpoint=self.notes / name, **known, **options)

    def plan(self, model: nn.Module, structures: Mapping[str, str | None]) -> gm.Plan:
        """The plan of these structures, written down one by one."""
        return gm.plan(model, self.group, rank=0, inputs=self.data[0][:1], overrides=structures)


@dataclass(frozen=True)
class Start:
    """A model within the budget, before any training, and how it came about; `kinds` counts what its layers are."""

    model: nn.Module
    kinds: Mapping[str, int]
    seconds: float
    optimum: Mapping[str, float | str] | None = None


def kinds(case: Case, plan: gm.Plan) -> dict[str, int]:
    """How many of the free layers are dense, low ranks, adapted bases or group matrices."""
    found = {"dense": len(case.free()) - len(plan.layers)}
    for text in plan.layers.values():
        structure = gm.Structure.parse(text)
        kind = "group" if structure.group is not None else "low rank" if structure.grid is None else "adapted"
        found[kind] = found.get(kind, 0) + 1
    return {kind: count for kind, count in found.items() if count}


def ours(case: Case, budget: str, _: int) -> Start:
    """The package as it is meant: planned under the budget and fitted, both with data."""
    return _started(case, lambda: case.compress(case.dense, "ours", budget=budget))


def ours_free(case: Case, budget: str, _: int) -> Start:
    """The same without data."""
    return _started(case, lambda: case.compress(case.dense, "ours_free", data=False, budget=budget))


def svd(case: Case, budget: str, _: int) -> Start:
    """Plain truncated SVD, the same share of every layer, each in the view with the smaller error."""
    return _started(case, lambda: gm.compress(case.dense, case.group, plan=case.plan(case.dense, even(case, budget))))


def svd_planned(case: Case, budget: str, _: int) -> Start:
    """Plain truncated SVD with ranks chosen over all layers together."""
    return _started(case, lambda: gm.compress(case.dense, case.group, plan=case.plan(case.dense, greedy(case, budget))))


def whitened(case: Case, budget: str, _: int) -> Start:
    """Low ranks of the sizes of `svd`, fitted with data as `ours` is.

    That is more than SVD-LLM does: layers are fitted one after another to the dense outputs, output gradients count
    too, and mean shifts are taken into BatchNorm.
    """
    structures = even(case, budget)
    return _started(case, lambda: case.compress(case.dense, "whitened", plan=case.plan(case.dense, structures)))


def shuffled(case: Case, budget: str, seed: int) -> Start:
    """The random structure of the size of `ours`: its plan under random names of every layer's rows and columns.

    Fitted with the same data as `ours`. A low rank stays what it is under new names; blocks and orbits do not.
    """
    known = {"data": case.data, "samples": case.samples, "checkpoint": case.notes / "ours"}
    wanted = gm.plan(case.dense, case.group, budget=budget, **known)
    names = [site.name for site in case.free()]
    model = renamed(case.dense, names, case.data[0][:1], seed=seed)
    structures = {f"{name}.1": wanted.layers.get(name) for name in names}
    plan = replace(case.plan(model, structures), optimum=wanted.optimum)
    return _started(case, lambda: case.compress(model, f"random_{seed}", plan=plan))


def _started(case: Case, make: Callable[[], gm.Result]) -> Start:
    begun = time.perf_counter()
    result = make()
    return Start(result.model, kinds(case, result.plan), time.perf_counter() - begun, result.plan.optimum)


class Spectrum:
    """A layer's weight in its views (of a k×k convolution both): squared singular values relative to their sum."""

    def __init__(self, weight: Tensor) -> None:
        self.shape = tuple(weight.shape)
        views = [False, True] if weight.dim() == 4 and min(weight.shape[2:]) > 1 else [False]
        values = {view: torch.linalg.svdvals(matrix_view(weight.detach().double(), split=view)) for view in views}
        self.energy = {view: (each.square() / each.square().sum()).cumsum(0) for view, each in values.items()}

    def cost(self, view: bool) -> int:
        """Numbers stored for one more rank."""
        return gm.Structure.factors(1, split=view).parameters(self.shape)

    def largest(self, limit: float) -> tuple[float, bool, int]:
        """Energy, view and rank of the best low rank of at most `limit` numbers; rank 0 where none fits.

        >>> Spectrum(torch.eye(4)).largest(16)
        (0.5, False, 2)
        """
        ranks = {view: rank_within(self.shape, int(limit), grid=None, split=view) for view in self.energy}
        return max((float(self.energy[view][rank - 1]) if rank else 0.0, view, rank) for view, rank in ranks.items())

    def chain(self) -> list[tuple[int, float, str | None]]:
        """(numbers, energy, structure) of the low ranks of both views and of dense that lie on the concave hull."""
        points: list[tuple[int, float, str | None]] = [(prod(self.shape), 1.0, None)]
        for view, energies in self.energy.items():
            each = self.cost(view)
            ranks = range(1, len(energies) + 1)
            points += [
                (r * each, float(energies[r - 1]), written(view, r)) for r in ranks if r * each < prod(self.shape)
            ]
        hull: list[tuple[int, float, str | None]] = []
        for point in sorted(points, key=lambda p: (p[0], -p[1])):
            while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-2], point):
                hull.pop()
            if not hull or point[1] > hull[-1][1]:
                hull.append(point)
        return hull


def written(view: bool, rank: int) -> str:
    """A low rank as a structure's string.

    >>> written(True, 3)
    'lowrank:3:split'
    """
    return str(gm.Structure.factors(rank, split=view))


def slope(a: tuple[int, float, Any], b: tuple[int, float, Any]) -> float:
    """Energy gained for each number more."""
    return (b[1] - a[1]) / (b[0] - a[0])


def _room(case: Case, budget: str) -> tuple[dict[str, Spectrum], int]:
    """The free layers, and what the budget leaves to them together."""
    sites, layers = case.free(), dict(case.dense.named_modules())
    outside = size(case.dense) - sum(prod(site.shape) for site in sites)
    return {site.name: Spectrum(layers[site.name].weight) for site in sites}, case.limit(budget) - outside


def even(case: Case, budget: str) -> dict[str, str]:
    """Low ranks of the largest equal share with which all layers fit; what is left over buys single ranks.

    Raises:
        GMError: with so small a share some layer has not even rank 1.
    """
    spectra, room = _room(case, budget)

    def at(share: float) -> dict[str, tuple[bool, int]]:
        return {name: each.largest(share * prod(each.shape))[1:] for name, each in spectra.items()}

    def stored(ranks: Mapping[str, tuple[bool, int]]) -> int:
        return sum(spectra[name].cost(view) * rank for name, (view, rank) in ranks.items())

    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if stored(at(middle)) <= room else (low, middle)
    ranks = at(low)
    gains = {name: _next_gain(spectra[name], *ranks[name]) for name in spectra}
    for name in sorted(gains, key=lambda each: -gains[each]):
        view, rank = ranks[name]
        if gains[name] and stored(ranks) + spectra[name].cost(view) <= room:
            ranks[name] = (view, rank + 1)
    starved = [name for name, (_, rank) in ranks.items() if not rank]
    if starved:
        raise GMError(f"{budget} of the parameters leaves not even rank 1 to {starved[0]!r} at an equal share")
    return {name: written(*each) for name, each in ranks.items()}


def _next_gain(spectrum: Spectrum, view: bool, rank: int) -> float:
    """Energy for each number of one rank more; 0 where there is none or it would store as much as dense."""
    energies, cost = spectrum.energy[view], spectrum.cost(view)
    if not 0 < rank < len(energies) or (rank + 1) * cost >= prod(spectrum.shape):
        return 0.0
    return float(energies[rank] - energies[rank - 1]) / cost


def greedy(case: Case, budget: str) -> dict[str, str | None]:
    """Low ranks by one global greedy over σ²/Σσ² per number stored, from rank 1 everywhere up to dense.

    σ² is taken relative to the layer, because BatchNorm undoes the scale of a weight.

    Raises:
        GMError: not even rank 1 everywhere fits.
    """
    spectra, room = _room(case, budget)
    chains = {name: each.chain() for name, each in spectra.items()}
    at = dict.fromkeys(chains, 0)
    room -= sum(chain[0][0] for chain in chains.values())
    if room < 0:
        raise GMError(f"{budget} of the parameters is less than rank 1 in every layer")
    steps = [(slope(a, b), name) for name, chain in chains.items() for a, b in pairwise(chain)]
    full: set[str] = set()
    for _, name in sorted(steps, key=lambda each: -each[0]):  # of one layer in the order of its chain, which is concave
        chain, here = chains[name], at[name]
        more = chain[here + 1][0] - chain[here][0]
        if name in full or more > room:
            full.add(name)
            continue
        at[name], room = here + 1, room - more
    return {name: chain[at[name]][2] for name, chain in chains.items()}


class Reorder(nn.Module):
    """Channels (axis 1) in another order."""

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, channels, ...)
        """x[:, index]."""
        return x[:, self.index]


def renamed(model: nn.Module, names: Sequence[str], inputs: Tensor, *, seed: int) -> nn.Module:
    """The same function with random names of the rows and columns of some convolutions, which become `name.1`.

    Their inputs are put into the new order before, their outputs back behind the BatchNorm that follows.

    Raises:
        GMError: a layer is no convolution, or no BatchNorm follows it.
    """
    generator = torch.Generator().manual_seed(seed)
    changed = copy.deepcopy(model)
    layers, norms = dict(changed.named_modules()), norms_after(model, inputs, names)
    new: dict[str, nn.Module] = {}
    for name in names:
        layer, norm = layers[name], layers.get(norms.get(name, ""))
        if not isinstance(layer, nn.Conv2d) or norm is None:
            raise GMError(f"{name!r} is renamed only as a convolution with a BatchNorm behind")
        size = layer.weight.shape[:2]
        rows, columns = (torch.randperm(each, generator=generator).to(layer.weight.device) for each in size)
        layer.weight.data = layer.weight.data[rows][:, columns]
        for tensor in [layer.bias, *norm.parameters(), *norm.buffers()]:
            if tensor is not None and tensor.dim():
                tensor.data = tensor.data[rows]
        new[name] = nn.Sequential(Reorder(columns), layer)
        new[norms[name]] = nn.Sequential(norm, Reorder(rows.argsort()))
    return gm.replace(changed, new).eval()


def pruning(case: Case, budget: str, _: int) -> Start:
    """Channels pruned by magnitude: groups ranked globally by their L2 norm, the smallest ratio that fits.

    Only the channels inside a residual block are pruned (the rows of its conv1): torch-pruning pairs channel k before a
    zero-padding shortcut with channel k behind it, where the padding on both sides has moved it.

    Source: Fang et al. 2023, DepGraph; torch-pruning's general recipe.
    """
    begun, limit = time.perf_counter(), case.limit(budget)
    low, high = 0.0, STEP
    while size(pruned := prune(case.dense, high, case.data[0][:1])) > limit:
        low, high = high, high + STEP
        if high >= 1:
            raise GMError(f"pruning inside the blocks does not come down to {budget} of the parameters")
    for _ in range(HALVINGS // 2):
        middle = (low + high) / 2
        found = prune(case.dense, middle, case.data[0][:1])
        low, high, pruned = (low, middle, found) if size(found) <= limit else (middle, high, pruned)
    return Start(pruned, {"pruned": len(case.free())}, time.perf_counter() - begun)


def size(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(each.numel() for each in model.parameters())


def torch_pruning() -> Any:
    """The package torch_pruning.

    Raises:
        GMError: it is not installed.
    """
    try:
        import torch_pruning
    except ImportError:
        raise GMError("the competitor 'pruning' needs torch-pruning: pip install torch-pruning") from None
    return torch_pruning


def prune(model: nn.Module, ratio: float, inputs: Tensor) -> nn.Module:
    """A copy with this share of the channels inside its blocks pruned."""
    package, small = torch_pruning(), copy.deepcopy(model)
    inner = [each.conv1 for _, each in small.named_modules() if isinstance(getattr(each, "conv2", None), nn.Conv2d)]
    others = [each for each in small.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    kept = [each for each in others if all(each is not one for one in inner)]
    importance = package.importance.GroupMagnitudeImportance(p=2)
    ways = {"importance": importance, "global_pruning": True, "pruning_ratio": ratio, "ignored_layers": kept}
    package.pruner.BasePruner(small, inputs, **ways).step()
    return small.eval()


COMPETITORS: dict[str, Callable[[Case, str, int], Start]] = {
    "ours": ours,
    "ours-free": ours_free,
    "svd": svd,
    "svd-planned": svd_planned,
    "whitened": whitened,
    "random": shuffled,
    "pruning": pruning,
}
RANDOM = ("random",)  # drawn anew for every seed of the tuning
