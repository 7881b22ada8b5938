"""The product of a frozen linear layer with few inputs, where all that is the same at every call is looked up once.

With a single input, finding out what is to be done takes as long as doing it. So what the layer keeps is bound to the
functions that use it, and a call only asks what may have changed since: the stored tensors, the kind of the input, and
the modes in which torch follows, counts or converts what is done. Where any of that is not as usual the call goes the
long way, that of `products.linear`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .factored import factor_linear
from .fewrows import ROWS, SPECTRUM, WAVES, Waves, few_rows
from .structure import Structure

Way = Callable[[Tensor, Tensor | None], Tensor]  # (N, columns), the bias -> (N, rows)


class Shortcut:
    """The product with what a frozen layer keeps, for the calls that it is meant for.

    A copy, and one that was pickled, knows nothing: it is outdated, so that the layer it belongs to makes it anew.
    """

    __slots__ = ("_columns", "_dtype", "_marks", "_most", "_way")

    def __init__(
        self,
        stored: Mapping[str, Tensor] | None = None,  # the parts of the weight
        ready: Mapping[str, Tensor] | None = None,  # what `products.keep` makes of them
        structure: Structure | None = None,
        columns: int = 0,  # of the weight
    ) -> None:
        self._marks: tuple[tuple[str, Tensor, int, int | None], ...] | None = None
        if stored is None or ready is None or structure is None:
            return
        self._marks = tuple(
            (name, part, part.data_ptr(), None if part.is_inference() else part._version)
            for name, part in stored.items()
        )
        self._columns, self._dtype = (columns,), next(iter(stored.values())).dtype
        self._way, most = _way(ready, structure, columns)
        self._most = most * columns

    def is_outdated(self, parameters: Mapping[str, Tensor | None]) -> bool:
        """Whether the parameters of the layer hold another tensor than those it was made of, or other values."""
        if self._marks is None:
            return True
        for name, part, pointer, version in self._marks:
            if parameters.get(name) is not part or part.data_ptr() != pointer:
                return True
            if version is not None and part._version != version:
                return True
        return False

    def product(
        self,
        given: Tensor,  # (*batch, columns)
        bias: Tensor | None,  # (rows,)
    ) -> Tensor | None:  # (*batch, rows)
        """x Wᵀ + b where the inputs are few and plain and nothing follows, counts or converts; None elsewhere."""
        if type(given) is not Tensor or given.dtype is not self._dtype or not given.is_cpu:
            return None
        if given.layout is not torch.strided or given.is_nested or not 0 < given.numel() <= self._most:
            return None
        shape = given.shape
        if shape[-1:] != self._columns:  # left to what refuses it
            return None
        if torch.is_autocast_enabled("cpu") or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
            return None
        if len(shape) == 2:
            return self._way(given, bias)
        return self._way(given.reshape(-1, *self._columns), bias).view(*shape[:-1], -1)

    def __reduce__(self) -> tuple[Any, ...]:
        return Shortcut, ()


def _way(ready: Mapping[str, Tensor], structure: Structure, columns: int) -> tuple[Way, int]:
    """What computes the product, and for how many inputs at most: none where matrix products are the better way."""
    factors = partial(_factors, ready=ready, structure=structure)
    if structure.group is None:
        return factors, sys.maxsize
    way: Way
    if WAVES in ready:
        way = waves = Waves(ready, columns)
        most = waves.most
    elif SPECTRUM in ready:
        way, most = partial(_few, ready=ready), ROWS
    else:
        return factors, 0
    return (partial(_sum, way=way, factors=factors) if "left" in ready else way), most


def _few(rows: Tensor, bias: Tensor | None, *, ready: Mapping[str, Tensor]) -> Tensor:
    return few_rows(rows, ready, bias)


def _factors(rows: Tensor, bias: Tensor | None, *, ready: Mapping[str, Tensor], structure: Structure) -> Tensor:
    found = factor_linear(rows, ready, structure)
    return found if bias is None else found + bias.to(found.dtype)


def _sum(rows: Tensor, bias: Tensor | None, *, way: Way, factors: Way) -> Tensor:
    return way(rows, bias) + factors(rows, None)
