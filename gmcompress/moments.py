"""Second moments of the inputs of layers, of the dense and the compressed model side by side, and what they tell.

Inputs are seen through hooks on the modules by name, so that any model that runs can be calibrated. A layer that is
never called (its weight is read by other code) has no moments, and is fitted without data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # one inside of vmap is of no use outside

from .forward import Inputs, run_seeded
from .kinds import conv_groups
from .linalg import add_gram_, add_product_, cholesky, gram_matrix, mirrored_

POSITIONS = 120  # input vectors per dimension of a moment, beyond which positions are drawn at random
WORK = 5e10  # multiply-adds of the sums of one layer, beyond which they are drawn too, but for
FEWEST = 3  # vectors per dimension
CHUNK = 1 << 24  # numbers of one unfolded piece of a convolution's input
DAMPING = 1e-3  # of the mean of a moment's diagonal, added to the diagonal
ROUNDING = 1e-6  # of a mean square, what may be left of it by rounding
TRUST = (0.0, 0.03, 0.3, 3.0)  # ridges under which targets are tried on examples held out, shares of the diagonal


@dataclass(frozen=True)
class Moments:
    """Sums over a layer's input vectors x (of the compressed model) and t (of the dense one), each of `size` numbers.

    For a convolution a vector is one patch, in the order of the weight; a grouped convolution has one sum per group.
    `inputs` is Σ x xᵀ and `cross` Σ t xᵀ, both (conv_groups, m, m) and divided by the number of vectors; the means are
    (conv_groups, m). `count` is that number too, or how many equally weighted vectors tell as much. `halves` are the
    moments of every other batch, where there are two or more. Where `collect` was told not to cross a layer, `cross` is
    `inputs`, `dense_mean` is `mean`, and there are no halves.
    """

    count: int
    inputs: Tensor
    cross: Tensor
    mean: Tensor
    dense_mean: Tensor
    halves: tuple[Moments, ...] = ()

    def centred(self) -> Moments:
        """The same with the means taken away: what counts where a bias or BatchNorm absorbs the mean.

        Nothing is left of inputs that are always the same, not even the rounding of their sums.
        """
        inputs = self.inputs - self.mean[:, :, None] * self.mean[:, None]
        cross = self.cross - self.dense_mean[:, :, None] * self.mean[:, None]
        left, whole = (each.diagonal(dim1=1, dim2=2).mean() for each in (inputs, self.inputs))
        if left <= ROUNDING * whole:
            inputs, cross = torch.zeros_like(inputs), torch.zeros_like(cross)
        halves = tuple(each.centred() for each in self.halves)
        return Moments(self.count, inputs, cross, self.mean, self.dense_mean, halves)

    def gram(self) -> Tensor:  # (conv_groups, m, m)
        """Σ x xᵀ, damped, and shrunk towards its diagonal where there are few vectors for its size."""
        return self._damped(0.0)[0]

    def _damped(self, ridge: float) -> tuple[Tensor, Tensor, float]:  # (conv_groups, m, m), (conv_groups, m), share
        """What `gram` is with a ridge, a share of the diagonal; what is added to it, and the share of that for few."""
        few = self.inputs.shape[1] / (self.inputs.shape[1] + self.count)
        diagonal = self.inputs.diagonal(dim1=1, dim2=2)
        size = diagonal.mean()
        added = (few + ridge) * diagonal + DAMPING * (size if float(size) > 0 else torch.ones_like(size))
        found = (1 - few) * self.inputs
        found.diagonal(dim1=1, dim2=2).add_(added)
        return found, added, few

    def target(self, weight: Tensor) -> Tensor:  # (rows, columns, *taps), same
        """The dense weight that best reproduces the dense layer's outputs from the compressed model's inputs.

        W* = W (C + R)(S + R)⁻¹: ‖W t − Ŵ x‖² is ‖(W* − Ŵ) S^½‖² and a part that no Ŵ changes. The ridge R is the one
        of TRUST, or so large that W* = W, whose targets err least when each half of the batches judges the other's:
        vectors of one example resemble each other, so that their number does not tell how far to trust them.
        """
        if not self.halves:
            return self._target(weight, TRUST[0])
        one, other = self.halves
        errors = {ridge: other._error(weight, one._target(weight, ridge)) for ridge in TRUST}
        errors = {ridge: lost + one._error(weight, other._target(weight, ridge)) for ridge, lost in errors.items()}
        best = min(errors, key=lambda ridge: errors[ridge])
        kept = one._error(weight, weight) + other._error(weight, weight)
        return weight if kept <= errors[best] else self._target(weight, best)

    def _target(self, weight: Tensor, ridge: float) -> Tensor:
        (moment, added, few), (groups, m) = self._damped(ridge), self.inputs.shape[:2]
        dense = weight.reshape(groups, -1, m)
        wanted = (1 - few) * (dense @ self.cross) + dense * added[:, None]
        return torch.cholesky_solve(wanted.mT, cholesky(moment)).mT.reshape(weight.shape)

    def _error(self, weight: Tensor, target: Tensor) -> float:
        """The mean of ‖W t − W* x‖² over these vectors, without the part that no target changes."""
        groups, m = self.inputs.shape[:2]
        dense, new = weight.reshape(groups, -1, m), target.reshape(groups, -1, m)
        return float((new * (new @ self.inputs - 2 * dense @ self.cross)).sum())

    def shift(self, dense: Tensor, fitted: Tensor) -> Tensor:  # weights -> (rows)
        """By how much the mean output of the fitted weight lies above that of the dense one."""
        return mean_output(fitted, self.mean) - mean_output(dense, self.dense_mean)


def mean_output(weight: Tensor, mean: Tensor) -> Tensor:  # (rows, columns, *taps), (conv_groups, m) -> (rows)
    """What a weight makes of the mean of its inputs."""
    return (weight.reshape(len(mean), -1, mean.shape[1]) @ mean[:, :, None]).flatten()


class _Stop(BaseException):  # the way out of a forward pass once its last layer was seen; no model catches it
    pass


def _run(model: nn.Module, inputs: Inputs, seed: int) -> Any:
    try:
        return run_seeded(model, inputs, seed=seed)
    except _Stop:
        return None


@torch.no_grad()
def collect(
    dense: nn.Module,
    small: nn.Module,
    names: Sequence[str],
    batches: Iterable[Inputs],
    *,
    crossed: Iterable[str] | None = None,
    places: Mapping[str, Tensor] | None = None,
) -> dict[str, Moments]:
    """The moments of the named layers, the dense and the compressed model run side by side on the same batches.

    `small` may be the dense model itself. Both must be in evaluation mode. Of a layer's input vectors at most POSITIONS
    per dimension are taken, fewer where the sums would cost too much, the same positions of both models. By default
    all layers are `crossed`; what is not is seen in the compressed model alone, at half of the work and a sixth of the
    memory. `places` weighs the vectors of a layer by the place of its output that they are for: one number for each
    place of an example, row after row, of mean 1.
    """
    batches, places = list(batches), places or {}
    sums: dict[str, _Sums] = {}
    both = set(names if crossed is None else crossed)
    old, new = (model.get_submodule for model in (dense, small))
    for number, inputs in enumerate(batches):
        other = _given(small, {name: new(name) for name in names}, inputs, number)
        apart = {name: old(name) for name in names if name in both and small is not dense}
        kept = other | (_given(dense, apart, inputs, number) if apart else {})
        for name in names:
            for index, (t, x) in enumerate(_paired(kept[name], other[name])):
                if name not in sums:
                    sums[name] = _Sums(old(name), len(batches), places.get(name), crossed=name in both)
                sums[name].add(t, x, number=number, seed=number * 1000 + index)
            kept[name], other[name] = [], []
    return {name: each.moments() for name, each in sums.items() if any(each.weights)}


def _paired(dense: Sequence[Tensor], small: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The inputs of a layer in both models, call by call; those of the compressed one alone where they do not match.

    What goes into a layer may depend on the values before: the tokens of an expert, the boxes of a detector.
    """
    alike = [each.shape for each in dense] == [each.shape for each in small]
    return [(t, x) for t, x in zip(dense if alike else small, small, strict=True) if x.numel()]


