"""Laws of the product on a group: every way is the slow twin's, and costs what its formula says."""

import itertools

import numpy as np
import pytest
import torch
from conftest import assert_close, must_fail
from market import GROUPS, slow_subgroups
from torch import Generator, Tensor

from gmcompress.errors import GMError
from gmcompress.groups import cyclic, group
from gmcompress.stencils import METHODS, Stencil, depthwise, multiply

SMALL = [name for name in GROUPS if group(name).order <= 8]


def slow_product(signal: Tensor, kernel: Tensor, table: np.ndarray, members: list[int], taps: list[int]) -> Tensor:
    """Σ_c Σ_u k[o, c, u] x[c, h·u], number by number."""
    found = torch.zeros(len(signal), len(kernel), len(members), dtype=signal.dtype)
    places = itertools.product(range(len(signal)), range(len(kernel)), range(len(members)))
    for b, o, h in places:
        for c, u in itertools.product(range(kernel.shape[1]), range(len(taps))):
            found[b, o, h] += kernel[o, c, u] * signal[b, c, int(table[members[h], taps[u]])]
    return found


def assert_product(stencil: Stencil, method: str, signal: Tensor, kernel: Tensor, expected: Tensor) -> None:
    table = torch.tensor(stencil.table(method))
    assert_close(multiply(signal, kernel, stencil, method=method, table=table), expected)


@pytest.mark.parametrize("name", SMALL)
def test_every_way_is_the_slow_twin(name: str, generator: Generator) -> None:
    table = group(name).table
    n = len(table)
    signal = torch.randn(2, 2, n, generator=generator, dtype=torch.float64)
    subsets = [[0], [n - 1], list(range(0, n, 2)), torch.randperm(n, generator=generator).tolist()]
    for members in [*slow_subgroups(table)[:6], list(range(n))]:
        for taps in subsets:
            stencil = Stencil(group(name), np.array(members), np.array(taps))
            kernel = torch.randn(1, 2, len(taps), generator=generator, dtype=torch.float64)
            expected = slow_product(signal, kernel, table, members, taps)
            for method in stencil.costs(1, 2):
                assert_product(stencil, method, signal, kernel, expected)
                must_fail(assert_product, stencil, method, signal, kernel + 1e-6, expected)
                must_fail(assert_product, stencil, method, signal.roll(1, 0), kernel, expected)
            apart = [slow_product(signal[:, [c]], kernel[:, [c]], table, members, taps) for c in (0, 1)]
            way = "circular" if stencil.box else "taps"
            assert_close(
                depthwise(signal, kernel[0], stencil, table=torch.tensor(stencil.table(way))), torch.cat(apart, 1)
            )


def test_boxes_are_those_of_products_of_cyclic_groups() -> None:
    for name, size in (("C8", (3,)), ("C8xC4", (3, 3)), ("C4xC4xC4", (3, 3, 3)), ("C2^6", None), ("D4", None)):
        stencil = Stencil(group(name), np.arange(group(name).order), np.array([0, *group(name).generators, 1]))
        inverse = stencil.group.inverse[stencil.taps]
        both = Stencil(stencil.group, stencil.members, np.unique(np.concatenate([stencil.taps, inverse])))
        assert (both.box and both.box.size) == size
    diagonal = Stencil(group("C4xC4"), np.array([0, 5, 10, 15]), np.array([0, 1]))
    assert diagonal.box is None, "a subgroup across the axes is no stride"


def test_costs() -> None:
    ring = Stencil(cyclic(64), np.arange(64), np.array([0, 1, 63]))
    costs = ring.costs(4, 2)
    assert set(costs) == set(METHODS)
    assert ring.method(4, 2) == min(costs, key=lambda each: costs[each])
    assert "dense" not in ring.costs(64, 64)
    assert ring.costs(8, 2)["circular"] == 2 * costs["circular"]
    assert Stencil(group("C32xC32"), np.arange(1024), np.arange(1024)).method(16, 16) == "fourier"
    assert set(Stencil(group("D4"), np.arange(8), np.array([0])).costs(1, 1)) == {"dense", "taps"}
    with pytest.raises(GMError, match="no way to multiply"):
        Stencil(group("D4"), np.arange(8), np.array([0])).table("circular")
    with pytest.raises(GMError, match="no way to multiply"):
        ring.table("fft")
