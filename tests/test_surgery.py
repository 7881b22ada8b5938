"""Surgery: sites and roles are found, what cannot be replaced says why, replacing reaches every name."""

import copy
import functools
import types

import accelerate
import pytest
import torch
import zoo
from torch import nn
from torch.nn.utils import parametrizations

import gmcompress as gm
from gmcompress.forward import call, run, shell
from gmcompress.surgery import trace


def by_name(model, inputs=None):
    return {site.name: site for site in trace(model, inputs)}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_tracing_leaves_the_model_alone(name):
    exhibit = zoo.MODELS[name]
    model = exhibit.build().train()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    hooks = sum(len(module._forward_pre_hooks) for module in modules)
    for inputs in (None, exhibit.inputs()):
        assert set(exhibit.compressed) <= set(by_name(model, inputs))
    assert model.training
    assert all(old is new for old, new in zip(modules, model.modules(), strict=True))
    assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())
    assert sum(len(module._forward_pre_hooks) for module in modules) == hooks


def test_roles_and_calls():
    sites = by_name(zoo.Convolutions(), torch.randn(1, 3, 9, 9))
    assert {name: site.role for name, site in sites.items() if site.role} == {"stem": "stem", "head": "classifier"}
    assert by_name(zoo.CalledTwice(), torch.randn(1, 8))["body"].calls == 2
    assert by_name(zoo.CalledTwice())["body"].calls == 2  # torch.fx sees the same
    assert by_name(zoo.ControlFlow())["left"].calls is None  # torch.fx cannot
    assert by_name(zoo.Unreachable())["aux"].calls == 0
    assert by_name(nn.Linear(4, 4))[""].role == ""


def test_convolution_groups_may_be_an_integer_of_numpy():
    sites = {site.name: site for site in trace(zoo.MODELS["sizes of numpy"].build())}
    assert [sites[name].conv_groups for name in ("conv", "up", "body")] == [2, 2, 1]


def test_order_is_that_of_the_run_not_of_the_definition():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(8, 3)
            self.first = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.last(self.first(x).mean((2, 3)))

    for inputs in (None, torch.randn(1, 3, 4, 4)):
        assert [(site.name, site.role) for site in trace(Backwards(), inputs)] == [
            ("first", "stem"),
            ("last", "classifier"),
        ]


def test_obstacles_are_named():
    assert "parametrized" in by_name(parametrizations.weight_norm(nn.Linear(4, 4)))[""].obstacle
    sites = by_name(zoo.MODELS["normed"].build())
    assert "weight_norm, spectral_norm or pruning" in sites["pruned.weight_orig"].obstacle
    assert "parametrized" in sites["new"].obstacle
    with pytest.warns(FutureWarning, match="weight_norm"):
        old = nn.utils.weight_norm(nn.Linear(4, 4))
    for each, key in ((old, "weight_v"), (nn.utils.spectral_norm(nn.Linear(4, 4)), "weight_orig")):
        assert "weight_norm, spectral_norm or pruning" in by_name(each)[key].obstacle
    assert "one flat list" in by_name(nn.LSTM(4, 4))["weight_hh_l0"].obstacle
    assert "not known to be a matrix" in by_name(nn.LayerNorm((4, 4)))[""].obstacle
    assert "container" in by_name(Box())[""].obstacle
    assert "sparse" in by_name(nn.Embedding(4, 4, sparse=True))[""].obstacle
    whole = nn.Linear(4, 4)
    whole.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    assert "torch.int8" in by_name(whole)[""].obstacle
    for free in (zoo.Tied(), zoo.MODELS["hooked"].build(), zoo.MODELS["standardised"].build()):
        assert not any(site.obstacle for site in trace(free) if not site.name.endswith("gain"))
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    assert by_name(patched)[""].obstacle.endswith("replaced on the instance")
    hooked = accelerate.hooks.add_hook_to_module(nn.Linear(4, 4), accelerate.hooks.AlignDevicesHook("cpu"))
    assert "remove_hook_from_module(model, recurse=True) takes that back" in by_name(hooked)[""].obstacle
    assert by_name(accelerate.hooks.remove_hook_from_module(hooked))[""].obstacle == ""
    assert by_name(nn.Linear(4, 4))[""].obstacle == ""


