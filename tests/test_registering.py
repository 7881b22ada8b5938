"""Classes of one's own whose parameters are matrices: registered, and refused where that does not fit."""

import pytest
import torch
import zoo
from torch import nn

import gmcompress as gm
from gmcompress.attaching import empty, exchange
from gmcompress.kinds import View, view_of


class Mine(nn.Module):
    """A layer of a user."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.w


@pytest.mark.parametrize(
    ("arguments", "layouts", "message"),
    [
        ((3,), {"w": "oi"}, "a class of torch.nn.Module, not 3"),
        ((dict,), {"w": "oi"}, "a class of torch.nn.Module"),
        ((Mine,), {}, r"which parameters of Mine are matrices\? Write register\(Mine"),
        ((Mine,), {"w": "ox"}, "a letter for each axis, .* not 'ox'"),
        ((Mine,), {"w": "ok"}, "o and i among them"),
        ((Mine,), {"w": 3}, "not 3"),
    ],
)
def test_bad_registrations_are_refused(arguments, layouts, message):
    with pytest.raises(gm.GMError, match=message):
        gm.register(*arguments, **layouts)


def test_registrations_that_do_not_fit_are_told_when_the_model_is_seen():
    model = nn.Sequential(Mine(), nn.Linear(8, 3))
    assert "register" in gm.plan(nn.Sequential(Mine(), *zoo.mlp()), "C4", rank=1).skipped["0.w"]
    gm.register(Mine, w="oik")
    with pytest.raises(gm.GMError, match="registered with w='oik', but its w has 2 axes"):
        gm.plan(model, "C4", rank=1)
    gm.register(Mine, v="oi")
    with pytest.raises(gm.GMError, match="registered with 'v', but has no such parameter; near: 'w'"):
        gm.plan(model, "C4", rank=1)
    gm.register(Mine, w="io")
    assert list(gm.plan(model, "C4", rank=1).layers) == ["0.w"]
    assert view_of(model[0], "w", model[0].w) == View("io", (8, 8))


def test_what_is_no_matrix_is_refused():
    class Closed(nn.Linear):
        def __init_subclass__(cls, *, name):
            cls.name = name

    with pytest.raises(gm.GMError, match=r"Closed cannot compute its weight: .*; exclude it"):
        gm.compress(nn.Sequential(Closed(8, 8), nn.Linear(8, 3)), "C4", rank=1)
    plan = gm.plan(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), "C4", rank=1)

    class Registry(nn.Linear):
        def __init_subclass__(cls):
            raise RuntimeError("no more of these")

    with pytest.raises(gm.GMError, match="Registry cannot compute its weight: no more of these; exclude it"):
        gm.compress(nn.Sequential(Registry(8, 8), nn.Linear(8, 3)), "C4", rank=1)
    taken = zoo.mlp()
    taken[0].structured_weight = nn.Linear(16, 16)
    with pytest.raises(gm.GMError, match="Linear has a 'structured_weight' of its own; exclude its weight"):
        gm.compress(taken, "C4", rank=1)
    with pytest.raises(gm.GMError, match=r"another network: '0' .*is not known to be a matrix here"):
        gm.compress(nn.Sequential(nn.ReLU(), nn.Linear(8, 3)), plan=plan)
    with pytest.raises(gm.GMError, match="no structured layer for weight of LayerNorm"):
        empty(nn.LayerNorm((4, 4)), "", "C4")
    with pytest.raises(gm.GMError, match="no module 'wieght'"):
        exchange(nn.Embedding(8, 8), {"wieght": gm.GMWeight((8, 8), "C4")})
    with pytest.raises(gm.GMError, match="not initialised yet"):
        gm.compress(nn.Sequential(nn.LazyConv1d(8, 3)), "C4", rank=1)
    with pytest.raises(gm.GMError, match="meta device"):
        gm.compress(nn.Embedding(8, 8, device="meta"), "C4", rank=1)
