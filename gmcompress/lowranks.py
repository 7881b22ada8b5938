"""All low ranks of one weight at once: the leading parts of one factorisation, and what each number of them loses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import Form, Metric, Tensors, start_factors
from .structure import Structure, expand


@dataclass(frozen=True)
class LowRanks:
    """The low ranks up to the largest of a weight in one view; `losses`, (rank + 1,), are tr(G E S Eᵀ) of each.

    Every one is the best for its rank in the view rows × columns·taps, where the convolution has one group.
    """

    tensors: Tensors
    losses: Tensor

    @property
    def largest(self) -> int:
        return len(self.losses) - 1

    def leading(self, rank: int) -> Tensors:
        """The tensors of a lower rank."""
        return leading(self.tensors, rank)

    def as_adapted(self, structure: Structure) -> Tensors:
        """The low rank of an adapted structure's rank as one of that structure: all scales are 1."""
        assert structure.grid is not None, "adapted bases have blocks"
        left = self.tensors["left"]
        return {**self.leading(structure.lowrank), "scales": left.new_ones(*structure.grid, structure.lowrank)}


def leading(tensors: Tensors, rank: int) -> Tensors:
    """The part of a low rank's tensors that is a lower one."""
    return {"left": tensors["left"][..., :rank], "right": tensors["right"][:rank]}


def low_ranks(weight: Tensor, metric: Metric, rank: int, *, split: bool) -> LowRanks:
    """The low ranks of a weight up to this one.

    Components c_1, c_2 … left out of the largest, with the error E, lose ‖E − Σ c_k‖² = ‖E‖² − 2 Σ ⟨E, c_k⟩ +
    Σ ⟨c_j, c_k⟩ in the norm of the metric: products of the factors alone, and sums in which nothing cancels.
    """
    structure = Structure.factors(rank, split=split)
    tensors = start_factors(weight, structure, metric)
    form, shape = Form(structure, tuple(weight.shape)), tuple(weight.shape)
    arranged = form.arrange_metric(metric)
    (u,), _, (v,) = form.load(tensors)  # (o·h, r), (i·w, r)
    error = form.arrange(expand(tensors, structure, shape) - weight)  # (o, h, i, w)
    weighed = arranged.apply(error.flatten(1))
    by_component = (u * (weighed.reshape(len(u), -1) @ v)).sum(0).double()
    left_out = _after(by_component[:, None])[:, 0]
    among = _after(_after(_products(u, v, form, arranged).double()).mT).diagonal()
    least = float((error.flatten(1) * weighed).sum(dtype=torch.float64))
    return LowRanks(tensors, (least - 2 * left_out + among).clamp_min(0))


def _after(terms: Tensor) -> Tensor:  # (r, n) -> (r + 1, n)
    """The sums over all terms from each place on, the last of none."""
    sums = terms.flip(0).cumsum(0).flip(0)
    return torch.cat([sums, torch.zeros_like(sums[:1])])


def _products(u: Tensor, v: Tensor, form: Form, arranged: Metric) -> Tensor:  # (r, r)
    """⟨c_j, c_k⟩ in the norm of the metric, for the components c_k = u_k v_kᵀ: sums over pairs of vertical taps."""
    h, width = form.sizes[1], len(v)
    groups = 1 if arranged.inputs is None else len(arranged.inputs)
    rows = u.reshape(groups, -1, h, u.shape[1])  # (g, o/g, h, r)
    given = rows
    if arranged.outputs is not None:
        size = rows.shape[1]
        outputs = arranged.outputs.reshape(groups, size, groups, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        given = (outputs @ rows.flatten(2)).reshape(rows.shape)
    found = u.new_zeros(u.shape[1], u.shape[1])
    for one in range(h):
        for other in range(one, h):
            left = rows[:, :, one].mT @ given[:, :, other]
            if arranged.inputs is not None:
                inputs = arranged.inputs.reshape(groups, h, width, h, width)[:, one, :, other]
                both = (left * (v.mT @ (inputs @ v))).sum(0)
            elif one == other:
                both = left[0] * (v.mT @ v)
            else:
                continue
            found += both if one == other else both + both.mT
    return found
