"""Fitting layers one after another on data: nearer than without, means kept, the dense model untouched."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import zoo
from conftest import assert_close, must_fail
from torch import Generator, Tensor, nn

from gmcompress.adapted import EASY
from gmcompress.calibration import divergence, outputs
from gmcompress.candidates import plain_svd
from gmcompress.factors import Metric
from gmcompress.forward import shell
from gmcompress.notes import Notes
from gmcompress.projection import project
from gmcompress.reconstruction import PATIENCE, Calibration, Reconstruction, best_fit, calibrate, reconstruct
from gmcompress.structure import Structure, expand
from gmcompress.subjects import Subject


class Convolutional(nn.Module):
    """Convolutions with BatchNorm, one with a bias in place of it, and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


def convolutional() -> tuple[nn.Module, dict[str, str], tuple[int, ...]]:
    model = Convolutional()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model, {"first": "lowrank:5:split", "second": "adapted:3:2x2:split"}, (64, 3, 6, 6)


def perceptron() -> tuple[nn.Module, dict[str, str], tuple[int, ...]]:
    model = nn.Sequential(
        *(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    )
    return model, {"0": "lowrank:4", "2": "C4+displacement:1", "4": "adapted:4:2x2"}, (200, 12)


SUBJECTS = pytest.mark.parametrize("build", [convolutional, perceptron], ids=lambda each: each.__name__)


def data_of(shape: tuple[int, ...], generator: Generator) -> list[Tensor]:
    """Two batches of correlated inputs with a mean."""
    mixing = torch.randn(shape[1], shape[1], generator=generator) * torch.logspace(0.5, -1.5, shape[1])
    x = torch.randn(*shape, generator=generator).movedim(1, -1) @ mixing.T + 0.3
    return list(x.movedim(-1, 1).chunk(2))


def subject(build, generator: Generator) -> tuple[nn.Module, nn.Module, dict[str, Structure], Calibration]:
    torch.manual_seed(0)
    model, plan, shape = build()
    dense, batches = shell(model), data_of(shape, generator)
    structures = {name: Structure.parse(text) for name, text in plan.items()}
    known = calibrate(dense, batches, list(structures), logits=True, macs=1000)
    return dense, copy.deepcopy(dense), structures, known


def outputs_of(model: nn.Module, name: str, batches: Sequence[Tensor]) -> Tensor:  # (vectors, rows)
    """What one layer puts out on the data."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    outputs(model, batches)
    handle.remove()
    return torch.cat([each.movedim(1, -1).flatten(0, -2) if each.dim() == 4 else each for each in seen])


@SUBJECTS
def test_with_data_the_outputs_are_nearer(build, generator: Generator) -> None:
    dense, small, structures, known = subject(build, generator)
    plain = copy.deepcopy(dense)
    before = {key: each.clone() for key, each in dense.state_dict().items()}
    found = reconstruct(dense, small, structures, known)
    assert list(found.fits) == list(structures)
    wanted = outputs(dense, known.batches)
    none = Reconstruction({}, {}, {})
    for name, structure in structures.items():
        none.take_in(name, plain, project(dense.get_submodule(name).weight, structure), None, None)

    def assert_nearer(ours: nn.Module, theirs: nn.Module) -> None:
        far, near = (divergence(wanted, outputs(each, known.batches), logits=True) for each in (theirs, ours))
        assert 0 < near < 0.7 * far

    assert_nearer(small, plain)
    must_fail(assert_nearer, plain, small)
    assert all(torch.equal(each, before[key]) for key, each in dense.state_dict().items())
    assert all(each.grad is None for each in dense.parameters())


def test_a_fit_that_may_store_more_may_take_longer(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    dense, small, _, known = subject(perceptron, generator)
    structures = {
        "0": Structure.parse("lowrank:2"),
        "2": Structure.parse("lowrank:2"),
        "4": Structure.parse("lowrank:6"),
    }
    taken: list[float] = []

    def noted(*given: object, effort: float) -> object:
        taken.append(effort)
        return best_fit(*given, effort=1.0)  # type: ignore[arg-type]

    monkeypatch.setattr("gmcompress.reconstruction.best_fit", noted)
    reconstruct(dense, small, structures, known)
    assert taken[0] == taken[1]  # which store 29 and 25 % of their weights
    assert taken[2] / taken[0] == pytest.approx((6 * 32 / 256 / EASY) ** PATIENCE)


@SUBJECTS
def test_the_means_of_all_outputs_are_kept(build, generator: Generator) -> None:
    dense, small, structures, known = subject(build, generator)
    found = reconstruct(dense, small, structures, known)
    for name in structures:

        def mean_of(model: nn.Module, name: str = name) -> Tensor:
            outputs = outputs_of(model, name, known.batches)
            places = known.places.get(name, torch.ones(1))
            mean = (places.to(outputs).repeat(len(outputs) // len(places))[:, None] * outputs).mean(0)
            norm = known.norms.get(name)
            return mean if norm is None else mean - model.get_submodule(norm).running_mean

        assert_close(mean_of(small), mean_of(dense), slack=10)
        assert (name in known.places) == (isinstance(dense.get_submodule(name), nn.Conv2d))
        assert (name in found.biases) != (name in known.norms)
        if name in found.biases:
            layer = small.get_submodule(name)
            layer.bias.data.copy_(dense.get_submodule(name).bias)
        else:
            small.get_submodule(known.norms[name]).running_mean.copy_(
                dense.get_submodule(known.norms[name]).running_mean
            )
        must_fail(assert_close, mean_of(small), mean_of(dense))
        found.take_in(name, small, found.fits[name], found.biases.get(name), next(iter(found.means.items()), None))


@SUBJECTS
def test_the_small_model_holds_what_was_found(build, generator: Generator) -> None:
    dense, small, structures, known = subject(build, generator)
    found = reconstruct(dense, small, structures, known)
    for name, structure in structures.items():
        fit, weight = found.fits[name], small.get_submodule(name).weight
        assert fit.structure.parameters(weight.shape) <= structure.parameters(weight.shape)
        assert_close(weight, expand(fit.tensors, fit.structure, weight.shape))
        assert {each.dtype for each in fit.tensors.values()} == {torch.float32}
        assert 0 < fit.loss < 1
    for name, mean in found.means.items():
        assert torch.equal(small.get_submodule(name).running_mean, mean)


def test_a_layer_that_never_runs_is_fitted_without_data(generator: Generator) -> None:
    torch.manual_seed(0)
    dense = shell(zoo.Unreachable())
    known = calibrate(dense, [torch.randn(30, 8, generator=generator)], ["body", "aux"], logits=True, macs=100)
    structures = dict.fromkeys(("body", "aux"), Structure.parse("adapted:2:2x2"))
    found = reconstruct(dense, copy.deepcopy(dense), structures, known)
    expected = project(dense.aux.weight.double(), "adapted:2:2x2")
    assert_close(found.fits["aux"].loss, expected.loss, slack=100)
    assert_close(found.fits["aux"].loss, found.fits["aux"].relative_error ** 2, slack=1e6)
    assert set(found.biases) == {"body"}
    must_fail(assert_close, found.fits["body"].loss, found.fits["body"].relative_error ** 2)


@pytest.mark.parametrize(("text", "shape"), [("adapted:2:4x4", (8, 8)), ("adapted:3:2x4:split", (8, 8, 3, 3))])
def test_the_best_fit_is_never_worse_than_plain_svd(text: str, shape: tuple[int, ...], generator: Generator) -> None:
    structure, columns = Structure.parse(text), torch.Size(shape[1:]).numel()
    for kind in ("random", "low rank"):
        weight = torch.randn(shape, generator=generator, dtype=torch.float64)
        if kind == "low rank":
            plain, _ = plain_svd(Subject(weight, Metric()), structure.parameters(shape))
            weight = expand(project(weight, plain).tensors, plain, shape)
        root = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
        for metric in (Metric(), Metric(root @ root.T)):
            found = best_fit(weight, weight, structure, metric)
            control, loss = plain_svd(Subject(weight, metric), structure.parameters(shape))
            assert found.loss <= loss * (1 + 1e-9) + 1e-12
            assert found.structure in (structure, control)
            if kind == "low rank":
                assert found.structure == control
                assert found.loss < 1e-9 < project(weight, structure, metric=metric).loss, "the control"


@SUBJECTS
def test_what_was_interrupted_goes_on(build, generator: Generator, tmp_path) -> None:
    dense, small, structures, known = subject(build, generator)
    expected, again = copy.deepcopy(small), copy.deepcopy(small)
    reconstruct(dense, expected, structures, known)

    def stop(_name: str, done: int, _of: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    notes = Notes(tmp_path / "notes", {"model": "this"})
    with pytest.raises(KeyboardInterrupt):
        reconstruct(dense, small, structures, known, notes=notes, progress=stop)
    fitted: list[str] = []
    reconstruct(dense, again, structures, known, notes=notes, progress=lambda name, *_: fitted.append(name))
    assert fitted == list(structures)[1:]
    for key, each in again.state_dict().items():
        assert_close(each.float(), expected.state_dict()[key].float())


def test_chunks_hold_consecutive_layers() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(7)))
    names = [str(each) for each in range(7)]
    for passes, longest in ((1, 7), (2, 4), (7, 1), (100, 1)):
        chunks = Calibration((), {}, {}, {}, passes, False).chunks(model, names)
        assert [name for chunk in chunks for name in chunk] == names
        assert max(map(len, chunks)) == longest


class Residual(nn.Module):
    """Blocks that add to one stream, as in a transformer; every layer sees the errors of all before it."""

    def __init__(self, blocks: int = 8, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(torch.relu(x))
        return self.head(x)


def test_errors_are_made_up_for_once(generator: Generator) -> None:
    """Layers of one pass see the same errors; were all to correct them, two passes would lose more than one a layer."""
    torch.manual_seed(0)
    dense, batches = shell(Residual()), [each + 2 for each in data_of((400, 16), generator)]
    names = [f"blocks.{n}" for n in range(8)]
    structures = {name: Structure.parse("lowrank:2" if n < 4 else "lowrank:7") for n, name in enumerate(names)}
    known, lost = calibrate(dense, batches, names, logits=True, macs=1000), {}
    for passes in (8, 2):
        small = copy.deepcopy(dense)
        reconstruct(dense, small, structures, replace(known, passes=passes))
        lost[passes] = divergence(outputs(dense, batches), outputs(small, batches), logits=True)
    assert lost[8] > 0
    assert lost[2] < 1.05 * lost[8]
