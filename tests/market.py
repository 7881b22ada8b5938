"""The subjects of the tests, each with its slow twin: a loop written from the formula, never from the fast path."""

from __future__ import annotations

import cmath
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmcompress.structure import Separable, Structure

# ---------------------------------------------------------------------------------------------------------------------
# GROUPS: a group string and its twin, the elements in their documented order and the product of two of them.

Twin = tuple[list[Hashable], Callable[[Any, Any], Hashable]]


def cayley(twin: Twin) -> np.ndarray:
    """The table of a twin, entry by entry."""
    elements, product = twin
    index = {element: number for number, element in enumerate(elements)}
    return np.array([[index[product(a, b)] for b in elements] for a in elements])


def compose(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """The permutation x -> a(b(x))."""
    return tuple(a[x] for x in b)


def ring(n: int) -> Twin:
    """The integers modulo n under addition."""
    return list(range(n)), lambda a, b: (a + b) % n


def polygon(n: int) -> Twin:
    """Rotations and reflections of the n-gon with two sides, as permutations of (corner, side); element 2a + s."""

    def motion(a: int, s: int) -> tuple[int, ...]:
        flip = -1 if s else 1
        return tuple(2 * ((a + flip * corner) % n) + (side + s) % 2 for corner in range(n) for side in range(2))

    return [motion(a, s) for a in range(n) for s in range(2)], compose


def hamilton(p: tuple[complex, complex], q: tuple[complex, complex]) -> tuple[complex, complex]:
    """The product of the quaternions p0 + p1·j and q0 + q1·j."""
    return p[0] * q[0] - p[1] * q[1].conjugate(), p[0] * q[1] + p[1] * q[0].conjugate()


def dicyclic(n: int) -> Twin:
    """The unit quaternions xᵃ jˢ with x = exp(4πi/n); element 2a + s."""
    powers = [cmath.exp(4j * cmath.pi * a / n) for a in range(n // 2)]
    elements = [hamilton((x, 0j), unit) for x in powers for unit in ((1 + 0j, 0j), (0j, 1 + 0j))]

    def product(p: tuple[complex, complex], q: tuple[complex, complex]) -> Hashable:
        exact = hamilton(p, q)
        return min(elements, key=lambda e: abs(e[0] - exact[0]) + abs(e[1] - exact[1]))

    return elements, product


def generated(*moves: Sequence[int]) -> Twin:
    """The permutations that the moves generate, breadth first, the moves applied from the left."""
    elements = [tuple(range(len(moves[0])))]
    for element in elements:
        for move in moves:
            if (image := compose(move, element)) not in elements:
                elements.append(image)
    return elements, compose


def tuples(*twins: Twin) -> Twin:
    """The direct product: tuples, the first place slowest."""
    products = [each[1] for each in twins]
    elements = list(itertools.product(*(each[0] for each in twins)))
    return elements, lambda a, b: tuple(p(x, y) for p, x, y in zip(products, a, b, strict=True))


def twisted(normal: Twin, acting: Twin, act: Callable[[Any, Any], Hashable]) -> Twin:
    """The semidirect product: pairs with (x, h)·(y, k) = (x·act(h, y), h·k)."""
    elements = [(x, h) for x in normal[0] for h in acting[0]]
    return elements, lambda a, b: (normal[1](a[0], act(a[1], b[0])), acting[1](a[1], b[1]))


def _repeat(step: Callable[[Any], Hashable]) -> Callable[[int, Any], Hashable]:
    """The action of a cyclic group whose generator acts by `step`."""

    def act(times: int, point: Any) -> Hashable:
        for _ in range(times):
            point = step(point)
        return point

    return act


def _turn_units(q: tuple[complex, complex]) -> tuple[complex, complex]:
    """The automorphism i -> j -> k -> i of the quaternions."""
    return complex(q[0].real, q[1].imag), complex(q[0].imag, q[1].real)


SWAP, TURN = (1, 0, 2), (1, 2, 0)
ALTERNATING_4 = ((1, 2, 0, 3), (1, 3, 2, 0))

GROUPS: dict[str, Twin] = {
    **{f"C{n}": ring(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 12, 64)},
    **{f"D{n}": polygon(n) for n in (1, 2, 3, 4, 5, 6, 8, 32)},
    **{f"Q{n}": dicyclic(n) for n in (4, 8, 12, 16, 64)},
    "S1": generated((0,)),
    "S2": generated((1, 0)),
    "S3": generated(TURN, SWAP),
    "S4": generated((1, 2, 3, 0), (1, 0, 2, 3)),
    "A2": generated((0, 1)),
    "A3": generated(TURN),
    "A4": generated(*ALTERNATING_4),
    "A5": generated((1, 2, 0, 3, 4), (1, 3, 2, 0, 4), (1, 4, 2, 3, 0)),
    "C2xC2": tuples(ring(2), ring(2)),
    "C4xC2": tuples(ring(4), ring(2)),
    "C6xC2": tuples(ring(6), ring(2)),
    "C2^3": tuples(ring(2), ring(2), ring(2)),
    "C2^6": tuples(*[ring(2)] * 6),
    "C8xC8": tuples(ring(8), ring(8)),
    "C4xC2^2": tuples(ring(4), ring(2), ring(2)),
    "C2xS3": tuples(ring(2), generated(TURN, SWAP)),
    "D4xC2": tuples(polygon(4), ring(2)),
    "Q8xC3": tuples(dicyclic(8), ring(3)),
    "S3^2": tuples(generated(TURN, SWAP), generated(TURN, SWAP)),
    "C7:C3[2]": twisted(ring(7), ring(3), lambda h, x: 2**h * x % 7),
    "C5:C4[2]": twisted(ring(5), ring(4), lambda h, x: 2**h * x % 5),
    "C3:C4[2]": twisted(ring(3), ring(4), lambda h, x: 2**h * x % 3),
    "C7:C3[2]xC2": tuples(twisted(ring(7), ring(3), lambda h, x: 2**h * x % 7), ring(2)),
    "C8:C2[0 1 2 3 4 5 6 7/0 3 6 1 4 7 2 5]": twisted(ring(8), ring(2), lambda h, x: 3**h * x % 8),
    "(C2xC2):C3[0 1 2 3/0 2 3 1/0 3 1 2]": twisted(
        tuples(ring(2), ring(2)), ring(3), _repeat(lambda x: ((x[0] + x[1]) % 2, x[0]))
    ),
    "Q8:C3[0 1 2 3 4 5 6 7/0 3 1 2 4 7 5 6/0 2 3 1 4 6 7 5]": twisted(dicyclic(8), ring(3), _repeat(_turn_units)),
    "<(0 1 2)(3 4),(0 1)>": generated((1, 2, 0, 4, 3), (1, 0, 2, 3, 4)),
    "<(0 1 2 3),(0 2)>": generated((1, 2, 3, 0), (2, 1, 0, 3)),
    "<(0 1)>x<(0 1 2)>": tuples(generated((1, 0)), generated(TURN)),
}


def slow_subgroups(table: np.ndarray) -> list[list[int]]:
    """Every subgroup, as its elements: all that the known ones generate with one more element, until nothing is new."""

    def closure(elements: frozenset[int]) -> frozenset[int]:
        products = frozenset(int(table[a, b]) for a in elements for b in elements)
        return elements if products == elements else closure(products)

    known = frontier = {frozenset([0])}
    while frontier:
        frontier = {closure(each | {a}) for each in frontier for a in range(len(table)) if a not in each} - known
        known = known | frontier
    return sorted((sorted(each) for each in known), key=lambda each: (len(each), each))


def slow_act(table: np.ndarray, g: int, signal: Tensor) -> Tensor:
    """(g·x)[g·y] = x[y], on the last axis."""
    moved = torch.empty_like(signal)
    for y in range(len(table)):
        moved[..., int(table[g, y])] = signal[..., y]
    return moved


SMALL = [name for name, (elements, _) in GROUPS.items() if len(elements) <= 24]

NOT_GROUPS: dict[str, list[list[int]]] = {
    "a loop: Latin, with identity, every element its own inverse, not associative": [
        [0, 1, 2, 3, 4],
        [1, 0, 3, 4, 2],
        [2, 4, 0, 1, 3],
        [3, 2, 4, 0, 1],
        [4, 3, 1, 2, 0],
    ],
    "a Latin square whose identity is not 0": [[(a + b + 1) % 4 for b in range(4)] for a in range(4)],
    "a monoid, the maximum: associative, with identity, not Latin": [[max(a, b) for b in range(3)] for a in range(3)],
}

# ---------------------------------------------------------------------------------------------------------------------
# STRUCTURES: a structure string and the shape of a weight; their twins are the functions below.

STRUCTURES: list[tuple[str, tuple[int, ...]]] = [
    ("C1", (2, 3)),
    ("C4", (4, 4)),
    ("C4", (8, 12)),
    ("C4", (8, 4, 3, 3)),
    ("D4", (8, 16)),
    ("Q8", (8, 8)),
    ("C2xS3", (12, 12)),
    ("C7:C3[2]", (21, 21)),
    ("(C2xC2):C3[0 1 2 3/0 2 3 1/0 3 1 2]", (12, 12)),
    ("<(0 1 2)(3),(0 1)(3)>", (6, 12)),
    ("C2", (4, 2, 3, 1)),
    ("D4[G/<1>,G]", (8, 16)),
    ("D4[G/<1>,G/<2>]", (8, 6)),
    ("D4[G,G/<1,4>]", (8, 4, 1, 2)),
    ("S3[G/<1>,fixed3]", (4, 3)),
    ("C4[G,G,grid3x3]", (4, 8, 3, 3)),
    ("D4[G,G,grid3x3]", (8, 8, 3, 3)),
    ("D1[G,G,grid2x3]", (4, 2, 2, 3)),
    ("D2[G/<1>,G/<2>,grid3x2]", (4, 2, 3, 2)),
    ("C4[fixed2,G,grid2x2]", (2, 4, 2, 2)),
    ("C4+displacement:1", (4, 4)),
    ("S3+displacement:2", (12, 6)),
    ("D4+displacement:2", (8, 8, 3, 3)),
    ("C4[G,G,grid3x3]+displacement:2", (8, 4, 3, 3)),
    ("C4[G,G/<2>]+displacement:1", (4, 4)),
    ("C4+lowrank:2", (8, 8)),
    ("D4[G/<1>,G]+lowrank:1", (4, 8, 3, 3)),
    ("C4+displacement:1+lowrank:2:split", (8, 4, 3, 2)),
    ("S3+displacement:1+lowrank:2", (6, 12)),
    ("C2+adapted:1:2x2", (4, 6)),
    ("C2+displacement:1+adapted:2:1x2:split", (4, 4, 2, 3)),
    ("lowrank:3", (6, 5)),
    ("lowrank:3:split", (4, 6, 3, 2)),
    ("adapted:2:2x2", (6, 8)),
    ("adapted:1:2x3", (4, 6, 3, 2)),
    ("adapted:2:2x4:split", (4, 8, 2, 3)),
    ("separable:2", (4, 3, 3, 4)),
    ("gseparable:1", (2, 4, 3, 3)),
    ("dseparable:2", (4, 6, 3, 2)),
    ("dgseparable:2:3x3<1,3-5,7>", (4, 3, 5, 1)),
    ("separable:1:2x3<4-5,0-2>", (3, 2, 5, 1)),
]
GROUPED = [(text, shape) for text, shape in STRUCTURES if Structure.parse(text).group]  # those with a group part
ALONE = [(text, shape) for text, shape in STRUCTURES if Structure.parse(text).lowrank and (text, shape) not in GROUPED]


def slow_orbits(structure: Structure) -> np.ndarray:  # (|X|, |Y|·taps)
    """Orbit labels by brute force: the next label to all images of the first entry that has none."""
    taps = structure.taps.size if structure.taps else 1
    labels = -np.ones((structure.rows.size, structure.columns.size, taps), dtype=int)
    for x, y, t in itertools.product(*map(range, labels.shape)):
        if labels[x, y, t] < 0:
            label = labels.max() + 1
            for g in range(structure.group.order):
                image = structure.taps.action[g, t] if structure.taps else t
                labels[structure.rows.action[g, x], structure.columns.action[g, y], image] = label
    return labels.reshape(structure.rows.size, -1)


def slow_move(weight: Tensor, structure: Structure, g: int) -> Tensor:
    """V with V[x, y, t] = W[g·x, g·y, g·t], in every block."""
    flat = weight.flatten(2) if weight.dim() > 2 else weight[:, :, None]
    rows = [start + int(x) for start in range(0, len(flat), structure.rows.size) for x in structure.rows.action[g]]
    columns = [
        start + int(y) for start in range(0, flat.shape[1], structure.columns.size) for y in structure.columns.action[g]
    ]
    taps = structure.taps.action[g].tolist() if structure.taps else list(range(flat.shape[2]))
    return flat[rows][:, columns][:, :, taps].reshape(weight.shape)


def slow_nearest(weight: Tensor, structure: Structure) -> Tensor:
    """The average over the group."""
    moved = [slow_move(weight, structure, g) for g in range(structure.group.order)]
    return torch.stack(moved).mean(0)


def slow_expand(tensors: Mapping[str, Tensor], structure: Structure, shape: Sequence[int]) -> Tensor:
    """The sum of both parts, entry by entry."""
    parts = {name: tensor.detach().double().numpy() for name, tensor in tensors.items()}
    if structure.separable is not None:
        return torch.from_numpy(_slow_separable(parts, structure.separable, shape).reshape(tuple(shape)))
    weight = np.zeros((shape[0], shape[1], prod(shape[2:])))
    if structure.group is not None:
        weight += _slow_group_part(parts, structure, shape)
    if structure.lowrank:
        weight += _slow_factor_part(parts, structure, shape)
    return torch.from_numpy(weight.reshape(tuple(shape)))


def _slow_separable(parts: Mapping[str, np.ndarray], separable: Separable, shape: Sequence[int]) -> np.ndarray:
    """W[o, i, t] = Σ_k of the factors at (x, h), the place of tap t on the grid of the two subgroups."""
    weight, grid = np.zeros((shape[0], shape[1], prod(shape[2:]))), separable.grid_of(shape)
    for o, i, t, k in itertools.product(*map(range, weight.shape), range(separable.terms)):
        x, h = divmod(t if grid.places is None else grid.places[t], grid.sizes[1])
        at = {
            "separable": {"outer": (o, x), "inner": (o, i, h)},
            "gseparable": {"outer": (o, i, x), "inner": (o, i, h)},
            "dseparable": {"mixing": (o, i), "outer": (o, x, h)},
            "dgseparable": {"mixing": (o, i), "outer": (o, x), "inner": (o, h)},
        }[separable.kind]
        weight[o, i, t] += np.prod([parts[name][(k, *place)] for name, place in at.items()])
    return weight


def _slow_group_part(parts: Mapping[str, np.ndarray], structure: Structure, shape: Sequence[int]) -> np.ndarray:
    """W[x, y, t] = f(orbit of x, y, t) + Σ_k a_k(x) b_k(orbit of x, y, t)."""
    labels, (size, columns) = slow_orbits(structure), (structure.rows.size, structure.columns.size)
    orbits, taps = labels.max() + 1, prod(shape[2:])
    labels = labels.reshape(size, columns, -1)
    carried = 1 if structure.taps else taps
    o, i = shape[0] // size, shape[1] // columns
    kernel = parts["kernel"].reshape(o, i, orbits, carried)
    rank = parts["gates"].shape[1] if "gates" in parts else 0
    filters = parts["filters"].reshape(o, rank, i, orbits, carried) if rank else kernel
    weight = np.zeros((shape[0], shape[1], taps))
    for row, column, tap in itertools.product(*map(range, weight.shape)):
        (p, x), (q, y) = divmod(row, size), divmod(column, columns)
        orbit, rest = (labels[x, y, tap], 0) if structure.taps else (labels[x, y, 0], tap)
        weight[row, column, tap] = kernel[p, q, orbit, rest]
        for k in range(rank):
            weight[row, column, tap] += parts["gates"][p, k, x] * filters[p, k, q, orbit, rest]
    return weight


def _slow_factor_part(parts: Mapping[str, np.ndarray], structure: Structure, shape: Sequence[int]) -> np.ndarray:
    """W[x, y, t] = Σ_k u_k(x) s_k(p, q) v_k(y, t) for x in row block p and y in column block q; all s are 1 without."""
    weight, (high, wide) = np.zeros((shape[0], shape[1], prod(shape[2:]))), structure.grid or (1, 1)
    for p, q, k in itertools.product(range(high), range(wide), range(structure.lowrank)):
        scale = parts["scales"][p, q, k] if "scales" in parts else 1.0
        for row, column, tap in itertools.product(*map(range, weight.shape)):
            if row * high // shape[0] != p or column * wide // shape[1] != q:
                continue
            if structure.split:
                down, across = divmod(tap, shape[3])
                weight[row, column, tap] += parts["left"][row, down, k] * scale * parts["right"][k, column, across]
            else:
                right = parts["right"].reshape(structure.lowrank, shape[1], -1)[k, column, tap]
                weight[row, column, tap] += parts["left"][row, k] * scale * right
    return weight


def slow_view(weight: Tensor, structure: Structure) -> Tensor:
    """The matrix whose rank the factor part bounds: rows × columns·taps, or, split, rows·ky × columns·kx."""
    if not structure.split:
        return weight.reshape(weight.shape[0], -1)
    rows, columns, height, width = weight.shape
    matrix = weight.new_zeros(rows * height, columns * width)
    for x, y, down, across in itertools.product(*map(range, weight.shape)):
        matrix[x * height + down, y * width + across] = weight[x, y, down, across]
    return matrix


def random_tensors(
    structure: Structure, shape: Sequence[int], generator: torch.Generator, *, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Stored tensors of a weight of this structure, normally distributed."""
    shapes = structure.shapes(shape)
    return {name: torch.randn(each, generator=generator, dtype=dtype) for name, each in shapes.items()}


def slow_diagonals(weight: Tensor, structure: Structure) -> Tensor:  # (o, n, i·|Y|·taps)
    """F[x, (y, t)] = W[x, (x·y, x·t)] in every block, row by row; the tap of a carried tap stays."""
    n = structure.group.order
    rows = [
        slow_move(weight, structure, x)[start].flatten()  # row 0 of the moved weight is W[x·0, x·y, x·t]
        for start in range(0, len(weight), n)
        for x in range(n)
    ]
    return torch.stack(rows).reshape(len(weight) // n, n, -1)


# ---------------------------------------------------------------------------------------------------------------------
# IMAGES for motions of the plane.


def blobs(size: int, generator: torch.Generator, *, count: int = 2, width: float = 2.5) -> Tensor:
    """Images (count, 1, size, size) without fine detail and dark towards the border."""
    steps = torch.arange(size) - (size - 1) / 2
    middles = (torch.rand(count, 6, 2, generator=generator) - 0.5) * size / 3
    rows, columns = (steps - middles[..., each, None] for each in (0, 1))
    hills = torch.exp(-(rows.square()[..., None] + columns.square()[..., None, :]) / (2 * width**2))
    return (torch.randn(count, 6, 1, 1, generator=generator) * hills).sum(1, keepdim=True)
