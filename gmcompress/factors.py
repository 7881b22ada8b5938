"""The factor part of a weight as matrices, what an error of it costs, and the start of a fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from .errors import GMError
from .linalg import cholesky, truncated_svd
from .structure import Structure

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Metric:
    """What an error E of a weight (rows, columns·taps) costs: tr(G E S Eᵀ), Frobenius where both are None.

    `inputs` is S, (m, m) or (conv_groups, m, m) with m = columns·taps, in the order of the weight; `outputs` is G,
    (rows, rows). Both are symmetric and positive semidefinite. Between rows of different convolution groups G counts
    as 0: their inputs differ, and of two moments that do not belong together no loss can be made.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None

    def loss(self, error: Tensor) -> float:  # (rows, columns, *taps)
        """tr(G E S Eᵀ) of an error of the weight's shape.

        >>> Metric(inputs=torch.diag(torch.tensor([1.0, 4.0]))).loss(torch.ones(3, 2))
        15.0
        """
        flat = error.flatten(1)
        return float((flat * self.apply(flat)).sum())

    def apply(self, flat: Tensor) -> Tensor:  # (rows, m) -> (rows, m)
        """G E S."""
        groups = 1 if self.inputs is None or self.inputs.dim() == 2 else self.inputs.shape[0]
        apart = flat.reshape(groups, -1, flat.shape[1])
        if self.inputs is not None:
            apart = apart @ self.inputs
        if self.outputs is not None:
            blocks = self.outputs.reshape(groups, apart.shape[1], groups, apart.shape[1])
            apart = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0) @ apart
        return apart.reshape(flat.shape)

    def relative_loss(self, found: Tensor, wanted: Tensor) -> float:
        """tr(G E S Eᵀ)/tr(G W S Wᵀ) for E = found − wanted; not relative where the wanted weight costs nothing."""
        whole, lost = self.loss(wanted), self.loss(found.to(wanted) - wanted)
        return lost / whole if whole > 0 else lost

    def to(self, dtype: torch.dtype) -> Metric:
        """The metric in another precision."""
        moments = (self.inputs, self.outputs)
        return Metric(*(None if each is None else each.to(dtype) for each in moments))

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse moments that do not fit a weight of this shape.

        Raises:
            GMError: naming both shapes, or that a moment is not finite.
        """
        rows, columns = shape[0], prod(shape[1:])
        for what, moment, size in (("inputs", self.inputs, columns), ("outputs", self.outputs, rows)):
            if moment is None:
                continue
            groups = moment.shape[0] if moment.dim() == 3 else 1
            if moment.dim() not in (2, 3) or moment.shape[-2:] != (size, size) or rows % groups:
                came = tuple(moment.shape)
                raise GMError(f"the moment of the {what} has shape {came}, which does not fit a weight {shape}")
            if not torch.isfinite(moment).all():
                raise GMError(f"the moment of the {what} holds NaN or infinity")


@dataclass(frozen=True)
class Form:
    """The factor part of a weight of one shape, as matrices: rows (o, h) of P blocks, columns (i, w) of Q blocks.

    An arranged weight has the axes (o, h, i, w): one reshape gives the matrix of the factors (o·h, i·w), another the
    one that the metric acts on (o, h·i·w). Where the taps are not split, h is 1.
    """

    structure: Structure
    shape: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, int, int, int]:  # o, h, i, w
        taps = prod(self.shape[2:])
        height = self.shape[2] if self.structure.split else 1
        return self.shape[0], height, self.shape[1], taps // height

    @property
    def grid(self) -> tuple[int, int]:
        return self.structure.grid or (1, 1)

    def arrange(self, weight: Tensor) -> Tensor:  # (rows, columns, *taps) -> (o, h, i, w)
        o, h, i, w = self.sizes
        return weight.reshape(o, i, h, w).transpose(1, 2).contiguous()

    def restore(self, arranged: Tensor) -> Tensor:
        return arranged.transpose(1, 2).reshape(self.shape)

    def arrange_metric(self, metric: Metric) -> Metric:
        """The metric for arranged errors (o, h·i·w), always with an axis of convolution groups."""
        if metric.inputs is None:
            return metric
        _, h, i, w = self.sizes
        gram = metric.inputs if metric.inputs.dim() == 3 else metric.inputs[None]
        apart = gram.reshape(len(gram), i, h, w, i, h, w).permute(0, 2, 1, 3, 5, 4, 6)
        return replace(metric, inputs=apart.reshape(gram.shape))

    def load(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:  # U (P,a,r), s (P,Q,r), V (Q,b,r)
        p, q = self.grid
        left, right = tensors["left"].flatten(0, -2), tensors["right"].flatten(1).mT
        rank = left.shape[1]
        scales = tensors.get("scales", left.new_ones(p, q, rank))
        return left.reshape(p, -1, rank), scales, right.reshape(q, -1, rank)

    def store(self, u: Tensor, s: Tensor, v: Tensor) -> Tensors:
        """The stored tensors, balanced: of every component the same norm left and right, and scales around 1."""
        size = s.square().mean((0, 1)).sqrt()
        nu, nv = u.square().sum((0, 1)).sqrt(), v.square().sum((0, 1)).sqrt()
        tiny = torch.finfo(u.dtype).tiny
        both = (nu * nv * size).sqrt()
        shapes = self.structure.shapes(self.shape)
        u, v, s = u * (both / nu.clamp_min(tiny)), v * (both / nv.clamp_min(tiny)), s / size.clamp_min(tiny)
        if self.structure.grid is None:
            u, s = u * s, torch.ones_like(s)
        found = {"left": u.reshape(shapes["left"]), "right": v.reshape(-1, v.shape[-1]).mT.reshape(shapes["right"])}
        return found if self.structure.grid is None else found | {"scales": s}


def views_of(shape: Sequence[int]) -> list[bool]:
    """The views of a weight as a matrix: rows × columns·taps, and for a kernel with the taps split between the sides.

    >>> views_of((64, 64, 3, 3)), views_of((64, 64, 1, 1))
    ([False, True], [False])
    """
    return [False, True] if len(shape) == 4 and min(shape[2:]) > 1 else [False]


def start_factors(weight: Tensor, structure: Structure, metric: Metric) -> Tensors:
    """The factor part from the truncated SVD of the whitened matrix, all scales 1.

    For a low rank this is the minimum, where the matrix is rows × columns·taps and the convolution has one group; for
    the other view the inputs' moment is averaged over the vertical taps.

    Source: Eckart and Young 1936; whitening as in Wang et al. 2024, SVD-LLM, theorem 3.2.
    """
    form = Form(structure, tuple(weight.shape))
    matrix = form.arrange(weight).flatten(2).flatten(0, 1)
    moments = InputMoments(form, form.arrange_metric(metric))
    left = None if metric.outputs is None else cholesky(metric.outputs)
    right = None if moments.columns is None else cholesky(moments.columns)
    if left is not None:
        apart = matrix.reshape(len(left), -1)
        matrix = (left.mT @ apart).reshape(matrix.shape)
    if right is not None:
        matrix = matrix @ right
    u, s, vh = truncated_svd(matrix, structure.lowrank)
    u, v = u * s.sqrt(), vh.mT * s.sqrt()
    if left is not None:
        u = torch.linalg.solve_triangular(left.mT, u.reshape(len(left), -1), upper=True).reshape(u.shape)
    if right is not None:
        v = torch.linalg.solve_triangular(right.mT, v, upper=True)
    (p, q), rank = form.grid, structure.lowrank
    return form.store(u.reshape(p, -1, rank), u.new_ones(p, q, rank), v.reshape(q, -1, rank))


class InputMoments:
    """What the preconditioner needs of the inputs' moment, averaged over convolution groups."""

    def __init__(self, form: Form, arranged: Metric) -> None:
        self.full: Tensor | None = None  # (h, i·w, h, i·w)
        self.columns: Tensor | None = None  # (i·w, i·w), the mean over the vertical taps
        self.blocks: Tensor | None = None  # (Q, b, b), its diagonal blocks
        if arranged.inputs is None:
            return
        _, h, i, w = form.sizes
        self.full = arranged.inputs.mean(0).reshape(h, i * w, h, i * w)
        self.columns = torch.stack([self.full[k, :, k] for k in range(h)]).mean(0)
        q = form.grid[1]
        b = i * w // q
        apart = self.columns.reshape(q, b, q, b)
        self.blocks = torch.stack([apart[k, :, k] for k in range(q)])
