"""Calibration: divergences of outputs, gradients at the outputs of layers, and the norms behind them."""

import math

import pytest
import torch
from conftest import assert_close, must_fail
from test_moments import Tokens
from torch import Generator, Tensor, nn

import gmcompress as gm
from gmcompress.calibration import divergence, norms_after, output_gradients, outputs, projection
from gmcompress.errors import GMError
from gmcompress.moments import Moments

# ------------------------------------------------------------------------------------------------------ the divergences


def slow_divergence(old: Tensor, new: Tensor) -> float:
    """Σ p ln(p/q), place by place."""
    total = 0.0
    for a, b in zip(old.tolist(), new.tolist(), strict=True):
        p, q = (torch.tensor(each, dtype=torch.float64).exp() for each in (a, b))
        p, q = p / p.sum(), q / q.sum()
        total += sum(float(x * (x / y).log()) for x, y in zip(p, q, strict=True))
    return total / len(old)


def test_the_divergence_of_logits(generator: Generator) -> None:
    old, new = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = slow_divergence(old, new)
    assert_close(divergence([old], [new], logits=True), expected)
    assert_close(divergence([old[:2], old[2:]], [new[:2], new[2:]], logits=True), expected)
    assert_close(divergence([old], [new + 3], logits=True), expected)
    assert_close(divergence([old.view(2, 3, 5)], [new.view(2, 3, 5)], logits=True), expected)
    maps = (each.view(1, 2, 3, 5).permute(0, 3, 1, 2) for each in (old, new))
    assert_close(divergence(*([each] for each in maps), logits=True), expected)
    must_fail(assert_close, divergence([new], [old], logits=True), expected)
    for logits in (True, False):
        assert_close(divergence([old], [old], logits=logits), 0.0)


def test_the_divergence_of_other_outputs(generator: Generator) -> None:
    old, new = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = (old - new).square().mean() / (old - old.mean(0)).square().mean()
    assert_close(divergence([old], [new], logits=False), expected)
    assert_close(divergence([5 * old + 1], [5 * new + 1], logits=False), expected)
    must_fail(assert_close, divergence([old], [2 * new], logits=False), expected)
    single = old[:, :1]  # of a binary classifier, in which a softmax says nothing
    for logits in (True, False):
        assert_close(
            divergence([single], [new[:, :1]], logits=logits), divergence([old[:, 0]], [new[:, 0]], logits=False)
        )
        longer = torch.cat([new, new[:1]])
        assert_close(divergence([old], [longer], logits=logits), divergence([old], [new], logits=logits))
        assert divergence([old], [new[:0]], logits=logits) == 0
        assert math.isfinite(divergence([old[0, 0]], [new[0, 0]], logits=logits))
    assert_close(
        divergence([old[:1]], [new[:1]], logits=False),
        float((old - new)[0].square().mean() / old[0].var(unbiased=False)),
    )
    assert divergence([torch.zeros(2, 2)], [torch.ones(2, 2)], logits=False) == 1
    losses = nn.Sequential(nn.Linear(2, 2))
    losses.register_forward_hook(lambda _module, _inputs, found: {"loss": found.mean(), "logits": found})
    assert outputs(losses, [torch.ones(3, 2)])[0].shape == (3, 2)
    with pytest.raises(GMError, match="no tensor of floating point"):
        outputs(nn.Flatten(), [torch.zeros(2, 2, dtype=torch.int64)])


@pytest.mark.parametrize("logits", [True, False])
def test_the_divergence_leaves_out_masked_entries(logits: bool, generator: Generator) -> None:
    old, new = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    masked_old, masked_new = (torch.cat([each, torch.full((6, 1), -math.inf)], 1) for each in (old, new))
    expected = divergence([old], [new], logits=logits)
    found = divergence([masked_old], [masked_new], logits=logits)
    assert found > 0
    if logits:
        assert_close(found, expected)
    assert math.isfinite(divergence([masked_old], [masked_new.flip(1)], logits=logits))  # where others are masked
    assert math.isnan(divergence([old], [new * math.nan], logits=logits))  # which no fit may be taken for


def test_a_model_that_masks_its_outputs_is_compressed_with_data(generator: Generator) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    model.register_forward_hook(lambda _module, _, found: found.masked_fill(found == found.amin(1, True), -math.inf))
    x = torch.randn(8, 8, generator=generator)
    result = gm.compress(model, "C4", data=[x], budget="75%", effort=0.1)
    assert result.plan.layers
    assert result.plan.optimum is not None
    assert math.isfinite(result.plan.optimum["loss"])


# -------------------------------------------------------------------------------------------------------- the gradients


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 2), nn.Flatten(), nn.Linear(6, 3)
    ).double()


def test_output_gradients_are_those_of_the_fisher_information(generator: Generator) -> None:
    """Of the last layer the moment is the mean of diag(p) − p pᵀ, which many drawn labels near; its diagonal is 1."""
    model = classifier()
    x = torch.randn(600, 2, 4, 4, generator=generator, dtype=torch.float64)
    found = {k: v.moment for k, v in output_gradients(model, [x], ["0", "2", "4"], logits=True).items()}
    p = model(x).softmax(-1)
    fisher = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0).detach()
    expected = fisher / fisher.diagonal().mean()

    def assert_near(moment: Tensor) -> None:
        assert float((moment - expected).norm() / expected.norm()) < 0.1

    assert_near(found["4"])
    must_fail(assert_near, torch.eye(3, dtype=torch.float64))
    for name, rows in (("0", 4), ("2", 6), ("4", 3)):
        assert found[name].shape == (rows, rows)
        assert_close(found[name].diagonal().mean(), 1.0)
        assert float(torch.linalg.eigvalsh(found[name]).min()) > -1e-6
    again = output_gradients(model, [x], ["0", "2", "4"], logits=True)
    assert all(torch.equal(again[name].moment, found[name]) for name in found)


