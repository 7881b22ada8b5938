"""Selection: the solver against all choices, the bounds, the sweep, and what is said when nothing fits."""

import itertools
import math
import re

import numpy as np
import pytest
import scipy.optimize
from conftest import must_fail

from gmcompress.budgets import KINDS
from gmcompress.errors import GMError
from gmcompress.selection import Candidate, Selection, check_reachable, select, sweep

CASES = {  # the kinds of cost that are limited, and whether layers are tied
    "params": (("params",), False),
    "params and macs": (("params", "macs"), False),
    "all three": (("params", "bytes", "macs"), False),
    "ties": (("params",), True),
    "ties and macs": (("params", "macs"), True),
    "alike": (("params",), False),
    "alike, macs": (("params", "macs"), False),
    "alike, ties": (("params",), True),
}


def random_candidate(rng, name, size, losses):
    """Losses: small whole numbers with many equals, of all sizes, or nearly in proportion to the parameters saved."""
    params = int(rng.integers(0, size))
    loss = [rng.integers(0, 4), 10 ** rng.uniform(-9, 3), (size - params) * rng.uniform(0.8, 1.2)][losses]
    return Candidate(name, params, int(rng.integers(0, 4 * size)), int(rng.integers(0, 100 * size)), float(loss))


def market(seed, case):
    """A random table of up to 5 layers with up to 5 candidates, limits somewhere between all and nothing, and ties.

    Alike are layers of at most two different rows.
    """
    rng = np.random.default_rng([seed, list(CASES).index(case)])
    kinds, tied = CASES[case]
    size = 10 ** int(rng.integers(1, 8))  # few different costs, or many
    names = [None, "C2", "C4", "C8", "D4"]
    table = {}
    for layer in range(rng.integers(1, 6)):
        offered = rng.permutation(5)[: rng.integers(3 if tied else 1, 6)]
        table[f"layer{layer}"] = [random_candidate(rng, names[each], size, seed % 3) for each in offered]
    if case.startswith("alike"):
        rows = list(table.values())[:2]
        table = {f"layer{layer}": rows[rng.integers(len(rows))] for layer in range(rng.integers(2, 6))}
    fixed = {kind: int(rng.integers(0, size)) for kind in kinds}
    limits = {}
    for kind in kinds:
        costs = [[getattr(each, kind) for each in row] for row in table.values()]
        least, most = sum(map(min, costs)), sum(map(max, costs))
        limits[kind] = fixed[kind] + least + int(rng.uniform(0, 1) * (most - least))
    ties = [[str(name) for name in rng.choice(list(table), 2)] for _ in range(rng.integers(1, 3))] if tied else []
    return {"table": table, "limits": limits, "fixed_costs": fixed, "ties": ties}


def total(table, choice, kind):
    return sum(getattr(table[name][index], kind) for name, index in choice.items())


def fits(choice, table, limits, fixed_costs, ties):
    """Whether the choice keeps to the limits and the ties."""
    structure = {name: table[name][index].structure for name, index in choice.items()}
    return all(
        fixed_costs.get(kind, 0) + total(table, choice, kind) <= limit for kind, limit in limits.items()
    ) and all(structure[tie[0]] == structure[each] for tie in ties for each in tie)


def slow_select(table, limits, *, fixed_costs, ties, add=math.fsum):
    """The least loss over all choices that fit; None if there is none."""
    choices = (
        dict(zip(table, indices, strict=True))
        for indices in itertools.product(*(range(len(row)) for row in table.values()))
    )
    losses = [
        add(table[name][index].loss for name, index in choice.items())
        for choice in choices
        if fits(choice, table, limits, fixed_costs, ties)
    ]
    return min(losses, default=None)


