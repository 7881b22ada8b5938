"""The benchmark of dynamics: its simulation obeys what it should, its networks keep to their sizes, and it runs."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close, must_fail
from torch import Generator, Tensor

from gmcompress import GMError

SIDE = 16


def turned(fields: Tensor) -> Tensor:  # (..., side, side)
    return fields.rot90(1, (-2, -1))


def turned_vectors(fields: Tensor) -> Tensor:  # (..., 2, side, side)
    """A quarter turn moves a vector at (r, c) to (side − 1 − c, r), and (down, right) becomes (−right, down)."""
    found = turned(fields)
    return torch.stack([-found[..., 1, :, :], found[..., 0, :, :]], -3)


def turned_states(states: Tensor) -> Tensor:  # (..., 3, side, side)
    return torch.cat([turned(states[..., :1, :, :]), turned_vectors(states[..., 1:, :, :])], -3)


def two_plumes(smoke: Any, imperfection: float) -> Any:
    """Two simulations with the same buoyancy, in float64."""
    places = torch.tensor([[[3.0, 4.0], [9.2, 10.5]], [[12.0, 1.3], [5.0, 6.0]]], dtype=torch.float64)
    inflow = smoke.discs(places, torch.tensor([[0.2, 0.3], [0.25, 0.2]], dtype=torch.float64), SIDE)
    return smoke.Setup(inflow, smoke.upward(imperfection, SIDE).double().expand(2, -1, -1, -1))


def test_a_flow_at_rest_moves_nothing_and_whole_cells_are_a_roll(modules: Any, generator: Generator) -> None:
    advected = modules("smoke").advected
    fields = torch.rand(2, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    still = torch.zeros(2, 2, SIDE, SIDE, dtype=torch.float64)
    assert torch.equal(advected(fields, still), fields)
    steady = torch.tensor([2.0, -3.0], dtype=torch.float64)[:, None, None].expand_as(still)
    assert_close(advected(fields, steady), fields.roll((2, -3), (2, 3)))
    halfway = advected(fields, still + 0.5)
    assert_close(halfway.sum((2, 3)), fields.sum((2, 3)))
    assert_close(halfway[:, :, 1, 1], fields[:, :, :2, :2].mean((2, 3)))
    must_fail(assert_close, halfway, fields)


def test_projection_leaves_no_divergence_and_changes_nothing_twice(modules: Any, generator: Generator) -> None:
    smoke = modules("smoke")
    flow = torch.randn(3, 2, SIDE, SIDE, generator=generator, dtype=torch.float64)
    found = smoke.projected(flow)
    assert float(smoke.divergence(flow).abs().max()) > 0.5
    assert float(smoke.divergence(found).abs().max()) < 1e-12
    assert float(found.mean((2, 3)).abs().max()) < 1e-12
    assert_close(smoke.projected(found), found)
    assert float(((flow - found) * found).sum().abs()) < 1e-9  # the nearest such flow


def test_smoke_is_never_negative_and_goes_up(modules: Any) -> None:
    smoke = modules("smoke")
    states = smoke.plumes(3, 30, elsewhere=False, imperfection=0.5, seed=0)
    assert float(states[:, :, 0].min()) >= 0
    assert float(smoke.divergence(states[:, -1, 1:]).abs().max()) < 1e-5
    carried = (states[:, -1, 0] * states[:, -1, 1]).sum((1, 2))
    assert bool((carried < 0).all())  # up is where rows begin
    assert torch.equal(states, smoke.plumes(3, 30, elsewhere=False, imperfection=0.5, seed=0))
    assert not torch.equal(states, smoke.plumes(3, 30, elsewhere=False, imperfection=0.5, seed=1))
    with pytest.raises(GMError, match="at least one simulation"):
        smoke.plumes(0, 30, elsewhere=False, imperfection=0.5, seed=0)


def test_inflows_are_where_they_should_be(modules: Any) -> None:
    smoke = modules("smoke")
    half = smoke.SIDE // 2
    for elsewhere in (False, True):
        first = smoke.plumes(40, 1, elsewhere=elsewhere, imperfection=0.5, seed=3)[:, 0, 0]
        peak = first.flatten(1).argmax(1)
        row, column = peak // smoke.SIDE, peak % smoke.SIDE
        inside = ((row - half) % smoke.SIDE <= half) & ((column - half) % smoke.SIDE <= half)  # rounded to a cell
        assert bool(inside.all()) if elsewhere else float(inside.float().mean()) < 0.2


def assert_turns(smoke: Any, setup: Any, other: Any) -> None:
    assert_close(smoke.simulated(other, 20), turned_states(smoke.simulated(setup, 20)), slack=100)


def test_a_turned_set_up_gives_a_turned_result_unless_the_symmetry_is_broken(modules: Any) -> None:
    smoke = modules("smoke")
    for imperfection in (0.0, 0.5):
        setup = two_plumes(smoke, imperfection)
        whole = smoke.Setup(turned(setup.inflow), turned_vectors(setup.buoyancy))
        assert_turns(smoke, setup, whole)
        upright = two_plumes(smoke, 0.0).buoyancy
        strength = setup.buoyancy[:, :1] / upright[:, :1]  # stays where it is, while all else is turned
        partly = smoke.Setup(turned(setup.inflow), strength * turned_vectors(upright))
        if imperfection:
            must_fail(assert_turns, smoke, setup, partly)
        else:
            assert_turns(smoke, setup, partly)


def assert_moves(smoke: Any, setup: Any) -> None:
    moved = smoke.Setup(setup.inflow.roll((3, 5), (1, 2)), setup.buoyancy)
    assert_close(smoke.simulated(moved, 20), smoke.simulated(setup, 20).roll((3, 5), (3, 4)), slack=100)


def test_inflows_elsewhere_give_the_same_elsewhere_unless_the_symmetry_is_broken(modules: Any) -> None:
    smoke = modules("smoke")
    assert_moves(smoke, two_plumes(smoke, 0.0))
    must_fail(assert_moves, smoke, two_plumes(smoke, 0.5))


def test_windows_do_not_mix_what_is_learned_with_what_is_judged(modules: Any) -> None:
    training = modules("dynamics_training")
    data = training.Data.made(2, 1)
    assert data.training.shape[1] == training.SPLIT - training.FIRST
    assert torch.equal(data.future[:, : training.SEEN], data.training[:, -training.SEEN :])
    assert data.future.shape[1] == training.SEEN + training.LAST - training.SPLIT
    assert not torch.equal(data.domain, data.held_out)
    with pytest.raises(GMError, match="too few"):
        training.windows(data.training, 100, 1)


def test_errors_are_those_of_the_forecast(modules: Any, generator: Generator) -> None:
    training = modules("dynamics_training")
    states = torch.randn(2, 14, 3, 4, 4, generator=generator, dtype=torch.float64)
    found = training.errors(training.unchanged, states, 3)
    squares: dict[str, list[float]] = {"density": [], "velocity": []}
    for simulation in states:
        for first in range(0, 14 - 5 + 1, 4):
            for later in range(3):
                apart = (simulation[first + 2 + later] - simulation[first + 1]).square()
                squares["density"] += apart[0].flatten().tolist()
                squares["velocity"] += apart[1:].flatten().tolist()
    assert_close(found["velocity"], math.sqrt(sum(squares["velocity"]) / len(squares["velocity"])))
    assert_close(found["density"], math.sqrt(sum(squares["density"]) / len(squares["density"])))


def test_a_relaxed_convolution_is_plain_until_its_weights_differ(modules: Any, generator: Generator) -> None:
    models = modules("dynamics_models")
    torch.manual_seed(0)
    layer = models.RelaxedConv(2, 3, 3, banks=2, side=8).double()
    signal = torch.randn(2, 2, 8, 8, generator=generator, dtype=torch.float64)

    def commutes() -> None:
        assert_close(layer(signal.roll((1, 2), (2, 3))), layer(signal).roll((1, 2), (2, 3)))

    commutes()
    with torch.no_grad():
        layer.weights[0, 3, 4] = 5.0
    must_fail(commutes)
    patch = signal[:, :, 2:5, 3:6]  # around (3, 4)
    weighed = layer.filters[0] * 5.0 + layer.filters[1]
    assert_close(layer(signal)[:, :, 3, 4], torch.einsum("oiuv,biuv->bo", weighed, patch) + layer.bias)


def test_group_matrices_commute_with_the_subgroup_until_gates_differ(modules: Any, generator: Generator) -> None:
    gated, ungated = (row.build() for row in modules("dynamics_models").ROWS[:2])
    signal = torch.randn(1, 6, 32, 32, generator=generator)

    def commutes(network: Any, step: int) -> None:
        with torch.no_grad():
            moved = network(signal.roll((step, 2 * step), (2, 3)))
            assert_close(moved, network(signal).roll((step, 2 * step), (2, 3)), slack=10)

    commutes(ungated, 4)
    must_fail(commutes, ungated, 1)
    commutes(gated, 4)  # filters behind the gates begin at zero
    torch.nn.init.ones_(gated.gates.filters)
    must_fail(commutes, gated, 4)


def test_a_network_learns_to_forecast(modules: Any) -> None:
    models, training = modules("dynamics_models"), modules("dynamics_training")
    data = training.Data.made(4, 1)
    torch.manual_seed(0)
    model = models.Forecaster(models.convolutions(6, 3), data.training)
    recipe = training.Recipe()
    before = training.errors(model, data.held_out, 5)["velocity"]
    training.train(model, data.training, recipe, 1e-2, seed=0, steps=40)
    after = training.errors(model, data.held_out, 5)["velocity"]
    assert after < 0.8 * training.errors(training.unchanged, data.held_out, 5)["velocity"]
    assert after < before
    with pytest.raises(training.DivergenceError, match="smaller rates"):
        training.train(model, data.training, recipe, math.inf, seed=0, steps=3)


def test_only_a_rate_at_which_the_loss_is_lost_is_passed_over(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dynamics, training, row = modules("dynamics"), modules("dynamics_training"), modules("dynamics_models").ROWS[0]
    options = dynamics.parse(["--smoke"])

    def tried(problem: GMError) -> dict[str, float]:
        def learn(_bench: Any, _row: Any, lr: float, **_options: Any) -> tuple[Any, dict[str, Any]]:
            if lr > 1:
                raise problem
            return training.unchanged, {}

        monkeypatch.setattr(dynamics, "learn", learn)
        data, recipe = training.Data.made(1, 1), training.Recipe(rates=(1.0, 2.0))
        return dynamics.rates(dynamics.Bench(data, recipe, torch.device("cpu"), options, {}, None), row)

    assert list(tried(training.DivergenceError("the loss is no number"))) == ["1"]
    with pytest.raises(GMError, match="another"):
        tried(GMError("another fault, which is no number either"))


def test_every_row_runs_keeps_to_its_size_and_is_taken_over(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dynamics, rows = modules("dynamics"), modules("dynamics_models").ROWS
    output = tmp_path / "dynamics.jsonl"
    arguments = ["--smoke", "--output", str(output)]
    assert dynamics.main(arguments) == 0
    first = modules("rows").read_rows(output)
    assert [each["row"] for each in first] == [row.name for row in rows]
    for line in first:
        assert line["parameters"] <= line["most"]
        assert math.isfinite(line["loss"])
        assert line["future"].keys() == line["domain"].keys() == {"density", "velocity"}
        assert line["lr"] in map(float, line["tried"])
        assert str(tmp_path) not in line["command"]
    ours = max(each["parameters"] for each in first if each["ours"])
    assert ours <= min(each["parameters"] for each in first if not each["ours"])
    said = capsys.readouterr().out
    assert all(row.name in said for row in rows)
    assert dynamics.main([*arguments, "--resume", "--rows", rows[0].name, "--seeds", "0", "1"]) == 0
    assert [each["seed"] for each in modules("rows").read_rows(output)] == [0] * len(first) + [1]
    assert modules("rows").read_rows(output)[-1]["tried"] == first[0]["tried"]
    monkeypatch.setattr(dynamics, "ROWS", (replace(rows[0], most=10),))
    assert dynamics.main(["--smoke", "--rows", rows[0].name, "--output", str(tmp_path / "y.jsonl")]) == 2
    assert "more than 10" in capsys.readouterr().err
    assert not (tmp_path / "y.jsonl").exists()


def test_ahead_is_ahead_of_every_other_by_more_than_the_spread(modules: Any) -> None:
    verdict = modules("dynamics").verdict

    def row(name: str, ours: bool, future: float, domain: float) -> dict[str, Any]:
        errors = {"future": {"velocity": future, "density": 1.0}, "domain": {"velocity": domain, "density": 1.0}}
        return {"row": name, "ours": ours, **errors}

    rows = [row("a", True, 1.0, 1.0), row("a", True, 1.2, 3.0), row("b", False, 2.0, 2.2), row("c", False, 9.0, 9.0)]
    behind = {"density, Future": False, "density, Domain": False}
    assert verdict(rows) == {"velocity, Future": True, "velocity, Domain": False, **behind}
    assert verdict(rows[1:]) == {"velocity, Future": True, "velocity, Domain": False, **behind}
    assert verdict([rows[0], *rows[2:]]) == {"velocity, Future": True, "velocity, Domain": True, **behind}
    assert verdict([*rows, row("d", True, 0.1, 0.1)]) == verdict(rows)  # the first of ours is the one that counts
    with pytest.raises(GMError, match="of others are needed"):
        verdict(rows[:2])
