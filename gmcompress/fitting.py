"""Fit a structured weight to a quadratic loss: L-BFGS, preconditioned by the Gauss–Newton blocks of the factors.

The loss of an error E = Ŵ − W is tr(G E S Eᵀ): S is the second moment of the layer's inputs, G that of the gradients at
its outputs; without them it is the Frobenius norm. A factor part U_p diag(s_pq) V_qᵀ is stiff, with long flat valleys:
alternating least squares crawls, first-order methods do not arrive, and Gauss–Newton steps pay for a linear solve each.
The exact blocks of the Gauss–Newton matrix as the initial Hessian take the stiffness out, the memory of L-BFGS follows
the valleys, and a step costs one product with the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor
from torch.func import vjp

from .factors import Form, InputMoments, Metric, Tensors
from .linalg import cholesky
from .structure import Structure, expand

COUPLED = 48  # rank up to which the preconditioner couples the scales of a block; above it their diagonal is enough
OVERHEAD = 2e7  # multiply-adds that could be done while a small product is set up
MEMORY, LEAST_MEMORY = 30, 6  # steps that L-BFGS remembers, fewer where they are more numbers than the next line says:
MEMORY_NUMBERS = 1_000_000  # what leaves the cache takes longer than the few more steps that it saves
REFRESH = 20  # steps after which the preconditioner is computed anew, and convergence is judged
REFRESHES = 4  # of the exact preconditioner that the effort must allow, else a coarser one is used
DAMPING = 0.1  # of the diagonal of the preconditioner's blocks, added to it
SUFFICIENT = 1e-4  # of the decrease that the slope promises: what a step must bring (Armijo)
USUAL = 2.0**20  # the largest entry of a weight or moment, and its inverse, beyond which products leave float32
LINEAR = ("kernel", "filters", "left")  # the stored tensors that scale with the weight
RETRIES = 12  # shorter steps tried before the direction is given up


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

    def vjp(self, x: Tensors, error: Tensor) -> Tensors:  # error (o, h, i, w)
        u, s, v = x["u"], x["s"], x["v"]
        error = error.reshape(len(u), u.shape[1], -1)
        inner = (u.mT @ error).reshape(len(u), -1, len(v), v.shape[1])  # (P, r, Q, b)
        by_scale = torch.einsum("prqb,qbr->pqr", inner, v)
        return {"u": error @ self._right(s, v).mT, "s": by_scale, "v": torch.einsum("prqb,pqr->qbr", inner, s)}

    def preconditioner(self, x: Tensors, *, coarse: bool) -> _Blocks:
        """The diagonal blocks of JᵀMJ: of s and V with the moment averaged over the vertical taps, of U if `coarse`."""
        u, s, v = x["u"], x["s"], x["v"]
        m = self.moments
        right, h = self._right(s, v), 1 if coarse else self.form.sizes[1]
        if m.full is None or m.blocks is None or m.columns is None:
            by_u, h = right @ right.mT, 1  # for each vertical tap alike
            vsv = v.mT @ v
        else:
            if h == 1:
                by_u = right @ m.columns @ right.mT
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
    """Blocks of the Gauss–Newton matrix: of U (P, h·r, h·r), of s (P, Q, r, r) or its diagonal, of V as A_q ⊗ S_q.

    h is 1 where those of U are the same for every vertical tap.
    """

    by_u: Tensor
    by_s: Tensor
    by_v: Tensor  # (Q, r, r)
    moment: Tensor | None  # (Q, b, b)
    h: int

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
            probe = torch.randn(x[name].shape, generator=generator, dtype=torch.float64, device="cpu").to(x[name])
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

    def refresh_cost(self, *, coarse: bool) -> float:
        """Multiply-adds of a new preconditioner, about: the products and inverses of its blocks."""
        (_, h, i, w), rank, (p, q) = self.form.sizes, self.form.structure.lowrank, self.form.grid
        h = 1 if coarse else h
        moved = 0 if self.metric.inputs is None else p * rank * (h * i * w) ** 2
        pairs = p * q * rank**3 if 0 < rank <= COUPLED else 0
        return float(moved + p * (h * rank) ** 2 * i * w + 3 * (p * (h * rank) ** 3 + q * rank**3 + pairs))

    def vjp(self, x: Tensors, error: Tensor) -> Tensors:
        return {name: each for part in self.parts for name, each in part.vjp(x, error).items()}

    def preconditioner(self, x: Tensors, *, coarse: bool) -> Callable[[Tensors], Tensors]:
        """The inverse of the damped Gauss–Newton blocks at x, as a function."""
        solver = self.factors.preconditioner(x, coarse=coarse).damped(DAMPING) if self.factors else None
        sizes = self.group.curvature(x) if self.group else {}

        def solve(r: Tensors) -> Tensors:
            z = {name: r[name] / size for name, size in sizes.items()}
            return z | solver(r) if solver else z

        return solve


class _Flat:
    """The same problem as a function of one vector, which holds all tensors one after another."""

    def __init__(self, problem: _Problem, start: Tensors) -> None:
        self.problem, self.shapes = problem, {name: each.shape for name, each in start.items()}
        self.sizes = [each.numel() for each in start.values()]

    def join(self, x: Tensors) -> Tensor:  # -> (n,)
        return torch.cat([x[name].reshape(-1) for name in self.shapes])

    def apart(self, vector: Tensor) -> Tensors:
        pieces = vector.split(self.sizes)
        return {name: each.view(shape) for (name, shape), each in zip(self.shapes.items(), pieces, strict=True)}

    def slope(self, vector: Tensor) -> tuple[float, Tensor]:
        """The loss, and half of its gradient."""
        x = self.apart(vector)
        error = self.problem.error(x)
        weighed = self.problem.weigh(error)
        return float((error * weighed).sum()), self.join(self.problem.vjp(x, weighed))

    def preconditioner(self, vector: Tensor, *, coarse: bool) -> Callable[[Tensor], Tensor]:
        solve = self.problem.preconditioner(self.apart(vector), coarse=coarse)
        return lambda r: self.join(solve(self.apart(r)))


def _remembered(size: int) -> int:
    """How many steps are remembered where each is so many numbers."""
    return max(LEAST_MEMORY, min(MEMORY, MEMORY_NUMBERS // max(1, size)))


class _Memory:
    """The last steps s and the changes y of the gradient along them, as rows, and the products s_i·y_j.

    The two loops of L-BFGS are two triangular systems in these products, so that a direction takes four products with
    the rows and not a chain of small ones.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        most = _remembered(size)
        self.steps, self.changes = like.new_zeros(most, size), like.new_zeros(most, size)
        self.products = torch.zeros(most, most, dtype=torch.float64, device=like.device)
        self.order: list[int] = []  # rows in use, oldest first

    def forget(self) -> None:
        self.order.clear()

    def note(self, step: Tensor, change: Tensor) -> None:
        """Remember a step, if the curvature along it is positive beyond rounding."""
        if float(step @ change) > 1e-10 * float(step.norm() * change.norm()):
            row = self.order.pop(0) if len(self.order) == len(self.steps) else len(self.order)
            self.order.append(row)
            self.steps[row], self.changes[row] = step, change
            self.products[row], self.products[:, row] = self.changes @ step, self.steps @ change

    def direction(self, gradient: Tensor, precondition: Callable[[Tensor], Tensor]) -> Tensor:
        """Downhill, as far as the quadratic model says."""
        order = self.order
        if not order:
            return -precondition(gradient)
        steps, changes = self.steps[: len(order)], self.changes[: len(order)]
        products = self.products[order][:, order]
        upper = products.triu()  # the first loop: a_i s_i·y_i + Σ_{j>i} a_j s_i·y_j = s_i·g
        first = torch.linalg.solve_triangular(upper, (steps @ gradient).double()[order, None], upper=True)[:, 0]
        rest = gradient - changes.mT @ self._by_row(first).to(gradient)
        last = self.changes[order[-1]]
        scale = float(products[-1, -1]) / max(float(last @ precondition(last)), torch.finfo(torch.float32).tiny)
        found = scale * precondition(rest)
        # the second loop adds Σ c_i s_i, where c_i s_i·y_i + Σ_{j<i} c_j s_j·y_i = a_i s_i·y_i − y_i·z
        wanted = first * products.diagonal() - (changes @ found).double()[order]
        second = torch.linalg.solve_triangular(upper.mT, wanted[:, None], upper=False)[:, 0]
        return -(found + steps.mT @ self._by_row(second).to(found))

    def _by_row(self, ordered: Tensor) -> Tensor:
        found = torch.empty_like(ordered)
        found[self.order] = ordered
        return found


