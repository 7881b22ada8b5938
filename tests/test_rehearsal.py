"""Weights that a model's code does not take computed stay dense, with a reason; the rest is compressed."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import zoo
from conftest import assert_close, must_fail
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import gmcompress as gm
from gmcompress.attaching import structured
from gmcompress.copies import duplicate
from gmcompress.forward import run
from gmcompress.rehearsal import ASIDE, ELSEWHERE, REFUSED, RUNS, UNREAD, _Rehearsal, agree, rehearsed_sites
from gmcompress.surgery import read_weight, trace


class Model(nn.Module):
    """Two layers and a head; the first is used as each of the tests says."""

    def __init__(self, use, layer=nn.Linear):
        super().__init__()
        self.picky, self.free, self.head = layer(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.use = use
        self.aside = [self.picky.weight]
        self.bound = functools.partial(F.linear, weight=self.picky.weight)

    def forward(self, x):
        return self.head(torch.tanh(self.free(torch.tanh(self.use(self, x)))))


class SelfAware(nn.Linear):
    def forward(self, x):
        assert type(self).__name__ == "SelfAware"
        return super().forward(x)


class Limited(nn.Linear):
    """A weight of limited norm, as the layers of networks for electroencephalograms have."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        return super().forward(x)


class Keeps(nn.Linear):
    """Makes its weight ready once."""

    made = None

    def forward(self, x):
        self.made = F.normalize(self.weight.detach()) if self.made is None else self.made
        return F.linear(x, self.made, self.bias)


class Moving(nn.Linear):
    """Sets its weight anew in training, as codebooks that follow what they encode do."""

    def forward(self, x):
        if self.training:
            self.weight = nn.Parameter(0.9 * self.weight)
        return super().forward(x)


class Clipped(nn.Linear):
    """Bounds its weight in training, as critics do."""

    def bound(self):
        return [each.data.clamp_(-0.1, 0.1) for each in [self.weight] if self.training]

    def forward(self, x):
        self.bound()
        return super().forward(x)


class Followed(nn.Linear):
    """Has a slow copy, which follows it in training, parameter by parameter."""

    def __init__(self, *widths):
        super().__init__(*widths)
        self.slow = [each.detach().clone() for each in self.parameters()]

    def forward(self, x):
        for old, new in zip(self.slow, self.parameters(), strict=True) if self.training else ():
            old.lerp_(new.detach(), 0.1)
        return super().forward(x)


class Closed(nn.Linear):
    def __init_subclass__(cls, *, name):
        cls.name = name


def asks_for_the_type(self, x):
    assert type(self.picky) is nn.Linear
    return self.picky(x)


def unpacks(self, x):
    weight, bias = self.picky.parameters()
    return F.linear(x, weight, bias)


class Renamed(nn.Linear):
    """A hook on its state that needs the dense weight."""

    def __init__(self, *widths):
        super().__init__(*widths)
        self._register_state_dict_hook(lambda _module, state, prefix, _: state.update(w=state.pop(f"{prefix}weight")))


def scaled(self, x):
    return torch.func.functional_call(self.picky, {key: 2 * each for key, each in self.picky.named_parameters()}, (x,))


def called(self, x):
    return self.picky(x)


HAZARDS = {
    "type": (Model, (asks_for_the_type,), REFUSED + "AssertionError"),
    "unpacked": (Model, (unpacks,), REFUSED),
    "state dict": (Model, (lambda self, x: F.linear(x, self.picky.state_dict()["weight"]),), REFUSED + "KeyError"),
    "parameter": (Model, (lambda self, x: F.linear(x, self.picky._parameters["weight"]),), REFUSED + "KeyError"),
    "kept aside": (Model, (lambda self, x: F.linear(x, self.aside[0]),), ELSEWHERE),
    "bound": (Model, (lambda self, x: self.bound(x),), ELSEWHERE),
    "own name": (Model, (called, SelfAware), REFUSED + "AssertionError"),
    "kept ready": (Model, (called, Keeps), UNREAD),
    "limited": (Model, (called, Limited), REFUSED + "GMError"),
    "moving": (Model, (called, Moving), REFUSED + "GMError"),
    "clipped": (Model, (called, Clipped), REFUSED + "GMError"),
    "followed": (Model, (called, Followed), REFUSED + "RuntimeError"),
    "scaled": (Model, (scaled,), ELSEWHERE),
    "state": (Model, (called, Renamed), REFUSED + "KeyError"),
    "no subclass": (Model, (called, Closed), "cannot compute its weight"),
}

FOLLOWED = ("unpacked", "state dict", "parameter", "kept aside", "bound", "scaled")  # known without inputs


