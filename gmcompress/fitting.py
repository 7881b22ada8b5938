"""Fit a structured weight to a quadratic loss: Levenberg–Marquardt, each step by preconditioned conjugate gradients.

The loss of an error E = Ŵ − W is tr(G E S Eᵀ): S is the second moment of the layer's inputs, G that of the gradients at
its outputs; without them it is the Frobenius norm. A factor part U_p diag(s_pq) V_qᵀ is stiff: alternating least
squares crawls and first-order methods do not arrive. Gauss–Newton steps, with the exact blocks of the factors as
preconditioner, arrive in a few dozen products with the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor
from torch.func import jvp, vjp

from .errors import GMError
from .linalg import cholesky, truncated_svd
from .structure import Structure, expand

FORCING = 0.01  # an inner solve stops when the squared preconditioned residual has fallen by this much
INNER = 30  # steps of conjugate gradients at most in one step of Levenberg–Marquardt
RETRIES = 5  # larger dampings tried before the fit is taken as converged

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Metric:
    """What an error E of a weight (rows, columns·taps) costs: tr(G E S Eᵀ), Frobenius where both are None.

    `inputs` is S, (m, m) or (conv_groups, m, m) with m = columns·taps, in the order of the weight; `outputs` is G,
    (rows, rows). Both are symmetric and positive semidefinite.
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
        if self.inputs is not None:
            groups = self.inputs.shape[0] if self.inputs.dim() == 3 else 1
            flat = (flat.reshape(groups, -1, flat.shape[1]) @ self.inputs).reshape(flat.shape)
        return flat if self.outputs is None else self.outputs @ flat

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
class _Form:
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


def start_factors(weight: Tensor, structure: Structure, metric: Metric) -> Tensors:
    """The factor part from the truncated SVD of the whitened matrix, all scales 1.

    For a low rank this is the minimum, where the matrix is rows × columns·taps and the convolution has one group; for
    the other view the inputs' moment is averaged over the vertical taps.

    Source: Eckart and Young 1936; whitening as in Wang et al. 2024, SVD-LLM, theorem 3.2.
    """
    form = _Form(structure, tuple(weight.shape))
    matrix = form.arrange(weight).flatten(2).flatten(0, 1)
    moments = _Moments(form, form.arrange_metric(metric))
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


class _Moments:
    """What the preconditioner needs of the inputs' moment, averaged over convolution groups."""

    def __init__(self, form: _Form, arranged: Metric) -> None:
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


