"""Metrics: counts by formula agree with torch's own counter, timing is interleaved, the model is left alone."""

import itertools
import math
import time

import pytest
import timm
import torch
import zoo
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gmcompress as gm
from gmcompress import adapted
from gmcompress.forward import run
from gmcompress.metrics import count_macs, latencies, measure_together


def scalings(model, inputs):
    """Multiplications by scales of adapted bases in computed weights, entry by entry: torch counts no such products."""
    layers = [each for each in model.modules() if isinstance(each, (gm.GMLinear, gm.GMConv2d)) and each.structure.grid]
    counts = []
    for each in layers:
        each.register_forward_pre_hook(
            lambda layer, given: counts.append(
                0 if layer.takes_fast_product(given[0]) else len(layer.scales) * layer.right.numel()
            )
        )
    run(model, inputs)
    for each in layers:
        each._forward_pre_hooks.clear()
    return sum(counts)


@pytest.mark.parametrize("name", ["mlp", "root", "called twice", "convolutions", "timm convnet"])
def test_multiply_adds_by_formula_and_by_counter_agree(name):
    exhibit = zoo.MODELS[name]
    model, inputs = exhibit.build().eval(), exhibit.inputs()
    for options in ({"residual": "displacement"}, {"residual": "lowrank"}, {"overrides": {"*": "adapted:2:2x4"}}):
        small = gm.compress(model, "C4", rank=1, **options).model
        for each in (model, small, gm.densify(small)):
            found = gm.measure(each, inputs, repeats=2)
            assert found.macs == found.counted_macs + scalings(each, inputs) > 0


def test_what_no_layer_owns_is_only_in_the_counter():
    exhibit = zoo.MODELS["timm transformer"]
    found = gm.measure(exhibit.build(), exhibit.inputs(), repeats=2)
    assert found.counted_macs > found.macs > 0


class Crossing(nn.Module):
    """Attention from 10 places to 7 others, with as many inputs in each as it is built with."""

    def __init__(self, **widths):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, **widths)
        self.others = nn.Parameter(torch.randn(7, 3, self.attention.kdim))

    def forward(self, x):
        return self.attention(x, value=self.others, key=self.others, need_weights=False)[0]


def two_encoders():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)


