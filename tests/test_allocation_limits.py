"""Tables without a model: limits of several kinds at once, filled to the last rank and refused in time."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from conftest import must_fail
from torch import nn

import gmcompress as gm
from gmcompress.allocation import Table, check_budgets, fill
from gmcompress.budgets import parse_budget
from gmcompress.planning import Eligible
from gmcompress.structure import Structure
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
    assert 288 <= Counted.seen <= 2 * 288


# ------------------------------------------------------------------------------------------------- filling what is left


def laddered(shapes: Mapping[str, tuple[int, ...]], positions: Mapping[str, int], **options: Any) -> Table:
    """A table of dense layers and low ranks of two sizes, that lose in proportion to what they leave out."""
    table = replace(empty_table(shapes, positions), **options)
    rungs = {
        name: [None, *(Structure.factors(rank) for rank in (1, min(shape) // 4))] for name, shape in shapes.items()
    }
    found = {
        name: [replace(each, loss=1 - each.params / prod(shapes[name])) for each in table.priced(name, row)]
        for name, row in rungs.items()
    }
    return replace(table, candidates=found)


def ranks_of(found: Mapping[str, Structure | None]) -> list[int]:
    return [each.lowrank for each in found.values() if each is not None]


def test_ranks_grow_into_what_is_left() -> None:
    small = dict.fromkeys("ab", Structure.parse("lowrank:1"))

    def ranks(room: int, sizes: tuple[int, int] = (1, 1), fixed: tuple[str, ...] = ()) -> list[int]:
        table = laddered(dict.fromkeys("ab", (16, 16)), {"a": 1, "b": 1}, itemsizes=dict(zip("ab", sizes, strict=True)))
        return ranks_of(fill(small, table, {"bytes": room}, fixed=fixed))

    assert ranks(31) == [1, 1]
    assert ranks(64) == [3, 1]
    assert ranks(64, fixed=("a",)) == [1, 3]
    assert ranks(128) == [4, 2], "up to the next rung, then the next layer"
    assert ranks(128, (4, 2)) == [1, 3], "where a number takes fewer bytes"
    assert ranks(383, (4, 2)) == [2, 4]
    others = {"a": None, "b": Structure.parse("C4")}
    assert fill(others, laddered(dict.fromkeys("ab", (16, 16)), {"a": 1, "b": 1}), {"params": 99}) == others


SHAPES = {"a": (16, 16), "b": (16, 24), "c": (32, 16)}
POSITIONS = {"a": 1, "b": 9, "c": 4}


def costs_of(table: Table, ranks: Mapping[str, int]) -> dict[str, int]:
    """What low ranks of these layers cost, from the formulas."""
    stored = {name: rank * sum(table.named[name].shape) for name, rank in ranks.items()}
    macs = sum(POSITIONS[name] * each for name, each in stored.items())
    return {"params": sum(stored.values()), "bytes": 4 * sum(stored.values()), "macs": macs}


def assert_filled(table: Table, ranks: Mapping[str, int], limits: Mapping[str, int]) -> None:
    """Within all limits, and beyond one of them with any larger ranks below the next rungs: by all of them."""

    def fits(each: Mapping[str, int]) -> bool:
        return all(costs_of(table, each)[kind] <= limit for kind, limit in limits.items())

    assert fits(ranks)
    ladder = {name: (1, min(table.named[name].shape) // 4) for name in ranks}
    most = {
        name: ladder[name][1] if rank <= ladder[name][1] else min(table.named[name].shape)
        for name, rank in ranks.items()
    }
    for more in product(*(range(ranks[name], most[name] + 1) for name in ranks)):
        larger = dict(zip(ranks, more, strict=True))
        dense = any(costs_of(table, {name: larger[name]})["params"] >= prod(table.named[name].shape) for name in larger)
        assert larger == ranks or dense or not fits(larger)


@pytest.mark.parametrize("kinds", [("params",), ("macs",), ("params", "macs"), ("macs", "bytes", "params")], ids=str)
def test_limits_of_several_kinds_are_filled_to_the_last_rank(kinds: tuple[str, ...]) -> None:
    table = laddered(SHAPES, POSITIONS)
    small = dict.fromkeys(SHAPES, 1)
    base, top = costs_of(table, small), costs_of(table, {"a": 7, "b": 8, "c": 9})
    grown = 0
    for seed in range(40):
        shares = np.random.default_rng(seed).uniform(0, 1, len(kinds))
        limits = {
            kind: base[kind] + int(share * (top[kind] - base[kind])) for kind, share in zip(kinds, shares, strict=True)
        }
        start = dict.fromkeys(SHAPES, Structure.parse("lowrank:1"))
        found = fill(start, table, {kind: limits[kind] - base[kind] for kind in kinds})
        ranks = dict(zip(SHAPES, ranks_of(found), strict=True))
        assert_filled(table, ranks, limits)
        if ranks != small:
            must_fail(assert_filled, table, small, limits)
            grown += 1
    assert grown > 20


# ------------------------------------------------------------------------------------------------------ refused in time


def nothing_yet(*_: object, **__: object) -> None:
    raise AssertionError("the budget could have been refused before")


def test_limits_that_exclude_each_other_are_refused_before_any_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Group matrices have the fewest numbers here, low ranks the fewest multiply-adds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), *(nn.Linear(16, 16, bias=False) for _ in range(3)), nn.Linear(16, 5))
    outside = {"params": 8 * 16 + 16 + 16 * 5 + 5, "macs": 8 * 16 + 16 * 5}
    budget = {"params": outside["params"] + 3 * 16, "macs": outside["macs"] + 3 * 32}
    options: dict[str, Any] = {"inputs": torch.randn(1, 8), "exclude": "0"}
    with monkeypatch.context() as patch:
        patch.setattr("gmcompress.jobs.check_budgets", lambda *_: None)
        with pytest.raises(gm.GMError, match="cannot be reached together with at most") as late:
            gm.plan(model, "C16", budget=budget, **options)
    for work in ("tabulate", "calibrate"):
        monkeypatch.setattr(f"gmcompress.jobs.{work}", nothing_yet)
    with pytest.raises(gm.GMError) as early:
        gm.plan(model, "C16", budget=budget, **options)
    assert str(early.value) == str(late.value)
    for kind in budget:
        with pytest.raises(AssertionError, match="could have been"):
            gm.plan(model, "C16", budget={kind: budget[kind]}, **options)
