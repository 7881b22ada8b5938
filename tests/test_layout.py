"""Runs over the data with channels last: where a model runs alike with it, and nowhere else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gmcompress as gm
from gmcompress.jobs import laid_out

CHANNELS_LAST = torch.channels_last


class Strided(nn.Module):
    """Reads what its convolution returns as if it lay in the usual order."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16 * 16, 4)
        self.read = read

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.read(self.second(self.first(images).relu())))


def reshaped(images: Tensor) -> Tensor:
    return images.reshape(len(images), -1)


def viewed(images: Tensor) -> Tensor:
    return images.view(len(images), -1)


def strided(images: Tensor) -> Tensor:
    return images.as_strided((len(images), 256), (256, 1))


def last(model: nn.Module) -> list[bool]:
    convolutions = [each for each in model.modules() if isinstance(each, nn.Conv2d)]
    return [each.weight.is_contiguous(memory_format=CHANNELS_LAST) for each in convolutions]


@pytest.mark.parametrize(("read", "expected"), [(reshaped, True), (viewed, False), (strided, False)])
def test_where_it_changes_nothing(read: Callable[[Tensor], Tensor], expected: bool) -> None:
    torch.manual_seed(0)
    model, images = Strided(read), torch.randn(2, 3, 8, 8)
    found = laid_out(model, images)
    assert last(found) == [expected] * 2
    assert last(model) == [False] * 2
    torch.testing.assert_close(found(images), model.eval()(images))


def test_shared_weights_stay_shared() -> None:
    model = Strided(reshaped)
    model.first = nn.Conv2d(3, 16, 3)
    twin = nn.Conv2d(16, 16, 3, padding=1)
    twin.weight = model.second.weight
    model.first = nn.Sequential(model.first, twin)
    found = laid_out(model, torch.randn(2, 3, 8, 8))
    assert found.get_submodule("first.1").weight is found.get_submodule("second").weight
    assert last(found) == [True, False, False]


@pytest.mark.parametrize("read", [reshaped, viewed, strided])
def test_compress_with_data(read: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Strided(read)
    images = torch.randn(32, 3, 8, 8)
    result = gm.compress(model, budget="60%", data=[images], effort=0.05)
    assert result.report.after.parameters < result.report.before.parameters
    assert last(model) == [False] * 2
    assert all(each.is_contiguous() for each in result.model.state_dict().values())
    assert torch.isfinite(result.model(images)).all()


class Remembers(Strided):
    """Keeps what it computed of the first images that it saw; the weight of one convolution is made by another."""

    def __init__(self) -> None:
        super().__init__(reshaped)
        self.seen: Tensor | None = None
        del self.second.weight
        self.made = nn.Linear(16, 16 * 9)

    def forward(self, images: Tensor) -> Tensor:
        self.second.weight = self.made.weight.mT.reshape(16, 16, 3, 3)
        self.seen = images.mean() if self.seen is None else self.seen
        return super().forward(images - self.seen)


def test_a_trial_leaves_nothing_behind_and_weights_that_a_model_makes_are_left_to_it() -> None:
    torch.manual_seed(0)
    model, images = Remembers(), torch.randn(32, 3, 8, 8)
    found = laid_out(model, images)
    assert found.seen is None
    assert found.first.weight.is_contiguous(memory_format=CHANNELS_LAST)
    result = gm.compress(model, budget="60%", data=[images], effort=0.05)
    torch.testing.assert_close(gm.densify(result.model)(images), result.model(images))