@pytest.mark.parametrize(
    ("build", "shape", "products"),  # of queries with keys, and of the shares with values
    [
        (lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (3, 10, 16), 2 * 3 * 10 * 10 * 16),
        (lambda: nn.TransformerEncoderLayer(16, 4, 32), (10, 16), 2 * 10 * 10 * 16),
        (two_encoders, (3, 5, 16), 2 * 2 * 3 * 5 * 5 * 16),
        (Crossing, (10, 3, 16), 2 * 3 * 10 * 7 * 16),
        (lambda: Crossing(kdim=8, vdim=8), (10, 3, 16), 2 * 3 * 10 * 7 * 16),
    ],
)
def test_the_projections_of_attention_count(build, shape, products):
    """Dense, compressed and frozen; the products of attention itself stay what the counter alone sees."""
    model, inputs = build().eval(), torch.randn(shape)
    small = gm.compress(model, "C4", rank=1, include="*").model
    for each in (model, small, gm.freeze(small, "dense")):
        found = gm.measure(each, inputs, repeats=2)
        assert found.counted_macs == found.macs + products
    assert torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            model(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert gm.measure(model, inputs, repeats=2).counted_macs == counter.get_total_flops() // 2


def test_a_budget_on_multiply_adds_knows_of_the_projections(monkeypatch):
    """They count as they are, for no structure makes them cheaper; the rest has to make up for it."""
    monkeypatch.setattr(adapted, "GRIDS", ())
    model, inputs = nn.TransformerEncoderLayer(16, 4, 64, batch_first=True).eval(), torch.randn(2, 10, 16)
    options = {"include": "*", "inputs": inputs}
    result = gm.compress(model, "C4", budget={"macs": "70%"}, **options)
    dense = 20 * (4 * 16 * 16 + 2 * 16 * 64)
    assert result.report.before.macs == dense
    assert gm.measure(gm.freeze(result.model, "structured"), inputs, repeats=2).macs <= 0.7 * dense
    with pytest.raises(gm.GMError, match="multiply-adds"):
        gm.plan(model, "C4", budget={"macs": "33%"}, **options)  # a third is theirs


def test_a_known_network_has_its_known_cost():
    found = gm.measure(timm.create_model("resnet50"), torch.zeros(1, 3, 224, 224), repeats=2)
    assert found.parameters == 25_557_032
    assert found.macs == 4_089_184_256  # 4.09 G, as published for ResNet-50 at 224 px
    assert found.bytes == 4 * (25_557_032 + 53_120) + 8 * 53  # BatchNorm statistics, and a counter for each


def test_transposed_convolutions_count():
    model = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    found = gm.measure(model, torch.zeros(2, 4, 5, 5), repeats=2)
    assert found.macs == found.counted_macs == 2 * 4 * 25 * 3 * 9


RECURRENT = [
    (lambda: nn.GRU(8, 12, 2, bidirectional=True), (5, 3, 8)),
    (lambda: nn.RNN(8, 12, batch_first=True), (5, 8)),
    (lambda: nn.LSTM(8, 12, 2), (5, 3, 8)),
    (lambda: nn.LSTMCell(8, 12), (3, 8)),
    (lambda: nn.GRUCell(8, 12), (8,)),
]


@pytest.mark.parametrize(("build", "shape"), RECURRENT)
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_recurrent_layers_count(build, shape):
    model = build().eval()
    weights = sum(each.numel() for each in model.parameters() if each.dim() > 1)
    with torch.backends.mkldnn.flags(enabled=False):  # which runs an LSTM in one call
        assert count_macs(model, torch.randn(shape)) == (math.prod(shape[:-1]) * weights,) * 2
    if isinstance(model, nn.RNNBase):
        packed = nn.utils.rnn.pack_sequence([torch.randn(5, 8), torch.randn(2, 8)])
        assert count_macs(model, {"input": packed})[0] == 7 * weights
    else:
        small = gm.compress(model, "C4", rank=0).model
        assert count_macs(small, torch.randn(shape))[0] == math.prod(shape[:-1]) * weights


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_what_is_applied_as_dense_is_priced_as_dense():
    """Weights attached to their modules have no fast product, and recurrent ones stay dense."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.hooked, self.memory, self.plain = nn.Linear(64, 64), nn.GRU(64, 64), nn.Linear(64, 64)
            self.hooked.register_forward_hook(lambda *_: None)

        def forward(self, x):
            return self.plain(self.memory(self.hooked(x))[0])

    model, inputs, whole = Reads().eval(), torch.randn(2, 3, 64), 6 * 64 * 64 * 8
    options = {"inputs": inputs, "include": "*"}
    result = gm.compress(model, "C8xC8", budget={"macs": "95%"}, **options)
    assert result.report.before.macs == whole
    assert gm.measure(gm.freeze(result.model, "structured"), inputs, repeats=2).macs <= 0.95 * whole
    with pytest.raises(gm.GMError, match="multiply-adds"):
        gm.plan(model, "C8xC8", budget={"macs": "85%"}, **options)  # 7 of 8 parts are not to be had


def test_without_inputs_only_what_needs_none():
    found = gm.measure(zoo.mlp())
    assert (found.macs, found.latency_ms, found.inputs) == (None, None, None)
    assert found.parameters == sum(each.numel() for each in zoo.mlp().parameters())


def test_tied_parameters_count_once():
    model = zoo.Tied()
    found = gm.measure(model)
    assert found.parameters == sum(each.numel() for each in model.parameters())
    assert found.bytes == 4 * found.parameters


def test_the_model_is_left_alone_and_bad_inputs_are_named():
    model = zoo.Convolutions().train()
    before = {key: each.clone() for key, each in model.state_dict().items()}
    gm.measure(model, torch.randn(2, 3, 9, 9), repeats=2)
    assert model.training
    assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(gm.GMError, match="does not run on inputs"):
        gm.measure(model, torch.randn(2, 5))
    with pytest.raises(gm.GMError, match="wrapped"):
        gm.measure(nn.DataParallel(model))


def test_a_layer_without_a_group_has_no_distance_and_no_displacement_rank():
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    first, second, third = gm.equivariance(
        gm.compress(model, "C8", overrides={"0": "lowrank:2", "1": "C8+adapted:1:2x2", "2": "adapted:2:2x2"}).model
    )
    for row, text in ((first, "lowrank:2"), (third, "adapted:2:2x2")):
        assert row["structure"] == text
        assert {row[key] for key in ("distance", "displacement_rank", "generator_displacement_rank")} == {None}
    assert 0 < second["distance"] < 1, "the control"
    assert second["displacement_rank"] > 0


def test_timed_runs_take_turns():
    order = []
    times = latencies([lambda: order.append("a"), lambda: order.append("b")], repeats=3)
    assert order == list("ab" * 4)
    assert all(median >= 0 and spread >= 0 for median, spread in times)


def test_slow_calls_are_repeated_less_often():
    runs = []
    latencies([lambda: runs.append(1)], repeats=50, seconds=0)
    assert len(runs) == 1 + 3  # the first run is not timed


def test_quick_calls_are_repeated_within_their_turn():
    order = []
    latencies([lambda: order.append("a"), lambda: order.append("b")], repeats=2, turn=1e-3)
    runs = ["".join(each) for _, each in itertools.groupby(order)]
    assert [run[0] for run in runs] == list("abab" + "ab")
    assert min(len(run) for run in runs[2:]) > 10
    slow = []
    latencies([lambda: slow.append(time.sleep(0.003))], repeats=2, turn=1e-3)
    assert len(slow) == 3 + 2, "the control: calls longer than a turn"


@pytest.mark.parametrize("interrupted", [0, 1, 2])
def test_one_interruption_does_not_make_a_quick_call_a_slow_one(interrupted):
    calls = itertools.count()
    latencies([lambda: time.sleep(0.005) if next(calls) == interrupted else None], repeats=2, turn=1e-3)
    assert next(calls) > 3 + 2 * 10  # it takes well below a hundredth of a turn, but more right after the sleep


def test_a_larger_model_takes_longer():
    """The control of the clock."""
    small, large = nn.Linear(8, 8), nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
    inputs = torch.zeros(256, 512)
    fast, slow = measure_together([nn.Linear(512, 8), large], inputs)
    assert slow.latency_ms > fast.latency_ms
    assert run(small, torch.zeros(1, 8)).shape == (1, 8)
    assert "latency ms" in str(fast)
