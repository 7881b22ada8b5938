"""What a structured weight is: orbit labels of a group on rows × columns (× taps), residuals, and factors.

A weight has shape (rows, columns, *taps), rows = o·|X| and columns = i·|Y|, for sets X and Y on which the group acts.
The o and i copies are block axes in front, so row p·|X| + x is point x of block p.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import numpy as np

from ..errors import GMError, shown
from ..groups import Group, GSet, gset
from ..groups import group as parse_group
from ..groups.group import MAX_ORDER, Indices
from .separable import Separable

MAX_STRING = 1 << 17  # characters; the longest group strings have half as many
MAX_RANK, MAX_BLOCKS = 999_999, 9999  # as many digits as the string may have
MAX_LABELS = MAX_ORDER**2  # entries of a table of labels; the group acting on itself has at most as many


@dataclass(frozen=True)
class Structure:
    """What a compressed weight looks like: a group part, a factor part, or the sum of both.

    The group part is a group matrix with a residual of low displacement rank. The factor part is a low rank, or has
    adapted bases: W_pq = U_p diag(s_pq) V_qᵀ on a grid of P × Q blocks, which for an abelian group is a group matrix in
    bases fitted to the weight in place of the Fourier bases, and with one block is a low rank. It is taken of the
    matrix rows × columns·taps, or, `split`, of a convolution's rows·ky × columns·kx. In place of both parts, a kernel
    may be a sum of separable ones, `separable`.

    Prints as, and parses from, one string: `group[rows,columns,taps]+displacement:r+lowrank:s` or `...+adapted:s:PxQ`,
    with `:split` behind where the taps are split; either part may be missing; or as `Separable` does. The bracket is
    left out where the group acts on itself in rows and columns and leaves the taps alone, and residuals of rank 0 are.

    Source: GM paper for the group part; Lee et al. 2024, BLAST, equation 2, for the adapted bases.

    >>> str(Structure.parse("C8xC8+displacement:2"))
    'C8xC8+displacement:2'
    >>> Structure.parse("C4[G,G,grid3x3]").labels.max()
    np.int64(35)
    >>> Structure.parse("adapted:6:4x2").parameters((64, 32))
    624
    """

    group: Group | None
    rows: GSet | None
    columns: GSet | None
    taps: GSet | None = None  # None: the taps are carried along, each with its own group matrix
    displacement: int = 0
    lowrank: int = 0  # rank of the factor part, with or without a grid
    split: bool = False  # whether the vertical taps of the factor part go with the rows
    grid: tuple[int, int] | None = None  # blocks (P, Q) of rows and columns with adapted bases; None: a low rank
    separable: Separable | None = None  # then there is nothing else

    def __post_init__(self) -> None:
        for what in ("displacement", "lowrank"):
            rank = getattr(self, what)
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
                raise GMError(f"{what} rank must be an integer of at least 0, not {shown(rank)}")
            if rank > MAX_RANK:
                raise GMError(f"{what} rank must be at most {MAX_RANK}, not {shown(rank)}")
        if self.separable is not None:
            if any((self.group, self.rows, self.columns, self.taps, self.displacement, self.lowrank, self.grid)):
                raise GMError(f"{self.separable} takes no group, no residual and no factors beside it")
            return
        if not self.lowrank and (self.split or self.grid):
            raise GMError("only a factor part of rank 1 or more has a grid or splits the taps, and this one has none")
        if self.group is None:
            if not self.lowrank or self.displacement or (self.rows, self.columns, self.taps) != (None, None, None):
                raise GMError("a structure without a group has a low rank or adapted bases, and nothing else")
        elif self.rows is None or self.columns is None:
            raise GMError("a structure with a group names the sets that it acts on")
        elif self.displacement and not self.rows.is_regular:
            raise GMError(f"displacement rank is defined where the rows are the group itself, not {self.rows.name!r}")
        elif self.taps is not None and max(self.group.order, self.rows.size) * self.points > MAX_LABELS:
            sizes = f"{self.group.order:,} elements, {self.rows.size:,} rows and {self.points:,} columns and taps"
            raise GMError(f"{self.group}: tables of {sizes} are too large; at most {MAX_LABELS:,} entries")
        if self.grid is not None:
            self._check_grid(self.grid)

    def _check_grid(self, grid: tuple[int, int]) -> None:
        counts = grid if isinstance(grid, tuple) and len(grid) == 2 else (0, 0)
        if any(not isinstance(each, int) or isinstance(each, bool) or not 1 <= each <= MAX_BLOCKS for each in counts):
            few = f"of rows and of columns, each at most {MAX_BLOCKS}"
            raise GMError(f"a grid is two numbers of blocks, {few}, not {shown(grid)}")
        if grid == (1, 1):
            raise GMError(f"adapted bases have more than one block; with a single one, write lowrank:{self.lowrank}")

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
        if found.separable is not None:
            raise GMError(f"{str(found)!r} takes no residual beside it, so rank={rank} cannot be added to it")
        if found.displacement or found.lowrank:
            raise GMError(f"{str(found)!r} already has a residual, so rank={rank} cannot be added to it")
        return found.with_rank(rank, residual=residual)

    @classmethod
    def regular(cls, group: Group, *, displacement: int = 0, lowrank: int = 0, split: bool = False) -> Structure:
        """The group acting on itself in rows and columns, the taps carried along."""
        points = gset(group, "G")
        return cls(group, points, points, None, displacement, lowrank, split)

    @classmethod
    def factors(cls, rank: int, *, grid: tuple[int, int] | None = None, split: bool = False) -> Structure:
        """A low rank, or with a grid of more than one block adapted bases, without a group.

        >>> Structure.factors(3, grid=(4, 4), split=True)
        Structure.parse('adapted:3:4x4:split')
        """
        return cls(None, None, None, None, 0, rank, split, None if grid == (1, 1) else grid)

    @classmethod
    def kernels(cls, separable: Separable) -> Structure:
        """A sum of separable kernels.

        >>> Structure.kernels(Separable("gseparable", 2))
        Structure.parse('gseparable:2')
        """
        return cls(None, None, None, separable=separable)

    @property
    def acting(self) -> Group:
        """The group of a structure that has one.

        Raises:
            GMError: it has none.
        """
        if self.group is None:
            raise GMError(f"{self} has no group part, so no group matrices, orbits or displacement belong to it")
        return self.group

    def with_rank(self, rank: int, *, residual: str, split: bool = False) -> Structure:
        """The same group matrices with a residual of this rank in place of the present ones.

        Raises:
            GMError: the residual is neither "displacement" nor "lowrank".
        """
        if self.separable is not None and rank:
            raise GMError(f"{self} takes no residual beside it")
        if residual not in ("displacement", "lowrank"):
            raise GMError(f'residual must be "displacement" or "lowrank", not {residual!r}')
        ranks = {"displacement": 0, "lowrank": 0, residual: rank}
        sets = (self.group, self.rows, self.columns, self.taps)
        return Structure(*sets, ranks["displacement"], ranks["lowrank"], split)

    def __str__(self) -> str:
        if self.separable is not None:
            return str(self.separable)
        parts = [] if self.group is None else [self._group_string()]
        if self.displacement:
            parts.append(f"displacement:{self.displacement}")
        if self.lowrank:
            kind = f"lowrank:{self.lowrank}"
            if self.grid is not None:
                kind = f"adapted:{self.lowrank}:{self.grid[0]}x{self.grid[1]}"
            parts.append(kind + (":split" if self.split else ""))
        return "+".join(parts)

    def _group_string(self) -> str:
        group, (rows, columns) = self.acting, self._sets
        if not group.name:
            raise GMError(f"{group} has no name; build it from a string, so that its structure can be written down")
        sets = [rows.name, columns.name] + ([self.taps.name] if self.taps else [])
        return group.name + ("" if sets == ["G", "G"] else f"[{','.join(sets)}]")

    def __repr__(self) -> str:
        return f"Structure.parse({str(self)!r})"

    @property
    def points(self) -> int:
        """Number of (column, tap) pairs on which the group acts: |Y|, or |Y|·taps where it acts on the taps."""
        columns = self._sets[1]
        return columns.size * (self.taps.size if self.taps else 1)

    @property
    def _sets(self) -> tuple[GSet, GSet]:
        """The sets of rows and columns, of a structure that has a group."""
        if self.rows is None or self.columns is None:
            raise GMError(f"{self} has no group part, so no group matrices, orbits or displacement belong to it")
        return self.rows, self.columns

    @property
    def is_regular(self) -> bool:
        """Whether there is a group part in which the rows are the group itself."""
        return self.rows is not None and self.rows.is_regular

    @cached_property
    def _moved(self) -> Indices:  # (n, points): g·(y, t) as one index
        columns = self._sets[1]
        if self.taps is None:
            return columns.action
        both = columns.action[:, :, None] * self.taps.size + self.taps.action[:, None, :]
        return both.reshape(self.acting.order, self.points)

    @cached_property
    def labels(self) -> Indices:  # (|X|, points)
        """The orbit of every (row, column, tap), numbered in the order of first appearance.

        Where the rows are the group itself, the orbit of (x, p) is x⁻¹·p. In general rows are taken orbit by orbit, and
        x = g·x₀, x₀ the first of its orbit: that of (x, p) is the orbit of g⁻¹·p under the elements that leave x₀
        alone. Costs |stabiliser|·points for each different stabiliser, and rows·points.
        """
        if self.is_regular:
            return self._moved[self.acting.inverse]
        action = self._sets[0].action
        found = np.full((action.shape[1], self.points), -1, dtype=np.int64)
        below: dict[bytes, Indices] = {}  # for each stabiliser, the orbits of the points under it
        count = 0
        for first in range(len(found)):
            if found[first, 0] >= 0:
                continue
            fixing = action[:, first] == first
            if fixing.tobytes() not in below:
                smallest = self._moved[fixing].min(axis=0)
                below[fixing.tobytes()] = np.unique(smallest, return_inverse=True)[1]
            numbers = below[fixing.tobytes()] + count
            rows, elements = np.unique(action[:, first], return_index=True)
            found[rows] = numbers[self._moved[self.acting.inverse[elements]]]
            count = int(numbers.max()) + 1
        return found

    def __deepcopy__(self, memo: dict[int, object]) -> Structure:
        return self  # immutable, and its tables are large

    @cached_property
    def orbits(self) -> int:
        """Number of orbits: the parameters of one block (for each tap, where the taps are carried along)."""
        return self.points if self.is_regular else int(self.labels.max()) + 1

    def blocks(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(o, i, carried): output and input multiplicity of a weight of this shape, and the number of carried taps.

        Raises:
            GMError: the shape does not fit: rows and columns must be multiples of the sizes of the sets.
        """
        if len(shape) < 2:
            raise GMError(f"a weight has shape (rows, columns, *taps), but this one has {tuple(shape)}")
        rows, columns, taps = shape[0], shape[1], prod(shape[2:])
        x, y = (each.size for each in self._sets)
        o, i = rows // x, columns // y
        if o * x != rows or i * y != columns or not rows or not columns:
            raise GMError(
                f"{self} needs rows divisible by {x} and columns divisible by {y}, "
                f"but the weight has shape {tuple(shape)}"
            )
        if self.taps is not None and self.taps.size != taps:
            raise GMError(f"{self} acts on {self.taps.size} taps, but the weight has shape {tuple(shape)}")
        return o, i, (1 if self.taps else taps)

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Name and shape of every stored tensor for a weight of the given shape."""
        if self.separable is not None:
            return self.separable.shapes(shape)
        found: dict[str, tuple[int, ...]] = {}
        if self.group is not None:
            o, i, _ = self.blocks(shape)
            inner = (i, self.orbits) if self.taps else (i, self.orbits, *shape[2:])
            found["kernel"] = (o, *inner)
            if self.displacement:
                found["gates"] = (o, self.displacement, self.group.order)
                found["filters"] = (o, self.displacement, *inner)
        return found | self._factor_shapes(shape) if self.lowrank else found

    def _factor_shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        if len(shape) < 2 or min(shape) < 1:
            raise GMError(f"a weight has shape (rows, columns, *taps), but this one has {tuple(shape)}")
        if self.split and len(shape) != 4:
            raise GMError(f"{self} splits the taps of a convolution, but the weight has shape {tuple(shape)}")
        found: dict[str, tuple[int, ...]] = {
            "left": (shape[0], shape[2], self.lowrank) if self.split else (shape[0], self.lowrank),
            "right": (self.lowrank, shape[1], shape[3]) if self.split else (self.lowrank, *shape[1:]),
        }
        if self.grid is not None:
            if shape[0] % self.grid[0] or shape[1] % self.grid[1]:
                raise GMError(
                    f"{self} needs rows divisible by {self.grid[0]} and columns divisible by {self.grid[1]}, "
                    f"but the weight has shape {tuple(shape)}"
                )
            found["scales"] = (*self.grid, self.lowrank)
        return found

    def parameters(self, shape: Sequence[int]) -> int:
        """Number of stored numbers for a weight of the given shape."""
        return sum(prod(each) for each in self.shapes(shape).values())


@lru_cache(maxsize=64)  # so that equal layers share one structure, and its labels
def _read(text: str | Group) -> Structure:
    """The structure that a string or a group stands for."""
    if isinstance(text, Group):
        return Structure.regular(text)
    head, *residuals = text.split("+")
    if separable := Separable.parse(head.strip()):
        if residuals:
            raise GMError(f"in {text[:80]!r}: separable kernels take no residual beside them")
        return Structure.kernels(separable)
    if not head.strip():
        raise GMError(f'the structure {text[:80]!r} names nothing in front; write "C4", "C4+lowrank:2" or "lowrank:2"')
    alone = head.strip().startswith(_KINDS)
    ranks: dict[str, Any] = {}
    for each in [head, *residuals] if alone else residuals:
        new = _read_residual(each.strip())
        if not new:
            known = '"displacement:2", "lowrank:2", "lowrank:2:split" and "adapted:8:4x4" are'
            raise GMError(f"in {text[:80]!r}: {each[:40]!r} is no residual; {known}")
        if set(new) & set(ranks):
            raise GMError(f"in {text[:80]!r}: at most one displacement, and one lowrank or adapted, can be given")
        ranks |= new
    if alone:
        return Structure(None, None, None, **ranks)
    # the bracket of sets comes last and holds a comma outside <...>; the action of a semidirect product does not
    match = re.fullmatch(r"(.*)\[([^\[\],<]+(?:<[^>]*>)?(?:,[^\[\],<]+(?:<[^>]*>)?)+)\]\s*", head)
    group = parse_group((match[1] if match else head).strip())
    if match is None:
        points = gset(group, "G")
        return Structure(group, points, points, **ranks)
    names = [each.strip() for each in re.findall(r"[^,<]+(?:<[^>]*>)?", match[2])]
    if len(names) > 3:
        raise GMError(f"in {text[:80]!r}: a structure acts on rows, columns and taps, but {len(names)} sets are named")
    sets = [gset(group, each) for each in names]
    return Structure(group, *sets, **ranks)  # type: ignore[arg-type]


_KINDS = ("displacement", "lowrank", "adapted")  # no group string begins with one of them
_RESIDUAL = re.compile(
    r"(?:(displacement):([0-9]{1,6})|(lowrank):([0-9]{1,6})(:split)?|(adapted):([0-9]{1,6}):([0-9]{1,4})x([0-9]{1,4})(:split)?)"
)


def _read_residual(text: str) -> dict[str, Any]:
    """The fields that one residual sets; none where it is malformed."""
    match = _RESIDUAL.fullmatch(text)
    if match is None:
        return {}
    if match[1]:
        return {"displacement": int(match[2])}
    if match[3]:
        return {"lowrank": int(match[4])} | ({"split": True} if match[5] else {})
    grid = (int(match[8]), int(match[9]))
    return {"lowrank": int(match[7]), "grid": grid} | ({"split": True} if match[10] else {})
