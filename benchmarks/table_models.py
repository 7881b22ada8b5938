"""The rows of the tables: our networks with their recipes, and beside them what others have published."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from table_training import Recipe
from torch import nn

import gmcompress as gm

THOMAS = "Thomas, Gu, Dao, Rudra and Ré 2018, table 1"
PAPER = "Samudre, Petrache, Nord and Trivedi 2025, section on experiments"


@dataclass(frozen=True)
class Published:
    """A result of others: accuracy in percent on their own images, and the parameters as they count them."""

    table: str
    model: str
    accuracy: float
    parameters: int | None
    source: str


PUBLISHED = (
    Published("hidden", "dense", 46.0, 1_058_826, THOMAS),
    Published("hidden", "LDR-TD", 45.33, 18_442, THOMAS),
    Published("hidden", "Toeplitz-like", 41.8, None, THOMAS),
    Published("hidden", "circulant", 34.3, None, THOMAS),
    Published("hidden", "low rank", 32.3, None, THOMAS),
    Published("cifar", "GM-CNN", 58.31, 13_681, PAPER),
    Published("cifar", "GM-CNN", 58.07, 6_003, PAPER),
    Published("rotated", "GM-CNN", 84.5, 14_747, PAPER),
    Published("noise", "GM-CNN", 90.2, 5_915, PAPER),
    Published("rotated-backgrounds", "GM-CNN", 55.29, 5_915, PAPER),
    Published("rectangles", "GM-CNN", 99.89, 5_915, PAPER),
)


@dataclass(frozen=True)
class Row:
    """One network: `model` is the call that builds it, `most` the parameters that it may have, `target` in percent.

    Where `start` names another row of the table, that one is trained first, then compressed to `structure` of its
    hidden layer, and what comes out is trained with the first as its teacher.
    """

    table: str
    name: str
    model: str
    build: Callable[[], nn.Module]
    recipe: Recipe
    most: int | None = None
    target: float | None = None
    start: str | None = None
    structure: str | None = None

    @property
    def task(self) -> str:
        """The images of the table."""
        return "cifar-grey" if self.table == "hidden" else self.table


def hidden_layer(structure: str | None) -> nn.Sequential:
    """1024 → 1024 → ReLU → 10, the hidden layer dense or of a structure."""
    layer = nn.Linear(1024, 1024) if structure is None else gm.GMLinear(1024, 1024, structure)
    parts = {"flat": nn.Flatten(1), "hidden": layer, "activation": nn.ReLU(), "classifier": nn.Linear(1024, 10)}
    return nn.Sequential(OrderedDict(parts))


def compressed(dense: nn.Module, structure: str) -> nn.Module:
    """A trained network with the nearest hidden layer of a structure."""
    return gm.compress(dense, include="hidden", exclude="classifier", overrides={"hidden": structure}, rank=0).model


def _network(*arguments: Any, **options: Any) -> tuple[str, Callable[[], nn.Module]]:
    """A GMCNN, as written and as built."""
    written = ", ".join([*map(repr, arguments), *(f"{name}={value!r}" for name, value in options.items())])
    return f"GMCNN({written})", lambda: gm.GMCNN(*arguments, **options)


def _paper(*arguments: Any, **options: Any) -> tuple[str, Callable[[], nn.Module]]:
    """The same of the paper's own networks."""
    written, _ = _network(*arguments, **options)
    return written.replace("GMCNN(", "GMCNN.paper(", 1), lambda: gm.GMCNN.paper(*arguments, **options)


RANK3 = "C32xC32+displacement:3"
GREY = Recipe(epochs=40, batch_size=250, scale="image", flip=True)
COLOUR = Recipe(epochs=80, batch_size=256, shift=2, flip=True)
DIGITS = Recipe(epochs=100, shift=2)
SHARED: dict[str, Any] = {"separable": "dseparable", "pool": "max", "bias": False}  # BatchNorm brings its own bias


def _deep(order: int, *widths: int) -> dict[str, Any]:
    """Layers at full, half and a quarter of the side: one, two, and the others."""
    half, quarter = (f"C{order // part}xC{order // part}" for part in (2, 4))
    strides = (half, None, quarter, *[None] * (len(widths) - 3))
    return {"channels": widths, "radius": 2, "strides": strides, "skip": "same", **SHARED}


def _two(widths: tuple[int, int], last: str, head: str) -> dict[str, Any]:
    strides = ("C16xC16", last)
    return {"channels": widths, "radius": (2, 3), "strides": strides, "head": head, "terms": 2, **SHARED}


HIDDEN = (
    Row(
        "hidden",
        "dense",
        "Linear(1024, 1024), ReLU, Linear(1024, 10)",
        lambda: hidden_layer(None),
        Recipe(epochs=40, lr=1e-3, weight_decay=0.3, batch_size=250, scale="image", flip=True, shift=1),
    ),
    Row(
        "hidden",
        "from scratch",
        f"GMLinear(1024, 1024, {RANK3!r}), ReLU, Linear(1024, 10)",
        lambda: hidden_layer(RANK3),
        GREY,
        18_442,
        47.5,
    ),
    Row(
        "hidden",
        "compressed",
        f"GMLinear(1024, 1024, {RANK3!r}), ReLU, Linear(1024, 10)",
        lambda: hidden_layer(RANK3),
        replace(GREY, distillation=0.7),
        18_442,
        47.5,
        start="dense",
        structure=RANK3,
    ),
)

CIFAR = tuple(
    Row("cifar", name, *network, recipe, most, target)
    for name, network, recipe, most, target in (
        ("two layers", _network("C32xC32", 3, 10, **_two((32, 72), "C2xC2", "flatten")), COLOUR, 13_681, 72.0),
        ("eight layers", _network("C32xC32", 3, 10, **_deep(32, 24, 24, 24, 40, 40, 40, 40, 40)), COLOUR, 13_681, 72.0),
        ("two layers, small", _network("C32xC32", 3, 10, **_two((24, 46), "C8xC8", "mean")), COLOUR, 6_003, 66.0),
        ("six layers, small", _network("C32xC32", 3, 10, **_deep(32, 20, 20, 20, 30, 30, 30)), COLOUR, 6_003, 66.0),
        ("the paper's network", _paper("C32", 3, 10, head_bias=False), replace(COLOUR, lr=3e-3), 13_681, None),
    )
)

SMALL = _deep(28, 20, 20, 20, 30, 30, 30)
VARIATIONS = tuple(
    Row(table, name, *_network("C28xC28", 1, outputs, **options), recipe, most, target)
    for table, name, outputs, options, recipe, most, target in (
        (
            "rotated",
            "eight layers",
            10,
            _deep(28, 24, 24, 24, 40, 40, 40, 40, 40),
            replace(DIGITS, turns="any"),
            14_747,
            95.0,
        ),
        ("noise", "six layers", 10, SMALL, DIGITS, 5_915, 90.2),
        ("rotated-backgrounds", "six layers", 10, SMALL, replace(DIGITS, turns="quarter"), 5_915, 55.29),
        ("rectangles", "six layers", 2, SMALL, Recipe(epochs=200, flip=True, flip_rows=True), 5_915, 99.89),
    )
)

ROWS = (*HIDDEN, *CIFAR, *VARIATIONS)
TABLES = tuple(dict.fromkeys(row.table for row in ROWS))
