"""Second moments of the inputs of layers: against slow sums, drawn, damped, and of inputs that differ in number."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import assert_close, must_fail
from torch import Generator, Tensor, nn

import gmcompress as gm
from gmcompress.calibration import output_gradients
from gmcompress.moments import Moments, collect
from gmcompress.plain import is_plain

CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2)},
    {"kernel_size": 3, "dilation": 2, "padding": 2},
    {"kernel_size": 3, "groups": 2, "padding": 1},
    {"kernel_size": (1, 3), "groups": 4, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 2, "padding": 1, "padding_mode": "circular", "groups": 2},
    {"kernel_size": 3, "groups": np.int64(2), "stride": np.int64(2)},
]


def slow_patches(layer: nn.Conv2d, x: Tensor) -> list[list[Tensor]]:
    """For every convolution group the vectors (channel, ky, kx) under the kernel, one for each place of the output."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    width, (high, wide) = layer.in_channels // layer.groups, layer.kernel_size
    places = layer(x).shape[2:]
    found: list[list[Tensor]] = [[] for _ in range(layer.groups)]
    for n, top, side, g in itertools.product(range(len(x)), *map(range, places), range(layer.groups)):
        patch = [
            padded[n, c, top * layer.stride[0] + y * layer.dilation[0], side * layer.stride[1] + z * layer.dilation[1]]
            for c, y, z in itertools.product(range(g * width, (g + 1) * width), range(high), range(wide))
        ]
        found[g].append(torch.stack(patch))
    return found


def assert_moments(found: Moments, old: list[list[Tensor]], new: list[list[Tensor]]) -> None:
    """The sums, vector by vector, in float64; `found` was summed in float32."""
    for g, (ts, xs) in enumerate(zip(old, new, strict=True)):
        ts, xs = ([each.detach().double() for each in vectors] for vectors in (ts, xs))
        assert found.count == len(xs)
        inputs = sum(torch.outer(x, x) for x in xs) / len(xs)
        cross = sum(torch.outer(t, x) for t, x in zip(ts, xs, strict=True)) / len(xs)
        for mine, expected in (
            (found.inputs, inputs),
            (found.cross, cross),
            (found.mean, sum(xs) / len(xs)),
            (found.dense_mean, sum(ts) / len(ts)),
        ):
            assert_close(mine[g].float(), expected.float(), slack=10)


def two(build: type[nn.Module], *arguments: object, **options: object) -> tuple[nn.Module, nn.Module]:
    """A small network and another one with other weights in front of the layer that is looked at."""
    torch.manual_seed(0)
    return tuple(nn.Sequential(nn.Conv2d(3, 4, 1), build(*arguments, **options)) for _ in range(2))  # type: ignore


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_moments_of_convolutions(options: dict[str, object], generator: Generator) -> None:
    dense, small = two(nn.Conv2d, 4, 8, **options)
    batches = [torch.randn(size, 3, 6, 5, generator=generator) for size in (2, 1)]
    found = collect(dense, small, ["1"], batches)["1"]
    with torch.no_grad():
        old, new = ([slow_patches(net[1], net[0](x)) for x in batches] for net in (dense, small))
    old, new = ([[*itertools.chain(*parts)] for parts in zip(*each, strict=True)] for each in (old, new))
    assert_moments(found, old, new)
    must_fail(assert_moments, found, old, old)
    assert_moments(collect(dense, dense, ["1"], batches)["1"], old, old)


