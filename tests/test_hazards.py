"""Models that draw, differentiate or go on running in their own ways: compressed with and without data, and stored."""

import math
import random
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import assert_close, must_fail
from torch import nn
from torch.nn.utils import parametrize

import gmcompress as gm
from gmcompress.forward import run, run_seeded, shell


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.more, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def features(self, x):
        return torch.tanh(self.more(torch.tanh(self.body(x))))


class Force(Base):
    """An energy and its slope, which counts on gradients being on."""

    def forward(self, x):
        x = x.requires_grad_()
        energy = self.head(self.features(x)).sum()
        return energy, torch.autograd.grad(energy, x)[0]


class Yields(Base):
    """Runs while its output is read."""

    def forward(self, x):
        for step in range(3):
            yield {"step": step, "logits": self.head(self.features(step + x))}


class Draws(Base):
    """Takes random numbers wherever there are any."""

    def forward(self, x):
        return self.head(self.features(x + torch.rand(1) + random.random() + np.random.rand()))


class Waves(Base):
    def forward(self, x):
        return torch.fft.fft(self.head(self.features(x)))


class Sparse(Base):
    """Holds matrices of few entries."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such tensors are in beta state
            self.more.weight = nn.Parameter(torch.eye(8).to_sparse_csr(), requires_grad=False)

    def forward(self, x):
        return self.head(torch.tanh(self.more.weight @ self.body(x).T).T)


STORED = [Force, Yields, Draws, Waves]


def leaves(outputs):
    return torch.utils._pytree.tree_leaves(outputs)


@pytest.mark.parametrize("options", [{"rank": 1}, {"budget": "75%", "effort": 0.1}], ids=["rank", "data"])
@pytest.mark.parametrize("cls", [*STORED, Sparse])
def test_such_models_are_not_broken(cls, options, tmp_path):
    torch.manual_seed(0)
    model, x = cls().eval(), torch.randn(8, 8)
    if "budget" in options:
        options = options | {"data": [x]}
    result = gm.compress(model, "C4", inputs=x, **options)
    assert set(result.plan.layers) & {"body", "more"}
    small, dense, old = (leaves(run_seeded(each, x)) for each in (result.model, gm.densify(result.model), model))
    for ours, twin, theirs in zip(small, dense, old, strict=True):
        if isinstance(ours, torch.Tensor):
            assert_close(torch.as_tensor(ours).abs(), twin.abs(), slack=10)
            assert ours.shape == theirs.shape
            must_fail(assert_close, ours.abs(), theirs.abs())
    assert gm.doctor(model, x, "C4").works
    if cls in STORED:
        gm.save(result, tmp_path / "small", inputs=x)
        assert isinstance(gm.load(tmp_path / "small", cls()), cls)


def test_a_run_leaves_the_random_numbers_of_the_caller_alone():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    model = Draws()
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    run_seeded(model, torch.zeros(1, 8))
    assert random.getstate() == state[0]
    assert np.random.get_state()[1].tolist() == state[1]
    assert torch.equal(torch.get_rng_state(), state[2])


def test_iterators_without_end_are_read_for_a_while():
    class Endless(Base):
        def forward(self, x):
            while True:
                yield self.body(x)

    assert len(run(Endless(), torch.ones(1, 8))) == 1000


@pytest.mark.parametrize("given", ["groups", "few"])
def test_parameters_are_all_of_them_whatever_a_class_gives_out(given, tmp_path):
    class Model(Base):
        def parameters(self, recurse=True):
            head = list(self.head.parameters(recurse))
            return [{"params": head, "lr": 0.1}] if given == "groups" else head

        def forward(self, x):
            return self.head(self.features(x))

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(8, 8)
    result = gm.compress(model, "C4", budget="85%", data=[x], effort=0.1)
    assert result.report.before.parameters == 2 * 72 + 27
    assert gm.doctor(model, x, "C4").works
    tuned = gm.tune(result, [x], epochs=1, lr=1e-3).model
    gm.save(tuned, tmp_path / "small", inputs=x)
    assert_close(run(gm.load(tmp_path / "small", Model()), x), run(gm.densify(tuned), x))


@pytest.mark.parametrize("where", ["inputs", "inside"])
def test_sparse_and_nested_tensors_on_the_way(where):
    class Graph(Base):
        def forward(self, x, links):
            return self.head(links @ self.features(links @ x))

    class Sentences(Base):
        def forward(self, x, links):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such tensors are a prototype
                nested = torch.nested.nested_tensor(
                    [each[: 1 + at] for at, each in enumerate(x[:, None] * links[..., None])]
                )
                found = self.more(torch.relu(self.body(nested))).to_padded_tensor(0.0)
            return self.head(found.sum(1))

    torch.manual_seed(0)
    links = torch.eye(8) + torch.eye(8).roll(1, 0)
    if where == "inputs":
        model, given = Graph(), {"x": torch.randn(8, 8), "links": links.to_sparse()}
    else:
        model, given = Sentences(), {"x": torch.randn(8, 8), "links": links}
    result = gm.compress(model.eval(), "C4", budget="85%", data=[given], effort=0.1)
    assert set(result.plan.layers) & {"body", "more"}
    assert gm.tune(
        result, [given], epochs=1, lr=1e-3, features=1.0, blocks=("more",) if where == "inputs" else ("head",)
    )


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_nested_inputs_and_outputs(tmp_path):
    class Model(Base):
        def forward(self, x):
            return self.head(torch.relu(self.more(torch.relu(self.body(x)))))

    torch.manual_seed(0)
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    result = gm.compress(Model().eval(), "C4", rank=1, inputs=x)
    assert list(result.plan.layers) == ["body", "more"]
    assert_close(*(run(each, x).to_padded_tensor(0.0) for each in (result.model, gm.densify(result.model))))
    with pytest.raises(gm.GMError, match=r"not nested \[\(3, 8\), \(5, 8\)\]"):
        gm.compress(Model(), "C4", data=[x])
    with pytest.raises(gm.GMError, match=r"not nested \[\(3, 8\), \(5, 8\)\]"):
        gm.export(result, tmp_path / "small.safetensors", format="dense")


def test_a_model_that_turns_gradients_off_is_not_tuned():
    class Still(Base):
        @torch.no_grad()
        def forward(self, x):
            return self.head(self.features(x))

    model, x = Still().eval(), torch.randn(8, 8)
    with pytest.raises(gm.GMError, match="turns gradients off"):
        gm.tune(gm.compress(model, "C4", rank=1, inputs=x), [x], epochs=1, lr=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 0.0])
def test_starved_layers_are_compressed_with_data(size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)).eval()
    nn.init.constant_(model[2].weight, size)
    result = gm.compress(model, "C4", budget="75%", data=[torch.randn(8, 8)], effort=0.1)
    assert math.isfinite(result.plan.optimum["loss"])
    assert result.plan.layers


def test_parameters_that_a_run_makes_are_asked_for_before():
    class Late(Base):
        def __init__(self):
            super().__init__()
            self.late = None

        def forward(self, x):
            if self.late is None:
                self.late = nn.Linear(8, 8)
            return self.head(self.late(self.features(x)))

    model, x = Late(), torch.randn(4, 8)
    for door in (gm.compress, gm.plan, gm.doctor):
        if door is gm.doctor:
            assert "run it once before" in door(model, x, "C4").run_problem
        else:
            with pytest.raises(
                gm.GMError, match=r"makes or drops parameters as it runs, such as 'late.bias'; run it once"
            ):
                door(model, "C4", rank=1, inputs=x)
    assert model.late is None
    model(x)
    assert "late" in gm.compress(model, "C4", rank=1, inputs=x).plan.layers


def test_the_parameter_that_is_parametrized_is_named():
    model = Base()
    parametrize.register_parametrization(model.body, "bias", nn.Tanh())
    parametrize.register_parametrization(model.more, "weight", nn.Tanh())
    skipped = gm.plan(model, "C4", rank=1, include=["head"], overrides={"head": "lowrank:1"}).skipped
    assert [skipped[name].split(";")[0] for name in ("body", "more")] == [
        "its bias is parametrized",
        "its weight is parametrized",
    ]


def test_buffers_that_a_first_run_fills_are_stored(tmp_path):
    class Fills(Base):
        def __init__(self):
            super().__init__()
            self.register_buffer("places", None)

        def forward(self, x):
            if self.places is None:
                self.places = torch.linspace(0, 1, x.shape[-1])
            return self.head(self.features(x + self.places))

    torch.manual_seed(0)
    x = torch.randn(4, 8)
    small = gm.compress(Fills().eval(), "C4", rank=1, inputs=x).model
    found = small(x)
    gm.save(small, tmp_path / "small", inputs=x)
    assert torch.equal(gm.load(tmp_path / "small", Fills())(x), found)


@pytest.mark.parametrize(("layer", "form"), [(nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d)])
def test_compressed_networks_take_a_memory_format(layer, form):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(layer(3, 8, 1), layer(8, 8, 3), nn.Conv1d(8, 8, 3)),
        torch.randn(2, 3, *[5] * (form == torch.channels_last_3d), 5, 5),
    )
    small = gm.compress(model[:2].eval(), "C4", rank=1, inputs=x).model
    expected = small(x)
    for each in (small, gm.freeze(small, "dense"), gm.compress(model[2], "C4", rank=1).model):
        each.to(memory_format=form)
    assert_close(small.to(memory_format=form)(x.to(memory_format=form)), expected, slack=10)


def test_labels_are_read_where_a_model_does_not_run_without_them():
    class Translates(Base):
        def forward(self, x, decoder_x=None, labels=None):
            if decoder_x is None:
                decoder_x = nn.functional.one_hot(labels, 8).float()
            return self.head(self.features(x + decoder_x))

    torch.manual_seed(0)
    model, batch = Translates().eval(), {"x": torch.randn(8, 8), "labels": torch.arange(8)}
    result = gm.compress(model, "C4", budget="85%", data=[batch], effort=0.1)
    assert set(result.inputs) == {"x", "labels"}
    beside = [batch | {"decoder_x": batch["x"]}]
    assert set(gm.compress(model, "C4", budget="85%", data=beside, effort=0.1).inputs) == {"x", "decoder_x"}


def test_layers_that_run_in_threads_of_their_own():
    class Threads(Base):
        def forward(self, x):
            with ThreadPoolExecutor() as threads:
                return self.head(sum(threads.map(lambda layer: torch.tanh(layer(x)), [self.body, self.more])))

    model, x = Threads().eval(), torch.randn(8, 8)
    result = gm.compress(model, "C4", rank=1, inputs=x)
    assert list(result.plan.layers) == ["body", "more"]
    assert_close(result.model(x), gm.densify(result.model)(x))
    assert gm.doctor(model, x, "C4").works


@pytest.mark.parametrize("options", [{"rank": 1}, {"budget": "75%", "effort": 0.1}], ids=["rank", "data"])
def test_torch_may_make_tensors_elsewhere_by_default(options, tmp_path):
    torch.manual_seed(0)
    images = torch.randn(8, 8, 6, 6)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.Flatten(), nn.Linear(16, 3))
    if "budget" in options:
        options = options | {"data": [images]}
    with torch.device("meta"):  # as a GPU that torch.set_default_device names
        result = gm.compress(model, "D4", inputs=images, **options)
        for path in ("structured", "dense", "auto"):
            assert_close(gm.freeze(result.model, path, inputs=images)(images), gm.densify(result.model)(images))
        gm.export(result, tmp_path / "small.safetensors", format="dense")
        gm.save(result, tmp_path / "small")
        gm.load(tmp_path / "small", model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{"rank": 1}, {"budget": "75%", "effort": 0.1}], ids=["rank", "data"])
def test_torch_may_make_tensors_of_another_type_by_default(options, dtype, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)).eval(), torch.randn(16, 8)
    if "budget" in options:
        options = options | {"data": [x]}
    usual = gm.compress(model, "C4", inputs=x, **options).model
    torch.set_default_dtype(dtype)
    try:
        result = gm.compress(model, "C4", inputs=x, **options)
        gm.save(gm.tune(result, [x], epochs=1, lr=1e-3), tmp_path / "small")
        loaded = gm.load(tmp_path / "small", model)
        found = {path: gm.freeze(result.model, path, inputs=x)(x) for path in ("structured", "dense", "auto")}
    finally:
        torch.set_default_dtype(torch.float32)
    assert {each.dtype for each in [*loaded.parameters(), *result.model.parameters()]} == {torch.float32}
    for each in (result.model(x), *found.values()):
        assert_close(each, usual(x), slack=10)


def test_a_batch_by_name_may_be_one_argument(tmp_path):
    class Whole(Base):
        def forward(self, batch):
            return self.head(self.features(batch["x"] + batch["y"]))

    torch.manual_seed(0)
    model, batch = Whole().eval(), {"x": torch.randn(40, 8), "y": torch.randn(40, 8)}
    result = gm.compress(model, "C4", budget="75%", data=[batch], effort=0.1)
    assert set(result.plan.layers) & {"body", "more"}
    tuned = gm.tune(result, [batch], epochs=1, lr=1e-3).model
    gm.save(tuned, tmp_path / "small", inputs=batch)
    assert_close(gm.load(tmp_path / "small", Whole())(batch), gm.densify(tuned)(batch))
    assert gm.doctor(model, batch, "C4").works
    with pytest.raises(gm.GMError, match="as one argument, since it has none of these names: KeyError"):
        gm.compress(model, "C4", rank=1, inputs={"z": torch.randn(2, 8)})
    mlp = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))  # whose one argument is called `input`
    with pytest.raises(gm.GMError, match="as one argument, since it takes no 'index', 'name': TypeError"):
        gm.compress(mlp, "C4", rank=1, inputs={"input": torch.randn(2, 8), "index": torch.arange(2), "name": "ab"})


def test_models_that_learn_from_some_of_their_inputs():
    class Learns(Base):
        """Takes a step of gradient descent on examples, and answers with the weights that it leads to."""

        def forward(self, x, wanted, asked):
            weights = dict(self.body.named_parameters())
            with torch.enable_grad():
                loss = (torch.func.functional_call(self.body, weights, (x,)) - wanted).square().mean()
                slopes = torch.autograd.grad(loss, list(weights.values()))
            weights = {key: each - 0.1 * slope for (key, each), slope in zip(weights.items(), slopes, strict=True)}
            return self.head(self.more(torch.func.functional_call(self.body, weights, (asked,))))

    torch.manual_seed(0)
    model, x = Learns().eval(), [torch.randn(4, 8) for _ in range(3)]
    model.body.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(*x)
    model.requires_grad_(True)
    result = gm.compress(model, "C4", rank=1, inputs=x)
    assert list(result.plan.layers) == ["more"]
    assert "body" in result.plan.skipped
    assert_close(result.model(*x), gm.densify(result.model)(*x))
    assert gm.doctor(model, x, "C4").works
    assert not any(each.requires_grad for each in shell(model).parameters())


@pytest.mark.parametrize("options", [{"rank": 1}, {"budget": "75%", "effort": 0.1}], ids=["rank", "data"])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_evaluation_mode_keeps_of_the_weights_is_that_of_the_new_ones(inplace, options, tmp_path):
    class Merges(Base):
        """Multiplies two weights once, when it is put into evaluation mode."""

        def train(self, mode=True):
            super().train(mode)
            self.product = None if mode else (self.more.weight @ self.body.weight).detach()
            return self

        def forward(self, x):
            if self.product is None:
                return self.head(x @ self.body.weight.T @ self.more.weight.T)
            return self.head(x @ self.product.T)

    torch.manual_seed(0)
    model, x = Merges().eval(), torch.randn(8, 8)
    expected = model(x)
    if "budget" in options:
        options = options | {"data": [x]}
    result = gm.compress(model, "C4", inputs=x, inplace=inplace, **options)
    assert {"body", "more"} <= set(result.plan.layers)
    small = result.model(x)
    must_fail(assert_close, small, expected)
    dense = gm.densify(result.model)
    for each in (dense(x), result.model.train()(x), gm.densify(result.model)(x)):
        assert_close(each, small, slack=10)
    gm.save(result, tmp_path / "small", inputs=x)
    assert_close(gm.load(tmp_path / "small", Merges())(x), small, slack=10)


def test_a_model_that_trains_jointly_what_got_several_structures_is_refused():
    class Follows(Base):
        """A copy of its layers follows them slowly while it is trained."""

        def __init__(self):
            super().__init__()
            self.teacher = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)

        def forward(self, x):
            if self.training:
                ours = [*self.body.parameters(), *self.more.parameters()]
                for slow, each in zip(self.teacher.parameters(), ours, strict=True):
                    slow.data.mul_(0.9).add_(each.data, alpha=0.1)
            return self.head(self.features(x)), self.teacher(x)

    torch.manual_seed(0)
    model, x = Follows().eval(), torch.randn(8, 8)
    mixed = {"teacher.*": "lowrank:1", "*": "lowrank:2"}
    with pytest.raises(gm.GMError, match=r"cannot be trained, though the dense one can: RuntimeError.* rank="):
        gm.compress(model, "C4", rank=1, inputs=x, overrides=mixed)
    small = gm.compress(model, "C4", rank=1, inputs=x, include="teacher.1").model.train()
    before = small.teacher[0].weight.clone()
    small(x)[0].sum().backward()
    must_fail(assert_close, small.teacher[0].weight, before)


def test_lists_may_have_another_length():
    class Exits(Base):
        """Goes on for as long as the values say, and gives out the answers on the way."""

        def forward(self, x):
            x, found = self.features(x), []
            for _ in range(1 + int(x.detach().std() * 1000) % 9):
                found.append(self.head(x))
            return {"answers": found, "last": found[-1]}

    torch.manual_seed(0)
    model, data = Exits().eval(), [torch.randn(8, 8) for _ in range(10)]
    result = gm.compress(model, "C4", budget="75%", data=data, effort=0.1)
    counts = [[len(each(x)["answers"]) for x in data] for each in (model, result.model)]
    assert counts[0] != counts[1]
    assert gm.tune(result, data, epochs=1, lr=1e-3).model(data[0])["answers"]


def test_outputs_that_a_low_rank_makes_infinite_say_what_to_do():
    class Flows(Base):
        """The logarithm of a change of volumes beside the outputs, as of normalising flows."""

        def forward(self, x):
            return self.features(x), (torch.linalg.svdvals(self.body.weight) - 1e-3).log().sum()

    torch.manual_seed(0)
    model, x = Flows().eval(), torch.randn(8, 8)
    nn.init.orthogonal_(model.body.weight)
    with pytest.raises(gm.GMError, match=r"not finite .* leave out with exclude= what its code inverts"):
        gm.compress(model, "C4", rank=1, inputs=x, overrides={"body": "lowrank:2"})
    assert list(gm.compress(model, "C4", rank=1, inputs=x, exclude="body", include="more").plan.layers) == ["more"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whoever_turns_gradients_off_can_compress_and_tune(mode):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)).eval(), torch.randn(16, 8)
    with mode():
        result = gm.compress(model, "C4", budget="75%", data=[x.clone()], effort=0.1)
        tuned = gm.tune(result, [x.clone()], epochs=1, lr=1e-3).model
    for each in (result.model, tuned):
        assert not any(part.is_inference() for part in each.parameters())
        each(x).square().sum().backward()
        assert all(part.grad is not None for part in each.parameters())
