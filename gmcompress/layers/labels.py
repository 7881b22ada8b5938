"""The table of orbit labels that structured layers read, one tensor for all layers of equal structure on a device."""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..structure import Structure

_TABLES: WeakValueDictionary[tuple[object, ...], Tensor] = WeakValueDictionary()  # those that some layer holds


def label_table(structure: Structure, device: torch.device | str | None = None) -> Tensor:  # (|X|, points), int32
    """`structure.labels` on a device (torch's default where None): the same tensor at every call, not to be written to.

    Residuals play no part. Where torch makes other tensors than its own, as fake ones while it traces, none is shared.

    >>> one, other = (label_table(Structure.parse(text)) for text in ("C4", "C4+displacement:1"))
    >>> one is other
    True
    """
    with torch.inference_mode(False):  # such tensors can be used outside of it as well
        like = torch.empty(0, dtype=torch.int32, device=device)
        key = (structure.group, structure.rows, structure.columns, structure.taps, like.device)
        shared = type(like) is Tensor
        table = _TABLES.get(key) if shared else None
        if table is None:
            table = torch.tensor(structure.labels, dtype=torch.int32, device=like.device)
        if shared:
            _TABLES[key] = table
        return table
