"""Structured weights: the orbit labels of a group on rows × columns (× taps), and what follows from them.

A weight has shape (rows, columns, *taps), rows = o·|X| and columns = i·|Y|, for sets X and Y on which the group acts.
The o and i copies are block axes in front, so row p·|X| + x is point x of block p.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import GMError
from .groups import Group, GSet, gset
from .groups import group as parse_group
from .groups.group import Indices

MAX_STRING = 1 << 17  # characters; the longest group strings have half as many


@dataclass(frozen=True)
class Structure:
    """What a compressed weight looks like: a group matrix, plus residuals of low displacement rank and of low rank.

    Prints as, and parses from, one string: `group[rows,columns,taps]+displacement:r+lowrank:s`. The bracket is left out
    where the group acts on itself in rows and columns and leaves the taps alone; residuals of rank 0 are left out.
    `lowrank:s:split` is a low rank of a convolution's rows·ky × columns·kx, in place of rows × columns·taps.

    >>> str(Structure.parse("C8xC8+displacement:2"))
    'C8xC8+displacement:2'
    >>> Structure.parse("C4[G,G,grid3x3]").labels.max()
    np.int64(35)
    """

    group: Group
    rows: GSet
    columns: GSet
    taps: GSet | None = None  # None: the taps are carried along, each with its own group matrix
    displacement: int = 0
    lowrank: int = 0
    split: bool = False  # whether the vertical taps of the low-rank part go with the rows

    def __post_init__(self) -> None:
        for what in ("displacement", "lowrank"):
            rank = getattr(self, what)
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
                raise GMError(f"{what} rank must be an integer of at least 0, not {rank!r}")
        if self.split and not self.lowrank:
            raise GMError("only a low-rank residual can be split over the taps, and this structure has none")
        if self.displacement and not self.rows.is_regular:
            raise GMError(f"displacement rank is defined where the rows are the group itself, not {self.rows.name!r}")

    @classmethod
    def parse(cls, text: str | Group | Structure, *, rank: int = 0, residual: str = "displacement") -> Structure:
        """The structure that a string, or a group alone, stands for; `rank` adds a residual where the string has none.

        Raises:
            GMError: the string is malformed, or a rank is given twice.
        """
        if not isinstance(text, str | Group | Structure):
            raise GMError(f'a structure is given as a string such as "C4+displacement:1", not {type(text).__name__}')
        if isinstance(text, str) and len(text) > MAX_STRING:
            raise GMError(f"a structure string of {len(text)} characters is too long; at most {MAX_STRING}")
        found = text if isinstance(text, Structure) else _read(text)
        if rank == 0:
            return found
        if found.displacement or found.lowrank:
            raise GMError(f"{str(found)!r} already has a residual, so rank={rank} cannot be added to it")
        return found.with_rank(rank, residual=residual)

    @classmethod
    def regular(cls, group: Group, *, displacement: int = 0, lowrank: int = 0, split: bool = False) -> Structure:
        """The group acting on itself in rows and columns, the taps carried along."""
        points = gset(group, "G")
        return cls(group, points, points, None, displacement, lowrank, split)

    def with_rank(self, rank: int, *, residual: str, split: bool = False) -> Structure:
        """The same group matrices with a residual of this rank in place of the present ones.

        Raises:
            GMError: the residual is neither "displacement" nor "lowrank".
        """
        if residual not in ("displacement", "lowrank"):
            raise GMError(f'residual must be "displacement" or "lowrank", not {residual!r}')
        ranks = {"displacement": 0, "lowrank": 0, residual: rank}
        return Structure(self.group, self.rows, self.columns, self.taps, **ranks, split=split)

    def __str__(self) -> str:
        if not self.group.name:
            raise GMError(
                f"{self.group} has no name; build it from a string, so that its structure can be written down"
            )
        sets = [self.rows.name, self.columns.name] + ([self.taps.name] if self.taps else [])
        bracket = "" if sets == ["G", "G"] else f"[{','.join(sets)}]"
        ranks = [("displacement", self.displacement), ("lowrank", self.lowrank)]
        residuals = "".join(f"+{name}:{rank}" for name, rank in ranks if rank)
        return self.group.name + bracket + residuals + (":split" if self.split else "")

    def __repr__(self) -> str:
        return f"Structure.parse({str(self)!r})"

    @property
    def points(self) -> int:
        """Number of (column, tap) pairs on which the group acts: |Y|, or |Y|·taps where it acts on the taps."""
        return self.columns.size * (self.taps.size if self.taps else 1)

    @cached_property
    def _moved(self) -> Indices:  # (n, points): g·(y, t) as one index
        if self.taps is None:
            return self.columns.action
        both = self.columns.action[:, :, None] * self.taps.size + self.taps.action[:, None, :]
        return both.reshape(self.group.order, self.points)

    @cached_property
    def labels(self) -> Indices:  # (|X|, points)
        """The orbit of every (row, column, tap), numbered in the order of first appearance.

        Where the rows are the group itself, the orbit of (x, p) is x⁻¹·p.
        """
        if self.rows.is_regular:
            return self._moved[self.group.inverse]
        rows, points = self.rows.size, self.points
        smallest = np.arange(rows * points).reshape(rows, points)
        for element in range(self.group.order):
            moved = self.rows.action[element][:, None] * points + self._moved[element]
            smallest = np.minimum(smallest, moved)
        return np.unique(smallest, return_inverse=True)[1].reshape(rows, points).astype(np.int64)

    def __deepcopy__(self, memo: dict[int, object]) -> Structure:
        return self  # immutable, and its tables are large

    @cached_property
    def orbits(self) -> int:
        """Number of orbits: the parameters of one block (for each tap, where the taps are carried along)."""
        return self.points if self.rows.is_regular else int(self.labels.max()) + 1

    def blocks(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(o, i, carried): output and input multiplicity of a weight of this shape, and the number of carried taps.

        Raises:
            GMError: the shape does not fit: rows and columns must be multiples of the sizes of the sets.
        """
        if len(shape) < 2:
            raise GMError(f"a weight has shape (rows, columns, *taps), but this one has {tuple(shape)}")
        rows, columns, taps = shape[0], shape[1], prod(shape[2:])
        o, i = rows // self.rows.size, columns // self.columns.size
        if o * self.rows.size != rows or i * self.columns.size != columns or not rows or not columns:
            raise GMError(
                f"{self} needs rows divisible by {self.rows.size} and columns divisible by {self.columns.size}, "
                f"but the weight has shape {tuple(shape)}"
            )
        if self.taps is not None and self.taps.size != taps:
            raise GMError(f"{self} acts on {self.taps.size} taps, but the weight has shape {tuple(shape)}")
        return o, i, (1 if self.taps else taps)

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Name and shape of every stored tensor for a weight of the given shape."""
        o, i, _ = self.blocks(shape)
        inner = (i, self.orbits) if self.taps else (i, self.orbits, *shape[2:])
        found: dict[str, tuple[int, ...]] = {"kernel": (o, *inner)}
        if self.displacement:
            found["gates"] = (o, self.displacement, self.group.order)
            found["filters"] = (o, self.displacement, *inner)
        if self.lowrank and self.split:
            if len(shape) != 4:
                raise GMError(f"{self} splits the taps of a convolution, but the weight has shape {tuple(shape)}")
            found["left"] = (shape[0], shape[2], self.lowrank)
            found["right"] = (self.lowrank, shape[1], shape[3])
        elif self.lowrank:
            found["left"] = (shape[0], self.lowrank)
            found["right"] = (self.lowrank, *shape[1:])
        return found

    def parameters(self, shape: Sequence[int]) -> int:
        """Number of stored numbers for a weight of the given shape."""
        return sum(prod(each) for each in self.shapes(shape).values())


@lru_cache(maxsize=512)  # so that equal layers share one structure, and its labels
def _read(text: str | Group) -> Structure:
    """The structure that a string or a group stands for."""
    if isinstance(text, Group):
        return Structure.regular(text)
    head, *residuals = text.split("+")
    ranks: dict[str, Any] = {}
    for each in residuals:
        match = re.fullmatch(r"(displacement|lowrank):([0-9]{1,6})(:split)?", each.strip())
        if match is None or match[1] in ranks or (match[3] and match[1] != "lowrank"):
            known = '"displacement:2", "lowrank:2" and "lowrank:2:split" are'
            raise GMError(f"in {text[:80]!r}: {each[:40]!r} is no residual; {known}")
        ranks |= {match[1]: int(match[2])} | ({"split": True} if match[3] else {})
    # the bracket of sets comes last and holds a comma outside <...>; the action of a semidirect product does not
    match = re.fullmatch(r"(.*)\[([^\[\],<]+(?:<[^>]*>)?(?:,[^\[\],<]+(?:<[^>]*>)?)+)\]\s*", head)
    group = parse_group((match[1] if match else head).strip())
    if match is None:
        return Structure.regular(group, **ranks)
    names = [each.strip() for each in re.findall(r"[^,<]+(?:<[^>]*>)?", match[2])]
    if len(names) > 3:
        raise GMError(f"in {text[:80]!r}: a structure acts on rows, columns and taps, but {len(names)} sets are named")
    sets = [gset(group, each) for each in names]
    return Structure(group, *sets, **ranks)  # type: ignore[arg-type]


def as_structure(structure: Structure | Group | str) -> Structure:
    """A structure as it is; a group or a string as the structure it names."""
    return Structure.parse(structure)


def index_tensor(indices: Indices, like: Tensor) -> Tensor:
    """A copy of an (immutable) index array as an int64 tensor, on the device of `like`."""
    return torch.tensor(indices, dtype=torch.int64, device=like.device)


def check_weight(weight: Tensor) -> Tensor:
    """The weight in float64, detached.

    Raises:
        GMError: it is no tensor of real numbers, or holds NaN or infinity.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        what = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise GMError(f"a weight is a tensor of real numbers, not {what}")
    place = "cpu" if weight.device.type == "mps" else weight.device  # which has no float64
    exact = weight.detach().to(place, torch.float64)
    if not torch.isfinite(exact).all():
        raise GMError(f"the weight of shape {tuple(weight.shape)} holds NaN or infinity")
    return exact


