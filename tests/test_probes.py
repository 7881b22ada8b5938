"""What a model minds: probes in its layers against runs of the model, and what is left of them."""

from collections.abc import Callable
from math import prod

import pytest
import torch
from conftest import assert_close, must_fail
from test_allocation import assert_untouched, convolutional, examples, perceptron, state_of
from torch import Tensor, nn

from gmcompress.calibration import divergence, outputs
from gmcompress.factors import Metric
from gmcompress.probes import PROBES, Probe, Probes, Sensitivity, expected_divergences
from gmcompress.reconstruction import calibrate
from gmcompress.selection import Candidate
from gmcompress.structure import Structure, expand
from gmcompress.subjects import Subject, rank_within


def test_sensitivities_are_power_laws() -> None:
    for scale, exponent in ((2.0, 1.0), (0.3, 0.7), (5.0, 1.9)):
        points = [(x, scale * x**exponent) for x in (0.02, 0.3)]
        for given in (points, points[::-1]):
            found = Sensitivity.through(given)
            assert_close(found.scale, scale, slack=1e8)
            assert_close(found.exponent, exponent, slack=1e7)
        weighed = found.weigh(Candidate("C4", 1, 4, None, 0.1))
        assert weighed.loss == pytest.approx(scale * 0.1**exponent, rel=1e-4)
        assert found.weigh(Candidate(None, 1, 4, None, 0.0)).loss == 0
    steep = Sensitivity.through([(0.1, 1e-6), (0.2, 1.0)])
    assert steep.exponent == 2
    for points in ([(0.0, 0.0), (0.0, 0.0)], [(0.5, 0.1), (0.5, 0.1)], [(0.1, 0.5), (0.4, 0.01)]):
        found = Sensitivity.through(points)
        assert 0.5 <= found.exponent <= 2
        assert 0 <= found.scale < float("inf")


@pytest.mark.parametrize(("build", "name"), [(perceptron, "2"), (convolutional, "2")], ids=["bias", "norm"])
def test_a_probe_takes_its_shift_out_of_the_bias(build: Callable[[], nn.Module], name: str) -> None:
    """As in a compression, but where a BatchNorm takes the shift up, which is left as it is; so is the model."""
    model = build().eval()
    x = examples(model, 200) + 3  # so that a low rank of what varies shifts the mean
    known = calibrate(model, [x], [name], logits=True, macs=1000)
    moments = known.moments(model, model, [name])[name]
    layer, before = model.get_submodule(name), state_of(model)
    subject = Subject(layer.weight.detach().double(), known.metric(name, layer, moments))
    model.zero_grad()
    found = Probes(model, known, 1).measure(name, Probe.of(subject, moments.mean))
    assert_untouched(model, before)

    def expected(*, shifted: bool) -> Sensitivity:
        points, split = [], layer.weight.dim() == 4
        for share in PROBES:
            rank = rank_within(subject.shape, int(share * prod(subject.shape)), grid=None, split=split)
            fitted = expand(
                subject.low_ranks(rank, split=split).leading(rank), Structure.factors(rank, split=split), subject.shape
            )
            other = build().eval()
            with torch.no_grad():
                other.get_submodule(name).weight.copy_(fitted)
                shift = moments.shift(subject.weight, fitted).float()
                if shifted and name in known.norms:
                    other.get_submodule(known.norms[name]).running_mean.add_(shift)
                elif shifted:
                    other.get_submodule(name).bias.sub_(shift)
            away = divergence(outputs(model, [x]), outputs(other, [x]), logits=True)
            points.append((subject.low_rank_loss(rank, split=split), away))
        return Sensitivity.through(points)

    def assert_found(wanted: Sensitivity) -> None:
        assert found.scale == pytest.approx(wanted.scale, rel=1e-3)
        assert found.exponent == pytest.approx(wanted.exponent, abs=1e-3)

    assert_found(expected(shifted=name not in known.norms))
    must_fail(assert_found, expected(shifted=name in known.norms))


# ----------------------------------------------------------------------------------------------------- by the gradients


class Tokens(nn.Module):
    """Classes of every token, read in windows of two: examples × windows are the first axis of the layer."""

    def __init__(self, *, windows: bool) -> None:
        super().__init__()
        self.windows, self.body, self.head = windows, nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4, 6) -> (batch, 4, 5)
        inside = x.reshape(-1, 2, 6) if self.windows else x
        return self.head(self.body(inside).reshape(len(x), 4, 8).tanh())


