"""Work side by side: the order, the threads, what happens when one fails, and that results do not depend on it."""

import threading
from itertools import pairwise

import pytest
import torch
from torch import nn

import gmcompress as gm
from gmcompress import reconstruction, workers
from gmcompress.errors import GMError
from gmcompress.projection import project
from gmcompress.workers import side_by_side

CPU = torch.device("cpu")
SMALL = [(8, 8)] * 6


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_small_weights_are_worked_on_by_several_threads_of_which_each_has_one_of_torch():
    together = threading.Barrier(4, timeout=60)  # which lets nobody pass before four are at work

    def work(item):
        if item < 4:
            together.wait()
        return item, torch.get_num_threads(), threading.get_ident()

    found = list(side_by_side(work, range(6), SMALL, device=CPU))
    assert [item for item, _, _ in found] == list(range(6))
    assert {threads for _, threads, _ in found} == {1}
    assert len({ident for _, _, ident in found}) == 4
    assert torch.get_num_threads() == 4


def test_modes_of_the_caller_reach_the_workers():
    def work(_item):
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    with torch.no_grad():
        assert set(side_by_side(work, range(6), SMALL, device=CPU)) == {(False, False)}
    with torch.inference_mode():
        assert set(side_by_side(work, range(6), SMALL, device=CPU)) == {(False, True)}
    assert set(side_by_side(work, range(6), SMALL, device=CPU)) == {(True, False)}


def test_weights_that_do_not_fit_into_memory_together_are_worked_on_one_by_one(monkeypatch):
    monkeypatch.setattr(workers, "ROOM", 1e6)
    inside = []

    def work(item):
        inside.append(item)
        seen = len(inside), torch.get_num_threads()
        inside.remove(item)
        return seen

    wide = [(4096, 256)] * 3
    assert list(side_by_side(work, range(3), wide, device=CPU)) == [(1, 4)] * 3


def test_an_item_that_fails_ends_it_after_those_before_it():
    def work(item):
        if item == 2:
            raise GMError("the third")
        return item

    found = side_by_side(work, range(6), SMALL, device=CPU)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(GMError, match="the third"):
        next(found)
    assert torch.get_num_threads() == 4


def test_items_are_asked_for_only_a_little_ahead():
    asked = []

    def items():
        for item in range(100):
            asked.append(item)
            yield item

    found = side_by_side(abs, items(), [(8, 8)] * 100, device=CPU)
    next(found)
    assert len(asked) <= 4 * workers.AHEAD + 1
    found.close()
    assert torch.get_num_threads() == 4
    assert not [each for each in threading.enumerate() if each.name.startswith("gmcompress")]


def test_on_other_devices_all_is_done_by_the_caller():
    found = side_by_side(lambda _: threading.get_ident(), range(3), SMALL[:3], device=torch.device("meta"))
    assert set(found) == {threading.get_ident()}


class Perceptron(nn.Sequential):
    """Three layers with a batch norm, and as many threads as there are layers find something to do."""

    def __init__(self):
        widths = (16, 48, 32, 24)
        super().__init__(
            *(part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()))
        )


@pytest.mark.parametrize(
    "options",
    [{"budget": "60%", "data": True}, {"budget": "60%"}],
    ids=["calibrated", "without data"],
)
def test_what_compress_makes_of_a_model_does_not_depend_on_who_works_beside(options, monkeypatch):
    torch.manual_seed(0)
    model, data = Perceptron().eval(), [torch.randn(64, 16) for _ in range(2)]
    options = options | ({"data": data} if "data" in options else {})
    used = set()

    def noted(*arguments, **named):
        used.add(threading.get_ident())
        return project(*arguments, **named)

    monkeypatch.setattr(reconstruction, "project", noted)
    together = gm.compress(model, "C8", include="*", **options)
    assert used
    assert threading.get_ident() not in used
    monkeypatch.setattr(workers, "ROOM", 0.0)
    alone = gm.compress(model, "C8", include="*", **options)
    assert alone.plan.layers == together.plan.layers
    for name, value in alone.model.named_parameters():
        assert torch.equal(together.model.get_parameter(name), value)
