"""Blocks whose layers are refitted together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gmcompress as gm
from gmcompress import blocks
from gmcompress.attaching import structured
from gmcompress.blocks import Refit, refit_blocks

WIDTH = 16
PLAN: dict[str, Any] = {"rank": 0, "overrides": {"*": "adapted:2:2x2"}, "effort": 0.1}


class Residual(nn.Module):
    """A block with a shortcut; `style` is how it takes and gives its tensors, or what is odd about it."""

    def __init__(self, style: str = "") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.style = style

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Any:
        if self.style == "in place":
            x.mul_(0.9)
        if self.style == "outside" and not Stack.runs:
            raise LookupError("there is no run around this block")
        hidden = self.down(torch.relu(self.up(self.norm(x))))
        hidden = hidden.detach() if self.style == "no gradients" else hidden
        found = x + scale * hidden
        return (found, None) if self.style == "tuple" else found


class Stack(nn.Module):
    """Residual blocks in a list, between a first and a last layer."""

    runs = 0  # of any of them, at present

    def __init__(self, style: str = "", depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Residual(style) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 5)
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        options: dict[str, Any] = {"scale": 1.5} if self.style == "keyword" else {}
        try:
            Stack.runs += 1
            for block in self.blocks:
                x = block(x, **options)
                x = x[0] if self.style == "tuple" else x
                x = block(x) if self.style == "twice" else x
        finally:
            Stack.runs -= 1
        return self.head(x)


def examples(count: int = 512) -> list[Tensor]:
    torch.manual_seed(1)
    mixed = torch.randn(4, 8)
    return [torch.randn(128, 4) @ mixed + 0.1 * torch.randn(128, 8) for _ in range(count // 128)]


def built(style: str = "") -> nn.Module:
    torch.manual_seed(0)
    return Stack(style).eval()


def unrefitted(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> gm.Result:
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "WORK", 0.0)
        return gm.compress(model, "C4", **PLAN, data=examples())


def error(small: nn.Module, dense: nn.Module) -> float:
    inputs = torch.cat(examples(1024)[4:])  # none of those that were calibrated on
    with torch.no_grad():
        wanted = dense(inputs)
        return float((small(inputs) - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("style", ["", "in place", "tuple", "keyword"])
def test_refitting_brings_the_outputs_nearer(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = built(style)
    before = {name: each.clone() for name, each in dense.state_dict().items()}
    without = unrefitted(dense, monkeypatch)
    refitted = gm.compress(dense, "C4", **PLAN, data=examples())
    assert without.report.blocks == ()
    assert len(refitted.report.blocks) == 3
    assert refitted.plan.layers == without.plan.layers
    assert error(refitted.model, dense) < 0.8 * error(without.model, dense)
    assert all(row["after"] < row["before"] and row["rate"] > 0 for row in refitted.report.blocks)
    assert all(torch.equal(each, before[name]) for name, each in dense.state_dict().items())
    assert "Blocks refitted together" in str(refitted.report)
    assert gm.Report.from_json(refitted.report.to_json()).blocks == refitted.report.blocks


@pytest.mark.parametrize(("style", "count"), [("twice", 0), ("no gradients", 3), ("outside", 0)])
def test_a_block_that_cannot_follow_is_left_as_it_is(style: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = built(style)
    without = unrefitted(dense, monkeypatch)
    with_blocks = gm.compress(dense, "C4", **PLAN, data=examples())
    assert [row["rate"] for row in with_blocks.report.blocks] == [0.0] * count
    states = without.model.state_dict(), with_blocks.model.state_dict()
    assert all(torch.equal(each, states[1][name]) for name, each in states[0].items())


def test_what_held_out_batches_do_not_bear_out_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = built()
    without = unrefitted(dense, monkeypatch)
    monkeypatch.setattr(blocks, "RATES", (100.0,))
    spoilt = gm.compress(dense, "C4", **PLAN, data=examples())
    assert [row["rate"] for row in spoilt.report.blocks] == [0.0] * 3
    states = without.model.state_dict(), spoilt.model.state_dict()
    assert all(torch.equal(each, states[1][name]) for name, each in states[0].items())


def refit(small: nn.Module, dense: nn.Module) -> list[Refit]:
    return refit_blocks(dense, small, examples(), macs=10_000, logits=True)


def test_outputs_that_have_not_come_nearer_take_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = built()
    small = unrefitted(dense, monkeypatch).model
    before = {name: each.clone() for name, each in small.state_dict().items()}
    monkeypatch.setattr(blocks, "divergence", lambda *_, **__: 1.0)
    assert [(each.rate, each.after == each.before) for each in refit(small, dense)] == [(0.0, True)] * 3
    assert all(torch.equal(each, before[name]) for name, each in small.state_dict().items())


def test_all_blocks_go_back_as_far_as_held_out_examples_bear_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = built()
    start = unrefitted(dense, monkeypatch).model
    # held-out losses: before, after the steps, and at each share of the way
    judged = {1.0: iter([3.0, 1.0, 2.0]), blocks.SHARES[1]: iter([3.0, 2.5, 2.0, 1.0, 1.5])}
    found = {}
    for share, losses in judged.items():
        monkeypatch.setattr(blocks, "divergence", lambda *_, left=losses, **__: next(left))
        found[share] = copy.deepcopy(start)
        assert all(each.rate > 0 for each in refit(found[share], dense))
    ends = found.pop(1.0).state_dict()
    for share, model in found.items():
        for name, each in model.state_dict().items():
            torch.testing.assert_close(each, start.state_dict()[name].lerp(ends[name], share))
    assert any(not torch.equal(each, start.state_dict()[name]) for name, each in ends.items())


@pytest.mark.parametrize(("passes", "trials"), [(1, blocks.TRIED), (6, 5)])
def test_few_blocks_are_tried_where_trials_cost_more_than_steps(
    passes: int, trials: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    dense = Stack(depth=5).eval()
    small = unrefitted(dense, monkeypatch).model
    monkeypatch.setattr(blocks, "WORK", passes * 512 * 3 * 10_000)
    judged = iter([2.0] + 9 * [1.0])  # so few steps may not help the outputs
    monkeypatch.setattr(blocks, "divergence", lambda *_, **__: next(judged))
    tried: list[float] = []
    first = blocks._Descent.choose
    monkeypatch.setattr(blocks._Descent, "choose", lambda *each: tried.append(rate := first(*each)) or rate)
    found = refit(small, dense)
    assert len(tried) == trials
    assert all(each.rate > 0 and each.after < each.before for each in found)
    longer = blocks.LONGER if trials == 5 else 1.0
    assert {each.rate for each in found} <= {longer * rate for rate in tried}


def test_a_rate_that_does_harm_gives_way_to_a_lower_one(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = built()
    small = unrefitted(dense, monkeypatch).model
    monkeypatch.setattr(blocks, "RATES", (100.0,))
    monkeypatch.setattr(blocks, "LOWER", 1e5 * blocks.LONGER)
    found = refit(small, dense)
    assert all(each.rate == pytest.approx(1e-3) and each.after < each.before for each in found)


def test_a_block_goes_back_as_far_as_its_held_out_steps_bear_it_out() -> None:
    def off(moved: Tensor, best: float) -> float:
        return float((moved.mean() - best).abs())

    start, end = torch.zeros(3), torch.ones(3)
    for best in (*blocks.SHARES, 1.0):
        moved = end.clone()
        least = blocks._shorten([moved], [start], 2.0, partial(off, moved, best))
        torch.testing.assert_close(moved, torch.full((3,), best))
        assert least == pytest.approx(0.0, abs=1e-6)
    assert blocks._shorten([moved], [start], 2.0, lambda: 3.0) == 2.0
    assert torch.equal(moved, start)


def test_modes_flags_and_gradients_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = built()
    small = unrefitted(dense, monkeypatch).model.train()
    small.blocks[0].requires_grad_(False)
    flags = [each.requires_grad for each in small.parameters()]
    fixed = {name: each.clone() for name, each in small.state_dict().items() if name.startswith(("stem", "head"))}
    refit(small, dense)
    assert all(each.training for each in small.modules())
    assert not dense.training
    assert [each.requires_grad for each in small.parameters()] == flags
    assert all(each.grad is None for each in [*small.parameters(), *dense.parameters()])
    assert all(torch.equal(small.state_dict()[name], each) for name, each in fixed.items())


def test_blocks_run_by_themselves_see_what_whole_runs_show_them(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = built()
    one, other = (unrefitted(dense, monkeypatch).model for _ in range(2))
    found = refit(one, dense)
    monkeypatch.setattr(blocks._Walk, "leave", lambda *_: None)
    assert [each.block for each in refit(other, dense)] == [each.block for each in found]
    for name, each in one.state_dict().items():
        torch.testing.assert_close(each, other.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_a_tensor_that_lives_elsewhere_too_does_not_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = built()
    small = unrefitted(dense, monkeypatch).model
    small.blocks[1].norm.bias = small.blocks[2].norm.bias
    free = blocks._free(small, "blocks.1")
    assert "norm.weight" in free
    assert "norm.bias" not in free
    names = {f"{name}.{part}" for name, layer in structured(small.blocks[1]).items() for part in layer.parts()}
    assert names
    assert names <= set(free)


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_half_precision_is_left_alone(change: Callable[[nn.Module], nn.Module]) -> None:
    dense = built()
    small = change(gm.compress(dense, "C4", **PLAN).model)
    assert refit(small, dense) == []


def test_too_few_examples_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = built()
    small = unrefitted(dense, monkeypatch).model
    assert refit_blocks(dense, small, [examples()[0][:60]], macs=10_000, logits=True) == []
    assert refit_blocks(dense, small, examples(), macs=10**12, logits=True) == []


def test_a_call_that_was_interrupted_goes_on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = built()
    options: dict[str, Any] = {**PLAN, "data": examples(), "checkpoint": tmp_path / "notes"}

    def stop(name: str, *_: int) -> None:
        if name == "blocks.2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gm.compress(dense, "C4", progress=stop, **options)
    seen: list[str] = []
    first = blocks._refit
    monkeypatch.setattr(blocks, "_refit", lambda name, *a, **k: seen.append(name) or first(name, *a, **k))
    resumed = gm.compress(dense, "C4", **options)
    assert seen == ["blocks.2"]
    assert len(resumed.report.blocks) == 3
    whole = gm.compress(dense, "C4", **PLAN, data=examples()).model.state_dict()
    for name, each in resumed.model.state_dict().items():
        torch.testing.assert_close(each, whole[name], rtol=1e-3, atol=1e-4)


def test_a_failure_in_place_gives_norms_their_values_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built()
    before = {name: each.clone() for name, each in model.state_dict().items()}

    calls: list[int] = []

    def fail(*_: Any) -> None:  # not before the blocks are refitted
        calls.append(1)
        if len(calls) == 2:
            raise gm.GMError("the outputs are others")

    monkeypatch.setattr("gmcompress.pipeline.check_outputs", fail)
    with pytest.raises(gm.GMError, match="the outputs are others"):
        gm.compress(model, "C4", **PLAN, data=examples(), inplace=True)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_in_place_gives_the_same() -> None:
    dense, model = built(), built()
    wanted = gm.compress(dense, "C4", **PLAN, data=examples()).model.state_dict()
    found = gm.compress(model, "C4", **PLAN, data=examples(), inplace=True)
    assert found.model is model
    assert len(found.report.blocks) == 3
    assert all(torch.equal(each, wanted[name]) for name, each in model.state_dict().items())