def assert_adds_up(selection, table, limits, *, fixed_costs, ties):
    """The fields are those of the choice, and the choice keeps to the limits and the ties."""
    assert list(selection.choice) == list(table)
    assert fits(selection.choice, table, limits, fixed_costs, ties)
    assert selection.costs == {kind: total(table, selection.choice, kind) for kind in KINDS}
    assert selection.loss == math.fsum(table[name][index].loss for name, index in selection.choice.items())
    assert 0 <= selection.bound <= selection.loss
    assert math.isclose(selection.gap * selection.loss, selection.loss - selection.bound, rel_tol=1e-9, abs_tol=1e-300)


def assert_best(selection, least):
    assert math.isclose(selection.loss, least, rel_tol=1e-9)
    assert selection.gap == 0
    assert selection.bound == selection.loss


def assert_no_swap_is_better(selection, table, limits, *, fixed_costs, ties):
    """Another candidate in one layer, or in all layers tied together, never loses less within the limits."""
    for name, row in table.items():
        for other in row:
            choice = dict(selection.choice)
            for each in {name, *(each for tie in ties if name in tie for each in tie)}:
                names = [candidate.structure for candidate in table[each]]
                choice[each] = names.index(other.structure) if other.structure in names else choice[each]
            if fits(choice, table, limits, fixed_costs, ties):
                assert math.fsum(table[each][index].loss for each, index in choice.items()) >= selection.loss


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(60))
def test_the_choice_is_the_best_of_all(seed, case):
    subject = market(seed, case)
    if (least := slow_select(**subject)) is None:
        with pytest.raises(GMError, match=r"cannot be reached|share none"):
            select(**subject)
        return
    selection = select(**subject)
    assert_adds_up(selection, **subject)
    assert_no_swap_is_better(selection, **subject)
    assert_best(selection, least)
    if not subject["ties"]:
        assert_earlier_lose_less(selection, subject["table"])


def assert_earlier_lose_less(selection, table):
    """Of layers with the same row."""
    for (one, row), (other, same) in itertools.combinations(table.items(), 2):
        if row == same:
            assert row[selection.choice[one]].loss <= row[selection.choice[other]].loss


def test_most_of_the_market_can_be_chosen_from():
    """The control of the law above, which lets refusals pass where there is no choice."""
    reachable = [slow_select(**market(seed, case)) is not None for seed in range(60) for case in CASES]
    assert sum(reachable) > 320


KNAPSACK = {  # the best keeps b and c; a greedy choice by loss per saved parameter gives up c, then has room to spare
    "a": [Candidate(None, 10, 40, None, 0.0), Candidate("C8", 0, 0, None, 60.0)],
    "b": [Candidate(None, 20, 80, None, 0.0), Candidate("C8", 0, 0, None, 100.0)],
    "c": [Candidate(None, 30, 120, None, 0.0), Candidate("C8", 0, 0, None, 120.0)],
}


def naive_select(table, limit):
    """Give up the layer of least loss per parameter until it fits."""
    choice = dict.fromkeys(table, 0)
    for name in sorted(table, key=lambda name: table[name][1].loss / table[name][0].params):
        if total(table, choice, "params") > limit:
            choice[name] = 1
    loss = math.fsum(table[name][index].loss for name, index in choice.items())
    return Selection(choice, loss, {"params": total(table, choice, "params")}, loss, 0.0)


def test_greed_and_another_objective_are_seen():
    least = slow_select(KNAPSACK, {"params": 50}, fixed_costs={}, ties=())
    assert_best(select(KNAPSACK, {"params": 50}), least)
    must_fail(assert_best, naive_select(KNAPSACK, 50), least)
    subject = market(1, "params")
    assert_best(select(**subject), slow_select(**subject))
    must_fail(assert_best, select(**subject), slow_select(**subject, add=max))


def test_dominated_candidates_and_equals():
    row = [
        Candidate("worse", 10, 50, 5, 2.0),
        Candidate("same, more bytes", 10, 60, 5, 1.0),
        Candidate("C2", 10, 50, 5, 1.0),
        Candidate("C2 again", 10, 50, 5, 1.0),
        Candidate(None, 20, 80, 9, 0.0),
    ]
    assert select({"a": row}, {"params": 10}).choice == {"a": 2}
    assert select({"a": row}, {}).choice == {"a": 4}


