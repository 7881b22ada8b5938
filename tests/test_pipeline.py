"""compress(): the zoo survives it, the user's model does not change, bad input is named; densify and equivariance."""

import copy
import itertools

import pytest
import timm
import torch
import zoo
from conftest import assert_close
from torch import nn
from torch.utils._pytree import tree_flatten

import gmcompress as gm
from gmcompress import jobs
from gmcompress.attaching import structured
from gmcompress.copies import duplicate
from gmcompress.forward import call, run
from gmcompress.jobs import private
from gmcompress.layers import GMLayer
from gmcompress.pipeline import check_outputs


def assert_same_outputs(found, expected, *, slack=10.0):
    (new, new_form), (old, old_form) = tree_flatten(found), tree_flatten(expected)
    assert new_form == old_form
    for a, b in zip(new, old, strict=True):
        assert a.dtype == b.dtype
        assert_close(a.detach(), b.detach(), slack=slack)


MODES = {"rank 1": {"rank": 1}, "budget": {"budget": "80%"}}


SUBJECTS = [each for each in itertools.product(zoo.MODELS, MODES) if "timm" not in each[0] or each[1] == "rank 1"]


@pytest.fixture(params=SUBJECTS, ids=" at ".join, scope="module")
def compressed(request):
    """Every model of the zoo with its inputs and the result of compressing it."""
    name, mode = request.param
    exhibit = zoo.MODELS[name]
    torch.manual_seed(0)
    model, inputs = exhibit.build().eval(), exhibit.inputs()
    return exhibit, model, inputs, gm.compress(model, "C4", inputs=inputs, **MODES[mode])


def test_the_zoo_compresses(compressed):
    exhibit, model, inputs, result = compressed
    layers = set(structured(result.model))
    if result.plan.optimum is None:
        assert layers == set(exhibit.compressed)
    else:
        assert layers
        assert result.report.after.parameters <= 0.8 * result.report.before.parameters
    check_outputs(run(model, inputs), run(result.model, inputs))
    assert result.report.after.parameters < result.report.before.parameters
    assert [row["layer"] for row in result.report.layers] == list(result.plan.layers)


def test_the_zoo_keeps_its_dense_models(compressed):
    exhibit, model, _, result = compressed
    assert not any(isinstance(module, GMLayer) for module in model.modules())
    torch.manual_seed(0)
    fresh = exhibit.build()
    assert all(torch.equal(each, fresh.state_dict()[key]) for key, each in model.state_dict().items())
    shared = {id(each) for each in model.parameters()} & {id(each) for each in result.model.parameters()}
    assert not shared


def test_the_zoo_densifies_to_the_same_function(compressed):
    _, _, inputs, result = compressed
    dense = gm.densify(result.model)
    assert not any(isinstance(module, GMLayer) for module in dense.modules())
    assert_same_outputs(run(dense, inputs), run(result.model, inputs))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, about compiled parts
def test_the_zoo_trains(compressed):
    _, _, inputs, result = compressed
    model = duplicate(result.model, {}).train()
    outputs = [each for each in tree_flatten(call(model, inputs))[0] if each.requires_grad]
    sum(each.float().sum() for each in outputs).backward()
    layers = [module for module in model.modules() if isinstance(module, GMLayer)]
    parts = [part for layer in layers for part in layer.parts().values()]
    if any(part.requires_grad for part in parts):
        assert any(part.grad is not None and part.grad.abs().sum() > 0 for part in parts if part.requires_grad)
    assert all(part.grad is None for part in parts if not part.requires_grad)


def test_train_and_no_grad_agree_for_a_transformer_encoder():
    """In evaluation without gradients torch reads the weights directly, in training it calls the layers."""
    exhibit = zoo.MODELS["encoder layer"]
    model, inputs = gm.compress(exhibit.build(), "C4", rank=1).model, exhibit.inputs()
    slow = model.train()(inputs)
    with torch.no_grad():
        fast = model.eval()(inputs)
    assert_close(fast, slow.detach(), slack=10)


