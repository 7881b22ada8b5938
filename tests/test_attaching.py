"""Structured weights attached to modules of any kind: the model around them goes on as before."""

import copy
import io
import sys
import types

import pytest
import torch
import zoo
from conftest import assert_close, must_fail
from torch import nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves

import gmcompress as gm
from gmcompress.attaching import attached, dense_class, remember, structured
from gmcompress.forward import call, run
from gmcompress.kinds import View
from gmcompress.metrics import count_macs, layer_positions
from gmcompress.surgery import find_weight, read_weight, trace, write_weight

KINDS = [*zoo.kinds_zoo.MODELS, "tied", "encoder layer"]
MODELS = pytest.mark.parametrize("name", KINDS)


def built(name):
    torch.manual_seed(0)
    return zoo.MODELS[name].build().eval(), zoo.MODELS[name].inputs()


def small(name, **options):
    model, inputs = built(name)
    return gm.compress(model, "C4", **{"rank": 1, **options}).model, inputs


def assert_same(found, expected):
    for new, old in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert_close(new.detach(), old.detach(), slack=10)


# --------------------------------------------------------------------------------------------------- views of a matrix


VIEWS = [
    View("oi", (4, 6)),
    View("io", (4, 6)),
    View("oikk", (4, 2, 3, 5)),
    View("iok", (8, 3, 2)),
    View("iok", (8, 3, 2), groups=4),
    View("oii", (4, 2, 3)),
    View("kooi", (2, 3, 4, 5)),
]


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_views_are_inverse_and_follow_the_letters(view):
    parameter = torch.randn(view.shape)
    matrix = view.matrix(parameter)
    assert tuple(matrix.shape) == view.matrix_shape
    assert torch.equal(view.parameter(matrix), parameter)
    must_fail(assert_close, view.parameter(matrix + 1), parameter)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_matrix_of_a_transposed_convolution_maps_inputs_to_outputs(groups):
    layer = nn.ConvTranspose2d(8, 12, (1, 1), groups=groups, bias=False).double()
    matrix, x = read_weight(layer, ""), torch.randn(8, dtype=torch.float64)
    assert matrix.shape == (12, 8 // groups, 1, 1)
    parts = matrix[:, :, 0, 0].reshape(groups, -1, 8 // groups) @ x.reshape(groups, -1, 1)
    assert_close(layer(x.view(1, 8, 1, 1)).flatten(), parts.flatten())


@MODELS
def test_weights_are_read_and_written_by_name(name):
    model, _ = built(name)
    for each in zoo.MODELS[name].compressed:
        matrix = read_weight(model, each).clone()
        assert matrix.shape == next(site.shape for site in trace(model) if site.name == each)
        write_weight(model, each, 2 * matrix)
        assert torch.equal(read_weight(model, each), 2 * matrix)


# ------------------------------------------------------------------------------------------------ life of the modules


@MODELS
def test_the_modules_stay_what_they_were(name):
    model, _ = built(name)
    result = gm.compress(model, "C4", rank=1).model
    assert set(structured(result)) == set(zoo.MODELS[name].compressed)
    for path, (weight, places) in attached(result).items():
        for module, key in places:
            old = next(each for each in model.modules() if type(each) is dense_class(module))
            assert isinstance(module, type(old))
            assert getattr(module, key).shape == weight.view.shape
            assert key not in module._parameters
        assert find_weight(model, path)[0].training == weight.training


@MODELS
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_it_computes_what_the_dense_model_does_in_every_mode(name, mode):
    model, inputs = small(name)
    dense = gm.densify(model)
    assert type(dense) is type(zoo.MODELS[name].build())
    assert list(dense.state_dict()) == list(zoo.MODELS[name].build().state_dict())
    with torch.set_grad_enabled(mode != "no_grad"):
        found, wanted = (call(each.train(mode == "train"), inputs) for each in (model, dense))
    assert_same(found, wanted)
    original, _ = built(name)
    must_fail(assert_same, found, run(original, inputs))


@MODELS
def test_gradients_reach_every_part(name):
    model, inputs = small(name)
    sum(each.float().square().sum() for each in tree_leaves(call(model.train(), inputs))).backward()
    for layer in structured(model).values():
        assert all(part.grad is not None and part.grad.isfinite().all() for part in layer.parts().values())


@MODELS
def test_copies_pickles_and_states(name):
    model, inputs = small(name)
    expected = run(model, inputs)
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    if name not in ("normed",):  # parametrized modules refuse to be pickled
        torch.save(model, file)
        file.seek(0)
        assert_same(run(torch.load(file, weights_only=False), inputs), expected)
    again, _ = small(name)
    with torch.no_grad():
        for each in again.parameters():
            each.zero_()
    must_fail(assert_same, run(again, inputs), expected)
    again.load_state_dict(copied.state_dict())
    assert_same(run(again, inputs), expected)
    with torch.no_grad():
        for each in copied.parameters():
            each.zero_()
    assert_same(run(model, inputs), expected)


@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm")  # torch's own
@pytest.mark.parametrize("name", [each for each in KINDS if each != "normed"])
def test_export(name):
    """Parametrized and pruned modules are no matter of this package."""
    model, inputs = small(name)
    args = tuple(inputs) if isinstance(inputs, list) else (inputs,)
    assert_same(torch.export.export(model, args).module()(*args), run(model, inputs))


@pytest.mark.parametrize("name", ["registered", "tied"])
def test_compile(name):
    model, inputs = small(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(inputs), model(inputs))


@pytest.mark.parametrize("name", ["attention", "tables", "signals"])
def test_torch_fx_follows_it_as_the_dense_model(name):
    """It takes torch's own modules whole, as attention, in which code asks for values."""
    model, inputs = small(name)
    traced = torch.fx.symbolic_trace(model)
    assert_same(run(traced, inputs), run(model, inputs))
    nodes = [[str(node) for node in torch.fx.symbolic_trace(each).graph.nodes] for each in (model, gm.densify(model))]
    assert nodes[0] == nodes[1]
    sum(each.float().square().sum() for each in tree_leaves(call(traced.train(), inputs))).backward()
    assert all(each.grad is not None for name, each in traced.named_parameters() if "structured_" in name)


@MODELS
def test_dtypes_and_flags(name):
    model, _ = built(name)
    for each in model.parameters():
        each.requires_grad_(False)
    result = gm.compress(model.bfloat16(), "C4", rank=1).model
    for layer in structured(result).values():
        assert {part.dtype for part in layer.parts().values()} == {torch.bfloat16}
        assert not layer.trains
    result.double()
    assert {layer.weight.dtype for layer in structured(result).values()} == {torch.float64}


def test_tied_weights_stay_tied(tmp_path):
    model, inputs = built("tied")
    result = gm.compress(model, "C4", budget="60%", inputs=inputs, include="*")
    assert result.report.after.parameters <= 0.6 * result.report.before.parameters
    gm.save(result, tmp_path / "small")
    for each in (result.model, copy.deepcopy(result.model), gm.load(tmp_path / "small", zoo.Tied())):
        assert each.head.structured_weight.same_as(each.embedding.structured_weight)
        assert sum(part.numel() for part in each.parameters()) == result.report.after.parameters
    dense = gm.densify(result.model)
    assert dense.head.weight is dense.embedding.weight
    site = gm.trace(model, inputs)[0]
    assert (site.name, site.aliases, site.role, site.calls) == ("embedding", ("head",), "output embedding", 2)


@pytest.mark.parametrize("frozen", [False, True])
def test_tied_weights_under_functional_call(frozen):
    """Which puts a module's tensors back by name: one module under two names would keep those of the call."""
    model, inputs = small("tied", include="*")
    expected = run(model, inputs)
    model = gm.freeze(model, "dense") if frozen else model
    others = {name: torch.randn_like(each) for name, each in model.named_parameters()}
    twin = copy.deepcopy(model)
    twin.load_state_dict(others, strict=False)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    assert_same(torch.func.functional_call(model, others, args), run(twin, inputs))
    assert_same(run(model, inputs), expected)
    must_fail(assert_same, run(twin, inputs), expected)
    assert list(structured(model)) == list(structured(twin)) == ["embedding", "body"]
    model.float()
    assert model.head.structured_weight.same_as(model.embedding.structured_weight)


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_that_are_no_longer_tied_are_their_own(compiled):
    model, inputs = small("tied", include="*")
    model.load_state_dict({name: each.clone() for name, each in model.state_dict().items()}, assign=True)
    before = run(model, inputs)
    with torch.no_grad():
        for each in model.head.parameters():
            each.mul_(2)
    expected = run(gm.densify(model), inputs)
    must_fail(assert_same, before, expected)
    torch.compiler.reset()
    assert_same(run(model, inputs), expected)
    if compiled:
        assert_same(torch.compile(model, backend="eager", fullgraph=True)(inputs), expected)
        assert_same(torch.export.export(model, (inputs,)).module()(inputs), expected)


def test_pruned_weights_are_told_apart():
    torch.manual_seed(0)
    dense = nn.Sequential(*(nn.Conv1d(8, 8, 3, padding=1) for _ in range(2)))
    model, inputs = gm.compress(dense, "C4", rank=0, include="*").model.eval(), torch.randn(2, 8, 5)
    for each in model:
        prune.l1_unstructured(each.structured_weight, "kernel", amount=0.5)
    assert list(structured(model)) == ["0", "1"]
    assert_same(gm.densify(model)(inputs), model(inputs))


def test_hooks_and_attributes_are_kept():
    model, inputs = small("hooked")
    assert len(model.hooked._forward_hooks) == 1
    assert model.marked.scale == gm.densify(model).marked.scale == 0.5
    assert type(model.marked) is gm.GMLinear
    assert model.one.bias is model.two.bias
    fired = []
    model.more.register_forward_hook(lambda *_: fired.append(1))
    run(model, inputs)
    assert fired


def test_what_is_no_longer_as_it_was_made_is_attached_to():
    model, inputs = small("altered")
    assert isinstance(model.conv.structured_weight, gm.GMWeight)
    assert model.wide.weight.shape == (16, 8)
    assert (model.conv.stride, model.named.path, model.named.labels) == (2, "here", "these")
    assert type(gm.densify(model).named) is nn.Linear
    assert_same(run(gm.densify(model), inputs), run(model, inputs))


def test_layers_whose_class_has_a_way_of_copying_of_its_own(tmp_path):
    class Copied(nn.Linear):
        """As the linear layer of torch_geometric, but that it is one of torch's."""

        def __deepcopy__(self, memo):
            found = type(self)(self.in_features, self.out_features)
            found.weight, found.bias = copy.deepcopy(self.weight, memo), copy.deepcopy(self.bias, memo)
            return found

    def build():
        torch.manual_seed(0)
        return nn.Sequential(Copied(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3)).eval()

    x = torch.randn(4, 8)
    result = gm.compress(build(), "C4", rank=1, inputs=x)
    assert list(result.plan.layers) == ["0", "2"]
    copied = copy.deepcopy(result.model)
    assert copied[0].structured_weight is not result.model[0].structured_weight
    gm.save(result, tmp_path / "small")
    dense = gm.densify(result.model)
    assert type(copy.deepcopy(dense)[0]) is Copied
    for each in (copied, dense, gm.load(tmp_path / "small", build()), gm.freeze(result, "dense").model):
        assert_close(each(x), result.model(x))


def test_a_module_that_lets_nothing_be_set_on_it():
    class Sealed(nn.Linear):
        def __setattr__(self, key, value):
            if "bias" in vars(self).get("_parameters", ()) and key != "training":
                raise AttributeError(f"{key} cannot be set")
            super().__setattr__(key, value)

    model, x = nn.Sequential(Sealed(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(9, 8)
    for options in ({"rank": 1}, {"budget": "80%", "data": x}):
        result = gm.compress(model, "C4", inputs=x, **options)
        assert "0" in result.plan.layers
        dense = gm.densify(result.model)
        assert type(dense[0]) is Sealed
        assert_same(run(dense, x), run(result.model, x))


def test_in_place_rolls_back_whole():
    class Refuses(nn.Module):
        _tied_weights_keys = {"again.weight": "table.weight"}  # noqa: RUF012 # as transformers declares it

        def __init__(self):
            super().__init__()
            self.body, self.table, self.again = nn.Linear(8, 8), nn.Embedding(8, 8), nn.Linear(8, 8)
            self.norm = nn.BatchNorm1d(8)
            self.again.weight = self.table.weight

        def forward(self, x):
            if "weight" not in self.table._parameters:
                raise TypeError("not my table")
            return self.again(self.norm(self.body(x)))

    model, x = Refuses().eval(), torch.randn(9, 8)
    before = {name: (id(each), each.clone()) for name, each in model.state_dict(keep_vars=True).items()}
    plan = gm.plan(model, "C4", rank=1)  # without inputs it is not known that the table has to stay dense
    for options in ({"inputs": x}, {"data": x}):
        with pytest.raises(gm.GMError, match="not my table"):
            gm.compress(model, plan=plan, inplace=True, **options)
        assert [type(each) for each in model.children()] == [nn.Linear, nn.Embedding, nn.Linear, nn.BatchNorm1d]
        assert "_tied_weights_keys" not in vars(model)
        after = model.state_dict(keep_vars=True)
        assert list(after) == list(before)
        assert all(id(after[name]) == key and torch.equal(after[name], old) for name, (key, old) in before.items())
    assert gm.compress(model.train(), "C4", rank=1, inplace=True).model is model
    assert model.table.structured_weight.same_as(model.again.structured_weight)
    assert vars(model)["_tied_weights_keys"] != Refuses._tied_weights_keys == gm.densify(model)._tied_weights_keys


def test_the_root_itself_can_be_attached_to_in_place():
    model = nn.Embedding(16, 8)
    put_back = remember(model)
    assert gm.compress(model, "C4", rank=1, inplace=True).model is model
    assert isinstance(model, nn.Embedding)
    put_back()
    assert type(model) is nn.Embedding


# ---------------------------------------------------------------------------------------------------- budgets and data


@pytest.mark.parametrize("name", [each for each in KINDS if each not in ("attention", "decoder layer")])
def test_calibrated_budgets(name):
    """Kinds without moments are fitted to their weights; their sensitivity is measured all the same."""
    model, inputs = built(name)
    result = gm.compress(model, "C4", budget="85%", data=[inputs, inputs])
    assert result.report.after.parameters <= 0.85 * result.report.before.parameters
    assert all(not text.startswith("C") for text in (result.plan.layers.get(key, "") for key in ("words", "places")))


def test_multiply_adds_are_counted_as_before():
    model, inputs = built("signals")
    result = gm.compress(model, "C4", rank=0, include="*", inputs=inputs)
    assert result.report.after.macs == result.report.before.macs
    macs, counted = count_macs(model, inputs)
    assert macs == counted
    sites = gm.trace(model, inputs)
    positions = layer_positions(model, inputs, [site.name for site in sites])
    assert sum(positions[site.name] * torch.Size(site.shape).numel() for site in sites) == macs
    with pytest.raises(gm.GMError, match=r"100.0 %\) lie outside .* no structure makes cheaper to apply; .* are none"):
        gm.plan(model, "C4", budget={"macs": "70%"}, inputs=inputs)  # of weights attached, which have no fast product


def test_annealing_starts_at_the_teacher():
    from gmcompress.tuning.factors import Annealing

    for name in ("signals", "tied", "registered"):
        teacher, inputs = built(name)
        student = gm.compress(teacher, "C4", rank=1).model
        annealing = Annealing(student, teacher, share=0.5)
        annealing.attach(student)
        annealing.set(0.0)
        assert_same(run(student, inputs), run(teacher, inputs))
        annealing.set(0.5)
        must_fail(assert_same, run(student, inputs), run(teacher, inputs))
        annealing.remove()


def test_tuning_and_equivariance():
    for name in ("tied", "standardised"):
        model, inputs = built(name)
        result = gm.compress(model, "C4", rank=1, inputs=inputs)
        tuned = gm.tune(result, [inputs], epochs=1, lr=1e-3)
        assert {row["layer"] for row in gm.equivariance(tuned)} == set(result.plan.layers)


# --------------------------------------------------------------------------------------------------------- other kinds


def test_conv1d_of_transformers_is_known_by_its_name(monkeypatch):
    """A stand-in under the same full name; the package itself is not imported."""

    class Conv1D(nn.Module):
        def __init__(self, outputs, inputs):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight)

    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", types.ModuleType("transformers.pytorch_utils"))
    Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"
    model, x = nn.Sequential(Conv1D(12, 8), Conv1D(8, 12), nn.Linear(8, 3)), torch.randn(2, 8)
    assert gm.trace(model, x)[0].shape == (12, 8)
    result = gm.compress(model, "C4", rank=1, inputs=x)
    assert set(result.plan.layers) == {"0", "1"}
    assert result.report.before.macs == 2 * (12 * 8 + 8 * 12 + 8 * 3)
    assert_same(run(gm.densify(result.model), x), run(result.model, x))


def test_embeddings_that_renormalise():
    model, tokens = nn.Sequential(nn.Embedding(16, 8, max_norm=1.0), nn.Linear(8, 3)), torch.arange(6)
    with torch.no_grad():
        model[0].weight.mul_(3)
    before = model[0].weight.detach().clone()
    result = gm.compress(model, "C4", rank=1, inputs=tokens)
    assert torch.equal(model[0].weight, before)
    assert float(result.model[0](tokens).detach().norm(dim=1).max()) < 1.001
    result.model(tokens).sum().backward()


@pytest.mark.parametrize("options", [{"rank": 1}, {"budget": "60%"}], ids=["rank", "budget"])
def test_the_zero_row_of_the_padding_stays_zero(options, tmp_path):
    def build():
        return nn.Sequential(nn.Embedding(16, 8, padding_idx=3), nn.Linear(8, 3))

    model, tokens = build(), torch.arange(8)
    result = gm.compress(model, "C4", inputs=tokens, **options)
    gm.save(result, tmp_path / "small")
    other = build()
    with torch.no_grad():
        other[0].weight.fill_(1.0)
    loaded = gm.load(tmp_path / "small", other)
    for each in (result.model, gm.densify(result.model), copy.deepcopy(result.model), loaded):
        assert float(each[0].weight[3].detach().abs().max()) < 1e-6
        assert each[0].weight[4].any()
    assert torch.equal(loaded[0].weight, result.model[0].weight)
    exported = torch.export.export(result.model.eval(), (tokens,)).module()
    assert_same(exported(tokens), run(result.model, tokens))
    control = gm.compress(other, "C4", rank=1).model
    assert control[0].weight[3].any(), "where the dense row is not zero, neither is the structured one"


def test_a_saved_layer_keeps_its_form_whatever_hooks_the_model_has_now(tmp_path):
    for saved, built_on in ((False, True), (True, False)):
        models = [zoo.mlp(), zoo.mlp()]
        for model, hooked in zip(models, (saved, built_on), strict=True):
            if hooked:
                model[0].register_forward_hook(lambda *_: None)
        result = gm.compress(models[0], "C4", rank=1, inputs=torch.randn(2, 8))
        gm.save(result, tmp_path / str(saved))
        loaded = gm.load(tmp_path / str(saved), models[1])
        assert isinstance(structured(loaded)["0"], gm.GMWeight) == saved
