"""Batches of data: what is taken of a loader, parts of a batch, and bad data."""

from collections.abc import Iterator
from inspect import signature

import pytest
import torch
from torch import Generator, Tensor, nn

import gmcompress as gm
from gmcompress import batches
from gmcompress.batches import count_arguments, count_examples, first_of, is_divisible, split_batch, take
from gmcompress.errors import GMError
from gmcompress.jobs import undivided


def batches_of(*sizes: int) -> Iterator[tuple[Tensor, Tensor]]:
    for size in sizes:
        yield torch.arange(size).float()[:, None], torch.zeros(size)


def test_what_is_taken_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(each) for each in take(batches_of(4, 4, 4), samples=6)] == [4, 2]
    assert [len(each) for each in take(batches_of(4, 4), samples=8)] == [4, 4]
    assert [len(each) for each in take(torch.zeros(9, 2), samples=5)] == [5]
    mapping = {"x": torch.zeros(4, 2), "labels": torch.zeros(4), "scale": 3}
    for data in (mapping, [mapping]):
        (found,) = take(data, samples=3)
        assert set(found) == {"x", "scale"}
        assert (found["x"].shape, found["scale"]) == ((3, 2), 3)
    monkeypatch.setattr(batches, "MEMORY", 40)
    assert [len(each) for each in take(batches_of(6, 6, 6))] == [6, 6]


def test_inputs_beside_labels_may_be_several() -> None:
    x, y = torch.ones(4, 2), torch.zeros(4)
    (named,) = take([({"x": x, "mask": None, "labels": y}, y)])
    assert set(named) == {"x", "mask"}
    for pair in ((x, 2 * x), [x, 2 * x]):
        (several,) = take(take([(pair, y)], samples=3))
        assert [each.shape for each in several] == [(3, 2), (3, 2)]
        assert torch.equal(several[1], 2 * several[0])


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "empty"), ([3], "gave int"), ([torch.tensor(1.0)], "first axis"), ([torch.zeros(0, 3)], "first axis")],
)
def test_bad_data_is_refused(data: object, message: str) -> None:
    with pytest.raises(GMError, match=message):
        take(data)


def test_batches_are_split_and_joined(generator: Generator) -> None:
    x = torch.randn(7, 3, generator=generator)
    for limit, sizes in ((6, [2, 2, 2, 1]), (1, [1] * 7), (100, [7])):
        assert [len(each) for each in split_batch(x, limit)] == sizes
        assert torch.equal(torch.cat(split_batch(x, limit)), x)
    pieces = split_batch({"x": x, "y": x, "flag": True}, 12)
    assert [len(each["x"]) for each in pieces] == [2, 2, 2, 1]
    assert all(each["flag"] for each in pieces)
    for part, size in zip(split_batch({"x": x, "pair": [x, {"y": x}]}, 18), [2, 2, 2, 1], strict=True):
        assert [len(each) for each in (part["x"], part["pair"][0], part["pair"][1]["y"])] == [size] * 3
    pieces = split_batch({"x": x, "more": {"y": x}}, 12)
    assert [len(each["more"]["y"]) for each in pieces] == [2, 2, 2, 1]


def test_a_batch_that_cannot_be_divided_stays_whole(generator: Generator) -> None:
    nodes, edges = torch.randn(7, 3, generator=generator), torch.zeros(2, 9, dtype=torch.long)
    for whole in ({"x": nodes, "edges": edges}, {"x": nodes, "scale": torch.tensor(2.0)}):
        assert not is_divisible(whole)
        assert split_batch(whole, 1) == [whole]
        assert first_of(whole, 3) is whole
        (taken,) = take([whole], samples=3)
        assert all(taken[key] is each for key, each in whole.items())
        assert count_examples(whole) == 7
    pair = {"x": nodes, "pair": [nodes, {"flag": 1}]}
    assert is_divisible(pair)
    assert [len(each) for each in (first_of(pair, 3)["x"], first_of(pair, 3)["pair"][0])] == [3, 3]
    assert first_of(pair, 3)["pair"][1] == {"flag": 1}


def test_a_scalar_beside_the_examples_may_come_first() -> None:
    x, step = torch.zeros(7, 3), torch.tensor(2.0)
    for batch in ({"step": step, "x": x}, {"x": x, "step": step}):
        (taken,) = take([batch])
        assert count_examples(taken) == 7


def test_a_list_of_images_is_not_divided(generator: Generator) -> None:
    """By their channels, as batches would be."""
    images = [torch.randn(3, size, 8, generator=generator) for size in (8, 6)]
    labels = [{"boxes": torch.zeros(1, 4)} for _ in images]
    for data in ([{"images": images}], [(images, labels)], [(tuple(images), tuple(labels))]):
        (taken,) = take(take(data, samples=1))
        (given,) = taken.values() if isinstance(taken, dict) else taken
        assert all(torch.equal(a, b) for a, b in zip(given, images, strict=True))
        assert not is_divisible(taken)
        assert first_of(taken, 1) is taken
        assert split_batch(taken, 1) == [taken]
        assert count_examples(taken) == 2
    for other in ([(images, labels[:1])], [(images, [1, 2])], [([], [])]):
        with pytest.raises(GMError, match="but the data gave"):
            take(other)


