"""Freezing: the outputs stay, nothing more is saved, the faster path is taken, and changed weights are seen."""

import copy

import pytest
import torch
from conftest import assert_close, must_fail
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import gmcompress as gm
from gmcompress import freezing
from gmcompress.layers import GMConv2d, GMLinear, Verdict
from gmcompress.metrics import count_macs

LINEAR = ["C8", "C4xC2+displacement:1", "D4+lowrank:2", "lowrank:3", "adapted:2:2x2", "D4[G/<1>,G]"]
PADDING = [
    {"padding": 1},
    {"padding": "same", "dilation": 2},
    {"padding": 2, "padding_mode": "reflect", "stride": 2},
    {"padding": "same", "padding_mode": "circular"},
    {"groups": 2},
]


def network(text: str = "C8+displacement:1") -> nn.Module:
    torch.manual_seed(0)
    conv = GMConv2d(8, 16, 3, "C8", padding=1)
    made = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), GMLinear(16 * 16, 8, text), nn.Linear(8, 3))
    for each in made.parameters():
        nn.init.normal_(each, std=0.3)
    return made.eval()


@pytest.mark.parametrize("path", ["dense", "structured"])
@pytest.mark.parametrize("text", LINEAR)
def test_outputs_stay(text, path):
    model, x = network(text), torch.randn(3, 8, 4, 4)
    frozen = gm.freeze(model, path)
    assert_close(frozen(x), model(x), slack=10)
    assert gm.freeze(model, path).state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(frozen.parameters(), model.parameters(), strict=True))
    slow = text.startswith("D4[")
    assert gm.verdicts(frozen)["3"].path == ("dense" if slow else path)
    assert ("not the group itself" in gm.verdicts(frozen)["3"].reason) == (slow and path == "structured")
    with pytest.raises(gm.GMError, match="not frozen"):
        gm.verdicts(model)