def refine(
    weight: Tensor,  # (rows, columns, *taps)
    structure: Structure,
    tensors: Mapping[str, Tensor],  # the start, as named and shaped by Structure.shapes
    *,
    metric: Metric | None = None,
    iterations: int = 1000,
    tolerance: float = 1e-3,
    effort: float = 3e11,
) -> Tensors:
    """The stored tensors after steps of preconditioned L-BFGS from a start; the loss never grows.

    Stops after `iterations` steps, when 20 steps together lower the loss by less than `tolerance` × itself, when
    nothing is left of it, or after about `effort` multiply-adds. Works in the dtype of the weight.

    Source: Liu and Nocedal 1989 for L-BFGS; Byrd, Nocedal and Schnabel 1994 for its matrices; Nocedal and Wright,
    Numerical Optimization, 2006, algorithm 3.1.
    """
    size, metric = _size(weight), metric or Metric()
    weight, tensors = weight / size, {k: v / size if k in LINEAR else v for k, v in tensors.items()}
    moments = (None if each is None else each / _size(each) for each in (metric.inputs, metric.outputs))
    problem = _Problem(weight, structure, Metric(*moments))
    start = problem.balance(problem.load(tensors))
    flat = _Flat(problem, start)
    x = flat.join(start)
    memory, (loss, gradient) = _Memory(len(x), x), flat.slope(x)
    floor = torch.finfo(weight.dtype).eps ** 2 * float((problem.target * problem.weigh(problem.target)).sum())
    product = step_cost(structure, problem.form.shape, problem.metric)
    coarse = problem.refresh_cost(coarse=False) > effort / REFRESHES
    left, refreshed, judged = effort / product, problem.refresh_cost(coarse=coarse) / product, math.inf
    for number in range(iterations):
        if loss <= floor or left <= 0:
            break
        if number % REFRESH == 0:
            if loss > (1 - tolerance) * judged:
                break
            judged, precondition = loss, flat.preconditioner(x, coarse=coarse)
            left -= refreshed
        direction = memory.direction(gradient, precondition)
        if memory.order and not float(gradient @ direction) < 0:
            memory.forget()
            direction = memory.direction(gradient, precondition)
        step, lower, slope, tried = _search(flat, x, direction, loss, 2 * float(gradient @ direction))
        left -= tried
        if slope is not None:
            memory.note(step, slope - gradient)
            x, loss, gradient = x + step, lower, slope
        elif memory.order:
            memory.forget()
        else:
            break
    return {k: v * size if k in LINEAR else v for k, v in problem.store(flat.apart(x)).items()}