class Frames(nn.Module):
    """Takes four frames of each example along the first axis, and a mask of a row for each of eight places."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.more, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        apart = torch.tanh(self.body(mask @ x)).unflatten(0, (-1, 4))
        return self.head(torch.tanh(self.more(apart.roll(1, 1).flatten(0, 1)))).unflatten(0, (-1, 4)).mean(1)


def test_what_runs_on_whole_batches_alone_is_given_whole_ones(generator: Generator) -> None:
    torch.manual_seed(0)
    model = Frames().eval()
    mask = torch.eye(8)
    data = [{"x": torch.randn(8, 8, generator=generator), "mask": mask} for _ in range(10)]
    kept = undivided(model, data)
    assert [is_divisible(each) for each in kept] == [False] * 10
    assert all(torch.equal(new["x"], old["x"]) for new, old in zip(kept, data, strict=True))
    assert [count_examples(each) for each in kept] == [8] * 10
    assert split_batch(kept[0], 1)[0] is kept[0]

    result = gm.compress(model, "C4", budget="75%", data=data, effort=0.1)
    assert {each["block"] for each in result.report.blocks} <= {"", "body", "more", "head"}
    assert result.model(**data[0]).shape == (2, 3)
    assert result.report.after.inputs == "{x: (8, 8), mask: (8, 8)}"

    free = nn.Linear(8, 8)
    assert undivided(free, [torch.ones(4, 8)])[0].shape == (4, 8)
    with pytest.raises(GMError, match=r"does not run on inputs of shape \(4, 7\)"):
        gm.compress(nn.Sequential(free, nn.Linear(8, 8)), "C4", budget="75%", data=[torch.ones(4, 7)])


class FixedBatch(nn.Module):
    """Takes four examples, neither more nor less."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x.view(4, 8))))


def test_a_last_batch_that_a_model_of_fixed_size_cannot_take_is_left_out(generator: Generator) -> None:
    torch.manual_seed(0)
    data = torch.randn(10, 8, generator=generator).split(4)
    kept = undivided(FixedBatch(), data)
    assert [count_examples(each) for each in kept] == [4, 4]
    found = gm.compress(FixedBatch(), "C4", budget="90%", data=data, include="*", effort=0.1)
    assert found.model(data[0]).shape == (4, 3)
    assert len(undivided(nn.Linear(8, 8), data)) == 3, "the control"


class Remembers(nn.Module):
    """Goes on from the state that it left at its last call, a row for each example of it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.body, self.head = nn.LSTM(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.state: tuple[Tensor, ...] | None = None

    def forward(self, x: Tensor) -> Tensor:  # (batch, places, 8)
        found, state = self.cell(x.transpose(0, 1), self.state)
        self.state = tuple(each.detach() for each in state)
        return self.head(torch.tanh(self.body(found[-1])))


def test_a_model_that_keeps_a_state_for_each_example_is_given_batches_of_one_size(generator: Generator) -> None:
    torch.manual_seed(0)
    model, data = Remembers().eval(), torch.randn(14, 5, 8, generator=generator).split(4)
    kept = undivided(Remembers(), data)
    assert [count_examples(each) for each in kept] == [4, 4, 4]
    assert not any(map(is_divisible, kept))
    options = {"include": ["body", "head"], "effort": 0.1}
    found = gm.compress(model, "C4", budget="99%", data=data, inputs=data[0], **options)
    assert list(found.plan.layers)
    assert model.state is None
    assert found.model.state is None
    assert gm.tune(found, data[:3], epochs=1, lr=1e-3).model(data[0]).shape == (4, 3)


def test_models_of_several_arguments_are_given_all_of_a_batch() -> None:
    class Compares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.more, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(torch.tanh(self.more(torch.tanh(self.body(x)) * torch.tanh(self.body(y)))))

    torch.manual_seed(0)
    model, batch = Compares().eval(), [torch.randn(40, 8), torch.randn(40, 8)]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch), batch_size=20)
    result = gm.compress(model, "C4", budget="75%", data=loader, effort=0.1)
    assert [each.shape[1:] for each in result.inputs] == [(8,), (8,)]
    assert len(gm.tune(result, loader, epochs=1, lr=1e-3).report.history) == 1
    labels, losses = torch.zeros(40, dtype=torch.long), []
    for labelled in ([(batch, labels)], [(*batch, labels)]):
        small = gm.compress(model, "C4", rank=1, data=labelled)
        tuned = gm.tune(small, labelled, epochs=1, lr=1e-3, distillation=0.0)
        losses.append(tuned.report.history[0]["loss"])
    assert losses[0] == losses[1]
    with pytest.raises(gm.GMError, match="labels"):
        gm.tune(small.model, [batch], epochs=1, lr=1e-3)


def test_arguments_of_several_may_be_lists_and_numbers(generator: Generator) -> None:
    class Recommends(nn.Module):
        """Numbers, and for each of two tables the entries that are looked up and where those of an example begin."""

        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList([nn.EmbeddingBag(16, 8), nn.EmbeddingBag(12, 8)])
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor, entries: list[Tensor], starts: list[Tensor], scale: float) -> Tensor:
            found = [table(*each) for table, *each in zip(self.tables, entries, starts, strict=True)]
            return scale * self.head(torch.tanh(self.body(x + sum(found))))

    torch.manual_seed(0)
    x, labels = torch.randn(20, 8, generator=generator), torch.randn(20, 1, generator=generator)
    entries = [torch.randint(12, (40,), generator=generator) for _ in range(2)]
    batch = [x, entries, [torch.arange(0, 40, 2)] * 2, 0.5]
    model = Recommends().eval()
    for data in ([batch], [(*batch, labels)]):
        result = gm.compress(model, "C4", budget="75%", data=data, effort=0.1)
        assert result.model(*batch).shape == (20, 1)
        assert len(gm.tune(result, data, epochs=1, lr=1e-3).report.history) == 1
    for pair in ((x, {"y": x}), ("a", "b"), ([x, x], labels)):
        assert count_arguments(pair, signature(model.forward)) == 0