def test_at_full_rank_nothing_is_lost():
    """The control of all: a plan of the largest displacement rank gives the dense weight back."""
    model = zoo.mlp().double()
    exact = gm.plan(model, "C4", rank=1).edit({"0": "C4+displacement:3", "2": "C4+displacement:3"})
    assert_close(gm.compress(model, plan=exact).model(torch.eye(8).double()), model(torch.eye(8).double()))
    with pytest.raises(AssertionError):
        assert_close(gm.compress(model, "C4", rank=1).model(torch.eye(8).double()), model(torch.eye(8).double()))


def test_the_weight_is_the_nearest():
    model = zoo.mlp()
    result = gm.compress(model, "C4", rank=0)
    assert_close(result.model[0].weight, gm.nearest(model[0].weight, "C4").detach())
    row = result.report.layers[0]
    assert row["relative_error"] == pytest.approx(gm.distance(model[0].weight, "C4", relative=True), rel=1e-5)
    assert row["distance_compressed"] == 0


def test_in_place_changes_the_model_itself_and_only_when_all_is_well():
    model = zoo.Unreachable()
    result = gm.compress(model, "C4", rank=1, inplace=True, inputs=torch.randn(2, 8))
    assert result.model is model
    assert isinstance(model.body, gm.GMLinear)
    assert result.teacher is None
    broken = zoo.Unreachable()
    broken.aux.weight.data[0, 0] = float("nan")
    for options in ({"rank": 1}, {"budget": "80%"}, {"budget": "80%", "data": torch.randn(9, 8)}):
        with pytest.raises(gm.GMError, match=r"layer 'aux'.*NaN"):
            gm.compress(broken, "C4", inplace=True, **options)
    assert isinstance(broken.body, nn.Linear)


class ListsItsLayers(nn.Module):
    """Runs layers that it holds a second time, in a list and in a function, where torch does not look for modules."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.steps, last = [self.first], self.last
        self.end = lambda x: last(x)

    def forward(self, x):
        for step in self.steps:
            x = step(x).relu()
        return self.end(x)


@pytest.mark.parametrize("inplace", [False, True])
def test_layers_held_elsewhere_are_replaced_too(inplace, generator):
    model, x = ListsItsLayers(), torch.randn(3, 8, generator=generator)
    expected = gm.compress(copy.deepcopy(model), "C4", rank=0, include=["first", "last"]).model
    found = gm.compress(model, "C4", rank=0, include=["first", "last"], inputs=x, inplace=inplace).model
    assert isinstance(found.steps[0], gm.GMLinear)
    by_hand = expected.last(expected.first(x).relu())
    assert_close(found(x), by_hand)
    assert_close(gm.densify(found)(x), by_hand)


class OnlyDense(nn.Module):
    """Refuses to run once its layer is that of a group, which no rehearsal finds."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.again = self.body

    def forward(self, x):
        if isinstance(self.body, GMLayer) and self.body.structure.group.order > 1:
            raise TypeError("not my layer")
        return self.again(x)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_that_does_not_run_compressed_is_put_back(inplace):
    model = OnlyDense()
    body = model.body
    with pytest.raises(gm.GMError, match="not my layer"):
        gm.compress(model, "C4", rank=1, inputs=torch.randn(2, 8), inplace=inplace)
    assert model.body is body
    assert model.again is body


class Ensemble(nn.Module):
    """Runs its members at once, for which their weights are stacked."""

    def __init__(self):
        super().__init__()
        self.members, self.head = nn.ModuleList(nn.Linear(16, 16) for _ in range(2)), nn.Linear(16, 3)

    def forward(self, x):
        state = torch.func.stack_module_state(list(self.members))
        found = torch.vmap(lambda each: torch.func.functional_call(self.members[0], each, (x,)))(state)
        return self.head(found.mean(0))


