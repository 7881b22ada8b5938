"""Copies of models: what torch's own leave out or refuse, and what is shared with the model copied."""

import sys
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn

import gmcompress as gm
from gmcompress.copies import duplicate, evaluating, set_mode, state_of
from gmcompress.forward import run


class Slotted(nn.Linear):
    __slots__ = ("factor",)


class Marked(Slotted):
    __slots__ = "mark"  # one slot, of four letters


def test_what_cannot_be_copied_is_shared_and_the_rest_is_not():
    model = nn.Sequential(nn.Linear(4, 4), Marked(4, 4))
    model.lock, model[0].steps = threading.Lock(), (each for each in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such tensors are in beta state
        model.register_buffer("graph", torch.eye(4).to_sparse_csr())
    model[1].factor, model[1].weight.scale, model[1].mark = 3.0, 2.0, torch.ones(2)
    model[0].parent = weakref.ref(model)
    copied = duplicate(model, {})
    assert copied.lock is model.lock
    assert copied[0].steps is model[0].steps
    assert copied.graph is not model.graph
    assert torch.equal(copied.graph.to_dense(), torch.eye(4))
    assert (copied[1].factor, copied[1].weight.scale) == (3.0, 2.0)
    assert torch.equal(copied[1].mark, torch.ones(2))
    assert copied[1].mark is not model[1].mark
    assert copied[0].parent() is copied
    assert copied[0].weight is not model[0].weight


def test_a_part_that_is_not_copied_is_named():
    class Single(nn.Linear):
        def __deepcopy__(self, memo):
            return self

    model = nn.Sequential(nn.Linear(8, 8), Single(8, 8), nn.Linear(8, 3)).train()
    with pytest.raises(gm.GMError, match=r"'1' \(Single\) is not copied by copy.deepcopy"):
        gm.compress(model, "C4", rank=1)
    assert type(model[1]) is Single
    assert model[1].training
    assert duplicate(model, {id(model[1]): model[1]})[1] is model[1], "where it is asked for"


def test_evaluation_mode_whatever_train_is():
    class Silent(nn.Linear):
        def train(self, mode=True):
            super().train(mode)

    class Trainer(nn.Linear):
        def train(self, _batches, _epochs):
            raise AssertionError

    for model in (nn.Sequential(Silent(2, 2)), Silent(2, 2), Trainer(2, 2), nn.Sequential(Trainer(2, 2))):
        assert evaluating(model) is model
        assert not any(module.training for module in model.modules())


def test_a_model_whose_train_returns_nothing(tmp_path):
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def train(self, mode=True):
            super().train(mode)

        def forward(self, x):
            return self.head(self.body(x))

    x = torch.randn(9, 8)
    for options in ({"rank": 1}, {"budget": "80%", "data": x}):
        result = gm.compress(Silent(), "C4", inputs=x, **options)
        gm.save(result, tmp_path / "small")
        loaded = gm.load(tmp_path / "small", Silent())
        for each in (loaded, gm.freeze(result, "structured").model):
            assert not each.training
            assert torch.allclose(each(x), run(result.model, x), atol=1e-5)


def test_the_state_is_whole_and_a_hook_that_fails_is_told():
    class Partial(nn.Linear):
        def state_dict(self):
            return {"bias": self.bias}

    model = Partial(2, 2)
    assert list(state_of(model)) == ["weight", "bias"]
    model._register_state_dict_hook(lambda _module, state, _prefix, _: state.pop("nothing"))
    with pytest.raises(gm.GMError, match="this Partial cannot give its state_dict: KeyError: 'nothing'"):
        state_of(model)


def test_slots_are_copied_under_whatever_name():
    class Private(nn.Linear):
        __slots__ = ("__factor", "scale")

        def __init__(self, *widths):
            super().__init__(*widths)
            self.__factor, self.scale = torch.full((), 3.0), 2.0

        def forward(self, x):
            return self.__factor * super().forward(x)

    class Counted(Private):
        reads = 0

        @property
        def scale(self):
            Counted.reads += 1

        @scale.setter
        def scale(self, value):
            Private.scale.__set__(self, value)

    model, x = Counted(4, 4), torch.randn(2, 4)
    copied = duplicate(model, {})
    assert torch.equal(copied(x), model(x))
    assert Private.scale.__get__(copied) == 2.0
    assert not Counted.reads


class Sealed(nn.Dropout):
    """A module on which nothing can be set once it is made."""

    def __setattr__(self, name, value):
        if "p" in vars(self) and name == "training":
            raise AttributeError(name)
        super().__setattr__(name, value)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("build", [nn.Dropout, Sealed, lambda: torch.jit.script(nn.Dropout())])
def test_the_mode_reaches_what_runs(build):
    module, ones = build(), torch.ones(64)
    set_mode(module, training=False)
    assert torch.equal(module(ones), ones)
    assert torch.equal(duplicate(module, {})(ones), ones)
    set_mode(module, training=True)
    assert not torch.equal(module(ones), ones)
    assert not torch.equal(duplicate(module, {})(ones), ones)


def test_modules_too_deep_in_one_another_say_how_to_go_on():
    class Deep(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.body = nn.Identity() if depth % 100 else nn.Linear(8, 8)
            self.more = Deep(depth - 1) if depth else None

        def forward(self, x):
            x = self.body(x)
            return x if self.more is None else self.more(x)

    model, limit = Deep(200).eval(), sys.getrecursionlimit()
    for inputs in (None, torch.ones(2, 8)):
        with pytest.raises(gm.GMError, match=r"too deep in one another to be copied; .* sys.setrecursionlimit"):
            gm.compress(model, "C4", rank=1, inputs=inputs)
    sys.setrecursionlimit(10_000)
    try:
        assert gm.compress(model, "C4", rank=1, inputs=torch.ones(2, 8)).plan.layers
    finally:
        sys.setrecursionlimit(limit)
