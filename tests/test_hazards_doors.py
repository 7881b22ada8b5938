"""Models that write into their own weights, make their own state or let nothing be set on them, at every door."""

import copy
import warnings

import pytest
import torch
from conftest import assert_close, must_fail
from torch import nn

import gmcompress as gm
from gmcompress.exporting import FORMATS
from gmcompress.forward import run_seeded, shell


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.more, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.more(torch.tanh(self.body(x)))))


class Halves(Base):
    """Halves a weight at its first run."""

    is_halved = False

    def forward(self, x):
        if not self.is_halved:
            self.head.weight.data.mul_(0.5)
            self.is_halved = True
        return super().forward(x)


@pytest.mark.parametrize(
    "use",
    [
        lambda model, x, _: gm.trace(model, x),
        lambda model, x, _: gm.measure(model, x, repeats=2),
        lambda model, x, _: gm.freeze(gm.compress(model, "C4", rank=1), "dense", inputs=x),
        lambda model, x, folder: gm.export(model, folder / "small.pt2", x, format="torch-export"),
        lambda model, x, folder: gm.export(model, folder / "small.safetensors", x, format="dense"),
        lambda model, x, folder: gm.save(model, folder / "small", inputs=x),
        lambda model, x, _: gm.equivariance_error(model, "C8", x[:, None], invariant=True),
        lambda model, x, _: gm.compress(model, "C4", rank=1, inputs=x, inplace=True),
        lambda model, x, _: gm.compress(model, "C4", budget="85%", data=[x], effort=0.1, inplace=True),
    ],
    ids=["trace", "measure", "freeze", "program", "state", "save", "equivariance", "in place", "in place, with data"],
)
def test_what_a_run_writes_into_its_weights_stays_in_the_copy_that_runs(use, tmp_path):
    torch.manual_seed(0)
    model, x = Halves().eval(), torch.randn(8, 8)
    weight = model.head.weight.detach().clone()
    use(model, x, tmp_path)
    assert not model.is_halved
    assert torch.equal(model.head.weight, weight)


def test_a_loaded_or_exported_model_has_not_run_yet(tmp_path):
    torch.manual_seed(0)
    model, x = Halves().eval(), torch.randn(8, 8)
    result = gm.compress(model, "C4", rank=1, inputs=x)
    gm.save(result, tmp_path / "small")
    gm.export(result, tmp_path / "small.safetensors", format="dense")
    loaded, dense = gm.load(tmp_path / "small", Halves()), Halves().eval()
    dense.load_state_dict(gm.files.read_tensors(tmp_path / "small.safetensors"))
    expected = run_seeded(shell(result.model, private=True), x)
    for each in (loaded, dense):
        assert_close(each(x), expected, slack=10)
        must_fail(assert_close, each.head.weight, model.head.weight)


class Transposes(nn.Linear):
    """Keeps its weight the other way round in its state."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight.detach().T.contiguous()

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].T
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Writes(Transposes):
    """The same, but past torch's own way of loading."""

    def _load_from_state_dict(self, state_dict, prefix, *_rest):
        with torch.no_grad():
            self.weight.copy_(state_dict[f"{prefix}weight"].T)
            self.bias.copy_(state_dict[f"{prefix}bias"])


def halve(_module, state, _prefix, _metadata):
    for key, each in state.items():
        state[key] = each.half()


def copied(_module, state, _prefix, _metadata):
    for key, each in state.items():
        state[key] = each.detach().clone()


@pytest.mark.parametrize("kind", [Transposes, Writes, halve, copied])
def test_state_that_a_model_makes_itself_is_put_back(kind, tmp_path):
    def build():
        model = Base()
        if isinstance(kind, type):
            model.body, model.head = kind(8, 8), kind(8, 3)
        else:
            model.register_state_dict_post_hook(kind)
        return model.eval()

    torch.manual_seed(0)
    model, x = build(), torch.randn(8, 8)
    result = gm.compress(model, "C4", rank=1, inputs=x)
    assert list(result.plan.layers) == ["body", "more"]
    gm.save(result, tmp_path / "small")
    assert_close(gm.load(tmp_path / "small", build())(x), result.model(x))


def test_state_that_is_not_taken_back_is_told(tmp_path):
    class Doubles(Base):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}sum"] = self.head.weight.detach().sum() + self.factor

        factor = 1.0

    torch.manual_seed(0)
    model, x = Doubles().eval(), torch.randn(8, 8)
    small = gm.compress(model, "C4", rank=1, inputs=x).model
    gm.save(small, tmp_path / "small", inputs=x)
    assert_close(gm.load(tmp_path / "small", Doubles())(x), small(x))
    small.factor = 2.0
    gm.save(small, tmp_path / "small", inputs=x)
    with pytest.raises(gm.GMError, match=r"'sum' is made by the model's own code .* does not take it back"):
        gm.load(tmp_path / "small", Doubles())


def test_a_model_on_which_nothing_can_be_set(tmp_path):
    class Sealed(Base):
        def __setattr__(self, key, value):
            if "head" in vars(self).get("_modules", ()):
                raise AttributeError(f"{key} cannot be set")
            super().__setattr__(key, value)

    torch.manual_seed(0)
    model, x = Sealed(), torch.randn(8, 8)
    result = gm.compress(model, "C4", budget="85%", data=[x], effort=0.1)
    gm.save(result, tmp_path / "small")
    for each in (gm.load(tmp_path / "small", Sealed()), gm.densify(result.model), gm.freeze(result, repeats=1).model):
        assert_close(each(x), result.model(x), slack=10)
    before = copy.deepcopy(result.model.state_dict())
    with pytest.raises(gm.GMError, match=r"accelerate cannot prepare this Sealed: .* cannot be set"):
        gm.tune(result, [x], epochs=1, lr=1e-3)
    assert all(torch.equal(each, before[key]) for key, each in result.model.state_dict().items())


@pytest.mark.parametrize(("name", "suffix"), FORMATS.items())
def test_a_batch_by_name_that_is_the_one_argument_is_exported(name, suffix, tmp_path):
    class Whole(Base):
        def forward(self, batch):
            return super().forward(batch["x"] + batch["shift"])

    batch = {"x": torch.randn(2, 3, 8), "shift": torch.randn(8)}
    result = gm.compress(Whole().eval(), "C4", rank=1, inputs=batch)
    found = gm.export(result, tmp_path / f"small{suffix}", format=name)
    assert found.dynamic
    assert found.difference < 1e-5


class Scaled(Base):
    """Has state that is no tensor."""

    def get_extra_state(self):
        return {"scale": 2.0}

    def set_extra_state(self, state):
        assert state == {"scale": 2.0}


class Quantised(Base):
    """Has state that is no tensor of numbers."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such tensors are deprecated
            self.register_buffer("table", torch.quantize_per_tensor(torch.ones(8), 0.1, 0, torch.qint8))


@pytest.mark.parametrize(("cls", "said"), [(Scaled, "let get_extra_state return a tensor"), (Quantised, "persistent=")])
def test_state_that_no_file_can_hold_is_told_at_every_door(cls, said, tmp_path):
    x = torch.randn(8, 8)
    result = gm.compress(cls().eval(), "C4", rank=1, inputs=x)
    for write in (gm.save, lambda *given: gm.export(*given, format="dense")):
        with pytest.raises(gm.GMError, match=said):
            write(result, tmp_path / "small.safetensors")
    assert not [*tmp_path.iterdir()]
