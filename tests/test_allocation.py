"""Budgets: kept to the last number, spent well, rules and ties obeyed; data in every form; nothing left changed."""

import itertools
import json
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
import zoo
from conftest import assert_close, must_fail
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gmcompress as gm
from gmcompress.candidates import plain_svd
from gmcompress.factors import Metric
from gmcompress.layers import GMLayer
from gmcompress.structure import Structure
from gmcompress.subjects import Subject


def perceptron(width: int = 16, depth: int = 3) -> nn.Module:
    torch.manual_seed(0)
    inner = [each for _ in range(depth) for each in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), *inner, nn.Linear(width, 5))


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    first, second = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), first, nn.BatchNorm2d(8), nn.ReLU(inplace=True), second, nn.BatchNorm2d(8)),
        *head,
    )


def examples(model: nn.Module, count: int = 24) -> Tensor:
    shape = (3, 7, 7) if isinstance(model[0], nn.Conv2d) else (8,)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


BUILDS = pytest.mark.parametrize("build", [perceptron, convolutional], ids=lambda each: each.__name__)
DATA = pytest.mark.parametrize("with_data", [False, True], ids=["alone", "data"])


def parameters(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: each.clone() for key, each in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Bit for bit, with no gradient, hook or structured layer left behind."""
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())
    assert all(each.grad is None for each in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ------------------------------------------------------------------------------------------------------------- limits


@BUILDS
@DATA
def test_a_budget_is_kept_and_more_is_never_worse(build: Callable[[], nn.Module], with_data: bool) -> None:
    model = build()
    before, x = state_of(model), examples(model)
    shares, losses = (0.45, 0.6, 0.75, 0.9, 1.0), []
    for plan, share in zip(gm.sweep(model, "C4", budgets=shares, data=x if with_data else None), shares, strict=True):
        result = gm.compress(model, plan=plan, data=x if with_data else None)
        assert parameters(result.model) <= plan.parameters <= share * parameters(model)
        assert plan.parameters > 0.8 * share * parameters(model) or share == 1
        assert 0 <= plan.optimum["bound"] <= plan.optimum["loss"]
        losses.append(plan.optimum["loss"])
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
    assert losses[0] > losses[-1] == 0
    assert plan.layers == {}
    assert_untouched(model, before)


@BUILDS
def test_budgets_of_bytes_and_multiply_adds(build: Callable[[], nn.Module]) -> None:
    model = build()
    x, stored = examples(model), sum(each.numel() * each.element_size() for each in model.state_dict().values())
    result = gm.compress(model, "C4", budget={"bytes": 0.6}, inputs=x)
    assert result.report.after.bytes <= 0.6 * stored == 0.6 * result.report.before.bytes
    assert result.report.after.bytes > 0.4 * stored
    plan = gm.plan(model, "C4", budget={"macs": 0.7, "params": 0.8}, inputs=x)
    assert plan.parameters <= 0.8 * parameters(model)
    places = {site.name: 25 if "Conv2d" in site.kind else 1 for site in plan.sites}
    dense = sum(places[site.name] * prod(site.shape) for site in plan.sites)
    kept = dense - sum(places[name] * (prod(plan.site(name).shape) - plan.stored(name)) for name in plan.layers)
    assert kept <= 0.7 * dense
    assert all(Structure.parse(text).group is None for text in plan.layers.values()), "which saves multiply-adds"
    whole = gm.plan(model, "C4", budget={"params": parameters(model) // 2})
    assert whole.parameters <= parameters(model) // 2
    with pytest.raises(gm.GMError, match="give example inputs or data"):
        gm.plan(model, "C4", budget={"macs": 0.5})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_bytes_are_counted_in_the_dtype_of_each_layer(dtype: torch.dtype) -> None:
    """Whatever the dtype of the first layer, by which the bytes of the others must not be counted."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    for place in (0, 2):
        model[place].to(dtype)
    whole = sum(each.numel() * each.element_size() for each in model.parameters())
    for share in (0.4, 0.7):
        plan = gm.plan(model, budget={"bytes": share}, include="*", overrides={"2": "lowrank:8"})
        after = gm.compress(model, plan=plan).report.after.bytes
        assert after <= share * whole
        assert after > share * whole - 8 * (128 + 16 * 16), "less than a rank of a layer is left"


def test_half_is_the_default() -> None:
    model = perceptron()
    assert gm.plan(model).layers == gm.plan(model, budget="50%").layers
    assert gm.plan(model).optimum["budget"] == "50 % of the parameters"
    assert gm.plan(model, "C4", rank=1).optimum is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "3%"}, r"at most .* parameters \(3\.0 %\) cannot be reached: the smallest possible is"),
        ({"budget": {"bytes": 100}}, "100 bytes .* cannot be reached"),
        ({"budget": "0%"}, "above 0 %"),
        ({"budget": 3}, "3 of what"),
        ({"budget": {"parms": 0.5}}, "the nearest are 'params'"),
        ({"budget": "50%", "rank": 1}, "neither budget="),
        ({"ties": ["*"], "rank": 1}, "nor ties="),
        ({"ties": ["nowhere"]}, "matches no layer"),
        ({"overrides": {"2": "C5"}}, "divisible by 5"),
        ({"exclude": "*"}, "no layer can be compressed"),
        ({"data": []}, "empty"),
        ({"data": [3]}, "a batch is"),
        ({"data": torch.zeros(4, 7)}, "does not run on inputs"),
        ({"data": torch.full((4, 8), float("nan"))}, "not finite"),
        ({"data": [(torch.zeros(4, 8), 0), (torch.zeros(4, 7), 0)]}, "does not run on inputs"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = perceptron()
    before = state_of(model)
    for inplace in (False, True):
        with pytest.raises(gm.GMError, match=message) as caught:
            gm.compress(model, "C4", inplace=inplace, **options)
        assert "\n" not in str(caught.value)
        assert_untouched(model, before)
        assert not any(isinstance(module, GMLayer) for module in model.modules())


def nothing_yet(*_: object, **__: object) -> None:
    raise AssertionError("the budget could have been refused before")


@pytest.mark.parametrize(
    ("budget", "ties"), [("3%", []), ({"bytes": 0.2}, []), ({"macs": 0.05}, []), ("24%", [[nn.Linear]])], ids=str
)
def test_a_budget_out_of_reach_is_refused_before_any_fit(budget: Any, ties: Any, monkeypatch) -> None:
    """With the words of the choice itself: the smallest size, and what stands in the way."""
    model = perceptron()
    options: dict[str, Any] = {"budget": budget, "ties": ties, "data": examples(model), "overrides": {"4": "C4"}}
    with monkeypatch.context() as patch:
        patch.setattr("gmcompress.jobs.check_budgets", lambda *_: None)
        with pytest.raises(gm.GMError, match="cannot be reached: the smallest possible is") as late:
            gm.plan(model, "C4", **options)
    for work in ("tabulate", "calibrate"):
        monkeypatch.setattr(f"gmcompress.jobs.{work}", nothing_yet)
    with pytest.raises(gm.GMError, match="cannot be reached") as early:
        gm.plan(model, "C4", **options)
    assert str(early.value) == str(late.value)
    with pytest.raises(gm.GMError, match="cannot be reached"):
        gm.sweep(model, "C4", budgets=["90%", budget], **{key: options[key] for key in ("data", "ties")})
    with pytest.raises(AssertionError, match="could have been"):
        gm.plan(model, "C4", **(options | {"budget": "90%"}))


# -------------------------------------------------------------------------------------------------------------- rules


def test_rules_are_obeyed() -> None:
    model = perceptron(depth=4)
    plan = gm.plan(model, "C4", budget="75%", exclude="2", overrides={"4": "C4+displacement:1", "6": None})
    assert plan.layers["4"] == "C4+displacement:1"
    assert {"2", "6", "10"} <= set(plan.skipped)
    assert "excluded by '2'" in plan.skipped["2"]
    assert "override" in plan.skipped["6"]
    assert "classifier" in plan.skipped["10"]
    free = gm.plan(model, "C4", budget="30%", include="10")
    assert "classifier" not in free.skipped.get("10", "")
    conv = convolutional()
    assert "stem" in gm.plan(conv, "C4", budget="50%").skipped["0"]
    assert "stem" not in gm.plan(conv, "C4", budget="40%", include="0").skipped.get("0", "")


def test_tied_layers_get_one_structure() -> None:
    model = perceptron(depth=4)
    for scale, name in ((0.1, "2"), (3.0, "4")):
        model.get_submodule(name).weight.data[:4] *= 20 * scale
        model.get_submodule(name).weight.data[4:] *= scale

    def assert_tied(plan: gm.Plan) -> None:
        assert len({plan.layers.get(name) for name in ("2", "4", "6", "8")}) == 1

    for budget in ("50%", "75%"):
        plan = gm.plan(model, "C4", budget=budget, ties=[nn.Linear])
        assert_tied(plan)
        assert plan.layers["2"]
        assert plan.parameters <= float(budget[:-1]) / 100 * parameters(model)
    must_fail(assert_tied, gm.plan(model, "C4", budget="75%"))
    half = gm.plan(model, "C4", budget="75%", ties=[["2", "4"]])
    assert half.layers.get("2") == half.layers.get("4")


def test_an_optimum_survives_json() -> None:
    plan = gm.plan(perceptron(), "C4", budget="70%", data=examples(perceptron()))
    again = gm.Plan.from_json(plan.to_json())
    assert again == plan
    assert again.optimum["measure"] == "divergence of the outputs"
    assert plan.edit({"2": None}).optimum is None
    for change in ({"loss": "small"}, {"loss": None}, {"more": 1.0}, {"budget": 3}, {"gap": float("nan")}):
        found = json.loads(plan.to_json())
        found["optimum"] |= change
        with pytest.raises(gm.GMError, match="in a plan"):
            gm.Plan.from_json(json.dumps(found))
    found["optimum"] = [1]
    with pytest.raises(gm.GMError, match="in a plan"):
        gm.Plan.from_json(json.dumps(found))
    old = {key: value for key, value in json.loads(plan.to_json()).items() if key != "optimum"}
    assert gm.Plan.from_json(json.dumps(old)).layers == plan.layers


# ---------------------------------------------------------------------------------------------------------- the choice


@BUILDS
@pytest.mark.parametrize("budget", ["45%", "60%", "80%"])
def test_no_layer_is_worse_than_plain_svd_of_its_size(build: Callable[[], nn.Module], budget: str) -> None:
    result = gm.compress(build(), "C4", budget=budget)
    for row in result.report.layers:
        assert row["relative_error"] <= row["svd_error"] * (1 + 1e-6)
    random = gm.compress(build(), "C4", rank=1)
    assert any(row["relative_error"] > row["svd_error"] for row in random.report.layers), "the control"


@pytest.mark.parametrize("seed", range(3))
def test_no_swap_for_plain_svd_improves_the_plan(seed: int) -> None:
    """Of any single layer, by plain SVD of at most the size that the plan gives it."""
    model = perceptron()
    generator = torch.Generator().manual_seed(seed)
    for each in model.parameters():
        each.data = torch.randn(each.shape, generator=generator)

    def assert_no_swap(plan: gm.Plan) -> None:
        assert plan.layers
        for name, text in plan.layers.items():
            subject = Subject(model.get_submodule(name).weight.detach().double(), Metric())
            assert gm.project(subject.weight, text).loss <= plain_svd(subject, plan.stored(name))[1] * (1 + 1e-6)

    assert_no_swap(gm.plan(model, "C4", budget="60%"))
    must_fail(assert_no_swap, gm.plan(model, "C4", rank=0))


# --------------------------------------------------------------------------------------------------------------- data


class Keywords(nn.Module):
    """Takes its inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = perceptron(depth=1)

    def forward(self, *, x: Tensor) -> Tensor:
        return self.inner(x)


def test_data_comes_in_many_forms() -> None:
    model, x = perceptron(depth=1), examples(perceptron())
    labels = torch.zeros(len(x), dtype=torch.int64)
    expected = gm.compress(model, "C4", budget="70%", data=[x[:16], x[16:]])
    for data in (
        [(x[:16], labels[:16]), (x[16:], labels[16:])],
        DataLoader(TensorDataset(x, labels), batch_size=16),
        ([each, 0] for each in (x[:16], x[16:], x)),
    ):
        found = gm.compress(model, "C4", budget="70%", data=data, samples=len(x))
        assert found.plan == expected.plan
        assert_close(found.model(x).detach(), expected.model(x).detach())
    whole = gm.compress(model, "C4", budget="70%", data=x)
    assert whole.plan.parameters <= 0.7 * parameters(model)
    assert_close(whole.model(x).detach(), gm.compress(model, "C4", budget="70%", data=[(x, labels)]).model(x).detach())
    named = gm.compress(Keywords(), "C4", budget="70%", data={"x": x, "labels": labels})
    assert named.plan.layers
    assert_close(named.model(x=x).detach(), whole.model(x).detach(), slack=100)
    must_fail(assert_close, gm.compress(model, "C4", budget="70%", data=x[:9]).model(x), whole.model(x))


@BUILDS
def test_data_helps_and_leaves_the_model_alone(build: Callable[[], nn.Module]) -> None:
    model = build().train()
    model(examples(model))
    x, before = examples(model), state_of(model)
    with_data = gm.compress(model, "C4", budget="50%", data=x).model.eval()
    without = gm.compress(model, "C4", budget="50%").model.eval()
    assert_untouched(model, before)
    assert model.training
    model.eval()
    wanted = model(x).detach()

    def assert_nearer(ours: nn.Module, theirs: nn.Module) -> None:
        assert bool(((ours(x) - wanted).square().mean() < 0.9 * (theirs(x) - wanted).square().mean()).all())

    assert_nearer(with_data, without)
    must_fail(assert_nearer, without, with_data)


@BUILDS
@DATA
def test_save_load_and_in_place(build: Callable[[], nn.Module], with_data: bool, tmp_path) -> None:
    model, twin = build().eval(), build().eval()
    x = examples(model)
    options = {"budget": "55%", "inputs": x[:2], **({"data": x} if with_data else {})}
    result = gm.compress(model, "C4", **options)
    inplace = gm.compress(twin, "C4", inplace=True, **options)
    assert inplace.model is twin
    assert any(isinstance(module, GMLayer) for module in twin.modules())
    assert_close(twin(x).detach(), result.model(x).detach())
    must_fail(assert_close, twin(x).detach(), model(x).detach())
    gm.save(result, tmp_path / "small")
    again = gm.load(tmp_path / "small", build())
    assert torch.equal(again.eval()(x), result.model.eval()(x))
    assert_close(gm.densify(result.model).eval()(x).detach(), result.model.eval()(x).detach(), slack=10)
    report = gm.Report.from_json(result.report.to_json())
    assert report.plan.optimum == result.plan.optimum


def test_what_was_interrupted_goes_on(tmp_path) -> None:
    model, x = perceptron(), examples(perceptron())
    options = {"group": "C4", "data": x, "checkpoint": tmp_path / "notes"}
    expected = gm.compress(model, "C4", budget="60%", data=x)
    calls: list[str] = []

    def stop(name: str, _done: int, _of: int) -> None:
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gm.compress(model, budget="60%", progress=stop, **options)
    first, calls = calls[0], []
    found = gm.compress(model, budget="60%", progress=lambda name, *_: calls.append(name), **options)
    assert first not in calls[: len(calls) - len(expected.plan.layers)], "its table was kept"
    assert found.plan == expected.plan
    assert_close(found.model(x).detach(), expected.model(x).detach(), slack=10)
    calls.clear()
    gm.compress(model, budget="75%", progress=lambda name, *_: calls.append(name), **options)
    assert calls == list(gm.plan(model, budget="75%", **options).layers), "another budget spares the table"
    calls.clear()
    gm.plan(model, budget="75%", progress=lambda name, *_: calls.append(name), effort=0.5, **options)
    assert set(calls) >= set(expected.plan.layers), "another effort has a table of its own"
    with pytest.raises(gm.GMError, match="another model"):
        gm.compress(zoo.mlp(), budget="75%", **options)
    with pytest.raises(gm.GMError, match="another data"):
        gm.compress(model, budget="75%", **(options | {"data": x + 1}))


def test_a_plan_carried_out_first_leaves_room_for_a_table(tmp_path) -> None:
    model, x = perceptron(), examples(perceptron())
    options = {"group": "C4", "data": x, "checkpoint": tmp_path / "notes"}
    plan = gm.plan(model, "C4", budget="60%", data=x)
    first = gm.compress(model, plan=plan, **options)
    second = gm.compress(model, budget="60%", **options)
    assert second.plan == plan
    assert torch.equal(second.model(x), first.model(x))


def test_residuals_belong_to_ranks() -> None:
    with pytest.raises(gm.GMError, match="goes with rank="):
        gm.plan(perceptron(), "C4", budget="60%", residual="lowrank")
    assert gm.plan(perceptron(), "C4", rank=1, residual="lowrank").layers
