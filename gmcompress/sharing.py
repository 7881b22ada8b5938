"""Tensors that follow from a description and are never written to: one for all who ask, on each device.

And modules that hold such tensors: what copies, moves and pickles of them go through leaves the tensors shared.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

_TENSORS: WeakValueDictionary[tuple[Hashable, ...], Tensor] = WeakValueDictionary()  # those that somebody holds


def shared_tensor(
    key: tuple[Hashable, ...],  # tells what it is
    make: Callable[[], Any],
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Tensor:
    """What `make` returns as a tensor on a device (torch's default where None): the same one at every call.

    It lives as long as somebody holds it. Where torch makes other tensors than its own, as fake ones while it traces,
    none is shared.

    >>> one, other = (shared_tensor(("squares", 3), lambda: [0, 1, 4], dtype=torch.int64) for _ in range(2))
    >>> one is other
    True
    """
    with torch.inference_mode(False):  # such tensors can be used outside of it as well
        like = torch.empty(0, dtype=dtype, device=device)
        place = (*key, dtype, like.device)
        shared = type(like) is Tensor
        found = _TENSORS.get(place) if shared else None
        if found is None:
            found = torch.tensor(make(), dtype=dtype, device=like.device)
        if shared:
            _TENSORS[place] = found
        return found


class SharingModule(nn.Module):
    """A module some of whose buffers are shared tensors, in its copies too: never stored, and made anew where it is."""

    SHARED: ClassVar[tuple[str, ...]]  # the names of these buffers

    def share_(self) -> None:
        """Take the shared tensors of the device on which the stored ones are."""
        raise NotImplementedError

    def _unshared_buffers(self) -> dict[str, Tensor | None]:
        return {name: None if name in self.SHARED else each for name, each in self._buffers.items()}

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles are made of: everything but the shared tensors."""
        return vars(self) | {"_buffers": self._unshared_buffers()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy shares them with its original."""
        super().__setstate__(state)
        self.share_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `.to` and `.cuda` go through, which would give every module tensors of its own."""
        self._buffers = self._unshared_buffers()
        super()._apply(fn, recurse)
        self.share_()
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        """With assign=True the stored tensors may now be on another device."""
        super()._load_from_state_dict(*args, **options)
        self.share_()