def step_cost(structure: Structure, shape: Sequence[int], metric: Metric) -> float:
    """Multiply-adds of one step of `refine`, about, and OVERHEAD."""
    stored = structure.parameters(shape)
    remembered = 4 * _remembered(stored) * stored
    moments = sum(each.shape[-1] for each in (metric.inputs, metric.outputs) if each is not None)
    return float(prod(shape) * (6 * structure.lowrank + moments + 8) + remembered) + OVERHEAD


def _size(tensor: Tensor) -> float:
    """What to divide it by so that its squares are far from the ends of its dtype: 1 for most, a power of two else."""
    largest = float(tensor.abs().max())
    usual = largest == 0 or 1 / USUAL < largest < USUAL or not math.isfinite(largest)
    return 1.0 if usual else 2.0 ** math.frexp(largest)[1]


def _search(
    flat: _Flat, x: Tensor, direction: Tensor, loss: float, slope: float
) -> tuple[Tensor, float, Tensor | None, int]:
    """A step along a direction that lowers the loss enough; with it the loss, half of the gradient, and the tries.

    The gradient is None where no step does.
    """
    length = 1.0
    for tried in range(1, RETRIES + 1):
        step = length * direction
        lower, gradient = flat.slope(x + step)
        if lower <= loss + SUFFICIENT * length * slope and lower < loss:
            return step, lower, gradient, tried
        beyond = lower - loss - length * slope  # what the parabola through both points bends by
        best = -slope * length**2 / (2 * beyond) if math.isfinite(beyond) and beyond > 0 else 0.0
        length = min(max(best, 0.1 * length), 0.5 * length)
    return step, loss, None, RETRIES