class _Factors:
    """The factor part as a function of its three tensors x = (U, s, V), with derivatives and preconditioner."""

    def __init__(self, form: _Form, arranged: Metric) -> None:
        self.form, self.moments = form, _Moments(form, arranged)
        self.outputs = None if arranged.outputs is None else float(arranged.outputs.diagonal().mean())

    def balance(self, x: Tensors) -> Tensors:
        """The same weight with columns of U and V of norm 1 in every block."""
        u, s, v = x["u"], x["s"], x["v"]
        tiny = torch.finfo(u.dtype).tiny ** 0.5
        nu, nv = u.norm(dim=1, keepdim=True).clamp_min(tiny), v.norm(dim=1, keepdim=True).clamp_min(tiny)
        return {"u": u / nu, "s": s * nu * nv.transpose(0, 1), "v": v / nv}

    @staticmethod
    def _right(s: Tensor, v: Tensor) -> Tensor:  # (P, Q, r), (Q, b, r) -> (P, r, Q·b)
        return torch.einsum("pqr,qbr->prqb", s, v).flatten(2)

    def value(self, x: Tensors) -> Tensor:  # (o, h, i, w)
        return (x["u"] @ self._right(x["s"], x["v"])).reshape(self.form.sizes)

    def jvp(self, x: Tensors, d: Tensors) -> Tensor:  # (o, h, i, w)
        moved = self._right(d["s"], x["v"]) + self._right(x["s"], d["v"])
        return (d["u"] @ self._right(x["s"], x["v"]) + x["u"] @ moved).reshape(self.form.sizes)

    def vjp(self, x: Tensors, error: Tensor) -> Tensors:  # error (o, h, i, w)
        u, s, v = x["u"], x["s"], x["v"]
        error = error.reshape(len(u), u.shape[1], -1)
        inner = (u.mT @ error).reshape(len(u), -1, len(v), v.shape[1])  # (P, r, Q, b)
        by_scale = torch.einsum("prqb,qbr->pqr", inner, v)
        return {"u": error @ self._right(s, v).mT, "s": by_scale, "v": torch.einsum("prqb,pqr->qbr", inner, s)}

    def preconditioner(self, x: Tensors) -> _Blocks:
        """The diagonal blocks of JᵀMJ: of U exact, of s and V with the moment averaged over the vertical taps."""
        u, s, v = x["u"], x["s"], x["v"]
        h, m = self.form.sizes[1], self.moments
        right = self._right(s, v)
        if m.full is None or m.blocks is None:
            by_u = torch.einsum("prx,ptx->prt", right, right)
            by_u = torch.einsum("prt,hk->phrkt", by_u, torch.eye(h, dtype=u.dtype, device=u.device))
            vsv = v.mT @ v
        else:
            moved = torch.einsum("prx,hxky->prhky", right, m.full)
            by_u = torch.einsum("prhky,pty->phrkt", moved, right)
            vsv = v.mT @ m.blocks @ v
        rank = u.shape[2]
        uu = u.mT @ u * (1.0 if self.outputs is None else self.outputs)
        by_u = by_u * (1.0 if self.outputs is None else self.outputs)
        by_v = torch.einsum("prt,pqr,pqt->qrt", uu, s, s)
        by_s = uu[:, None] * vsv[None]
        return _Blocks(by_u.reshape(len(u), h * rank, h * rank), by_s, by_v, m.blocks, h)


@dataclass(frozen=True)
class _Blocks:
    """Blocks of the Gauss–Newton matrix: of U (P, h·r, h·r), of s (P, Q, r, r), of V as A_q ⊗ S_q."""

    by_u: Tensor
    by_s: Tensor
    by_v: Tensor  # (Q, r, r)
    moment: Tensor | None  # (Q, b, b)
    h: int

    def diagonal(self) -> Tensors:
        """The diagonals, each broadcasting against its tensor; of U apart as (P, 1, h, r)."""
        by_u = self.by_u.diagonal(dim1=-2, dim2=-1)
        of_v = self.by_v.diagonal(dim1=-2, dim2=-1)[:, None]
        if self.moment is not None:
            of_v = of_v * self.moment.diagonal(dim1=-2, dim2=-1)[..., None]
        return {
            "u": by_u.reshape(len(by_u), 1, self.h, -1),
            "s": self.by_s.diagonal(dim1=-2, dim2=-1),
            "v": of_v,
        }

    def damped(self, damping: float) -> _Solver:
        """Their inverses, damping times their own diagonal added."""

        def factor(blocks: Tensor) -> Tensor:
            return cholesky(blocks + torch.diag_embed(damping * blocks.diagonal(dim1=-2, dim2=-1)), 1e-9)

        moment = None if self.moment is None else factor(self.moment)
        return _Solver(factor(self.by_u), factor(self.by_s), factor(self.by_v), moment, self.h)


@dataclass(frozen=True)
class _Solver:
    """Cholesky factors of damped blocks."""

    by_u: Tensor
    by_s: Tensor
    by_v: Tensor
    moment: Tensor | None
    h: int

    def __call__(self, d: Tensors) -> Tensors:
        u, s, v = d["u"], d["s"], d["v"]
        rows = u.reshape(len(u), -1, self.h * u.shape[2]).mT
        v = torch.cholesky_solve(v.mT, self.by_v).mT
        return {
            "u": torch.cholesky_solve(rows, self.by_u).mT.reshape(u.shape),
            "s": torch.cholesky_solve(s[..., None], self.by_s)[..., 0],
            "v": v if self.moment is None else torch.cholesky_solve(v, self.moment),
        }