@pytest.mark.parametrize("way", [{"rank": 1}, {"budget": "85%"}], ids=["rank", "budget"])
@pytest.mark.parametrize("name", HAZARDS)
def test_what_is_refused_stays_dense_and_the_rest_does_not(name, way, tmp_path):
    cls, arguments, reason = HAZARDS[name]
    torch.manual_seed(0)
    model, x = cls(*arguments).eval(), torch.randn(4, 8)
    run(model, x)  # which limits a weight once and for all
    before = {key: each.clone() for key, each in model.state_dict().items()}
    result = gm.compress(model, "C4", inputs=x, **way)
    assert list(result.plan.layers) == ["free"]
    assert reason in result.plan.skipped["picky"]
    assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())
    assert_close(run(gm.densify(result.model), x), run(result.model, x), slack=10)
    must_fail(assert_close, run(model, x), run(result.model, x))
    gm.save(result, tmp_path / "small")
    assert_close(run(gm.load(tmp_path / "small", cls(*arguments)), x), run(result.model, x))
    assert gm.doctor(model, x, "C4").works
    obstacles = {site.name: site.obstacle for site in rehearsed_sites(model, None)}
    assert obstacles == {"picky": ASIDE if name in FOLLOWED else "", "free": "", "head": ""}


def test_without_inputs_a_loop_over_all_parameters_is_seen():
    class Loops(nn.Module):
        def __init__(self, read):
            super().__init__()
            self.body, self.table, self.head, self.read = nn.Linear(8, 8), nn.Embedding(8, 8), nn.Linear(8, 3), read

        def forward(self, x):
            return self.head(self.body(x + self.table.weight[0])) + self.read(self)

    hazards = [
        lambda model: sum(each.square().sum() for each in model.parameters()),
        lambda model: sum(each.data.abs().max() for _, each in model.named_parameters()),
        lambda model: torch.cat([each.detach().flatten() for each in model.state_dict().values()]).norm(),
    ]
    for read in hazards:
        assert [site.obstacle for site in rehearsed_sites(Loops(read), None)] == [ASIDE] * 3
        with pytest.raises(gm.GMError, match="no layer"):
            gm.compress(Loops(read), "C4", rank=1)
    harmless = [
        lambda model: sum(each.weight.square().sum() for each in model.children()),
        lambda model: next(model.parameters()).new_zeros(3) + sum(each.numel() for each in model.parameters()),
        lambda model: torch.zeros(3, dtype=next(model.parameters()).dtype),
    ]
    for read in harmless:
        model, x = Loops(read), torch.randn(2, 8)
        assert not any(site.obstacle for site in rehearsed_sites(model, None))
        small = gm.compress(model, "C4", rank=1).model
        assert structured(small)
        if read is not harmless[1]:  # which counts the parameters
            assert_close(run(gm.densify(small), x), run(small, x))


def test_what_is_written_at_a_change_of_mode_is_not_lost():
    class Merging(nn.Linear):
        """Adds a low rank to its weight for evaluation, and takes it away for training."""

        def __init__(self, *widths):
            super().__init__(*widths)
            self.left, self.right, self.merged = nn.Parameter(torch.ones(8, 1)), nn.Parameter(torch.ones(1, 8)), False

        def train(self, mode=True):
            super().train(mode)
            if mode == self.merged:
                self.weight.data += (1 - 2 * mode) * self.left @ self.right
                self.merged = not mode
            return self

        def forward(self, x):
            return super().forward(x) + (0 if self.merged else x @ self.right.T @ self.left.T)

    model, x = Model(called, Merging), torch.randn(4, 8)
    expected = run(model, x)
    assert_close(run(model.eval(), x), expected, slack=10)
    result = gm.compress(model, "C4", rank=1, inputs=x)
    assert REFUSED + "GMError" in result.plan.skipped["picky"]
    assert list(result.plan.layers) == ["free"]
    small = run(result.model, x)
    assert_close(run(result.model.train().eval(), x), small, slack=10)


def test_objects_in_outputs_are_compared_too():
    class Found(types.SimpleNamespace):
        pass

    class Holds(Model):
        def forward(self, x):
            return Found(logits=super().forward(x), more=[Found(x=self.aside[0])])

    model, x = Holds(lambda self, x: F.linear(x, self.aside[0])).eval(), torch.randn(4, 8)
    for way in ({"rank": 1}, {"budget": "85%", "data": x}):
        result = gm.compress(model, "C4", inputs=x, **way)
        assert ELSEWHERE in result.plan.skipped["picky"]
    assert agree(Found(x=torch.ones(2)), Found(x=torch.ones(2)))
    assert not agree(Found(x=torch.ones(2)), Found(x=torch.zeros(2)))


