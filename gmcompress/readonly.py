"""Tensors computed anew at every read, into which nothing can be written: it would be lost without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # one inside of vmap has no memory to compare

from .errors import GMError

REMEDY = "gmcompress.densify(model, [its name]) puts a plain parameter in its place first"
ABOUT_OTHERS = ("requires_grad_", "share_memory_", "rename_")  # than the values
VIEWS = (  # methods that may hand out the same memory
    *("__getitem__", "__iter__", "as_strided", "chunk", "diagonal", "expand", "expand_as", "flatten", "movedim"),
    *("moveaxis", "narrow", "permute", "ravel", "reshape", "reshape_as", "select", "split", "squeeze", "swapaxes"),
    *("swapdims", "t", "tensor_split", "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as"),
)
OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "div", "mod", "pow", "and", "or", "xor", "lshift", "rshift")


class ReadOnly(Tensor):
    """A computed tensor as it is handed out: a plain one to every operation, but for those that write into it.

    Those of its own methods are refused, and so are they of what its methods hand out of the same memory: its `.data`,
    its `.detach()`, its rows and other views. What is made of it, as by `nn.Parameter`, copies and pickles, is its
    owner's to write to. Functions are not watched: `torch.add(a, b, out=weight)` writes, and is lost.
    """

    # as Parameter has: results are plain, and calls no slower
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    maker: object  # what computes it; None of a view, which is another weight

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
    def grad(self) -> Tensor | None:
        """None, for it is no leaf of a graph."""
        return super().grad

    @grad.setter
    def grad(self, values: Tensor | None) -> None:
        if values is not None:
            raise GMError(
                "the weight of a structured layer is computed at every read, so a gradient set on it would be lost; "
                f"let autograd find it, or {REMEDY}"
            )

    @property
    def T(self) -> Tensor:  # type: ignore[override]  # noqa: N802
        """The axes in reverse order."""
        return self.permute(*reversed(range(self.dim())))

    @property
    def mT(self) -> Tensor:  # type: ignore[override]  # noqa: N802
        """The last two axes exchanged."""
        return self.transpose(-2, -1)

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


def _viewing(name: str) -> Callable[..., Any]:
    def view(computed: ReadOnly, *arguments: Any, **options: Any) -> Any:
        return _shared(getattr(super(ReadOnly, computed), name)(*arguments, **options), computed)

    return view


def _shared(found: Any, computed: Any) -> Any:
    """What a method has given, as little to be written to where it lies in the memory of the computed tensor."""
    if torch.compiler.is_compiling():
        return found
    if isinstance(found, tuple | list):
        return type(found)(_shared(each, computed) for each in found)
    if not isinstance(found, Tensor):  # an iterator
        return (_shared(each, computed) for each in found)
    if type(found) is not Tensor or is_functorch_wrapped_tensor(found):
        return found
    same = found.untyped_storage()._cdata == computed.untyped_storage()._cdata
    return _marked(found, None) if same else found


for _name in VIEWS:
    setattr(ReadOnly, _name, _viewing(_name))
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


def check_registered(name: str, value: object) -> None:
    """Refuse a computed tensor as a parameter of another name, which pruning makes of what it is to compute itself.

    Raises:
        GMError: it is computed, and no parameter.
    """
    if isinstance(value, ReadOnly):
        raise GMError(
            f"the weight of a structured layer is computed and cannot become the parameter {name!r}, as pruning "
            f"needs it; prune the stored tensors by their names, or else {REMEDY}"
        )