def test_projections_of_logits_tell_more_surely_than_labels_drawn(generator: Generator) -> None:
    """⟨g, δ⟩² has the same mean, and with likely labels a far smaller spread; classes that are ruled out have none."""
    logits = torch.tensor([6.0, 1.0, 0.0, -float("inf"), 2.0], dtype=torch.float64).requires_grad_()
    p, change = logits.softmax(-1).detach(), torch.tensor([0.3, -1.0, 2.0, 5.0, 0.5], dtype=torch.float64)
    squares: dict[str, list[Tensor]] = {"projection": [], "label": []}
    for _ in range(2000):
        label = torch.multinomial(p, 1, generator=generator)
        scores = {
            "projection": projection(logits[None], generator, logits=True),
            "label": logits.log_softmax(-1).gather(0, label).sum(),
        }
        for name, score in scores.items():
            (gradient,) = torch.autograd.grad(score, logits)
            assert gradient[3] == 0
            squares[name].append((gradient * change).sum().square())
    means = {name: torch.stack(each).mean() for name, each in squares.items()}
    expected = (p * change.square()).sum() - (p * change).sum().square()
    assert abs(means["projection"] / expected - 1) < 0.15
    spread = {name: torch.stack(each).std() for name, each in squares.items()}
    assert spread["projection"] < 0.3 * spread["label"]


def test_places_count_by_their_mean_squared_gradients(generator: Generator) -> None:
    """Tokens of which two are read out; examples that differ in their number, and layers with one place, have none."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.tokens(x)[:, 1] + 0.5 * self.tokens(x)[:, 0])

    torch.manual_seed(0)
    model, x = Reads(), torch.randn(40, 5, 4, generator=generator)
    found = output_gradients(model, [x[:20], x[20:]], ["tokens", "head"], logits=True)
    assert found["head"].places is None
    assert_close(found["tokens"].places, torch.tensor([1.0, 4.0, 0.0, 0.0, 0.0]), slack=10)
    uneven = output_gradients(model, [x, x[:, :4]], ["tokens", "head"], logits=True)
    assert uneven["tokens"].places is None
    assert uneven["tokens"].moment.shape == (4, 4)


def test_frozen_weights_have_output_gradients_and_unreached_layers_none(generator: Generator) -> None:
    model, x = classifier(), torch.randn(50, 2, 4, 4, generator=generator, dtype=torch.float64)
    expected = output_gradients(model, [x], ["0", "2", "4"], logits=True)
    model.zero_grad()
    model.requires_grad_(False)
    found = output_gradients(model, [x], ["0", "2", "4"], logits=True)
    for name in expected:
        assert_close(found[name].moment, expected[name].moment, slack=1e6)
    assert all(each.grad is None for each in model.parameters())
    tokens = Tokens()
    assert set(output_gradients(tokens, [torch.randn(3, 4)], ["body", "never"], logits=False)) == {"body"}


# -------------------------------------------------------------------------------------------------------------- norms


class Norms(nn.Module):
    """Layers before BatchNorms, directly, after an activation, after an addition, in place or not, and shared."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth, self.fifth = (nn.Conv2d(4, 4, 1) for _ in range(5))
        self.after_first, self.after_relu, self.after_add, self.shared = (nn.BatchNorm2d(4) for _ in range(4))
        self.relu, self.inplace = nn.ReLU(inplace=inplace), inplace

    def forward(self, x: Tensor) -> Tensor:
        x = self.after_first(self.first(x))
        x = self.after_relu(self.relu(self.second(x)))
        y = self.third(x)
        if self.inplace:
            y += x
        else:
            y = y + x
        return self.shared(self.fourth(self.after_add(y))) + self.shared(self.fifth(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_the_norm_behind_a_layer(inplace: bool) -> None:
    names = ["first", "second", "third", "fourth", "fifth"]
    assert norms_after(Norms(inplace=inplace).eval(), torch.randn(2, 4, 3, 3), names) == {"first": "after_first"}
    twice = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert norms_after(nn.Sequential(twice, twice).eval(), torch.randn(2, 4), ["0.0"]) == {}
    assert norms_after(twice.eval(), torch.randn(2, 4), ["0"]) == {"0": "1"}


def test_inputs_that_are_always_the_same_leave_a_metric(generator: Generator) -> None:
    """As a layer has them that reads what is pooled over all of an image, where all images are alike."""
    for size in (1.0, 1e3):
        rows = size * torch.randn(1, 8, generator=generator, dtype=torch.float64).expand(50, 8)
        rounding = -1e-8 * size**2 * torch.eye(8, dtype=torch.float64)
        mean = rows.mean(0)[None]
        found = Moments(50, (rows.mT @ rows / 50 + rounding)[None], (rows.mT @ rows / 50)[None], mean, mean)
        assert float(torch.linalg.eigvalsh(found.centred().gram()).min()) > 0
        near = Moments(50, found.inputs + 0.01 * size**2 * torch.eye(8), found.cross, mean, mean)
        assert float(near.centred().inputs.diagonal(dim1=1, dim2=2).mean()) > 0.009 * size**2  # the control

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)).eval()
    x = 100 * torch.randn(1, 8, generator=generator)
    result = gm.compress(model, "C4", budget="75%", data=[x.expand(6, 8).clone()] * 4, effort=0.1)
    assert result.plan.layers
    assert torch.isfinite(result.model(x)).all()
