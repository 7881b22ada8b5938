"""The table of orbit labels that structured layers read, one tensor for all layers of equal structure on a device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sharing import shared_tensor
from ..structure import Structure


def label_table(structure: Structure, device: torch.device | str | None = None) -> Tensor:  # (|X|, points), int32
    """`structure.labels` on a device (torch's default where None): the same tensor at every call, not to be written to.

    Residuals play no part.

    >>> one, other = (label_table(Structure.parse(text)) for text in ("C4", "C4+displacement:1"))
    >>> one is other
    True
    """
    key = (structure.group, structure.rows, structure.columns, structure.taps)
    return shared_tensor(key, lambda: structure.labels, dtype=torch.int32, device=device)
