"""What a structure refuses: strings, ranks, grids, shapes and weights."""

import numpy as np
import pytest
import torch
from torch import Tensor

from gmcompress.errors import GMError
from gmcompress.groups import from_table
from gmcompress.structure import (
    Structure,
    displacement_rank,
    distance,
    generator_displacement,
    generator_displacement_rank,
    nearest,
)


@pytest.mark.parametrize(
    "text",
    [
        *("", "C4[G]", "C4[G,G", "C4[G,H]", "C4[G,G,fixed2,G]", "C3[G,G,grid3x3]", "C4[G,G,grid3x2]", "C4[G/<7>,G]"),
        *("C4+displacement:1:split", "C4+lowrank:0:split", "C4+lowrank:1:flat", "C4+lowrank:split"),
        *("C4+", "C4+lowrank", "C4+lowrank:1+lowrank:2", "C4+rank:1", "C4+displacement:-1", "C4+displacement:1.5"),
        *("D4[G/<1>,G]+displacement:1", "C4[G,G]xC2", "C4[fixed0,G]", "C4+lowrank:99999999"),
        *("lowrank:0", "lowrank:2+", "+lowrank:2", "lowrank", "lowrank:2:flat", "lowrank:2+C4", "lowrank:2xC4"),
        *("displacement:1", "displacement:1+lowrank:2", "lowrank:2+displacement:1", "lowrank:1+lowrank:1"),
        *("adapted:2", "adapted:0:2x2", "adapted:2:0x2", "adapted:2:2", "adapted:2:2x2x2", "adapted:2:-2x2"),
        *("adapted:2:2x2:flat", "adapted:2:split:2x2", "lowrank:1+adapted:1:2x2", "C4+lowrank:1+adapted:1:2x2"),
    ],
)
def test_strings_refused(text: str) -> None:
    with pytest.raises(GMError):
        Structure.parse(text)


def test_ranks_and_types_refused() -> None:
    for given, options in (
        (4, {}),
        (None, {}),
        ("C4+lowrank:1", {"rank": 1}),
        ("C4", {"rank": -1}),
        ("C4", {"rank": 1.5}),
        ("C4", {"rank": 1, "residual": "sparse"}),
        ("lowrank:1", {"rank": 1}),
        ("adapted:1:2x2", {"rank": 1, "residual": "lowrank"}),
    ):
        with pytest.raises(GMError):
            Structure.parse(given, **options)
    for text in ("adapted:7:1x1", "C4+adapted:7:1x1:split"):
        with pytest.raises(GMError, match=r"write lowrank:7$"):
            Structure.parse(text)
    for grid in ((2,), (2, 2, 2), (2, 0), (2.0, 2), [2, 2], (True, 2)):
        with pytest.raises(GMError, match="two numbers of blocks"):
            Structure.factors(1, grid=grid)
    points = Structure.parse("C4").rows
    for fields in ((None, points, points), (None, None, None, points), (points.group, points, None)):
        with pytest.raises(GMError, match="group"):
            Structure(*fields, lowrank=1)
    unnamed = from_table(np.add.outer(np.arange(65), np.arange(65)) % 65)
    with pytest.raises(GMError, match="no name"):
        str(Structure.regular(unnamed))
    with pytest.raises(GMError, match="no element"):
        generator_displacement(torch.zeros(4, 4), "C4", 4)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        *(("C4", (6, 4)), ("C4", (4, 6)), ("C4", (4,)), ("C4", ()), ("C4", (0, 4)), ("C4", (4, 0))),
        *(("C4[G,G,grid3x3]", (4, 4, 2, 2)), ("C4[G,G,grid3x3]", (4, 4)), ("D4[G/<1>,G]", (8, 4))),
    ],
)
def test_shapes_refused(text: str, shape: tuple[int, ...]) -> None:
    for refuses in (nearest, distance, generator_displacement_rank):
        with pytest.raises(GMError) as caught:
            refuses(torch.zeros(shape), text)
        assert str(shape) in str(caught.value)
    with pytest.raises(GMError):
        Structure.parse(text).parameters(shape)


@pytest.mark.parametrize(
    ("text", "shape", "words"),
    [
        ("adapted:1:3x2", (4, 4), "rows divisible by 3 and columns divisible by 2"),
        ("adapted:1:2x3", (4, 4, 3, 3), "rows divisible by 2 and columns divisible by 3"),
        ("C2+adapted:1:2x4:split", (4, 6, 2, 2), "rows divisible by 2 and columns divisible by 4"),
        ("adapted:1:2x2:split", (4, 4), "splits the taps"),
        ("lowrank:1:split", (4, 4, 3), "splits the taps"),
        ("lowrank:1", (4,), "a weight has shape"),
        ("lowrank:1", (4, 0), "a weight has shape"),
    ],
)
def test_shapes_refused_for_a_factor_part(text: str, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(GMError, match=words) as caught:
        Structure.parse(text).shapes(shape)
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize(
    "weight",
    [torch.full((4, 4), float("nan")), torch.full((4, 4), -float("inf")), torch.ones(4, 4, dtype=torch.int64), [[1.0]]],
    ids=["nan", "inf", "integers", "list"],
)
def test_weights_refused(weight: Tensor) -> None:
    for refuses in (nearest, distance, displacement_rank, generator_displacement_rank):
        with pytest.raises(GMError):
            refuses(weight, "C4")
