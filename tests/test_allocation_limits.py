"""Tables without a model: limits of several kinds at once, filled to the last rank and refused in time."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from torch import nn

from gmcompress.allocation import Table, check_budgets
from gmcompress.budgets import parse_budget
from gmcompress.planning import Eligible
from gmcompress.surgery import Site


def site(name: str, shape: tuple[int, ...]) -> Site:
    return Site(name, (), "Linear", shape, 1, prod(shape), 1, "", "")


def empty_table(shapes: Mapping[str, tuple[int, ...]], positions: Mapping[str, int] | None = None) -> Table:
    """What is known of float32 layers of these shapes before any fit, and nothing outside of them."""
    sites = tuple(site(name, shape) for name, shape in shapes.items())
    dense = sum(each.parameters for each in sites)
    totals = {"params": dense, "bytes": 4 * dense}
    if positions is not None:
        totals["macs"] = sum(positions[each.name] * each.parameters for each in sites)
    sizes = dict.fromkeys(shapes, 4)
    return Table(Eligible(sites, {}, {}, ()), sites, {}, "C1", totals, positions, sizes, False)


def dense_of(table: Table) -> nn.Module:
    """Layers of the shapes of a table, without numbers."""
    shapes = {name: each.shape for name, each in table.named.items()}
    return nn.ModuleDict(
        {name: nn.Linear(shape[1], shape[0], bias=False, device="meta") for name, shape in shapes.items()}
    )


# ------------------------------------------------------------------------------------------------------ looking it up


class Counted(tuple[Site, ...]):
    """Sites that count how many of them were looked at."""

    seen = 0

    def __iter__(self) -> Iterator[Site]:
        for each in super().__iter__():
            Counted.seen += 1
            yield each


def test_a_transformer_of_many_layers_is_looked_through_once() -> None:
    shapes = {"qkv": (192, 64), "out": (64, 64), "up": (256, 64), "down": (64, 256)}
    table = empty_table({f"{part} {n}": shape for n in range(72) for part, shape in shapes.items()})
    counted: Any = Counted(table.sites)
    check_budgets(replace(table, sites=counted), dense_of(table), None, parse_budget("50%"))
    assert Counted.seen <= 2 * 288
