"""The solver: silent, named where it is missing, and quick with many layers, different or alike."""

import ctypes
import os
import sys
import time
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
from test_selection import KNAPSACK, assert_earlier_lose_less, with_milp

from gmcompress.errors import GMError
from gmcompress.selection import Candidate, select


def test_without_scipy_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(GMError, match="needs the package 'scipy'"):
        select(KNAPSACK, {"params": 50})


def test_time_that_runs_out_on_the_way_to_the_solver_is_none(monkeypatch):
    """As on a machine that does much else: of 30 s, 40 have passed when the solver is told how many are left."""
    told, real = [], scipy.optimize.milp

    def milp(*args, options, **rest):
        told.append(options.get("time_limit", 0.0))
        return real(*args, options=options, **rest)

    monkeypatch.setattr(scipy.optimize, "milp", milp)
    monkeypatch.setattr("gmcompress.selection.time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr("gmcompress.knapsack.time", SimpleNamespace(monotonic=count(20.0, 20.0).__next__))
    assert select(KNAPSACK, {"params": 50}, time_limit=30).loss == 60
    assert told[0] == 0


def chatter(answer):
    ctypes.CDLL(None).printf(b"buffered by C\n")
    os.write(1, b"not buffered\n")
    return answer


def test_the_solver_prints_nothing(monkeypatch, capfd):
    print("before")
    with_milp(monkeypatch, chatter)
    select(KNAPSACK, {"params": 50})
    print("after")
    sys.stdout.flush()
    assert capfd.readouterr() == ("before\nafter\n", "")
    chatter(None)  # the control
    ctypes.CDLL(None).fflush(None)
    assert sorted(capfd.readouterr().out.splitlines()) == ["buffered by C", "not buffered"]


def test_standard_output_comes_back_after_a_failure(monkeypatch, capfd):
    def fail(answer):
        raise RuntimeError(answer.status)

    with_milp(monkeypatch, fail)
    with pytest.raises(RuntimeError):
        select(KNAPSACK, {"params": 50})
    os.write(1, b"heard\n")
    assert capfd.readouterr().out == "heard\n"


@pytest.mark.parametrize("kinds", [("params",), ("params", "macs")], ids=str)
def test_layers_that_are_all_alike_take_seconds(kinds):
    """Told apart, they would be searched through in every order."""
    rng = np.random.default_rng(0)
    rows = []
    for size in (1, 3, 4):
        shares, dense = rng.uniform(0.01, 0.9, (2, 31)), size * 768 * 768
        losses = (1 - shares[0]) ** 2 * rng.uniform(0.7, 1.3, 31)
        rows.append([Candidate(None, dense, 4 * dense, dense, 0.0)])
        for n, (share, macs, loss) in enumerate(zip(*shares, losses, strict=True)):
            rows[-1].append(Candidate(f"C{n}", int(dense * share), 0, int(dense * macs), float(loss)))
    for kept in ([0], [0, 1, 2]):
        table = {f"layer{layer}": rows[kept[layer % len(kept)]] for layer in range(288)}
        limits = {kind: int(0.3 * sum(row[0].params for row in table.values())) for kind in kinds}
        selection = select(table, limits, time_limit=10)
        assert selection.gap == 0
        assert_earlier_lose_less(selection, table)
        assert selection == select(table, limits, time_limit=10)


def test_a_large_network_takes_seconds():
    rng = np.random.default_rng(0)
    table = {}
    for layer in range(400):
        dense, size = int(2 ** rng.uniform(10, 22)), 10 ** rng.uniform(-9, 3)
        shares = rng.uniform(0.01, 0.9, 31)
        losses = size * (1 - shares) ** 2 * rng.uniform(0.7, 1.3, 31)
        table[f"layer{layer}"] = [Candidate(None, dense, 4 * dense, None, 0.0)] + [
            Candidate(f"C{n}", int(dense * share), int(4 * dense * share), None, float(loss))
            for n, (share, loss) in enumerate(zip(shares, losses, strict=True))
        ]
    limit = sum(row[0].params for row in table.values()) // 3
    start = time.process_time()
    selection = select(table, {"params": limit})
    assert time.process_time() - start < 5
    assert selection.gap == 0
    assert selection.costs["params"] <= limit