class Tokens(nn.Module):
    """A linear layer on tokens, called twice before another."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last, self.never = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(torch.tanh(self.body(x))))


def test_moments_of_tokens_and_of_a_module_called_twice(generator: Generator) -> None:
    torch.manual_seed(0)
    dense, small = Tokens(), Tokens()
    x = torch.randn(2, 5, 4, generator=generator)
    found = collect(dense, small, ["body", "last", "never"], [x])
    assert set(found) == {"body", "last"}, "a layer that never runs has no moments"
    vectors = []
    for net in (dense, small):
        with torch.no_grad():
            inner = torch.tanh(net.body(x))
            vectors.append([[*x.flatten(0, 1), *inner.flatten(0, 1)]])
    assert_moments(found["body"], *vectors)
    must_fail(assert_moments, found["body"], *([[each[0][:10]] for each in vectors]))
    assert not dense.body._forward_pre_hooks, "no hook is left behind"


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv2d(4, 4, 1, groups=2)])
def test_inputs_that_hardly_vary(layer: nn.Module, generator: Generator) -> None:
    shape = (40, 4) if isinstance(layer, nn.Linear) else (40, 4, 1, 1)
    x = 10 * torch.rand(shape[1:], generator=generator) + 0.01 * torch.randn(shape, generator=generator)
    model = nn.Sequential(layer)
    found = collect(model, model, ["0"], x.split(10))["0"]
    vectors = x.double().reshape(40, found.inputs.shape[0], -1).transpose(0, 1)
    apart = vectors - vectors.mean(1, keepdim=True)
    torch.testing.assert_close(found.centred().inputs, apart.mT @ apart / 40, rtol=1e-4, atol=1e-9)
    assert torch.linalg.eigvalsh(found.centred().inputs).min() > 0
    assert_close(found.inputs, vectors.mT @ vectors / 40, slack=1e4)


def test_only_crossed_layers_are_summed_with_the_dense_model(generator: Generator) -> None:
    dense, small = two(nn.Conv2d, 4, 4, kernel_size=3)
    batches = [torch.randn(3, 3, 6, 6, generator=generator) for _ in range(2)]
    whole, own = collect(dense, small, ["1"], batches)["1"], collect(dense, small, ["1"], batches, crossed=[])["1"]
    assert torch.equal(own.inputs, whole.inputs)
    assert torch.equal(own.dense_mean, own.mean)
    assert torch.equal(own.cross, own.inputs)
    assert not torch.equal(whole.cross, whole.inputs), "the control"


def test_sums_that_would_cost_too_much_are_of_fewer_vectors(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, _ = two(nn.Conv2d, 4, 4, kernel_size=3)  # sums of 36 x 36
    batches = [torch.randn(4, 3, 12, 12, generator=generator) for _ in range(4)]  # 1600 patches
    for work, expected in ((10**9, 1600), (500 * 36**2, 500), (1, 3 * 36)):
        monkeypatch.setattr("gmcompress.moments.WORK", work)
        count = collect(dense, dense, ["1"], batches)["1"].count
        assert count == expected if expected == 1600 else 0.6 * expected < count <= expected, "some are drawn twice"


def test_a_subsample_is_unbiased(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many seeds the mean of the drawn moments nears the whole one as fast as chance allows."""
    dense, _ = two(nn.Conv2d, 4, 4, kernel_size=3)
    batches = [torch.randn(4, 3, 12, 12, generator=generator) for _ in range(40)]
    monkeypatch.setattr("gmcompress.moments.POSITIONS", 10**6)
    whole = collect(dense, dense, ["1"], batches)["1"]
    monkeypatch.setattr("gmcompress.moments.POSITIONS", 45)  # 45·36 of 16000 patches, 40 of each batch
    drawn = collect(dense, dense, ["1"], batches)["1"]
    assert whole.count == 40 * 400
    assert 0.9 * 40 * 40 < drawn.count <= 40 * 40

    def assert_near(found: Tensor) -> None:
        error = float((found - whole.inputs).norm() / whole.inputs.norm())
        assert 0.001 < error < 3 * (36 / drawn.count) ** 0.5

    assert_near(drawn.inputs)
    must_fail(assert_near, 1.5 * drawn.inputs)
    must_fail(assert_near, whole.inputs)