def split(weight: Tensor, structure: Structure) -> Tensor:  # (rows, columns, *taps) -> (o, |X|, i, points, carried)
    """The weight with its block axes apart and its taps flat."""
    o, i, carried = structure.blocks(weight.shape)
    return weight.reshape(o, structure.rows.size, i, structure.points, carried)


def diagonals(weight: Tensor, structure: Structure | Group | str) -> Tensor:  # -> (o, n, i, points, carried)
    """Group-diagonal coordinates F[x, p] = W[x, x·p], a re-indexing; W is a group matrix ⇔ all rows of F are equal.

    Raises:
        GMError: the shape does not fit, or the rows are not the group itself.
    Source: GM paper, definition of displacement rank.
    """
    structure = as_structure(structure)
    if not structure.rows.is_regular:
        raise GMError(f"group diagonals need rows that are the group itself, not {structure.rows.name!r}")
    apart = split(weight, structure)
    index = index_tensor(structure._moved, weight)
    return apart.gather(3, index[None, :, None, :, None].expand_as(apart))


def expand(
    tensors: Mapping[str, Tensor],  # as named and shaped by Structure.shapes
    structure: Structure | Group | str,
    shape: Sequence[int],  # of the weight: (rows, columns, *taps)
    *,
    labels: Tensor | None = None,  # (|X|, points): structure.labels on the right device, where the caller keeps them
) -> Tensor:  # (rows, columns, *taps)
    """The dense weight of stored tensors, differentiable: W[x, p] = f(x⁻¹p) + Σ_k a_k(x) b_k(x⁻¹p), plus left·right.

    >>> expand({"kernel": torch.tensor([[[1.0, 2.0, 3.0]]])}, "C3", (3, 3)).tolist()
    [[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [2.0, 3.0, 1.0]]
    """
    structure = as_structure(structure)
    o, i, carried = structure.blocks(shape)
    kernel = tensors["kernel"]
    labels = index_tensor(structure.labels, kernel) if labels is None else labels.long()
    size, points = structure.rows.size, structure.points
    if "gates" in tensors:
        rank, order = tensors["gates"].shape[1:]
        gated = tensors["gates"].transpose(1, 2) @ tensors["filters"].reshape(o, rank, -1)  # (o, n, i·points·carried)
        rows = (kernel.reshape(o, 1, -1) + gated).reshape(o, order, i, points, carried)
        weight = rows.gather(3, labels[None, :, None, :, None].expand_as(rows))
    else:
        flat = kernel.reshape(o, i, structure.orbits, carried).index_select(2, labels.flatten())
        weight = flat.reshape(o, i, size, points, carried).transpose(1, 2)
    weight = weight.reshape(tuple(shape))
    return weight + lowrank_weight(tensors, structure, shape) if "left" in tensors else weight