def test_ties_go_by_structure_and_join():
    def row(*names):
        return [Candidate(name, 2 * (name is None) + 1, 0, None, len(name or "")) for name in names]

    table = {"a": row(None, "x", "yy"), "b": row("yy", "zz", "x"), "c": row("x", None, "yy"), "d": row(None, "x")}
    assert select(table, {"params": 9}, ties=[["a", "b"], ["c", "b"]]).choice == {"a": 1, "b": 2, "c": 0, "d": 0}
    assert select(table, {"params": 12}).choice == {"a": 0, "b": 2, "c": 1, "d": 0}
    with pytest.raises(GMError, match=r"share none: 'a' offers None, x, yy; 'e' offers w"):
        select(table | {"e": row("w")}, {"params": 99}, ties=[["a", "e"]])
    twice = {"a": [*row("x"), Candidate("x", 0, 0, None, 5.0)], "b": [*row("x"), Candidate("x", 1, 0, None, 0.5)]}
    assert select(twice, {"params": 1}, ties=[["a", "b"]]).choice == {"a": 1, "b": 1}


def with_milp(monkeypatch, change):
    """The solver, with its answer changed."""
    real = scipy.optimize.milp
    monkeypatch.setattr(scipy.optimize, "milp", lambda *args, **options: change(real(*args, **options)))


@pytest.mark.parametrize("case", ["params", "params and macs", "ties"])
def test_without_time_there_is_a_choice_and_a_true_bound(case):
    gaps = []
    for seed in range(60):
        subject = market(seed, case)
        try:
            selection = select(**subject, time_limit=0)
        except GMError:  # no choice exists, or none was found: the messages have their own tests
            continue
        least = slow_select(**subject)
        assert_adds_up(selection, **subject)
        assert_no_swap_is_better(selection, **subject)
        assert selection.bound <= least * (1 + 1e-9)
        assert least <= selection.loss * (1 + 1e-9)
        gaps.append(selection.gap)
    assert len(gaps) > 30
    assert max(gaps) > 0.01


def test_what_the_solver_had_when_the_time_ran_out_is_used(monkeypatch):
    def late(answer):
        return scipy.optimize.OptimizeResult({**answer, "status": 1, "mip_dual_bound": 0.0})

    found = 0
    for seed in range(60):
        subject = market(seed, "params")
        least, greedy = slow_select(**subject), select(**subject, time_limit=0)
        with monkeypatch.context() as patch:
            with_milp(patch, late)
            selection = select(**subject)
        assert math.isclose(selection.loss, least, rel_tol=1e-9)
        assert selection.bound <= least * (1 + 1e-9)
        found += selection.loss < greedy.loss and selection.gap > 0
    assert found > 1  # else there was nothing to be gained from the solver


def test_an_answer_over_the_limit_is_repaired_and_not_called_proven(monkeypatch):
    def too_large(answer):
        x = np.tile([1.0, 0.0], len(KNAPSACK))  # all dense
        return scipy.optimize.OptimizeResult({**answer, "x": x, "mip_dual_bound": 0.0})

    with_milp(monkeypatch, too_large)
    selection = select(KNAPSACK, {"params": 20})
    assert selection.costs["params"] <= 20
    assert math.isclose(selection.bound, 170)  # of the relaxation: without c and half of b
    assert selection.loss >= 180
    assert selection.gap > 0


def test_losses_of_very_different_sizes():
    """Tiny losses decide beside a huge one that no choice avoids, and under a huge one that a choice avoids."""
    tiny = {
        name: [Candidate(each.structure, each.params, 0, None, each.loss * 1e-9) for each in row]
        for name, row in KNAPSACK.items()
    }
    for huge in (
        [Candidate("C2", 5, 0, None, 1e3)],
        [Candidate("C2", 5, 0, None, 0.0), Candidate("C4", 0, 0, None, 1e3)],
    ):
        selection = select(tiny | {"huge": huge}, {"params": 55})
        assert selection.choice == {"a": 1, "b": 0, "c": 0, "huge": 0}