def test_nothing_is_refused_without_a_reason():
    for name in ("mlp", "tied", "two names", "convolutions", "attention", "hooked", "closes over", "bfloat16"):
        model, inputs = zoo.MODELS[name].build(), zoo.MODELS[name].inputs()
        assert rehearsed_sites(model, inputs) == trace(model, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stand_ins_compute_the_same_bit_for_bit(dtype):
    """So that rounding turns no token to another expert, whatever the dtype."""
    model, x = zoo.mlp(dtype), torch.randn(2, 8).to(dtype)
    rehearsal = _Rehearsal.of(model, x, ["0", "2"])
    small = rehearsal._computed(["0", "2"])
    for name in ("0", "2"):
        assert torch.equal(structured(small)[name].weight, read_weight(rehearsal.twin, name))
        assert not torch.equal(structured(small)[name].weight, read_weight(model, name))
    assert torch.equal(run(small, x), run(rehearsal.twin, x))


def test_models_that_draw_numbers_or_keep_a_memory_are_not_taken_for_others():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.seed = nn.Linear(8, 8), nn.Linear(8, 3), 0

        def forward(self, x):
            Draws.calls += 1  # of all copies, so that no two runs are alike
            return self.head(self.body(x) + torch.randn(8) + Draws.calls)

    Draws.calls = 0
    assert not any(site.obstacle for site in rehearsed_sites(Draws(), torch.ones(2, 8)))


def test_a_model_that_refuses_all_is_not_run_for_ever():
    class Refuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps, self.runs = nn.ModuleList(nn.Linear(4, 4) for _ in range(60)), 0

        def forward(self, x):
            Refuses.runs += 1
            for each in self.steps:
                assert type(each) is nn.Linear
                x = each(x)
            return x

    Refuses.runs = 0
    sites = rehearsed_sites(Refuses(), torch.ones(1, 4))
    assert all(site.obstacle.startswith(REFUSED) for site in sites)
    assert Refuses.runs <= RUNS + 4


def test_agreement():
    ones = torch.ones(2)
    assert agree({"a": [ones], "b": None}, {"a": [ones + 1e-7], "b": None})
    assert agree([ones, torch.tensor([1, 2])], [ones, torch.tensor([1, 3])]), "labels follow from the rest"
    assert agree([torch.tensor([1.0, float("-inf")])], [torch.tensor([1.0, float("-inf")])])
    for other in ([ones + 0.1], (ones,), [ones, ones], [ones.double()], [torch.ones(3)], [ones * float("nan")]):
        assert not agree(other, [ones])


def test_copies_follow_what_functions_close_over():
    model = zoo.MODELS["closes over"].build().eval()
    copied, x = duplicate(model, {}), torch.ones(2, 8)
    expected = run(copied, x)
    with torch.no_grad():
        for each in model.parameters():
            each.zero_()
    assert torch.equal(run(copied, x), expected)
    assert not run(model, x).any()

    def plain():
        return 1

    def own(times):
        return own(times - 1) if times else model

    model.plain, model.own = plain, own
    assert duplicate(model, {}).plain is plain
    copied = duplicate(model, {})
    assert copied.own is not own


def test_copies_of_graph_modules_stay_in_evaluation():
    model = create_feature_extractor(zoo.mlp(), {"2": "hidden"}).eval()
    assert not any(module.training for module in duplicate(model, {}).modules())
    assert all(module.training for module in duplicate(model.train(), {}).modules())
    x = torch.randn(4, 8)
    result = gm.compress(model.eval(), "C4", rank=1, inputs=x, include="*")
    assert not result.model.training
    assert_close(run(gm.densify(result.model), x)["hidden"], run(result.model, x)["hidden"])


@pytest.mark.parametrize("options", [{"rank": 1}, {"budget": "85%", "effort": 0.1}], ids=["rank", "data"])
def test_weights_that_the_first_run_of_a_model_rescales_are_rescaled_once(options):
    class Rescales(nn.Module):
        """Halves its outputs in evaluation, and doubles them again in training, by the weights themselves."""

        def __init__(self):
            super().__init__()
            self.body, self.more, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.is_halved = False

        def forward(self, x):
            if self.is_halved == self.training:
                with torch.no_grad():
                    self.head.weight.mul_(2.0 if self.training else 0.5)
                self.is_halved = not self.training
            return self.head(torch.tanh(self.more(torch.tanh(self.body(x)))))

    torch.manual_seed(0)
    model, x = Rescales().eval(), torch.randn(8, 8)
    weight = model.head.weight.detach().clone()
    if "budget" in options:
        options = options | {"data": [x]}
    result = gm.compress(model, "C4", inputs=x, **options)
    assert set(result.plan.layers) & {"body", "more"}
    for each in (model, result.model, gm.densify(result.model), gm.freeze(result, repeats=1).model):
        assert not each.is_halved
        assert torch.equal(each.head.weight, weight)
    assert gm.doctor(model, x, "C4").works
    assert torch.equal(model.head.weight, weight)
    result.model(x)
    assert torch.equal(result.model.head.weight, weight / 2)