def lowrank_weight(tensors: Mapping[str, Tensor], structure: Structure, shape: Sequence[int]) -> Tensor:
    """The low-rank part of a weight, left · right, of the weight's shape."""
    product = tensors["left"].flatten(0, -2) @ tensors["right"].flatten(1)
    return from_view(product, structure, shape)


def as_view(weight: Tensor, structure: Structure) -> Tensor:
    """The matrix of which the low-rank part is taken: rows × columns·taps, or rows·ky × columns·kx where split."""
    return weight.transpose(1, 2).flatten(2).flatten(0, 1) if structure.split else weight.flatten(1)


def from_view(matrix: Tensor, structure: Structure, shape: Sequence[int]) -> Tensor:
    """The weight of which this is the matrix."""
    if not structure.split:
        return matrix.reshape(tuple(shape))
    rows, columns, height, width = shape
    return matrix.reshape(rows, height, columns, width).transpose(1, 2)


def orbit_means(weight: Tensor, structure: Structure | Group | str) -> Tensor:  # -> kernel, as in Structure.shapes
    """The mean of the weight over every orbit: the kernel of the Frobenius-nearest group matrix."""
    structure = as_structure(structure)
    if structure.rows.is_regular:
        means = diagonals(weight, structure).mean(1)
    else:
        flat = split(weight, structure).transpose(1, 2).flatten(2, 3)  # (o, i, |X|·points, carried)
        labels = index_tensor(structure.labels, weight).flatten()
        sums = flat.new_zeros(*flat.shape[:2], structure.orbits, flat.shape[3]).index_add_(2, labels, flat)
        means = sums / torch.bincount(labels, minlength=structure.orbits)[:, None]
    return means.reshape(structure.shapes(weight.shape)["kernel"])