@pytest.mark.parametrize("data", [None, torch.randn(400, 16)], ids=["inputs", "data"])
def test_layers_that_are_taken_jointly_need_one_structure(data):
    options = {"inputs": torch.randn(4, 16), "data": data, "budget": "70%"}
    different = {"members.0": "C4", "members.1": "lowrank:2"}
    with pytest.raises(gm.GMError, match=r"the compressed model does not run, though the dense one does: .*ties="):
        gm.compress(Ensemble(), "C4", overrides=different, **options)
    result = gm.compress(Ensemble(), "C4", ties=["members.*"], **options)
    one, other = (result.plan.layers[f"members.{index}"] for index in range(2))
    assert one == other


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (zoo.mlp, {"group": "Z4"}, "unknown group family 'Z'"),
        (zoo.mlp, {"rank": -1}, "at least 0, not -1"),
        (zoo.mlp, {"exclude": "conv*"}, "matches no layer"),
        (zoo.mlp, {"inputs": torch.zeros(2, 3)}, r"does not run on inputs of shape \(2, 3\)"),
        (lambda: nn.Sequential(nn.Linear(7, 5)), {"rank": 1}, "no layer can be compressed"),
        (lambda: nn.DataParallel(zoo.mlp()), {}, "wrapped in DataParallel"),
        (lambda: torch.compile(zoo.mlp()), {}, "wrapped in OptimizedModule"),
        (zoo.mlp, {"plan": gm.plan(zoo.Unreachable(), "C4", rank=1)}, "no module 'body'"),
    ],
)
def test_bad_input_is_named_in_one_line(model, options, message):
    with pytest.raises(gm.GMError, match=message) as caught:
        gm.compress(model(), **{"group": "C4", **options})
    assert "\n" not in str(caught.value)


class Follows(nn.Module):
    """A second layer follows the first one slowly, at every call."""

    def __init__(self):
        super().__init__()
        self.body, self.slow, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    @torch.no_grad()
    def follow(self):
        self.slow.weight.data.mul_(0.9).add_(self.body.weight.data, alpha=0.1)

    def forward(self, x):
        if x.sum() != 0:  # which torch.fx cannot follow
            self.follow()
        return self.head(torch.tanh(self.body(x)) + self.slow(x))


def test_a_model_that_writes_into_its_parameters_is_left_as_it_was():
    model, x = Follows(), torch.randn(9, 8)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    for options in ({"rank": 1}, {"budget": "80%"}, {"budget": "80%", "data": x}):
        assert "body" in gm.compress(model, "C4", inputs=x, **options).plan.layers
        assert gm.doctor(model, x, "C4").works
        assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    run(model, x)
    assert not torch.equal(model.slow.weight, before["slow.weight"])


@pytest.mark.parametrize(
    "options", [{"inputs": torch.ones(9, 8)}, {"data": [torch.ones(9, 8)] * 2}], ids=["inputs", "data"]
)
@pytest.mark.parametrize("inplace", [False, True])
def test_what_a_model_counts_while_it_runs_stays_as_it_was(options, inplace):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
            self.register_buffer("runs", torch.tensor(0))

        def forward(self, x):
            self.runs += 1
            return self.head(torch.relu(self.body(x)))

    model = Counts()
    result = gm.compress(model, "C4", budget="80%", inplace=inplace, **options)
    frozen = gm.freeze(result)
    assert not any(int(each.runs) for each in (model, result.model, frozen.model))
    assert (result.model is model) == inplace
    frozen.model(torch.ones(2, 8))
    assert int(frozen.model.runs) == 1, "the control"


def test_one_copy_is_enough_to_learn_what_a_run_does(monkeypatch):
    copies = []
    monkeypatch.setattr(jobs, "private", lambda model: copies.append(private(model)) or copies[-1])
    for options, expected in (({}, 0), ({"inputs": torch.ones(9, 8)}, 1), ({"data": torch.ones(9, 8)}, 1)):
        copies.clear()
        jobs.Job.of(zoo.mlp(), "C4", options.get("inputs"), options.get("data"), 9, 1.0, None)
        assert len(copies) == expected


def test_inputs_are_left_as_they_were():
    exhibit = zoo.MODELS["habits"]
    inputs, same = exhibit.inputs(), exhibit.inputs()
    gm.compress(exhibit.build(), "C4", rank=1, inputs=inputs)
    assert torch.equal(inputs[0], same[0])
    assert len(inputs[1]) == 1


