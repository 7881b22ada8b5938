"""Models that write into their own weights, make their own state or let nothing be set on them, at every door."""

import pytest
import torch
from conftest import assert_close, must_fail
from torch import nn

import gmcompress as gm
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
        lambda model, x, folder: gm.export(model, folder / "small.pt2", x, format="torch-export"),
        lambda model, x, folder: gm.export(model, folder / "small.safetensors", x, format="dense"),
        lambda model, x, folder: gm.save(model, folder / "small", inputs=x),
        lambda model, x, _: gm.equivariance_error(model, "C8", x[:, None], invariant=True),
        lambda model, x, _: gm.compress(model, "C4", rank=1, inputs=x, inplace=True),
        lambda model, x, _: gm.compress(model, "C4", budget="85%", data=[x], effort=0.1, inplace=True),
    ],
    ids=["trace", "measure", "program", "state", "save", "equivariance", "in place", "in place, with data"],
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