def nearest(weight: Tensor, structure: Structure | Group | str) -> Tensor:  # same shape and dtype
    """The Frobenius-nearest group matrix, the Reynolds average over the group; the structure's residuals play no part.

    Raises:
        GMError: the shape does not fit the structure, or the weight is not finite.

    >>> nearest(torch.tensor([[1.0, 2.0], [4.0, 3.0]]), "C2").tolist()
    [[2.0, 3.0], [3.0, 2.0]]
    """
    structure = as_structure(structure)
    kernel = orbit_means(check_weight(weight), structure)
    return expand({"kernel": kernel}, structure, weight.shape).to(weight)


def distance(weight: Tensor, structure: Structure | Group | str, *, relative: bool = False) -> float:
    """d(W) = ‖W − nearest(W)‖, Frobenius, or d(W)/‖W‖; the mean over g of ‖ρ(g)W − Wρ(g)‖² is 2·d².

    >>> distance(torch.tensor([[1.0, 0.0], [0.0, -1.0]]), "C2", relative=True)
    1.0
    """
    exact = check_weight(weight)
    absolute = float((exact - nearest(exact, structure)).norm())
    return absolute / max(float(exact.norm()), torch.finfo(torch.float64).tiny) if relative else absolute


def displacement(weight: Tensor, structure: Structure | Group | str) -> Tensor:  # (o, n, columns·taps)
    """D(F) = F − PF with P the cyclic shift of the rows of the group diagonals; zero exactly on group matrices.

    Source: GM paper, definition of the displacement operator.
    """
    rows = diagonals(weight, structure).flatten(2)
    return rows - rows.roll(1, dims=1)


def displacement_rank(weight: Tensor, structure: Structure | Group | str, *, tolerance: float | None = None) -> int:
    """The paper's displacement rank: the largest rank over output blocks of the row-centred group diagonals.

    Singular values count above `tolerance` × the largest singular value of the block's F; by default the larger
    dimension × the machine epsilon of the weight's dtype. Not to be mixed with `generator_displacement_rank`.

    >>> displacement_rank(torch.eye(4) + torch.ones(4, 4), "C4")
    0
    """
    rows = diagonals(check_weight(weight), structure).flatten(2)
    scale = torch.linalg.matrix_norm(rows, 2)
    return numerical_rank(rows - rows.mean(1, keepdim=True), scale=scale, dtype=weight.dtype, tolerance=tolerance)


def generator_displacement(weight: Tensor, structure: Structure | Group | str, element: int) -> Tensor:
    """Δ_s(W) = W − ρ(s) W ρ(s)⁻¹, of the weight's shape: zero for all generators s exactly on structured weights."""
    structure = as_structure(structure)
    apart = split(weight, structure)
    back = int(structure.group.inverse[structure.group.check_elements([element])[0]])
    rows = index_tensor(structure.rows.action[back], weight)
    points = index_tensor(structure._moved[back], weight)
    return (apart - apart[:, rows][:, :, :, points]).reshape(weight.shape)


def generator_displacement_rank(
    weight: Tensor, structure: Structure | Group | str, *, tolerance: float | None = None
) -> int:
    """The largest rank over the group's generators s of Δ_s(W), as a matrix rows × (columns·taps).

    At most 2r for a group matrix plus a matrix of rank r; adds up under products, which `displacement_rank` does not.
    The tolerance is that of `displacement_rank`, relative to the largest singular value of W.
    """
    structure = as_structure(structure)
    exact = check_weight(weight)
    structure.blocks(exact.shape)
    scale = torch.linalg.matrix_norm(exact.flatten(1), 2)
    moved = [generator_displacement(exact, structure, each).flatten(1) for each in structure.group.generators]
    return max(
        (numerical_rank(each, scale=scale, dtype=weight.dtype, tolerance=tolerance) for each in moved), default=0
    )


def numerical_rank(matrix: Tensor, *, scale: Tensor, dtype: torch.dtype, tolerance: float | None) -> int:
    """Largest number of singular values above tolerance × scale, over a batch of matrices."""
    if tolerance is None:
        tolerance = max(matrix.shape[-2:]) * torch.finfo(dtype).eps
    values = torch.linalg.svdvals(matrix)
    return int((values > tolerance * scale[..., None]).sum(-1).max())
