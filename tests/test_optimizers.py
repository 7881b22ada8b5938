"""Models that hold their own optimizers go on learning, whatever their weights have become."""

from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close
from torch import nn

import gmcompress as gm
from gmcompress.attaching import remember
from gmcompress.optimizers import held_optimizers


class Agent(nn.Module):
    """Takes its own steps, with weights and biases in groups of their own and momentum."""

    def __init__(self, place: str = "alone") -> None:
        super().__init__()
        self.table, self.body, self.more, self.head = (
            nn.Embedding(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 3),
        )
        named = list(self.named_parameters())
        groups = [{"params": [pair for pair in named if (pair[1].dim() < 2) == flat]} for flat in (False, True)]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        self.optimizer = {"alone": optimizer, "in a list": [optimizer], "in an object": SimpleNamespace(it=optimizer)}[
            place
        ]

    def forward(self, tokens):
        return self.head(torch.tanh(self.more(torch.tanh(self.body(self.table(tokens))))))

    def learn(self, tokens):
        (optimizer,) = held_optimizers(self.train())
        optimizer.zero_grad()
        self(tokens).square().sum().backward()
        optimizer.step()
        self.eval()


def assert_learns(model, tokens):
    (optimizer,) = held_optimizers(model)
    weights, biases = optimizer.param_groups
    known = dict(model.named_parameters())
    for group in (weights, biases):
        assert all(known[name] is each for name, each in zip(group["param_names"], group["params"], strict=True))
    assert {id(each) for each in known.values()} == {id(each) for each in weights["params"] + biases["params"]}
    assert set(biases["param_names"]) == {name for name in known if name.endswith("bias")}
    before = {name: each.detach().clone() for name, each in known.items()}
    for _ in range(2):  # of residuals, one factor may be zero at the start
        model.learn(tokens)
    assert not [name for name, each in known.items() if torch.equal(before[name], each)]


@pytest.mark.parametrize("place", ["alone", "in a list", "in an object"])
@pytest.mark.parametrize("inplace", [False, True], ids=["copied", "in place"])
def test_models_with_an_optimizer_go_on_learning(place, inplace, tmp_path):
    torch.manual_seed(0)
    model, tokens = Agent(place).eval(), torch.arange(8)
    model.learn(tokens)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    small = gm.compress(model, "C4", rank=1, inputs=tokens, inplace=inplace).model
    assert len(gm.trace(small)) > 1
    gm.save(small, tmp_path / "small", inputs=tokens)
    loaded, dense, some = gm.load(tmp_path / "small", Agent(place)), gm.densify(small), gm.densify(small, ["more"])
    for each in (small, loaded, dense, some, gm.freeze(small, "dense")):
        (optimizer,) = held_optimizers(each)
        assert optimizer.state.keys() <= set(each.parameters())
        assert (each.head.weight in optimizer.state) == (each is not loaded)
        assert (each.body.bias in optimizer.state) == (each is not loaded)
        assert_learns(each, tokens)
    if not inplace:
        assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())
        assert_learns(model, tokens)


def test_a_failure_in_place_leaves_the_optimizer_as_it_was():
    torch.manual_seed(0)
    model, tokens = Agent(), torch.arange(8)
    model.learn(tokens)
    put_back = remember(model)
    expected = model(tokens)
    gm.compress(model, "C4", rank=1, inplace=True)
    put_back()
    assert_close(model(tokens), expected)
    assert held_optimizers(model)[0].state.keys() == set(model.parameters())
    assert_learns(model, tokens)


def test_wrappers_of_an_optimizer_and_parameters_of_others():
    class Wrapped(Agent):
        def __init__(self):
            super().__init__()
            self.temperature = [nn.Parameter(torch.ones(()))]
            self.optimizer.add_param_group({"params": [("temperature", self.temperature[0])]})
            self.wrapper = torch.optim.SGD([torch.zeros(1)], lr=0.1)
            self.wrapper.param_groups = self.optimizer.param_groups

    model, tokens = Wrapped().eval(), torch.arange(8)
    small = gm.compress(model, "C4", rank=1, inputs=tokens).model
    for each in (small, gm.densify(small)):
        for optimizer in (each.optimizer, each.wrapper):
            found = {id(part) for group in optimizer.param_groups for part in group["params"]}
            assert found == {id(part) for part in [*each.parameters(), *each.temperature]}


class Shared(SimpleNamespace):
    """Stays the same in copies, as what holds a connection or a lock does."""

    def __deepcopy__(self, memo):
        return self


def test_an_optimizer_that_copies_have_in_common_goes_on_with_the_model_itself():
    torch.manual_seed(0)
    model = Agent()
    model.optimizer = Shared(it=model.optimizer)
    tokens = torch.arange(8)
    before = [list(group["params"]) for group in model.optimizer.it.param_groups]
    result = gm.compress(model, "C4", rank=1, include="*")
    gm.densify(result.model)
    after = [list(group["params"]) for group in model.optimizer.it.param_groups]
    assert all(a is b for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))
    assert_learns(model, tokens)


class Forgetful(Agent):
    """Leaves its optimizer behind when it is copied."""

    def __getstate__(self):
        return self.__dict__ | {"optimizer": None}


def test_a_copy_may_do_without_the_optimizer():
    model = Forgetful()
    assert not held_optimizers(gm.compress(model, "C4", rank=1, include="*").model)
    assert len(held_optimizers(model)) == 1