def test_aliases_are_listed():
    assert by_name(zoo.TwoNames())["first"].aliases == ("second",)


class Box(nn.Sequential):
    """A container with a weight of its own."""

    def __init__(self):
        super().__init__(nn.Linear(4, 4))
        self.weight = nn.Parameter(torch.ones(4, 4))


gm.register(Box, weight="oi")


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("kind", ["DistributedDataParallel", "DataParallel", "ModelEmaV3"])
def test_wrapped_models_are_refused(kind):
    wrapped = type(kind, (Wrapper,), {})(zoo.mlp())
    with pytest.raises(gm.GMError, match=rf"wrapped in {kind}; unwrap it first: pass model.module"):
        trace(wrapped)


def test_compiled_scripted_meta_and_foreign_models_are_refused():
    with pytest.raises(gm.GMError, match=r"OptimizedModule.*_orig_mod"):
        trace(torch.compile(zoo.mlp()))
    with pytest.raises(gm.GMError, match="meta device"):
        trace(zoo.mlp().to("meta"))
    offloaded = accelerate.cpu_offload(zoo.mlp(), execution_device="cpu")
    with pytest.raises(gm.GMError, match=r"on the meta device .* elsewhere by accelerate; .*remove_hook_from_module"):
        trace(offloaded)
    assert trace(accelerate.hooks.remove_hook_from_module(offloaded, recurse=True))
    with pytest.raises(gm.GMError, match="not dict"):
        trace({})


class ByValue(nn.Linear):
    def __eq__(self, other):
        return isinstance(other, ByValue) and self.in_features == other.in_features

    def __hash__(self):
        return hash(self.in_features)


class Unhashable(nn.Linear):
    def __eq__(self, other):
        return self is other


class ByIdentity(nn.Linear):
    """Equal to another by value, but told apart by its hash, as torch needs."""

    def __eq__(self, other):
        return isinstance(other, ByIdentity) and torch.equal(self.weight, other.weight)

    __hash__ = nn.Module.__hash__


def test_modules_that_torch_takes_for_one_another_are_refused():
    """Neither parameters() nor eval() reaches the second of two that are equal."""
    with pytest.raises(
        gm.GMError, match=r"torch takes '1' \(ByValue\) for another module .* leaves __eq__ and __hash__"
    ):
        gm.compress(nn.Sequential(ByValue(8, 8), ByValue(8, 8)), "C4", rank=1, include="*")
    with pytest.raises(gm.GMError, match=r"cannot list the modules of this Sequential .*unhashable"):
        gm.compress(nn.Sequential(Unhashable(8, 8), nn.Linear(8, 8)), "C4", rank=1, include="*")
    model, x = nn.Sequential(ByIdentity(8, 8), ByIdentity(8, 8)), torch.randn(2, 8)
    model[1].load_state_dict(model[0].state_dict())
    for options in ({"inputs": x}, {"inplace": True}):
        small = gm.compress(model, "C4", rank=1, include="*", **options).model
        assert [type(each).__name__ for each in small] == ["StructuredByIdentity"] * 2
    assert torch.allclose(torch.export.export(small.eval(), (x,)).module()(x), small(x), atol=1e-6)


def test_inputs_that_do_not_fit_are_named():
    with pytest.raises(gm.GMError, match=r"does not run on inputs of shape \(2, 5\)"):
        trace(zoo.mlp(), torch.zeros(2, 5))


def test_replace_reaches_every_name_and_unregistered_lists():
    two = zoo.TwoNames()
    changed = gm.replace(two, {"first": nn.Identity()})
    assert changed.first is changed.second
    assert isinstance(changed.first, nn.Identity)
    assert isinstance(two.first, nn.Linear)
    twice = gm.replace(zoo.CalledTwice(), {"body": nn.Identity()})
    assert twice.steps[0] is twice.body