def test_costs_of_any_size_are_kept_to_the_last_unit():
    big = (1 << 49) + 1
    table = {
        "a": [
            Candidate(None, big + 1, 0, None, 0.0),
            Candidate("x", big, 0, None, 1.0),
            Candidate("y", 1, 0, None, 9.0),
        ],
        "b": [Candidate(None, 7, 0, None, 0.0), Candidate("x", 6, 0, None, 3.0)],
    }
    losses = [select(table, {"params": big + room}).loss for room in (8, 7, 6, 5)]
    assert losses == [0.0, 1.0, 4.0, 9.0]
    assert select(table, {"params": 10**30}).loss == 0


@pytest.mark.parametrize("time_limit", [30.0, 0.0])
@pytest.mark.parametrize("case", ["params", "params and macs"])
def test_a_larger_budget_never_loses_more(case, time_limit):
    for seed in range(10):
        subject = market(seed, case)
        table, limits, fixed = subject["table"], subject["limits"], subject["fixed_costs"]
        largest = {kind: max(getattr(each, kind) for row in table.values() for each in row) for kind in limits}
        ladder = [{kind: limits[kind] + step * largest[kind] // 3 for kind in limits} for step in (5, 0, 1, 3, 2, 4)]
        try:
            swept = sweep(table, ladder, fixed_costs=fixed, time_limit=time_limit)
        except GMError:
            continue
        for one, other in itertools.permutations(range(len(ladder)), 2):
            if all(ladder[one][kind] <= ladder[other][kind] for kind in limits):
                assert swept[one].loss >= swept[other].loss
        for selection, each in zip(swept, ladder, strict=True):
            assert_adds_up(selection, table, each, fixed_costs=fixed, ties=[])
    assert sweep(KNAPSACK, []) == []


def test_a_sweep_takes_the_better_choice_of_a_smaller_budget(monkeypatch):
    found = iter([60.0, 100.0, 0.0])

    def careless(*_, **__):
        loss = next(found)
        return Selection({}, loss, {"params": int(60 - loss / 6)}, loss / 2, 0.5)

    monkeypatch.setattr("gmcompress.selection.select", careless)
    swept = sweep(KNAPSACK, [{"params": 50}, {"params": 55}, {"params": 60}])
    assert [each.loss for each in swept] == [60.0, 60.0, 0.0]
    assert [each.bound for each in swept] == [30.0, 50.0, 0.0]
    assert [each.gap for each in swept] == [0.5, 1 / 6, 0.5]


def test_an_unreachable_limit_says_what_stands_in_the_way():
    table = {
        f"layer{n}": [Candidate(None, 4000 * n, 16_000 * n, None, 0.0), Candidate("C4", 1000 * n, 0, None, 1.0)]
        for n in range(1, 6)
    }
    with pytest.raises(GMError) as caught:
        select(table, {"params": 20_000}, fixed_costs={"params": 30_000}, totals={"params": 90_000})
    assert str(caught.value) == (
        "at most 20,000 parameters (22.2 %) cannot be reached: the smallest possible is 45,000 (50.0 %). Of these, "
        "30,000 (33.3 %) lie outside the layers to choose for; the largest inside are 'layer5' 5,000, 'layer4' 4,000, "
        "'layer3' 3,000"
    )
    assert select(table, {"params": 45_000}, fixed_costs={"params": 30_000}).loss == 5
    with pytest.raises(GMError, match=r"at most 44,999 parameters cannot .* is 45,000\. Of these, 30,000 lie"):
        select(table, {"params": 44_999, "bytes": 80_000}, fixed_costs={"params": 30_000})


def test_limits_that_exclude_each_other():
    table = {name: [Candidate("x", 1, 0, 50, 0.0), Candidate("y", 9, 0, 10, 0.0)] for name in "ab"}
    message = (
        r"at most 59 multiply-adds \(59\.0 %\) cannot be reached together with at most 10 parameters: "
        r"the smallest possible is 60 \(60\.0 %\)\. Of these, 0 \(0\.0 %\) lie outside .* 'a' 50, 'b' 10|'b' 50, 'a' 10"
    )
    with pytest.raises(GMError, match=message):
        select(table, {"params": 10, "macs": 59}, totals={"macs": 100})
    assert select(table, {"params": 10, "macs": 60}).loss == 0


@pytest.mark.parametrize("case", CASES)
def test_what_is_out_of_reach_is_known_from_the_costs_alone(case):
    """Each limit alone, and all of them together."""
    refused = 0
    for seed in range(60):
        subject = market(seed, case)
        if slow_select(**subject) is None:
            with pytest.raises(GMError, match=r"cannot be reached|share none") as early:
                check_reachable(**subject)
            with pytest.raises(GMError) as late:
                select(**subject)
            assert str(early.value).partition("; the largest")[0] == str(late.value).partition("; the largest")[0]
            refused += " together with " in str(early.value)
        else:
            check_reachable(**subject)
    assert (refused > 0) == (len(CASES[case][0]) > 1)


def test_no_choice_found_in_time_is_not_called_unreachable():
    said = []
    for seed in range(100):
        try:
            select(**market(seed, "ties and macs"), time_limit=0)
        except GMError as problem:
            said.append(str(problem))
    assert any(re.fullmatch(r"no choice within .* was found in 0 s; raise one or the other", each) for each in said)


GOOD = Candidate("C4", 1, 4, None, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": {}}, "the table is empty"),
        ({"table": {"fc": []}}, "layer 'fc' has no candidates"),
        ({"table": {"fc": [Candidate("C4", 1, 4, None, math.nan)]}}, "layer 'fc', candidate C4: a loss .* not nan"),
        ({"table": {"fc": [Candidate(None, 1, 4, None, math.inf)]}}, "candidate dense: a loss .* not inf"),
        ({"table": {"fc": [Candidate("C4", 1, 4, None, -1.0)]}}, "not -1.0"),
        ({"table": {"fc": [Candidate("C4", -1, 4, None, 0.0)]}}, "the parameters are a whole number .* not -1"),
        ({"table": {"fc": [Candidate("C4", 1, 4.5, None, 0.0)]}}, "the bytes are a whole number .* not 4.5"),
        ({"table": {"fc": [Candidate("C4", 1, None, 3, 0.0)]}}, "the bytes are a whole number .* not None"),
        ({"table": {"fc": [Candidate("C4", True, 4, None, 0.0)]}}, "not True"),
        ({"table": {"fc": [Candidate("C4", 1, 4, 1 << 51, 0.0)]}}, "the multiply-adds are a whole number"),
        ({"limits": {"macs": 9}}, "layer 'fc', candidate C4: the multiply-adds .* need example inputs"),
        ({"limits": {"flops": 9}}, "no cost is called 'flops'"),
        ({"limits": {"params": 0.5}}, "limits: the parameters are a whole number of at least 0, not 0.5"),
        ({"limits": {"params": -1}}, "not -1"),
        ({"limits": {"params": math.nan}}, "not nan"),
        ({"fixed_costs": {"params": -1}}, "fixed_costs: the parameters"),
        ({"fixed_costs": {"parameters": 1}}, "no cost is called 'parameters'; the nearest are 'params'"),
        ({"totals": {"params": "all"}}, "totals: the parameters"),
        ({"ties": [["fc", "fd"]]}, "a tie names 'fd', not in the table; the nearest are 'fc'"),
        ({"time_limit": -1}, "time_limit is a number of seconds of at least 0, not -1"),
        ({"time_limit": math.nan}, "not nan"),
    ],
)
def test_malformed_arguments_are_named(change, message):
    with pytest.raises(GMError, match=message):
        select(**{"table": {"fc": [GOOD]}, "limits": {"params": 9}, **change})


def test_unknown_multiply_adds_are_left_out_of_the_costs():
    assert select({"fc": [GOOD]}, {"params": 9}).costs == {"params": 1, "bytes": 4}
