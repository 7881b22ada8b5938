"""Fit a structured weight to a quadratic loss: Levenberg–Marquardt, each step by preconditioned conjugate gradients.

The loss of an error E = Ŵ − W is tr(G E S Eᵀ): S is the second moment of the layer's inputs, G that of the gradients at
its outputs; without them it is the Frobenius norm. A factor part U_p diag(s_pq) V_qᵀ is stiff: alternating least
squares crawls and first-order methods do not arrive. Gauss–Newton steps, with the exact blocks of the factors as
preconditioner, arrive in a few dozen products with the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import vjp

from .factors import Form, InputMoments, Metric, Tensors
from .linalg import cholesky
from .structure import Structure, expand

FORCING = 0.1  # an inner solve stops when the squared preconditioned residual has fallen by this much
INNER = 30  # steps of conjugate gradients at most in one step of Levenberg–Marquardt
COUPLED = 48  # rank up to which the preconditioner couples the scales of a block; above it their diagonal is enough
RETRIES = 5  # larger dampings tried before the fit is taken as converged


class _Factors:
    """The factor part as a function of its three tensors x = (U, s, V), with derivatives and preconditioner."""

    def __init__(self, form: Form, arranged: Metric) -> None:
        self.form, self.moments = form, InputMoments(form, arranged)
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
        if rank > COUPLED:  # so many blocks of r × r would cost more than the products they save
            uu, vsv = _diagonal(uu), _diagonal(vsv)
        by_s = uu[:, None] * vsv[None]
        return _Blocks(by_u.reshape(len(u), h * rank, h * rank), by_s, by_v, m.blocks, h)


@dataclass(frozen=True)
class _Blocks:
    """Blocks of the Gauss–Newton matrix: of U (P, h·r, h·r), of s (P, Q, r, r) or its diagonal, of V as A_q ⊗ S_q."""

    by_u: Tensor
    by_s: Tensor
    by_v: Tensor  # (Q, r, r)
    moment: Tensor | None  # (Q, b, b)
    h: int

    def diagonal(self) -> Tensors:
        """The diagonals, each broadcasting against its tensor; of U apart as (P, 1, h, r)."""
        by_u = _diagonal(self.by_u)
        of_v = _diagonal(self.by_v)[:, None]
        if self.moment is not None:
            of_v = of_v * _diagonal(self.moment)[..., None]
        return {
            "u": by_u.reshape(len(by_u), 1, self.h, -1),
            "s": self.by_s if self.by_s.dim() == 3 else _diagonal(self.by_s),
            "v": of_v,
        }

    def damped(self, damping: float) -> _Solver:
        """Their inverses, damping times their own diagonal added."""

        def inverse(blocks: Tensor) -> Tensor:
            return torch.cholesky_inverse(cholesky(blocks + torch.diag_embed(damping * _diagonal(blocks)), 1e-9))

        moment = None if self.moment is None else inverse(self.moment)
        if self.by_s.dim() == 3:
            by_s = 1 / (self.by_s * (1 + damping) + 1e-9 * self.by_s.mean() + torch.finfo(self.by_s.dtype).tiny)
        else:
            by_s = inverse(self.by_s)
        return _Solver(inverse(self.by_u), by_s, inverse(self.by_v), moment, self.h)


def _diagonal(blocks: Tensor) -> Tensor:
    return blocks.diagonal(dim1=-2, dim2=-1)


@dataclass(frozen=True)
class _Solver:
    """Inverses of damped blocks: products with them are much faster than solves with their factors."""

    by_u: Tensor
    by_s: Tensor
    by_v: Tensor
    moment: Tensor | None
    h: int

    def __call__(self, d: Tensors) -> Tensors:
        u, s, v = d["u"], d["s"], d["v"]
        v = v @ self.by_v
        return {
            "u": (u.reshape(len(u), -1, self.h * u.shape[2]) @ self.by_u).reshape(u.shape),
            "s": self.by_s * s if self.by_s.dim() == 3 else (self.by_s * s[..., None, :]).sum(-1),
            "v": v if self.moment is None else self.moment @ v,
        }


class _GroupPart:
    """The group part as a function of its stored tensors, with derivatives; scalar preconditioner."""

    def __init__(self, form: Form, arranged: Metric) -> None:
        structure = form.structure
        self.form, self.metric = form, arranged
        self.structure = replace(structure, lowrank=0, split=False, grid=None)
        self.names = tuple(self.structure.shapes(form.shape))

    def value(self, x: Tensors) -> Tensor:
        return self.form.arrange(expand({name: x[name] for name in self.names}, self.structure, self.form.shape))

    def jvp(self, x: Tensors, d: Tensors) -> Tensor:
        """Linear in the kernel, bilinear in gates and filters; torch's forward mode warns of itself."""
        if "gates" not in self.names:
            return self.value(d)
        by_filters = {"kernel": torch.zeros_like(x["kernel"]), "gates": x["gates"], "filters": d["filters"]}
        return self.value({**d, "filters": x["filters"]}) + self.value(by_filters)

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
        self.form = Form(structure, tuple(weight.shape))
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
    effort: float = 3e11,
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
