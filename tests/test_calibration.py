"""Calibration: moments against loops over patches, the targets they imply, divergences, gradients, and bad data."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import assert_close, must_fail
from torch import Generator, Tensor, nn

import gmcompress as gm
from gmcompress.calibration import divergence, norms_after, output_moments, outputs
from gmcompress.errors import GMError
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
        assert collect(dense, dense, ["1"], batches)["1"].count == expected


def test_a_subsample_is_unbiased(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many seeds the mean of the drawn moments nears the whole one as fast as chance allows."""
    dense, _ = two(nn.Conv2d, 4, 4, kernel_size=3)
    batches = [torch.randn(4, 3, 12, 12, generator=generator) for _ in range(40)]
    monkeypatch.setattr("gmcompress.moments.POSITIONS", 10**6)
    whole = collect(dense, dense, ["1"], batches)["1"]
    monkeypatch.setattr("gmcompress.moments.POSITIONS", 45)  # 45·36 of 16000 patches, 40 of each batch
    drawn = collect(dense, dense, ["1"], batches)["1"]
    assert whole.count == 40 * 400
    assert drawn.count == 40 * 40

    def assert_near(found: Tensor) -> None:
        error = float((found - whole.inputs).norm() / whole.inputs.norm())
        assert 0.001 < error < 3 * (36 / drawn.count) ** 0.5

    assert_near(drawn.inputs)
    must_fail(assert_near, 1.5 * drawn.inputs)
    must_fail(assert_near, whole.inputs)


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
    found = [output_moments(model, [each], ["0"], logits=False)["0"] for each in (x, x[None])]
    assert_close(found[0], found[1])


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


def test_output_moments_are_those_of_the_fisher_information(generator: Generator) -> None:
    """Of the last layer the moment is the mean of diag(p) − p pᵀ, which many drawn labels near; its diagonal is 1."""
    model = classifier()
    x = torch.randn(600, 2, 4, 4, generator=generator, dtype=torch.float64)
    found = output_moments(model, [x], ["0", "2", "4"], logits=True)
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
    again = output_moments(model, [x], ["0", "2", "4"], logits=True)
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_frozen_weights_have_output_moments_and_unreached_layers_none(generator: Generator) -> None:
    model, x = classifier(), torch.randn(50, 2, 4, 4, generator=generator, dtype=torch.float64)
    expected = output_moments(model, [x], ["0", "2", "4"], logits=True)
    model.zero_grad()
    model.requires_grad_(False)
    found = output_moments(model, [x], ["0", "2", "4"], logits=True)
    for name in expected:
        assert_close(found[name], expected[name], slack=1e6)
    assert all(each.grad is None for each in model.parameters())
    tokens = Tokens()
    assert set(output_moments(tokens, [torch.randn(3, 4)], ["body", "never"], logits=False)) == {"body"}


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