@pytest.mark.parametrize("kind", ["tokens", "images"])
def test_vectors_count_as_the_places_that_they_are_for(
    kind: str, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole sums against weighted ones place by place, and drawn ones near them; few places tell little."""
    if kind == "tokens":
        dense, small = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)) for _ in range(2))
        batches = [torch.randn(size, 6, 4, generator=generator) for size in (30, 10)]
        vectors = [[net[0](x).flatten(0, 1)[:, None] for x in batches] for net in (dense, small)]
    else:
        dense, small = two(nn.Conv2d, 4, 8, kernel_size=2, stride=(2, 1), groups=2)
        batches = [torch.randn(size, 3, 4, 4, generator=generator) for size in (30, 10)]
        patches = [[slow_patches(net[1], net[0](x)) for x in batches] for net in (dense, small)]
        vectors = [[torch.stack([torch.stack(g) for g in each], 1) for each in half] for half in patches]
    old, new = (torch.cat(each).detach().double() for each in vectors)  # (vectors, groups, m)
    places = torch.tensor([4.0, 0.5, 0.5, 0.5, 0.25, 0.25])
    weights = places.repeat(40).double()[:, None, None] / len(old)
    wanted = torch.einsum("vgi,vgj->gij", weights * new, new), torch.einsum("vgi,vgj->gij", weights * old, new)
    found = collect(dense, small, ["1"], batches, places={"1": places})["1"]
    assert_close(found.inputs.float(), wanted[0].float(), slack=10)
    assert_close(found.cross.float(), wanted[1].float(), slack=10)
    assert_close(found.mean.float(), (weights * new).sum(0).float(), slack=10)
    assert_close(found.dense_mean.float(), (weights * old).sum(0).float(), slack=10)
    must_fail(assert_close, collect(dense, small, ["1"], batches)["1"].inputs.float(), wanted[0].float())
    assert found.count == round(240 / float(places.square().mean()))
    assert [each.count for each in found.halves] == [round(n / float(places.square().mean())) for n in (180, 60)]

    monkeypatch.setattr("gmcompress.moments.WORK", 1)
    monkeypatch.setattr("gmcompress.moments.FEWEST", 25)  # times m, in two batches, of which the first has more
    drawn = collect(dense, small, ["1"], batches, places={"1": places})["1"]
    assert drawn.count < found.count

    def assert_near(one: Tensor) -> None:
        assert float((drawn.inputs - one).norm() / one.norm()) < 0.25

    assert_near(found.inputs)
    must_fail(assert_near, 2 * found.inputs)


def test_places_of_other_than_whole_examples_count_alike(generator: Generator) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 7, 4, generator=generator)
    odd = collect(model, model, ["0"], [x], places={"0": torch.rand(6, generator=generator)})["0"]
    assert torch.equal(odd.inputs, collect(model, model, ["0"], [x])["0"].inputs)


def moments_of(t: Tensor, x: Tensor) -> Moments:  # both (count, groups, m)
    t, x = t.transpose(0, 1), x.transpose(0, 1)
    return Moments(x.shape[1], x.mT @ x / x.shape[1], t.mT @ x / x.shape[1], x.mean(1), t.mean(1))


@pytest.mark.parametrize("groups", [1, 2])
def test_centred_moments_are_those_of_centred_vectors(groups: int, generator: Generator) -> None:
    t, x = (torch.randn(50, groups, 3, generator=generator, dtype=torch.float64) + 2 for _ in range(2))
    found, expected = moments_of(t, x).centred(), moments_of(t - t.mean(0), x - x.mean(0))
    assert_close(found.inputs, expected.inputs)
    assert_close(found.cross, expected.cross)
    must_fail(assert_close, moments_of(t, x).inputs, expected.inputs)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_target_is_the_least_squares_weight(
    groups: int, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the vectors are many and undamped, no other weight W* makes Σ ‖W t − W* x‖² smaller."""
    monkeypatch.setattr("gmcompress.moments.DAMPING", 1e-12)
    x = torch.randn(400, groups, 5, generator=generator, dtype=torch.float64)
    t = x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(4 * groups, 5, generator=generator, dtype=torch.float64)
    moments = moments_of(t, x)
    moments = Moments(10**15, moments.inputs, moments.cross, moments.mean, moments.dense_mean)
    parts = weight.reshape(groups, 4, 5)
    best = [torch.linalg.lstsq(x[:, g], t[:, g] @ parts[g].T).solution.T for g in range(groups)]
    assert_close(moments.target(weight), torch.cat(best), slack=1e3)
    must_fail(assert_close, moments.target(weight), weight)
    shift = [(x[:, g] @ best[g].T - t[:, g] @ parts[g].T).mean(0) for g in range(groups)]
    assert_close(moments.shift(weight, torch.cat(best)), torch.cat(shift))
    same = moments_of(t, t)
    assert_close(same.target(weight), weight, slack=10)


def test_few_vectors_are_damped(generator: Generator) -> None:
    """With fewer vectors than dimensions the Gram matrix can be factored, and the target of equal inputs is W."""
    x = torch.randn(3, 1, 8, generator=generator, dtype=torch.float64)
    moments, weight = moments_of(x, x), torch.randn(2, 8, generator=generator, dtype=torch.float64)
    torch.linalg.cholesky(moments.gram())
    assert float(torch.linalg.eigvalsh(moments.inputs).min()) < 1e-12, "the control"
    assert_close(moments.target(weight), weight, slack=10)
    nothing = moments_of(0 * x, 0 * x)
    assert_close(nothing.target(weight), weight)


@pytest.mark.parametrize("examples", [10, 4000])
def test_a_target_is_trusted_as_far_as_held_out_examples_bear_it_out(examples: int, generator: Generator) -> None:
    """Of many examples the regression is taken; of few, each seen in 40 places, what they share by chance is not."""
    m, weight = 24, torch.randn(4, 24, generator=generator, dtype=torch.float64)
    own = torch.randn(examples, 1, 1, m, generator=generator, dtype=torch.float64)
    x = own + 0.1 * torch.randn(examples, 40, 1, m, generator=generator, dtype=torch.float64)
    t = 0.7 * x + 0.5 * torch.randn(examples, 1, 1, m, generator=generator, dtype=torch.float64)
    halves = tuple(moments_of(*(each[n::2].flatten(0, 1) for each in (t, x))) for n in (0, 1))
    moments = replace(moments_of(t.flatten(0, 1), x.flatten(0, 1)), halves=halves)

    trusting, careful = (
        float((each.target(weight) - 0.7 * weight).norm()) for each in (replace(moments, halves=()), moments)
    )
    if examples == 4000:
        assert careful < 0.25 * float(0.3 * weight.norm())
    else:
        assert careful < 0.8 * trusting


class Routed(nn.Module):
    """Some vectors go through a layer, which ones depends on what comes before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.some, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        chosen = x[x[:, 0] > 0]
        return self.last(self.some(chosen)) if len(chosen) else self.last(chosen)


def test_layers_that_see_other_vectors_in_the_compressed_model(generator: Generator) -> None:
    torch.manual_seed(0)
    dense, small = Routed().eval(), Routed().eval()
    x = torch.randn(20, 8, generator=generator)
    found, own = (collect(each, small, ["some", "last"], [x, x])["some"] for each in (dense, small))
    assert found.count != collect(dense, dense, ["some"], [x, x])["some"].count
    for one, other in ((found.inputs, own.inputs), (found.cross, own.inputs), (found.mean, own.mean)):
        assert_close(one, other)
    with torch.no_grad():
        small.first.bias[0] = -100.0
    assert not collect(dense, small, ["some", "last"], [x])


@pytest.mark.parametrize("options", [{"budget": "75%"}, {"rank": 1}], ids=str)
def test_a_model_whose_code_follows_values_is_compressed(options, generator: Generator) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    result = gm.compress(Routed(), "C4", data=[x], **options)
    assert result.report.after.parameters < result.report.before.parameters
    assert result.model(x).shape[1] == 3


def test_images_without_a_batch_axis(generator: Generator) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(3, 6, 7, generator=generator)
    one, batch = (collect(model, model, ["0"], [each])["0"] for each in (x, x[None]))
    assert torch.equal(one.inputs, batch.inputs)
    found = [output_gradients(model, [each], ["0"], logits=False)["0"] for each in (x, x[None])]
    assert_close(found[0].moment, found[1].moment)
    assert found[0].places is not None
    assert torch.equal(found[0].places, found[1].places)


@pytest.mark.parametrize("kind", ["buffer", "tensor", "other settings"])
def test_layers_that_are_not_plain_are_fitted_to_their_weights(kind: str, generator: Generator) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 9, 3))
    if kind == "other settings":
        model[1].padding, model[1].stride = (1, 1), 2
    else:
        del model[1].bias
        if kind == "buffer":
            model[1].register_buffer("bias", torch.ones(8))
        else:
            vars(model[1])["bias"] = torch.ones(8)
    x = torch.randn(40, 3, 5, 5, generator=generator)
    assert not is_plain(model, "1")
    result = gm.compress(model, "C4", data=[x], budget={"params": 600}, include="1", exclude=["0", "3"])
    assert list(result.plan.layers) == ["1"]
    assert torch.isfinite(result.model(x)).all()
