"""Budgets: everything a user may write, read exactly; everything else refused by name."""

import json
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest

from gmcompress.budgets import Budget, parse_budget
from gmcompress.errors import GMError

QUARTER = Budget("params", 0.25, relative=True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("25%", [("params", 0.25, True)]),
        (" 25 % ", [("params", 0.25, True)]),
        ("33.3%", [("params", 0.333, True)]),
        (".5%", [("params", 0.005, True)]),
        ("100.%", [("params", 1.0, True)]),
        (0.25, [("params", 0.25, True)]),
        (1.0, [("params", 1.0, True)]),
        (np.float64(0.25), [("params", 0.25, True)]),
        (Fraction(1, 4), [("params", 0.25, True)]),
        ({"bytes": "12.5%"}, [("bytes", 0.125, True)]),
        ({"macs": 0.5}, [("macs", 0.5, True)]),
        ({"macs": 1.0}, [("macs", 1.0, True)]),
        ({"macs": 1}, [("macs", 1, False)]),
        ({"params": 100_000}, [("params", 100_000, False)]),
        ({"params": 1e5}, [("params", 100_000, False)]),
        ({"params": np.int64(7)}, [("params", 7, False)]),
        ({"params": (1 << 60) + 1}, [("params", (1 << 60) + 1, False)]),
        ({"macs": 0.5, "bytes": 9, "params": "1%"}, [("macs", 0.5, True), ("bytes", 9, False), ("params", 0.01, True)]),
        (QUARTER, [("params", 0.25, True)]),
        ((QUARTER, Budget("bytes", 8, relative=False)), [("params", 0.25, True), ("bytes", 8, False)]),
    ],
)
def test_what_may_be_written(given, expected):
    parsed = parse_budget(given)
    assert [(each.what, each.limit, each.relative) for each in parsed] == expected
    assert all(type(each.limit) is (float if each.relative else int) for each in parsed)
    assert parse_budget(parsed) == parsed
    assert tuple(Budget(**each) for each in json.loads(json.dumps([asdict(each) for each in parsed]))) == parsed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0.25", "a percentage above 0 % and up to 100 %, as \"25%\", not '0.25'"),
        ("", "not ''"),
        ("a quarter", "not 'a quarter'"),
        ("0%", "not '0%'"),
        ("-5%", "not '-5%'"),
        ("100.1%", r"not '100.1%'"),
        ("1e1%", "not '1e1%'"),
        ("nan%", "not 'nan%'"),
        ("٢٥%", "not '٢٥%'"),
        ("9" * 5000 + "%", "up to 100 %"),
        (0.0, "a share of more than 0 and at most 1, not 0.0"),
        (-0.5, "not -0.5"),
        (1.5, "at most 1, not 1.5"),
        (100.0, "at most 1, not 100.0"),
        (float("nan"), "not nan"),
        (float("inf"), "not inf"),
        (True, "not True"),
        (None, "not None"),
        (100_000, '100000 of what\\? write {"params": 100000}'),
        ([QUARTER], "a budget is a share such as"),
        ((), "a budget is a share such as"),
        ((QUARTER, QUARTER), "limit the same thing: 25 % of the parameters, 25 % of the parameters"),
        ({}, "at least one of params, bytes, macs"),
        ({"parms": "25%"}, "no cost is called 'parms'; the nearest are 'params'"),
        ({3: "25%"}, "no cost is called 3"),
        ({"params": "25"}, "not '25'"),
        ({"params": True}, "a budget of parameters is a number or a share .* not True"),
        ({"params": None}, "not None"),
        ({"macs": 0}, "multiply-adds is a share of more than 0 and at most 1, or a whole number of at least 1, not 0"),
        ({"macs": -3}, "not -3"),
        ({"macs": 1.5}, "not 1.5"),
        ({"macs": float("nan")}, "not nan"),
        ({"macs": float("inf")}, "not inf"),
        ({"bytes": "25%", "macs": -1.0}, "budget of multiply-adds .* not -1.0"),
    ],
)
def test_anything_else_is_refused(given, message):
    with pytest.raises(GMError, match=message):
        parse_budget(given)


@pytest.mark.parametrize(
    ("what", "limit", "relative"),
    [
        ("parameters", 0.5, True),
        ("params", 0, True),
        ("params", 1.1, True),
        ("params", float("nan"), True),
        ("params", 0.5, False),
        ("params", float("inf"), False),
        ("params", float("nan"), False),
        ("params", "25%", True),
        ("params", True, True),
    ],
)
def test_no_budget_out_of_range_exists(what, limit, relative):
    with pytest.raises(GMError):
        Budget(what, limit, relative=relative)


def test_a_share_is_the_decimal_number_that_was_written():
    for thousandths in range(1, 1001):
        (budget,) = parse_budget(f"{thousandths / 10}%")
        assert budget.absolute(1000) == thousandths
        assert budget.absolute(999) == thousandths * 999 // 1000
        assert parse_budget(thousandths / 1000) == (budget,)
    assert int(0.29 * 100) == 28  # the control: what the product of floats would have kept
    assert QUARTER.absolute((1 << 60) + 3) == 1 << 58
    assert Budget("bytes", 12, relative=False).absolute(5) == 12


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("25%", "25 % of the parameters"),
        (1.0, "100 % of the parameters"),
        ("33.3%", "33.3 % of the parameters"),
        ({"macs": 0.000123}, "0.0123 % of the multiply-adds"),
        ({"bytes": 100_000}, "at most 100,000 bytes"),
    ],
)
def test_a_budget_prints_as_a_phrase(given, text):
    assert str(parse_budget(given)[0]) == text