@pytest.mark.parametrize("options", PADDING, ids=str)
@pytest.mark.parametrize("text", ["C4", "C2+lowrank:3:split", "adapted:3:2x2"])
def test_convolutions_of_every_padding(text, options):
    torch.manual_seed(0)
    layer = GMConv2d(8, 16, 3, text, **options).double().eval()
    x = torch.randn(2, 8, 9, 8, dtype=torch.float64)
    wanted = layer(x)
    frozen = gm.freeze(nn.Sequential(layer), "structured")
    assert_close(frozen(x), wanted)
    assert gm.verdicts(frozen)["0"].path == ("dense" if "groups" in options else "structured")
    with FlopCounterMode(display=False) as counter:
        frozen(x)
    assert count_macs(frozen, x) == (counter.get_total_flops() // 2,) * 2


@pytest.mark.parametrize("text", LINEAR)
def test_outputs_lie_in_memory_as_those_of_torch(text):
    """A model may view them in another shape."""
    layer = gm.freeze(nn.Sequential(GMLinear(16, 24, text, bias=False)), "structured")
    for shape in ((1, 16), (70, 16), (2, 35, 16), (2, 3, 5, 16)):
        assert layer(torch.randn(shape)).is_contiguous()
    if "D4[" in text:
        return
    for size, options in ((1, {}), (3, {"padding": 1})):
        conv = gm.freeze(nn.Sequential(GMConv2d(16, 24, size, text, bias=False, **options)), "structured")
        x = torch.randn(2, 16, 5, 6)
        assert conv(x).is_contiguous()
        assert conv(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
        assert_close(conv(x.to(memory_format=torch.channels_last)), conv(x), slack=10)


@pytest.mark.parametrize("path", ["dense", "structured"])
def test_changed_weights_are_seen(path):
    frozen, x = gm.freeze(network(), path), torch.randn(2, 8, 4, 4)
    before = frozen(x)
    with torch.no_grad():
        frozen[0].kernel.mul_(2)
        frozen[3].gates.add_(1)
    dense = gm.densify(frozen)
    assert_close(frozen(x), dense(x), slack=10)
    assert not torch.allclose(frozen(x), before)
    frozen.load_state_dict(network().state_dict())
    assert_close(frozen(x), before, slack=10)
    copied = copy.deepcopy(frozen)
    with torch.no_grad():
        copied[0].kernel.zero_()
    assert_close(frozen(x), before, slack=10)


class Doubled(nn.Module):
    def forward(self, values):
        return 2 * values


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("path", ["dense", "structured"])
def test_weights_that_changed_without_a_sign_are_seen_after_training(path, compiled):
    x = torch.randn(3, 8, 4, 4)
    frozen = gm.freeze(network(), path)
    called = torch.compile(frozen, backend="eager", fullgraph=True) if compiled else frozen
    called(x)
    frozen.train()
    called(x).square().sum().backward()
    before = gm.densify(frozen)
    optimizer = torch.optim.AdamW(frozen.parameters(), lr=0.1, fused=True)  # raises no version of what it writes
    optimizer.step()
    frozen.eval()
    assert_close(called(x), gm.densify(frozen)(x), slack=10)
    must_fail(assert_close, called(x), before(x))
    called(x)
    frozen.load_state_dict(before.state_dict() | {key: 2 * each for key, each in frozen.state_dict().items()}, False)
    assert_close(called(x), gm.densify(frozen)(x), slack=10)
    assert gm.verdicts(frozen)["3"].path == path


@pytest.mark.parametrize("path", ["dense", "structured"])
def test_shapes_alone_are_found_where_there_are_no_values(path):
    frozen = gm.freeze(network(), path).to("meta")
    assert frozen(torch.randn(3, 8, 4, 4, device="meta")).shape == (3, 3)


def test_a_parametrized_layer_is_timed_like_any_other():
    model, x = network(), torch.randn(3, 8, 4, 4)
    parametrize.register_parametrization(model[3], "kernel", Doubled())
    frozen = gm.freeze(model, inputs=x)
    assert gm.verdicts(frozen)["3"].dense_ms > 0
    assert_close(frozen(x), model(x), slack=10)


@pytest.mark.parametrize("path", ["dense", "structured"])
@pytest.mark.parametrize("text", ["C8", "lowrank:3"])
def test_parts_that_are_computed_are_read_anew(text, path):
    """As those are that are pruned or parametrized."""
    model, x = network(text), torch.randn(3, 8, 4, 4)
    part = next(iter(model[3].parts()))
    prune.l1_unstructured(model[3], part, amount=0.5)
    frozen = gm.freeze(model, path)
    assert_close(frozen(x), model(x), slack=10)
    with torch.no_grad():
        getattr(frozen[3], f"{part}_orig").mul_(2)
    assert_close(frozen(x), gm.densify(frozen)(x), slack=10)
    must_fail(assert_close, frozen(x), model(x))


@pytest.mark.parametrize("path", ["dense", "structured"])
def test_training_goes_on(path):
    frozen, plain = gm.freeze(network(), path).train(), network().train()
    x = torch.randn(2, 8, 4, 4)
    for each in (frozen, plain):
        each(x).square().sum().backward()
    for found, wanted in zip(frozen.parameters(), plain.parameters(), strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        assert_close(found.grad, wanted.grad, slack=50)
    frozen.eval()
    assert frozen[0].kernel.grad is not None
    frozen.zero_grad()
    x.requires_grad_()
    frozen(x).sum().backward()
    assert x.grad is not None
    assert frozen[0].kernel.grad is None  # as the documentation says


def test_other_tensors_for_one_call():
    frozen, x = gm.freeze(network(), "structured"), torch.randn(2, 8, 4, 4)
    before = frozen(x)
    other = {name: 2 * each.detach() for name, each in frozen.named_parameters()}
    assert_close(functional_call(frozen, other, (x,)), functional_call(network(), other, (x,)), slack=10)
    assert torch.equal(frozen(x), before)


def times(monkeypatch, dense: float, fast: float) -> list[int]:
    """The measurement replaced by these milliseconds; how often it was asked for."""
    asked: list[int] = []

    def measured(calls, **_options):
        assert [call() is not None for call in calls] == [True, True]
        asked.append(len(calls))
        return [(dense, 0.0), (fast, 0.0)]

    monkeypatch.setattr(freezing, "latencies", measured)
    return asked


@pytest.mark.parametrize(("fast", "path", "reason"), [(0.5, "structured", "faster"), (0.99, "dense", "slower, kept")])
def test_auto_takes_the_faster_path(monkeypatch, fast, path, reason):
    times(monkeypatch, 1.0, fast)
    x = torch.randn(2, 8, 4, 4)
    frozen = gm.freeze(network(), inputs=x)
    for verdict in gm.verdicts(frozen).values():
        assert verdict.path == path
        assert (verdict.dense_ms, verdict.structured_ms) == (1.0, fast)
        assert reason in verdict.reason
    assert_close(frozen(x), network()(x), slack=10)


def test_equal_layers_are_measured_once(monkeypatch):
    asked = times(monkeypatch, 1.0, 0.5)
    model = nn.Sequential(*[GMLinear(8, 8, "C8") for _ in range(4)])
    frozen = gm.freeze(model, inputs=torch.randn(2, 8))
    assert len(asked) == 1
    assert gm.verdicts(frozen)["3"] == Verdict("structured", 1.0, 0.5, "as 0")


def test_an_inaccurate_product_is_not_taken(monkeypatch):
    times(monkeypatch, 1.0, 0.1)
    monkeypatch.setattr(freezing, "TOLERANCES", {torch.float32: 0.0})
    assert gm.verdicts(gm.freeze(network(), inputs=torch.randn(2, 8, 4, 4)))["0"].path == "dense"


class OneOfTwo(nn.Module):
    """A layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = GMLinear(8, 8, "C8"), GMLinear(8, 8, "C8")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_layers_that_are_not_called(monkeypatch):
    times(monkeypatch, 1.0, 0.1)
    found = gm.verdicts(gm.freeze(OneOfTwo(), inputs=torch.randn(1, 8)))
    assert found["used"].path == "structured"
    assert found["unused"] == Verdict("dense", reason="not called on these inputs")


class Routed(nn.Module):
    """Experts that run one after the other, each on the rows that are routed to it, which may be none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([GMLinear(8, 8, "C8") for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(self.experts[at](x[rows]).sum() for at, rows in enumerate(([], [0], []))) + self.experts[2](x).sum()


def test_layers_that_are_called_with_nothing(monkeypatch):
    times(monkeypatch, 1.0, 0.1)
    model, x = Routed().eval(), torch.randn(4, 8)
    found = gm.verdicts(gm.freeze(model, inputs=x))
    assert [found[f"experts.{at}"].path for at in range(3)] == ["dense", "structured", "structured"]
    assert found["experts.0"].reason == "not called on these inputs"
    for path in freezing.PATHS:
        frozen = gm.freeze(model, path, inputs=x)
        assert_close(frozen(x), model(x), slack=10)
        assert gm.measure(frozen, x, repeats=1).macs > 0
    empty = model.experts[0].eval()
    assert count_macs(gm.freeze(empty, "structured"), x[:0])[0] == 0


class Ensemble(nn.Module):
    """Layers whose tensors run stacked through one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([GMLinear(8, 8, "C8") for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tensors, _ = torch.func.stack_module_state(list(self.layers))
        return torch.vmap(lambda each: torch.func.functional_call(self.layers[0], each, (x,)))(tensors)


def test_layers_that_run_with_other_tensors_alone(monkeypatch):
    asked = times(monkeypatch, 1.0, 0.1)
    model, x = Ensemble(), torch.randn(2, 8)
    frozen = gm.freeze(model, inputs=x)
    assert not asked
    assert {each.path for each in gm.verdicts(frozen).values()} == {"dense"}
    assert_close(frozen(x), model(x))


def test_frozen_convolutions_inside_of_vmap():
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)).eval(), torch.randn(3, 2, 6, 6, 8)
    images = images.permute(0, 1, 4, 2, 3)  # channels last
    frozen = gm.freeze(gm.compress(model, "C4", rank=1, include="0").model, "structured")
    assert_close(torch.vmap(frozen)(images), torch.stack([frozen(each) for each in images]), slack=10)


class Slopes(nn.Sequential):
    """A model that takes its own derivatives by torch.func."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(torch.func.jacrev(super().forward))(x), *torch.func.jvp(super().forward, (x,), (x,))


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # what torch makes such derivatives of
def test_layers_that_torch_func_differentiates():
    torch.manual_seed(0)
    model, x = Slopes(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).eval(), torch.randn(2, 8)
    small = gm.compress(model, "C4", rank=1, inputs=x).model
    frozen = gm.freeze(small, inputs=x)
    assert {"torch.func" in each.reason for each in gm.verdicts(frozen).values()} == {True}
    for found, expected in zip(frozen(x), small(x), strict=True):
        assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_sentences_of_several_lengths():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.arange(5).expand(2, 5) >= torch.tensor([[3], [5]])
    result = gm.compress(encoder, "C4", rank=1, inputs={"src": x, "src_key_padding_mask": padding})
    frozen = gm.freeze(result)  # torch makes of the two one nested tensor
    assert "does not run here" in gm.verdicts(frozen)["layers.0.linear1"].reason
    with torch.no_grad():
        assert_close(frozen.model(x, src_key_padding_mask=padding), result.model(x, src_key_padding_mask=padding))


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("path", ["dense", "structured"])
def test_sparse_and_nested_inputs_take_the_dense_product(path):
    torch.manual_seed(0)
    small = nn.Sequential(GMLinear(8, 8, "C8+displacement:1"), nn.ReLU(), GMLinear(8, 4, "lowrank:2")).eval()
    frozen, x = gm.freeze(small, path), torch.randn(3, 8)
    sparse, nested = torch.eye(8)[:3].to_sparse(), torch.nested.nested_tensor([x, x[:2]])
    with torch.no_grad():
        assert_close(frozen(nested).to_padded_tensor(0.0), small(nested).to_padded_tensor(0.0))
        assert_close(frozen[0](sparse), small[0](sparse.to_dense()))
        assert_close(frozen(x), small(x))


def test_results_and_reports(monkeypatch):
    times(monkeypatch, 1.0, 0.1)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    x = torch.randn(8, 32)
    result = gm.compress(dense, group="C8", rank=1, inputs=x)
    frozen = gm.freeze(result)
    assert_close(frozen.model(x), result.model(x), slack=10)
    text = str(frozen.report)
    assert "Frozen layers" in text
    assert "structured" in text
    assert frozen.report.after.macs < result.report.after.macs
    assert frozen.report.after.macs == frozen.report.after.counted_macs
    again = type(frozen.report).from_json(frozen.report.to_json())
    assert again.layers == frozen.report.layers
    assert "Frozen layers" not in str(result.report)


def test_saved_as_if_it_were_not_frozen(tmp_path):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    result = gm.compress(dense, group="C8", rank=1, inputs=torch.randn(4, 32))
    for name, each in (("plain", result), ("frozen", gm.freeze(result, "structured"))):
        gm.save(each, tmp_path / name)
    plain, frozen = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "frozen"))
    assert plain == frozen
    loaded = gm.load(tmp_path / "frozen", copy.deepcopy(dense))
    assert_close(loaded(torch.ones(1, 32)), result.model(torch.ones(1, 32)))


def test_compiled_once_for_every_batch_size():
    from torch._dynamo.testing import CompileCounter

    frozen, counter = gm.freeze(network(), "structured"), CompileCounter()
    compiled = torch.compile(frozen, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (6, 7, 9):
            x = torch.randn(batch, 8, 4, 4)
            assert_close(compiled(x), frozen(x), slack=10)
    assert counter.frame_count == 1


def test_exported():
    frozen, x = gm.freeze(network(), "structured"), torch.randn(6, 8, 4, 4)
    program = torch.export.export(frozen, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert_close(program.module()(x[:5]), frozen(x[:5]), slack=10)


def test_exported_to_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    frozen = gm.freeze(network(), "structured")
    done = gm.export(frozen, tmp_path / "x.onnx", torch.randn(2, 8, 4, 4), format="onnx")
    assert done.difference < 1e-4


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(2, 2), {"path": "dense"}, "no structured layer"),
        (network(), {"path": "fast"}, "auto, dense, structured"),
        (network(), {}, "give inputs="),
        (network(), {"inputs": torch.randn(2, 3)}, "does not run on inputs"),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(gm.GMError, match=message):
        gm.freeze(model, **options)
    assert not any(getattr(each, "is_frozen", False) for each in model.modules())


def test_a_layer_without_a_fast_product():
    with pytest.raises(gm.GMError, match="no fast product"):
        GMLinear(8, 4, "D4[G/<1>,G]").freeze_("structured")