def nearly_low(layer: nn.Module, ranks: tuple[int, ...]) -> Probe:
    """A probe of the layer, of which each low rank is near the weight; errors shift the mean."""
    weight = layer.weight.detach().flatten(1)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    s[min(ranks) :] *= 0.05
    with torch.no_grad():
        layer.weight.copy_((u * s @ v).reshape(layer.weight.shape))
    tensors = {"left": (u * s)[:, : max(ranks)], "right": v[: max(ranks)].reshape(max(ranks), *layer.weight.shape[1:])}
    return Probe(ranks, tuple(1.0 / (1 + each) for each in ranks), False, tensors, None)


def measured(model: nn.Module, name: str, probe: Probe, x: Tensor, *, logits: bool) -> list[float]:
    """The divergences of runs."""
    layer, wanted, found = model.get_submodule(name), outputs(model, [x]), []
    before = layer.weight.detach().clone()
    for rank in probe.ranks:
        with torch.no_grad():
            layer.weight.copy_(probe.fitted(rank, before))
            found.append(divergence(wanted, outputs(model, [x]), logits=logits))
            layer.weight.copy_(before)
    return found


def assert_near(found: list[float], wanted: list[float]) -> None:
    """Within what so many drawn labels tell."""
    assert all(0.75 < a / b < 1.33 for a, b in zip(found, wanted, strict=True)), (found, wanted)


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("kind", ["vectors", "images", "tokens", "windows"])
def test_gradients_tell_the_divergence_of_small_errors(kind: str, logits: bool) -> None:
    builds: dict[str, Callable[[], nn.Module]] = {"vectors": perceptron, "images": convolutional}
    torch.manual_seed(0)
    model = builds.get(kind, lambda: Tokens(windows=kind == "windows"))().eval().requires_grad_(False)
    name = "body" if kind in ("tokens", "windows") else "2"
    x = examples(model, 1500) if kind in builds else torch.randn(1500, 4, 6)
    probe = nearly_low(model.get_submodule(name), (4, 3))
    before = state_of(model)
    found = expected_divergences(model, [x[:700], x[700:]], {name: probe}, logits=logits)[name]
    assert_untouched(model, before)
    wanted = measured(model, name, probe, x, logits=logits)
    assert_near(found, wanted)
    must_fail(assert_near, [2 * each for each in found], wanted)


def test_what_is_taken_up_causes_nothing() -> None:
    """An error that adds the same to every output, where there is a bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    x = torch.randn(200, 6)
    x[:, 3:] = 1.0  # constant inputs, which the low ranks leave out
    tensors = {"left": model[0].weight.detach()[:, :3], "right": torch.eye(6)[:3]}
    probe = Probe((3, 3), (0.1, 0.1), False, tensors, torch.tensor([[0.0, 0, 0, 1, 1, 1]]))
    assert expected_divergences(model, [x], {"0": probe}, logits=True)["0"][0] < 1e-12
    bare = Probe((3, 3), (0.1, 0.1), False, tensors, None)
    assert expected_divergences(model, [x], {"0": bare}, logits=True)["0"][0] > 1e-3


def test_where_gradients_do_not_tell_the_model_is_run() -> None:
    """Inputs that later code changes, and layers that no gradient reaches."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.cut = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            y = self.second(x)
            x += 1
            return x + y + self.cut(y).detach()

    torch.manual_seed(0)
    model, x = Overwrites().eval().requires_grad_(False), torch.randn(64, 4)
    probes = {
        name: Probe.of(Subject(model.get_submodule(name).weight.detach().double(), Metric()), None)
        for name in ("first", "second", "cut")
    }
    assert set(expected_divergences(model, [x], probes, logits=False)) == {"first"}
    work = Probes(model, calibrate(model, [x], list(probes), logits=False, macs=1), 3)
    found = work.sensitivities(probes)
    assert found["second"] == work.measure("second", probes["second"])
    assert found["cut"] == work.measure("cut", probes["cut"])
    assert found["first"] != work.measure("first", probes["first"])
    assert found["first"].scale == pytest.approx(work.measure("first", probes["first"]).scale, rel=0.5)


def test_batches_without_any_output_tell_nothing() -> None:
    """As those in which a detector finds no boxes."""

    class Finds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            found = self.body(x)
            return found[x[:, 0] > 0]

    torch.manual_seed(0)
    model, x = Finds().eval().requires_grad_(False), torch.randn(32, 4).abs()
    probes = {"body": Probe.of(Subject(model.body.weight.detach().double(), Metric()), None)}
    found = expected_divergences(model, [x, -x], probes, logits=False)
    assert found == expected_divergences(model, [x], probes, logits=False)
    assert expected_divergences(model, [-x], probes, logits=False) == {}
