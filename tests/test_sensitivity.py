"""The diagonal of the Fisher information at the outputs of blocks, against its closed form where there is one."""

import torch
from torch import Tensor, nn

from gmcompress.sensitivity import DAMPED, floating, sensitivities


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


def test_logits_have_the_variance_of_the_prediction():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4)).requires_grad_(False)
    x = torch.randn(1, 5).repeat(20_000, 1)
    (found,) = sensitivities(model, [x[:9000], x[9000:]], ["0"], logits=True)["0"]
    p = model(x[:1])[0].softmax(-1)
    variance = p * (1 - p)
    torch.testing.assert_close(undamped(found), variance / variance.mean(), rtol=0.05, atol=0.02)
    assert abs(float(found.mean()) - 1) < 1e-5


def test_a_random_projection_has_the_squared_columns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(5, 300))
    (found,) = sensitivities(model, [torch.randn(200, 5)], ["0"], logits=False)["0"]
    wanted = model[1].weight.square().sum(0)
    torch.testing.assert_close(undamped(found), (wanted / wanted.mean()).detach(), rtol=0.3, atol=0.0)
    assert all(each.grad is None for each in model.parameters())


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
    x = torch.ones(2)
    assert len(floating({"a": (x, torch.ones(2, dtype=torch.int64)), "b": [x, None]})) == 2