class _GroupPart:
    """The group part as a function of its stored tensors, differentiated by torch; scalar preconditioner."""

    def __init__(self, form: _Form, arranged: Metric) -> None:
        structure = form.structure
        self.form, self.metric = form, arranged
        self.structure = replace(structure, lowrank=0, split=False, grid=None)
        self.names = tuple(self.structure.shapes(form.shape))

    def value(self, x: Tensors) -> Tensor:
        return self.form.arrange(expand({name: x[name] for name in self.names}, self.structure, self.form.shape))

    def jvp(self, x: Tensors, d: Tensors) -> Tensor:
        own, moved = {name: x[name] for name in self.names}, {name: d[name] for name in self.names}
        return jvp(self.value, (own,), (moved,))[1]

    def vjp(self, x: Tensors, error: Tensor) -> Tensors:
        return vjp(self.value, {name: x[name] for name in self.names})[1](error)[0]

    def curvature(self, x: Tensors) -> dict[str, float]:
        """For every tensor the mean of the diagonal of JᵀMJ, from one random direction."""
        generator, found = torch.Generator().manual_seed(0), {}
        for name in self.names:
            zeros = {each: torch.zeros_like(x[each]) for each in self.names}
            probe = torch.randn(x[name].shape, generator=generator, dtype=torch.float64).to(x[name])
            moved = self.jvp(x, zeros | {name: probe}).flatten(1)
            size = float((moved * self.metric.apply(moved)).sum()) / probe.numel()
            found[name] = max(size, torch.finfo(probe.dtype).tiny)
        return found


class _Problem:
    """One weight to be fitted: the loss, and the Gauss–Newton steps that lower it."""

    def __init__(self, weight: Tensor, structure: Structure, metric: Metric) -> None:
        self.form = _Form(structure, tuple(weight.shape))
        self.metric = self.form.arrange_metric(metric)
        self.target = self.form.arrange(weight)
        self.factors = _Factors(self.form, self.metric) if structure.lowrank else None
        self.group = _GroupPart(self.form, self.metric) if structure.group is not None else None

    def load(self, tensors: Mapping[str, Tensor]) -> Tensors:
        x = {name: tensors[name] for name in self.group.names} if self.group else {}
        return x | dict(zip("usv", self.form.load(tensors), strict=True)) if self.factors else x

    def store(self, x: Tensors) -> Tensors:
        found = {name: x[name] for name in self.group.names} if self.group else {}
        return found | self.form.store(x["u"], x["s"], x["v"]) if self.factors else found

    @property
    def parts(self) -> list[_Factors | _GroupPart]:
        return [each for each in (self.group, self.factors) if each is not None]

    def balance(self, x: Tensors) -> Tensors:
        return x | self.factors.balance(x) if self.factors else x

    def weigh(self, error: Tensor) -> Tensor:  # M·E, arranged
        return self.metric.apply(error.flatten(1)).reshape(error.shape)

    def error(self, x: Tensors) -> Tensor:
        return sum((part.value(x) for part in self.parts), -self.target)

    def loss(self, x: Tensors) -> float:
        error = self.error(x)
        return float((error * self.weigh(error)).sum())

    def product_cost(self) -> float:
        """Multiply-adds of one product with JᵀMJ, about."""
        numel, structure, metric = self.target.numel(), self.form.structure, self.metric
        moments = (0 if metric.inputs is None else metric.inputs.shape[-1]) + (
            0 if metric.outputs is None else metric.outputs.shape[-1]
        )
        return float(numel * (6 * structure.lowrank + moments + 8))

    def jvp(self, x: Tensors, d: Tensors) -> Tensor:
        first, *rest = (part.jvp(x, d) for part in self.parts)
        return sum(rest, first)

    def vjp(self, x: Tensors, error: Tensor) -> Tensors:
        return {name: each for part in self.parts for name, each in part.vjp(x, error).items()}

    def steps(self, x: Tensors) -> _Steps:
        """What every damping tried at x shares."""
        gradient = self.vjp(x, self.weigh(self.error(x)))
        blocks = self.factors.preconditioner(x) if self.factors else None
        return _Steps(self, x, gradient, blocks, self.group.curvature(x) if self.group else {})