def _given(model: nn.Module, modules: Mapping[str, nn.Module], inputs: Inputs, seed: int) -> dict[str, list[Tensor]]:
    """The inputs of modules in one run: kept as they are, or as copies where later code changed them in place."""
    seen: dict[str, list[Tensor]] = {}
    for copying in (False, True):
        states: list[tuple[Tensor, tuple[int, int]]] = []
        with ExitStack() as stack:
            seen = _watch(stack, modules, states, copying=copying)
            _run(model, inputs, seed)
        if all(version_of(each) == state for each, state in states):
            break
    return seen


def _watch(
    stack: ExitStack,
    modules: Mapping[str, nn.Module],
    states: list[tuple[Tensor, tuple[int, int]]],  # of what is kept, which grows
    *,
    copying: bool,
) -> dict[str, list[Tensor]]:
    """Lists that fill with the inputs of modules as they are called; the pass stops once each was called."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments and isinstance(arguments[0], Tensor) and not is_functorch_wrapped_tensor(arguments[0]):
                given = _in_rows(arguments[0])
                found = given.clone() if copying else given
                seen[name].append(found)
                states.append((found, version_of(found)))
            if all(seen.values()):
                raise _Stop

        return hook

    for name, module in modules.items():
        stack.callback(module.register_forward_pre_hook(hook_of(name)).remove)
    return seen


def _in_rows(given: Tensor) -> Tensor:
    """The inputs of a layer; nested and sparse ones, such as sentences without their padding, as usual tensors."""
    if given.is_nested:
        return torch.cat([each.reshape(-1, each.shape[-1]) for each in given.unbind()])
    return given if given.layout is torch.strided else given.to_dense()


class _Sums:
    """The running sums of one layer."""

    def __init__(self, module: nn.Module, batches: int, places: Tensor | None, *, crossed: bool) -> None:
        self.module, self.batches, self.crossed = module, batches, crossed
        self.places = torch.ones(1, dtype=torch.float32, device="cpu") if places is None else places.cpu()
        self.groups = conv_groups(module)
        self.size = module.get_parameter("weight")[0].numel()
        self.weights = [0.0, 0.0] if crossed else [0.0]  # of the vectors, summed, and their squares
        self.squares = [0.0 for _ in self.weights]
        self.sums: list[list[Tensor]] = [[] for _ in self.weights]
        self.origin: Tensor | None = None  # near the mean, from which vectors are summed: nothing that varies is lost

    def add(self, dense: Tensor, small: Tensor, *, number: int, seed: int) -> None:
        """Take one call's inputs in, of a batch of this number."""
        half = number % len(self.sums)
        if isinstance(self.module, nn.Conv2d):
            parts = self._patches(self.module, dense, small, seed)
        else:
            x = small.reshape(-1, 1, self.size)
            parts = self._rows(x if dense is small else dense.reshape(-1, 1, self.size), x, seed)
        for t, x, weights in parts:  # (vectors, groups, size), the same, and (vectors, 1)
            own = x.transpose(0, 1).float()
            if self.origin is None:
                self.origin = own.mean(1, keepdim=True)
            own = own - self.origin
            other = own if t is x else t.transpose(0, 1).float() - self.origin
            if not self.sums[half]:
                self.sums[half] = self._zeros(own)
            means, products = self.sums[half][:2], self.sums[half][2:]
            for total, each in zip(means, (own, other), strict=True):
                total.add_((weights * each).sum(1))
            rows = weights.sqrt() * own
            if self.crossed and t is x:
                gram = gram_matrix(rows)
                for total in products:
                    total.add_(gram)
            else:
                add_gram_(products[0], rows)
                if self.crossed:
                    add_product_(products[1], other, weights * own)
            self.weights[half] += float(weights.sum())
            self.squares[half] += float(weights.square().sum())

    def _zeros(self, own: Tensor) -> list[Tensor]:
        """The sums of the vectors of both models, of their products, and of those with each other where crossed."""
        like = own.new_zeros(self.groups, self.size, dtype=torch.float64)
        square = (self.groups, self.size, self.size)
        return [like, like.clone(), *(like.new_zeros(square) for _ in range(2 if self.crossed else 1))]

    def _limit(self) -> int:
        """Vectors of one batch."""
        affordable = max(FEWEST * self.size, int(WORK / (self.groups * self.size**2)))
        return max(1, min(POSITIONS * self.size, affordable) // self.batches)

    def _rows(self, t: Tensor, x: Tensor, seed: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Vectors (vectors, 1, size) of both inputs, with their weights."""
        index, weights = self._chosen(torch.arange(len(x), device=x.device), seed)
        if len(index) == len(x):
            yield t, x, weights
        else:
            drawn = x[index]
            yield drawn if t is x else t[index], drawn, weights

    def _chosen(self, vectors: Tensor, seed: int) -> tuple[Tensor, Tensor]:  # (any), (any, 1)
        """Some of the vectors of a batch, or all where they are few, with their weights.

        Those drawn are drawn at random, in proportion to the weights of their places: as often as drawn they count.
        """
        count, limit = len(vectors), self._limit()
        uneven = count % len(self.places)  # other than whole examples, in which all count alike
        places = self.places.new_ones(1) if uneven else self.places
        if count <= limit:
            return vectors, places.repeat(count // len(places)).to(vectors.device)[:, None]
        generator = torch.Generator().manual_seed(seed)
        examples = torch.randint(count // len(places), (limit,), generator=generator, device="cpu") * len(places)
        drawn = torch.multinomial(places, limit, replacement=True, generator=generator)
        index, times = (examples + drawn).unique(return_counts=True)
        return vectors[index.to(vectors.device)], times.to(vectors.device, torch.float32)[:, None]

    def _patches(self, layer: nn.Conv2d, t: Tensor, x: Tensor, seed: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Patches (vectors, groups, size) of both inputs, piece by piece; they may lack the axis of the batch."""
        padded = [_padded(layer, each) for each in ((x,) if t is x else (t, x))]
        rows = [each.permute(0, 2, 3, 1).flatten(0, 2) for each in padded]  # (places, channels)
        corners, taps = (each.to(x.device) for each in _windows(layer, padded[0].shape))
        piece = max(1, CHUNK // (self.groups * self.size))
        for corner, weights in zip(*(each.split(piece) for each in self._chosen(corners, seed)), strict=True):
            at = (corner[:, None] + taps).flatten()
            found = [each.index_select(0, at).unflatten(0, (-1, len(taps))).transpose(1, 2) for each in rows]
            patches = [each.reshape(-1, self.groups, self.size) for each in found]
            yield patches[0], patches[-1], weights

    def moments(self) -> Moments:
        apart = [each for each in zip(self.weights, self.squares, self.sums, strict=True) if each[0]]
        for _, _, (_, _, inputs, *_) in apart:
            mirrored_(inputs)
        assert self.origin is not None, "vectors were seen"
        origin = self.origin[:, 0].double()
        halves = [_mean_of(weight, squares, sums, origin) for weight, squares, sums in apart]
        if len(halves) < 2:
            return halves[0]
        both = [a + b for a, b in zip(*self.sums, strict=True)]
        return replace(_mean_of(sum(self.weights), sum(self.squares), both, origin), halves=tuple(halves))


def _padded(layer: nn.Conv2d, x: Tensor) -> Tensor:  # (batch, channels, height, width), or without the batch
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = x.float() if x.dim() == 4 else x[None].float()
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


def _windows(layer: nn.Conv2d, shape: Sequence[int]) -> tuple[Tensor, Tensor]:  # (patches), (taps)
    """Where the patches of padded inputs begin among the places (example, row, column), and how far off each tap lies.

    >>> [each.tolist() for each in _windows(nn.Conv2d(1, 1, 2, stride=2), (1, 1, 4, 4))]
    [[0, 2, 8, 10], [0, 1, 4, 5]]
    """
    batch, _, *sides = shape
    axes = zip(sides, layer.kernel_size, layer.dilation, layer.stride, strict=True)
    downs, rights = (torch.arange(0, side - (k - 1) * apart, step, device="cpu") for side, k, apart, step in axes)
    down, right = (
        torch.arange(k, device="cpu") * apart for k, apart in zip(layer.kernel_size, layer.dilation, strict=True)
    )
    example = torch.arange(batch, device="cpu") * sides[0] * sides[1]
    corners = example[:, None, None] + downs[:, None] * sides[1] + rights
    return corners.flatten(), (down[:, None] * sides[1] + right).flatten()


def _mean_of(weight: float, squares: float, sums: Sequence[Tensor], origin: Tensor) -> Moments:
    """The moments of vectors of which the sums are those of what they are from the origin, (conv_groups, m)."""
    mean, dense_mean, inputs, *cross = (each / weight for each in sums)
    whole = _from_origin(inputs, mean, mean, origin)
    crossed = _from_origin(cross[0], dense_mean, mean, origin) if cross else whole
    return Moments(max(1, round(weight**2 / squares)), whole, crossed, mean + origin, dense_mean + origin)


def _from_origin(product: Tensor, one: Tensor, other: Tensor, origin: Tensor) -> Tensor:
    """The mean of (a + origin)(b + origin)ᵀ from that of a bᵀ and the means of a and b."""
    moved = (one + origin)[:, :, None] * (other + origin)[:, None]
    return product + moved - one[:, :, None] * other[:, None]


def version_of(tensor: Tensor) -> tuple[int, int]:
    """A tensor and its values: an activation or addition in place gives the same tensor another version."""
    return id(tensor), 0 if tensor.is_inference() else tensor._version
