"""Products of signals and kernels on a group: circular convolution, Fourier coefficients, tap by tap, dense matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from . import spectra
from .errors import GMError
from .groups import Group, axes_of, cyclic
from .groups.group import Indices
from .sharing import shared_tensor
from .spectra import Spectrum, correlate, spectrum, transform_macs

MAX_DENSE = 1 << 22  # entries of a dense matrix: 16 MiB in float32
# time for a multiply-add, relative to one tap by tap; measured by benchmarks/group_convolution.py --methods
BOX, TAPS, DENSE, FOURIER = 0.5, 1.0, 1.0, 1.6
DEPTHWISE = 2.0  # for one of a circular convolution channel by channel; tap by tap a number costs MOVED
MOVED = 8.0  # for a number that is gathered and added
BATCH = 8  # examples that share the transform of a kernel
METHODS = ("circular", "fourier", "taps", "dense")
ROLES = "xkg"  # of the trilinear form of the product tap by tap: signal, kernel, and what is on the output's side


@dataclass(frozen=True, eq=False)
class Stencil:
    """Which inputs each output reads: output h of `members` reads h·u for every u of `taps`.

    y[o, h] = Σ_c Σ_u k[o, c, u] x[c, h·u], the product by the group matrix W[h, y] = k(h⁻¹y); it commutes with the
    action (g·x)[y] = x[g⁻¹y] of every g of the subgroup `members`.

    >>> from gmcompress.groups import ball
    >>> stencil = Stencil(cyclic(6), np.array([0, 2, 4]), ball(cyclic(6), 1))
    >>> stencil.reads.tolist()
    [[0, 2, 4], [1, 3, 5], [5, 1, 3]]
    """

    group: Group
    members: Indices  # (m,), ascending, a subgroup
    taps: Indices  # (t,)

    def __deepcopy__(self, memo: dict[int, object]) -> Stencil:
        return self  # immutable, and its tables are large

    def __reduce__(self) -> tuple[Any, ...]:
        return find_stencil, (self.group, self.members, self.taps)

    @cached_property
    def reads(self) -> Indices:  # (t, m)
        """`reads[u, h]` is the element h·u."""
        return np.ascontiguousarray(self.group.table[np.ix_(self.members, self.taps)].T)

    @cached_property
    def labels(self) -> Indices:  # (m, n)
        """`labels[h, y]` is the tap with which h reads y, and the number of taps where it does not."""
        number = np.full(self.group.order, len(self.taps), dtype=np.int64)
        number[self.taps] = np.arange(len(self.taps))
        return number[self.group.table[self.group.inverse[self.members]]]

    @cached_property
    def steps(self) -> tuple[int, ...] | None:
        """Of a product of cyclic groups, where the members are every s-th place of each axis, these s; else None."""
        axes = axes_of(self.group)
        if not all(each == cyclic(each.order) for each in self.group.factors or (self.group,)):
            return None
        kept = [len(np.unique(each)) for each in np.unravel_index(self.members, axes)]
        if prod(kept) != len(self.members):
            return None
        return tuple(whole // part for whole, part in zip(axes, kept, strict=True))

    @cached_property
    def spectrum(self) -> Spectrum | None:
        """The Fourier transforms of a product of cyclic groups, or None."""
        if self.steps is None:
            return None
        axes = axes_of(self.group)
        return spectrum(axes, self.steps, np.stack(np.unravel_index(self.taps, axes), 1))

    @cached_property
    def box(self) -> Box | None:
        """How a circular convolution does the same, or None: for products of up to three cyclic groups."""
        axes = axes_of(self.group)
        if len(axes) > 3 or self.steps is None:
            return None
        places = np.stack(np.unravel_index(self.taps, axes), 1)  # (t, axes)
        signed = np.where(2 * places > np.array(axes), places - np.array(axes), places)
        low, high = np.minimum(signed.min(0), 0), np.maximum(signed.max(0), 0)  # padding cannot be negative
        size = tuple(int(each) for each in high - low + 1)
        at = np.ravel_multi_index(tuple((signed - low).T), size)
        padding = tuple(int(each) for pair in zip(-low[::-1], high[::-1], strict=True) for each in pair)
        return Box(axes, size, at, padding, self.steps)

    def costs(self, out_channels: int, in_channels: int) -> dict[str, float]:
        """Time for one example, in multiply-adds of a large matrix product; only the methods that can be used.

        With m outputs, n inputs, t taps and a box of b taps around them: circular ∝ m·o·i·b, taps ∝ m·o·i·t and the
        traffic m·i·t, dense ∝ m·n·o·i, as long as that matrix has at most 2²² entries, and fourier ∝ 2n·o·i, the
        transforms of signals, and those of the kernel shared by a batch of 8.
        """
        m, n, t = len(self.members), self.group.order, len(self.taps)
        pairs = out_channels * in_channels
        found = {"taps": m * t * (TAPS * pairs + MOVED * in_channels)}
        if self.box is not None:
            found["circular"] = BOX * m * pairs * prod(self.box.size)
        if self.steps is not None:
            axes = axes_of(self.group)
            half = n // axes[-1] * (axes[-1] // 2 + 1)  # coefficients
            each = transform_macs(axes)
            moved = (in_channels + out_channels) * each + min(
                each, half * (t + 1)
            ) * pairs / BATCH  # half of a ball are inverses
            found["fourier"] = FOURIER * (4 * half * pairs + moved + MOVED * half * (in_channels + out_channels))
        if m * n * pairs <= MAX_DENSE:
            found["dense"] = DENSE * m * n * pairs
        return found

    def multiply_adds(self, method: str, out_channels: int, in_channels: int, batch: int) -> int:
        """Multiply-adds of `multiply` in matrix products and convolutions, as torch's FlopCounterMode counts them.

        >>> ring = Stencil(cyclic(6), np.arange(6), np.array([0, 1, 5]))
        >>> [ring.multiply_adds(method, 2, 4, 1) for method in ("circular", "taps", "dense")]
        [144, 144, 288]
        """
        if method == "fourier":
            assert self.spectrum is not None
            return spectra.multiply_adds(self.spectrum, (out_channels, in_channels, len(self.taps)), batch)
        reads = {"taps": len(self.taps), "dense": self.group.order}.get(method) or prod(self._box().size)
        return reads * len(self.members) * batch * out_channels * in_channels

    def depthwise_cost(self, channels: int) -> float:
        """Time of `depthwise` for one example, as `costs` counts it."""
        each = MOVED * len(self.taps) if self.box is None else DEPTHWISE * prod(self.box.size)
        return len(self.members) * channels * each

    def depthwise_multiply_adds(self, channels: int, batch: int) -> int:
        """Multiply-adds of `depthwise` in convolutions; tap by tap it multiplies entry by entry, and has none."""
        return 0 if self.box is None else self.multiply_adds("circular", channels, 1, batch)

    def method(self, out_channels: int, in_channels: int) -> str:
        """The method that costs least."""
        costs = self.costs(out_channels, in_channels)
        return min(costs, key=costs.__getitem__)

    def table(self, method: str) -> Indices:
        """The index array that `multiply` needs for a method."""
        possible = {"circular": self.box is not None, "fourier": self.steps is not None}
        if method not in METHODS or not possible.get(method, True):
            raise GMError(f"{method!r} is no way to multiply on {self.group}; {', '.join(self.costs(1, 1))} are")
        if method == "fourier":
            return self.taps
        return {"taps": lambda: self.reads, "dense": lambda: self.labels}.get(method, lambda: self._box().at)()

    def tensor(self, method: str, device: torch.device | str | None = None) -> Tensor:
        """The same array as a tensor, of which there is one on each device."""
        return shared_tensor((self, method), lambda: self.table(method), dtype=torch.int64, device=device)

    def _box(self) -> Box:
        assert self.box is not None
        return self.box


_STENCILS: WeakValueDictionary[tuple[object, ...], Stencil] = WeakValueDictionary()  # those that some layer holds


def find_stencil(group: Group, members: Indices, taps: Indices) -> Stencil:
    """The stencil of these, the same object for all who ask: its tables are made once.

    >>> find_stencil(cyclic(6), np.arange(6), np.array([0])) is find_stencil(cyclic(6), np.arange(6), np.array([0]))
    True
    """
    made = Stencil(group, members, taps)
    return _STENCILS.setdefault((group, group.factors, members.tobytes(), taps.tobytes()), made)


@dataclass(frozen=True)
class Box:
    """The smallest box around the taps of a circular convolution; all offsets are counted from its lower corner."""

    axes: tuple[int, ...]
    size: tuple[int, ...]
    at: Indices  # (t,) the place of every tap in the box
    padding: tuple[int, ...]  # last axis first, below and above, as torch pads
    stride: tuple[int, ...]


def multiply(
    signal: Tensor,  # (batch, i, n)
    kernel: Tensor,  # (o, i, t)
    stencil: Stencil,
    *,
    method: str,
    table: Tensor,  # stencil.table(method), on the device of the signal
) -> Tensor:  # (batch, o, m)
    """y[b, o, h] = Σ_c Σ_u kernel[o, c, u] signal[b, c, h·u], differentiable as often as wanted.

    >>> stencil = Stencil(cyclic(3), np.arange(3), np.array([1]))
    >>> multiply(torch.tensor([[[1.0, 2, 3]]]), torch.ones(1, 1, 1), stencil, method="dense",
    ...          table=torch.tensor(stencil.table("dense")))
    tensor([[[2., 3., 1.]]])
    """
    if method == "dense":
        return multiply_labelled(signal, kernel, table)
    if method == "fourier":
        assert stencil.spectrum is not None
        return correlate(signal, kernel, stencil.spectrum, table)
    if method == "taps":
        return _by_taps(signal, kernel, table)
    return _by_circle(signal, kernel, table, stencil._box())


def depthwise(
    signal: Tensor,  # (batch, c, n)
    kernel: Tensor,  # (c, t)
    stencil: Stencil,
    *,
    table: Tensor,  # of the method "circular" where there is a box, else of "taps"
) -> Tensor:  # (batch, c, m)
    """y[b, c, h] = Σ_u kernel[c, u] signal[b, c, h·u]: every channel by itself.

    >>> stencil = Stencil(cyclic(3), np.arange(3), np.array([1]))
    >>> table = torch.tensor(stencil.table("circular"))
    >>> depthwise(torch.tensor([[[1.0, 2, 3]]]), torch.ones(1, 1), stencil, table=table)
    tensor([[[2., 3., 1.]]])
    """
    if stencil.box is not None:
        return _by_circle(signal, kernel[:, None], table, stencil.box, groups=len(kernel))
    found = kernel[:, 0, None] * signal.index_select(2, table[0])
    for tap in range(1, len(table)):
        found = found + kernel[:, tap, None] * signal.index_select(2, table[tap])
    return found


def multiply_labelled(
    signal: Tensor,  # (batch, i, n)
    kernel: Tensor,  # (o, i, t)
    labels: Tensor,  # (m, n), 0 ... t; t where an output does not read an input
) -> Tensor:  # (batch, o, m)
    """y[b, o, h] = Σ_c Σ_x kernel[o, c, labels[h, x]] signal[b, c, x], by the dense matrix of all that.

    >>> multiply_labelled(torch.tensor([[[1.0, 2]]]), torch.tensor([[[1.0, 10]]]), torch.tensor([[0, 1], [1, 2]]))
    tensor([[[21., 10.]]])
    """
    # output channels last, so that whole rows of the kernel are put in their places
    (m, n), (o, i, _) = labels.shape, kernel.shape
    padded = F.pad(kernel.permute(1, 2, 0), (0, 0, 0, 1))  # (i, t + 1, o): the last row is for what is not read
    matrix = padded.index_select(1, labels.T.flatten()).reshape(i * n, m * o)
    return (signal.flatten(1) @ matrix).unflatten(1, (m, o)).transpose(1, 2)


def _by_circle(signal: Tensor, kernel: Tensor, at: Tensor, box: Box, *, groups: int = 1) -> Tensor:
    o, i, t = kernel.shape
    filled = kernel
    if t != prod(box.size):
        filled = kernel.new_zeros(o, i, prod(box.size)).index_copy(2, at, kernel)
    elif t > 1:
        filled = torch.empty_like(kernel).index_copy(2, at, kernel)
    shaped = signal.reshape(signal.shape[0], -1, *box.axes)
    if any(box.padding):
        shaped = F.pad(shaped, box.padding, mode="circular")
    if groups > 1 and len(box.axes) == 2:
        shaped = shaped.contiguous(memory_format=torch.channels_last)  # by single channels several times faster on CPUs
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(box.axes) - 1]
    return convolve(shaped, filled.reshape(o, i, *box.size), stride=box.stride, groups=groups).flatten(2)


def _by_taps(signal: Tensor, kernel: Tensor, reads: Tensor) -> Tensor:
    """Positions in front, so that a tap moves whole rows; nothing of the size of the gathered input is ever kept."""
    if torch.is_autocast_enabled(signal.device.type):
        low = torch.get_autocast_dtype(signal.device.type)
        signal, kernel = signal.to(low), kernel.to(low)
    rows = signal.permute(2, 0, 1).contiguous()  # (n, batch, i)
    found = _Product.apply("g", len(rows), reads, rows, kernel.permute(2, 1, 0).contiguous())  # (m, batch, o)
    return found.permute(1, 2, 0)


# The trilinear form Σ_u Σ_h g[h] · (x[h·u] k_u) gives three products; the derivatives of each are the two others.


def _gathered(x: Tensor, k: Tensor, reads: Tensor) -> Tensor:  # (n, b, i), (t, i, o) -> (m, b, o)
    (_, b, i), o = x.shape, k.shape[2]
    found = x.new_zeros(reads.shape[1] * b, o)
    for tap in range(len(reads)):
        torch.addmm(found, x.index_select(0, reads[tap]).view(-1, i), k[tap], out=found)  # addmm_ is not counted
    return found.view(-1, b, o)


def _scattered(g: Tensor, k: Tensor, reads: Tensor, n: int) -> Tensor:  # (m, b, o), (t, i, o) -> (n, b, i)
    (m, b, o), i = g.shape, k.shape[1]
    found, flat = g.new_zeros(n, b, i), g.reshape(-1, o)
    for tap in range(len(reads)):
        found.index_add_(0, reads[tap], (flat @ k[tap].T).view(m, b, i))
    return found


def _correlated(x: Tensor, g: Tensor, reads: Tensor) -> Tensor:  # (n, b, i), (m, b, o) -> (t, i, o)
    i, flat = x.shape[2], g.reshape(-1, g.shape[2])
    found = x.new_empty(len(reads), i, flat.shape[1])  # made first, so that what is gathered reuses its memory
    for tap in range(len(reads)):
        found[tap] = x.index_select(0, reads[tap]).view(-1, i).T @ flat
    return found


class _Product(torch.autograd.Function):
    """The product that has the role `wanted` in the trilinear form, of the two others in the order x, k, g."""

    @staticmethod
    def forward(wanted: str, n: int, reads: Tensor, first: Tensor, second: Tensor) -> Tensor:
        if wanted == "g":
            return _gathered(first, second, reads)
        return _scattered(second, first, reads, n) if wanted == "x" else _correlated(first, second, reads)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        """One by one, because torch.vmap cannot write into a tensor that it did not batch."""
        pairs = list(zip(inputs, in_dims, strict=True))
        found = [
            _Product.apply(*(each if axis is None else each.select(axis, at) for each, axis in pairs))
            for at in range(info.batch_size)
        ]
        return torch.stack(found), 0

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.wanted, ctx.n, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Any:
        reads, *factors = ctx.saved_tensors
        own = ROLES.replace(ctx.wanted, "")
        known = {ctx.wanted: given, own[0]: factors[0], own[1]: factors[1]}
        derivatives = [
            _Product.apply(role, ctx.n, reads, *(known[each] for each in ROLES if each != role)) if needed else None
            for role, needed in zip(own, ctx.needs_input_grad[3:], strict=True)
        ]
        return None, None, None, *derivatives
