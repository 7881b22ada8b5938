"""What errors cost at the places of a block's output: against the closed form where there is one."""

import pytest
import torch
from torch import Tensor, nn

from gmcompress.nesting import floating
from gmcompress.sensitivity import DAMPED, sensitivities


def undamped(found: Tensor) -> Tensor:
    """What was measured, of mean 1."""
    return found * (1 + DAMPED) - DAMPED


class Tokens(nn.Module):
    """Reads the first token alone, after a block that keeps tokens apart."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x)[:, 0])


class Weighed(nn.Module):
    """Reads 1, 2 and 3 times the three places of a block's output."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis, self.block, self.head = axis, nn.Identity(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        gains = torch.tensor([1.0, 2.0, 3.0]).reshape([3 if each == self.axis else 1 for each in range(x.dim())])
        places = [each for each in range(1, x.dim()) if x.shape[each] != 6]
        return self.head((gains * self.block(x)).sum(places))


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize(("shape", "axis"), [((8, 3, 6), 1), ((8, 6, 3, 1), 2)])
def test_places_count_as_the_square_of_what_is_made_of_them(shape, axis, logits):
    torch.manual_seed(0)
    model = Weighed(axis).requires_grad_(False)
    (found,) = sensitivities(model, [torch.randn(shape), torch.randn(shape)], ["block"], logits=logits)["block"]
    wanted = torch.tensor([1.0, 4.0, 9.0]) * 3 / 14
    profile = undamped(found).movedim(axis - 1, 0).flatten(1)
    torch.testing.assert_close(profile, wanted[:, None].expand_as(profile))
    assert all(each.grad is None for each in model.parameters())


def test_vectors_count_alike():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    (found,) = sensitivities(model, [torch.randn(8, 5)], ["0"], logits=True)["0"]
    torch.testing.assert_close(found, torch.ones(4))


def test_what_the_outputs_do_not_use_counts_little():
    torch.manual_seed(0)
    (found,) = sensitivities(Tokens(), [torch.randn(16, 7, 6)], ["block"], logits=True)["block"]
    assert found.shape == (7, 6)
    assert float(undamped(found)[1:].abs().max()) < 1e-6
    assert float(found[1:].min()) > 0.05  # but something
    assert float(found[0].mean()) > 5


def test_outputs_of_changing_shapes_are_left_out():
    model = Tokens()
    batches = [torch.randn(4, 7, 6), torch.randn(4, 5, 6)]
    assert list(sensitivities(model, batches, ["block", "head"], logits=True)) == ["head"]


def test_modules_without_a_gradient_are_left_out():
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    assert list(sensitivities(model, [torch.randn(8, 4)], ["used", "unused"], logits=True)) == ["used"]


def test_tensors_of_floating_point_in_any_nesting():
    assert not floating([torch.eye(2).to_sparse()])
    x = torch.ones(2)
    assert len(floating({"a": (x, torch.ones(2, dtype=torch.int64)), "b": [x, None]})) == 2
