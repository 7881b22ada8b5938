"""The structured weight of a module of any other kind."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..groups import Group
from ..kinds import View
from ..structure import Structure
from .base import GMLayer, kept_random


class GMWeight(GMLayer):
    """The structured weight of any other module, called without arguments for the dense parameter that it stands for.

    `shape` is that of the parameter, `layout` has a letter for each of its axes as in `gmcompress.register`, `groups`
    are convolution groups, `zero_row` is one that stays zero in the parameter, as that of an embedding's padding does.
    `.weight` is the matrix, (rows, columns, *taps). It is attached to its module, which goes on as before, by
    `gmcompress.attaching`.

    Raises:
        GMError: the matrix has not the shape that the structure needs.

    >>> weight = GMWeight((8, 16), "C4", layout="io")
    >>> weight
    GMWeight((8, 16), 'C4', layout='io')
    >>> weight().shape, weight.weight.shape
    (torch.Size([8, 16]), torch.Size([16, 8]))
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        structure: Structure | Group | str,
        *,
        layout: str = "oi",
        groups: int = 1,
        zero_row: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self_view = View(layout, tuple(shape), groups)
        super().__init__(Structure.parse(structure), self_view.matrix_shape, bias=False, device=device, dtype=dtype)
        self.view = self_view
        self._twin_of: tuple[GMWeight, ...] = ()  # in a tuple, so that it is no child
        self.zero_row: Tensor | None
        self.register_buffer("zero_row", None if zero_row is None else torch.tensor(zero_row, device=device))

    def __repr__(self) -> str:
        options = f", layout={self.view.letters!r}" if self.view.letters != "oi" else ""
        options += f", groups={self.view.groups}" if self.view.groups > 1 else ""
        return f"GMWeight({self.view.shape}, {str(self.structure)!r}{options})"

    def forward(self) -> Tensor:
        """The dense parameter, computed at every call."""
        original = self.original
        return self._dense() if original is None else original()  # which may keep it

    @property
    def original(self) -> GMWeight | None:
        """The one whose twin this is, as long as both have the same stored tensors."""
        for each in self._twin_of:
            if self.same_as(each):
                return each
        return None

    def twin(self) -> GMWeight:
        """A structured weight with the same stored tensors, for one more module that holds the parameter.

        Were one module the child of two, `torch.func.functional_call` would leave the tensors of its call in it.
        """
        made = copy.copy(self)
        vars(made).update({name: each.copy() for name, each in vars(made).items() if isinstance(each, dict)})
        made._twin_of = (self,)
        return made

    def same_as(self, other: GMWeight) -> bool:
        """Whether both have the same stored tensors."""
        for name in self.PARTS:  # in words that a compiler follows
            if name not in self._parameters or self._parameters[name] is not other._parameters.get(name):
                return False
        return True

    @property
    def identity(self) -> tuple[int, ...]:
        """What tells weights with other stored tensors from this one and its twins."""
        return (id(self),) if self.computes_a_part else tuple(map(id, self._stored()))

    def _computed(self) -> Tensor:
        found = self.view.parameter(self._expanded())
        if self.zero_row is None:
            return found
        return found.masked_fill(torch.arange(len(found), device=found.device)[:, None] == self.zero_row, 0)

    def why_slow(self) -> str | None:
        """Why there is no fast product: the one that uses the weight is not of this package."""
        return f"the weight of another module is computed for it, in {self.view.letters!r} order"

    @classmethod
    @torch.no_grad()
    def like(
        cls, parameter: Tensor, view: View, structure: Structure | Group | str, *, zero_row: int | None = None
    ) -> GMWeight:
        """An empty structured weight with the device, dtype and frozen flag of a parameter."""
        options: dict[str, Any] = {"layout": view.letters, "groups": view.groups, "zero_row": zero_row}
        options |= {"device": parameter.device, "dtype": parameter.dtype}
        with kept_random(parameter):
            made = cls(view.shape, structure, **options)
        return made.requires_grad_(parameter.requires_grad)
