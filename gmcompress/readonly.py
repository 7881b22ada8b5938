"""Tensors computed anew at every read, into which nothing can be written: it would be lost without a word."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .errors import GMError

REMEDY = "gmcompress.densify(model, [its name]) puts a plain parameter in its place first"
ABOUT_OTHERS = ("requires_grad_", "share_memory_", "rename_")  # than the values
OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "div", "mod", "pow", "and", "or", "xor", "lshift", "rshift")


class ReadOnly(Tensor):
    """A computed tensor as it is handed out: a plain one to every operation, but for those that write into it.

    Those of its own methods are refused, and so are they of its `.data` and `.detach()`, which share its memory; views
    are plain tensors. What is made of it, as by `nn.Parameter`, copies and pickles, is its owner's to write to.
    """

    # as Parameter has: results are plain, and calls no slower
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    maker: object  # what computes it

    def detach(self) -> Tensor:
        """The same memory without a graph, as little to be written to."""
        return _marked(super().detach(), self.maker)

    @property
    def data(self) -> Tensor:
        """The same as `detach()`."""
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        _refuse(self, values)

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, _value: bool) -> None:
        self.__class__ = nn.Parameter  # type: ignore[assignment] # what nn.Parameter says of one that it has just made of this

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_subclass(Tensor).__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _refuse(_computed: Tensor, *_values: Any, **_options: Any) -> NoReturn:
    raise GMError(
        "the weight of a structured layer is computed at every read, so what is written into it would be lost; "
        f"{REMEDY}, and a .clone() of it may be written to"
    )


for _name in (each for each in dir(Tensor) if each.endswith("_") and not each.startswith("_")):
    if _name not in ABOUT_OTHERS:
        setattr(ReadOnly, _name, _refuse)
for _name in ("__setitem__", *(f"__i{each}__" for each in OPERATORS)):
    setattr(ReadOnly, _name, _refuse)


def read_only(computed: Tensor, maker: object) -> Tensor:
    """The computed tensor as it is handed out. A compiler, which writes into no weight, gets it as it is.

    >>> import torch
    >>> weight = read_only(torch.ones(2), "a layer")
    >>> (2 * weight).add_(1).tolist()
    [3.0, 3.0]
    >>> weight.add_(1)
    Traceback (most recent call last):
    gmcompress.errors.GMError: the weight of a structured layer is computed at every read, so what is written into it \
would be lost; gmcompress.densify(model, [its name]) puts a plain parameter in its place first, and a .clone() of it \
may be written to
    """
    if torch.compiler.is_compiling() or type(computed) is not Tensor:
        return computed
    return _marked(computed, maker)


def _marked(computed: Tensor, maker: object) -> Tensor:
    found = computed.as_subclass(ReadOnly)
    found.maker = maker
    return found


def check_assigned(value: object, maker: object) -> None:
    """Refuse to take another value for a computed tensor; its own is what tying tied weights again gives it.

    Raises:
        GMError: it is not what `maker` computed.
    """
    if not (isinstance(value, ReadOnly) and value.maker is maker):
        raise GMError(f"the weight of a structured layer is computed and cannot be assigned; {REMEDY}")