def test_outputs_that_differ_are_refused():
    with pytest.raises(gm.GMError, match="returns"):
        check_outputs([torch.zeros(2)], [torch.zeros(2, 1)])
    with pytest.raises(gm.GMError, match="returns"):
        check_outputs([torch.zeros(2)], (torch.zeros(2),))
    check_outputs([torch.zeros(2, 4), torch.zeros(2)], [torch.zeros(3, 4), torch.zeros(3)])  # boxes and their scores
    with pytest.raises(gm.GMError, match="not finite"):
        check_outputs([torch.zeros(2)], [torch.tensor([1.0, float("nan")])])
    check_outputs(torch.eye(2).to_sparse(), torch.eye(2).to_sparse())


def test_a_plan_made_before_is_carried_out():
    model = zoo.mlp()
    plan = gm.plan(model, "C4", rank=1).edit({"0": None})
    assert isinstance(gm.compress(model, plan=plan).model[0], nn.Linear)


def test_compressing_draws_no_random_numbers():
    data = torch.randn(8, 8)
    for model, options in (
        (timm.create_model("test_resnet"), {"rank": 1}),
        (zoo.mlp(), {"budget": "70%"}),
        (zoo.mlp(), {"budget": "70%", "data": data}),
    ):
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        gm.compress(model, "C4", **options)
        assert torch.equal(torch.rand(1), expected)


def test_equivariance_tells_the_distances_and_both_ranks():
    result = gm.compress(zoo.mlp(), "C4", rank=1)
    row = gm.equivariance(result)[0]
    assert row["displacement_rank"] == 1
    assert 0 < row["distance"] == pytest.approx(row["distance_compressed"], rel=1e-4)
    assert row["distance_before"] > row["distance"]
    exact = gm.equivariance(gm.compress(zoo.mlp(), "C4", rank=0).model)[0]
    assert (exact["displacement_rank"], exact["generator_displacement_rank"]) == (0, 0)
    low = gm.equivariance(gm.compress(zoo.mlp(), "C4", rank=1, residual="lowrank").model)[0]
    assert low["generator_displacement_rank"] <= 2
    with pytest.raises(gm.GMError, match="no structured layer"):
        gm.equivariance(zoo.mlp())


def test_results_and_reports_print_themselves():
    result = gm.compress(zoo.Convolutions().eval(), "C4", rank=1, inputs=torch.randn(1, 3, 9, 9))
    line = str(result)
    assert "\n" not in line
    assert f"{result.report.after.parameters:,}" in line
    text = str(result.report)
    for name, reason in result.plan.skipped.items():
        assert name in text
        assert reason.split()[0] in text
    assert gm.Report.from_json(result.report.to_json()).to_json() == result.report.to_json()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": 1}'])
def test_damaged_reports_are_refused(text):
    with pytest.raises(gm.GMError, match="report"):
        gm.Report.from_json(text)


def test_reports_are_saved_by_suffix(tmp_path):
    report = gm.compress(zoo.mlp(), "C4").report
    for suffix in ("html", "json", "txt"):
        report.save(tmp_path / f"report.{suffix}")
        assert (tmp_path / f"report.{suffix}").read_text().strip()
    with pytest.raises(gm.GMError, match=r"not as 'report\.pdf'"):
        report.save(tmp_path / "report.pdf")
    with pytest.raises(gm.GMError, match="cannot write"):
        report.save(tmp_path / "nowhere" / "report.json")
    assert len(list(tmp_path.iterdir())) == 3


def test_the_plan_of_another_network_is_refused() -> None:
    plan = gm.plan(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), "C4", rank=0)
    other = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    with pytest.raises(gm.GMError, match=r"another network: '0' has shape \(16, 16\) there, \(32, 32\) here"):
        gm.compress(other, plan=plan)


def test_the_summary_says_what_the_layers_became() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    result = gm.compress(model, "C4", budget="40%")
    assert sum(result.plan.kinds().values()) == len(result.plan.layers) == 2
    said = ", ".join(f"{count} {kind}" for kind, count in result.plan.kinds().items())
    assert f"2 of 3 layers replaced: {said}" in result.report.summary
    whole = gm.compress(model, "C4", budget="100%").report.summary
    assert "0 of 3 layers replaced" in whole
    assert "expect" not in whole
    assert "2 of 3 layers with C4" in gm.compress(model, "C4", rank=0).report.summary
