"""One tensor of a file to the stored parts of its structure, by blocks of rows where these are independent."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import GMError
from ..kinds import View
from ..projection import project
from ..structure import Structure
from .source import Entry, opened

NUMBERS = 1 << 23  # in a block of rows; the fit holds a few copies of it in float64


def rows_at_once(structure: Structure, shape: tuple[int, ...]) -> int:
    """How many rows of a weight are fitted at once: as many output blocks as have `NUMBERS` numbers, at least one.

    Group matrices and their gates are fitted to each output block by itself; factors need the whole weight.

    >>> rows_at_once(Structure.parse("C32xC32+displacement:1"), (1 << 14, 4096))
    2048
    >>> rows_at_once(Structure.parse("C32xC32+lowrank:1"), (1 << 14, 4096))
    16384
    """
    if structure.lowrank:
        return shape[0]
    block = shape[0] // structure.blocks(shape)[0]
    return min(shape[0], block * max(1, NUMBERS // (block * prod(shape[1:]))))


def fit_entry(entry: Entry, view: View, structure: Structure) -> tuple[dict[str, Tensor], float]:
    """The stored tensors of the nearest weight of this structure, in the type of the tensor, and the relative error.

    The weight lies in the tensor as the view says, which for inputs × outputs is read by columns.

    Raises:
        GMError: naming the tensor: it holds NaN or infinity, or a rank exceeds what it can have.
    """
    shape = view.matrix_shape
    step = rows_at_once(structure, shape)
    parts: dict[str, list[Tensor]] = {}
    lost = whole = 0.0
    for start in range(0, shape[0], step):
        with opened(entry) as tensor:  # closed after each, so that the pages of the file are not held
            weight = _read(tensor, view.letters, start, min(start + step, shape[0]))
        try:
            fit = project(weight, structure)
        except GMError as problem:
            raise GMError(f"{entry.name} in {entry.file}: {problem}") from None
        energy = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
        lost, whole = lost + fit.relative_error**2 * (energy or 1.0), whole + energy
        for name, each in fit.tensors.items():
            parts.setdefault(name, []).append(each)
    # of a structure without factors the output blocks are the first axis of every part
    tensors = {name: each[0] if len(each) == 1 else torch.cat(each) for name, each in parts.items()}
    return tensors, (lost / (whole or 1.0)) ** 0.5


def _read(tensor: Any, letters: str, start: int, stop: int) -> Tensor:
    """Some rows of the matrix."""
    if letters[0] == "o":
        return tensor[start:stop].clone()
    piece = tensor[:, start:stop]
    return View(letters, tuple(piece.shape)).matrix(piece).contiguous().clone()
