"""Tensors that follow from a description and are never written to: one for all who ask, on each device."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

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
