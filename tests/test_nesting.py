"""Nested inputs: copies of them that a model may change."""

import threading
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

import gmcompress as gm
from gmcompress.nesting import laid_open, own_copy
from gmcompress.rehearsal import agree


@dataclass
class Memory:
    """What a model has seen, which it adds to, such as the keys and values of a language model."""

    seen: list[Tensor] = field(default_factory=list)
    other: object = None


def test_own_arguments():
    x = torch.ones(2, requires_grad=True)
    first, (second, third) = own_copy([x, (x, {"y": 3})])
    assert first is second
    assert first is not x
    assert first.requires_grad
    assert third == {"y": 3}
    given = torch.zeros(2)
    own_copy(given).add_(1)
    assert not given.any()


def test_objects_are_copied_with_what_they_hold_but_for_modules():
    x = torch.zeros(2)
    memory = Memory([x])
    first, copied, again = own_copy((x, memory, memory))
    assert copied is again
    assert copied.seen[0] is first
    copied.seen.append(x)
    first.add_(1)
    assert len(memory.seen) == 1
    assert not x.any()
    for shared in (Memory(other=nn.Linear(2, 2)), Memory(other=threading.Lock()), len, torch):
        assert own_copy([shared])[0] is shared


@dataclass(slots=True)
class Slotted:
    """A dataclass without a dictionary of its own."""

    logits: Tensor
    name: str = "found"


def test_objects_in_slots_are_objects_too():
    given = Slotted(torch.zeros(2))
    assert list(laid_open([given])[0]) == ["logits", "name"]
    own_copy(given).logits.add_(1)
    assert not given.logits.any()
    assert agree(given, Slotted(torch.zeros(2)))
    assert not agree(given, Slotted(torch.ones(2)))

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)).eval()
    model.register_forward_hook(lambda _module, _inputs, found: Slotted(found))
    result = gm.compress(model, "C4", budget="75%", data=[torch.randn(8, 8)], effort=0.1)
    assert isinstance(result.model(torch.ones(1, 8)), Slotted)
    assert result.plan.layers


def test_a_model_that_adds_to_an_object_it_is_given_is_compressed():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x, memory):
            memory.seen.append(self.body(x))
            assert len(memory.seen) == 1, "it was given what another run left"
            return self.head(memory.seen[0])

    memory, x = Memory(), torch.randn(40, 8)
    for options in ({"rank": 1}, {"budget": "85%", "data": [{"x": x, "memory": memory}]}):
        result = gm.compress(Remembers(), "C4", inputs={"x": x, "memory": memory}, **options)
        assert list(result.plan.layers) == ["body"]
        assert not memory.seen


def test_what_is_returned_is_not_asked_for_attributes():
    """Which may have effects, as in a stand-in for an object elsewhere; what its slots hold is seen all the same."""

    class Remote:
        __slots__ = ("__secret", "told")
        asked: ClassVar[list[str]] = []

        def __init__(self):
            self.__secret, self.told = torch.ones(2), 1

        def __getattr__(self, name):
            self.asked.append(name)
            raise AttributeError(name)

    class Watched(Remote):
        __slots__ = ()

        @property
        def told(self):
            self.asked.append("told")

    for cls in (Remote, Watched):
        given = cls.__new__(cls)
        Remote.told.__set__(given, 1)
        assert laid_open([given]) == [{"told": 1}]
    found = laid_open(Remote())
    assert torch.equal(found["_Remote__secret"], torch.ones(2))
    assert not Remote.asked