@dataclass(frozen=True)
class _Steps:
    """The Gauss–Newton system (JᵀMJ + λD) d = −gradient at x, D its diagonal."""

    problem: _Problem
    x: Tensors
    gradient: Tensors
    blocks: _Blocks | None
    scalars: Mapping[str, float]  # curvature of the group part

    def solve(self, damping: float, inner: int) -> Tensors:
        """The step for one damping λ, by conjugate gradients under the damped blocks."""
        solver = self.blocks.damped(damping) if self.blocks else None
        diagonal = self.blocks.diagonal() if self.blocks else {}

        def precondition(r: Tensors) -> Tensors:
            z = {name: r[name] / (size * (1 + damping)) for name, size in self.scalars.items()}
            return z | solver(r) if solver else z

        def apply(d: Tensors) -> Tensors:
            found = self.problem.vjp(self.x, self.problem.weigh(self.problem.jvp(self.x, d)))
            for name, size in self.scalars.items():
                found[name] = found[name] + damping * size * d[name]
            for name, each in diagonal.items():
                apart = d[name] if name != "u" else d[name].reshape(len(d[name]), -1, *each.shape[2:])
                found[name] = found[name] + damping * (each * apart).reshape(d[name].shape)
            return found

        residual = {name: -each for name, each in self.gradient.items()}
        z = precondition(residual)
        direction, found = z, {name: torch.zeros_like(each) for name, each in residual.items()}
        size = first = _dot(residual, z)
        for _ in range(inner):
            if not size > FORCING * first or not first > 0:
                break
            moved = apply(direction)
            curvature = _dot(direction, moved)
            if not curvature > 0:
                break
            found = _add(found, direction, size / curvature)
            residual = _add(residual, moved, -size / curvature)
            z = precondition(residual)
            before, size = size, _dot(residual, z)
            direction = _add(z, direction, size / before)
        return found


def _dot(a: Tensors, b: Tensors) -> float:
    return float(sum((each * b[name]).sum() for name, each in a.items()))


def _add(a: Tensors, b: Tensors, factor: float) -> Tensors:
    return {name: each + factor * b[name] for name, each in a.items()}


def refine(
    weight: Tensor,  # (rows, columns, *taps)
    structure: Structure,
    tensors: Mapping[str, Tensor],  # the start, as named and shaped by Structure.shapes
    *,
    metric: Metric | None = None,
    iterations: int = 40,
    tolerance: float = 1e-3,
    effort: float = 2e12,
) -> Tensors:
    """The stored tensors after Levenberg–Marquardt steps from a start; the loss never grows.

    Stops after `iterations` steps, when a step lowers the loss by less than `tolerance` × itself, when nothing is left
    of it, or after about `effort` multiply-adds. The result is a local minimum. Works in the dtype of the weight.

    Source: Levenberg 1944 and Marquardt 1963 for the damping; Golub and Pereyra 2003 on such separable problems.
    """
    problem = _Problem(weight, structure, metric or Metric())
    x = problem.load(tensors)
    loss, damping = problem.loss(x), 1e-2
    floor = torch.finfo(weight.dtype).eps ** 2 * float((problem.target * problem.weigh(problem.target)).sum())
    inner = max(4, min(INNER, int(effort / (4 * problem.product_cost()))))
    for _ in range(iterations):
        if loss <= floor or effort <= 0:
            break
        steps = problem.steps(x := problem.balance(x))
        for _ in range(RETRIES):
            effort -= inner / 2 * problem.product_cost()  # about half of the inner steps are taken
            new = _add(x, steps.solve(damping, inner), 1.0)
            lower = problem.loss(new)
            if lower < loss:
                break
            damping *= 8
        else:
            break
        gain, x, loss, damping = 1 - lower / loss, new, lower, max(damping / 4, 1e-7)
        if gain < tolerance:
            break
    return problem.store(x)