def test_what_replaces_a_layer_may_hold_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    found = gm.replace(model, {"0": nn.Sequential(nn.Flatten(), model[0])})
    assert found[0][1] is model[0]
    x = torch.randn(2, 4)
    assert torch.equal(found(x), model(x))


def test_replace_in_place_and_at_the_root():
    two = zoo.TwoNames()
    assert gm.replace(two, {"first": nn.Identity()}, inplace=True) is two
    assert isinstance(two.second, nn.Identity)
    new = nn.Identity()
    root = nn.Linear(2, 2)
    assert gm.replace(root, {"": new}) is new
    with pytest.raises(gm.GMError, match="inplace=True cannot"):
        gm.replace(root, {"": new}, inplace=True)


class Holds(nn.Module):
    """Runs its layer from wherever a module may hold it."""

    def __init__(self):
        super().__init__()
        self.body = body = nn.Linear(4, 4)
        self.ways = nn.ModuleDict({"inside": nn.Sequential(self.body)})
        self.listed, self.named, self.paired = [self.body], {"body": [self.body]}, (1, self.body)
        self.closed, self.bound = lambda x: body(x), functools.partial(self.run, self.body)
        self.held, self.again = types.SimpleNamespace(body=self.body), self.run
        self.tower = [nn.Sequential(self.body)]  # of which torch does not know

    @staticmethod
    def run(layer, x):
        return layer(x)

    def forward(self, x):
        ways = [self.body, self.ways["inside"], self.listed[0], self.named["body"][0], self.paired[1], self.closed]
        ways += [self.bound, self.held.body, self.tower[0]]
        return torch.stack([way(x) for way in ways])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_replace_reaches_all_that_a_model_holds(inplace, wrapped):
    model, x = Holds(), torch.randn(2, 4)
    old, dense = model.body, model.body(x)
    new = nn.Sequential(model.body, nn.Threshold(9, 0)) if wrapped else nn.Identity()
    found = gm.replace(model, {"body": new}, inplace=inplace)
    assert (found is model) == inplace
    assert found.body is new
    assert not wrapped or new[0] is old
    assert torch.equal(found(x), (torch.zeros_like(x) if wrapped else x).expand(9, -1, -1))
    assert torch.equal(old(x), dense)
    assert model(x).shape == (9, 2, 4)


def test_replace_names_the_nearest():
    with pytest.raises(gm.GMError, match="no module 'frist'; the nearest are 'first'"):
        gm.replace(zoo.TwoNames(), {"frist": nn.Identity()})


def test_a_shell_shares_memory_but_not_modules():
    model = zoo.mlp().train()
    copied = shell(model)
    assert copied[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert model[0].weight.requires_grad
    assert not copied[0].weight.requires_grad
    assert copied[0] is not model[0]
    assert model.training
    assert not copied.training


def test_run_passes_tensors_sequences_and_mappings():
    exhibit = zoo.MODELS["control flow"]
    assert run(exhibit.build(), exhibit.inputs())["logits"].shape == (4, 3)
    pair = [torch.ones(3, 2), torch.ones(3, 2)]
    assert call(nn.Bilinear(2, 2, 1), pair).shape == (3, 1)


def test_parts_of_structured_weights_are_said_to_be_such():
    small = gm.compress(nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 8)), "C4", rank=1).model
    places = {"0.structured_weight": "GMWeight", "1": "GMLinear"}
    expected = {
        f"{place}.{part}": f"it is a stored part of {kind}, which has a structure already"
        for place, kind in places.items()
        for part in ("kernel", "gates", "filters")
    }
    sites = trace(small)
    assert {site.name: site.obstacle for site in sites} == expected | {"2": ""}
    assert {site.name: site.role for site in sites if site.role} == {"2": "classifier"}, "as before"
    with pytest.raises(gm.GMError, match=r"1\.kernel: it is a stored part of GMLinear"):
        gm.compress(small, "C4", rank=1)
