"""Export: the file computes what the model does, at any batch size, or it is not written; and compile and dtypes."""

import json
import sys

import pytest
import timm
import torch
import zoo
from conftest import assert_close, must_fail
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter

import gmcompress as gm
from gmcompress import exporting
from gmcompress.cli import main
from gmcompress.exporting import FORMATS
from gmcompress.layers import GMLayer

FIT = [(name, f"small{suffix}") for name, suffix in FORMATS.items()]


def every_kind(seed=0):
    """Structured layers with all stored parts, all views and both ways of taking labels, none of them at zero."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        gm.GMConv2d(8, 16, 3, "C4[G,G,grid3x3]+displacement:1", padding=1),
        gm.GMConv2d(16, 16, 3, "gseparable:1", padding=1),
        nn.ReLU(),
        gm.GMConv2d(16, 8, 3, "adapted:2:4x2:split", padding=1, stride=2),
        gm.GMConv2d(8, 16, 3, "C4+displacement:1+lowrank:2", groups=2, padding=1, padding_mode="reflect", bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        gm.GMLinear(16, 32, "D4[G/<1>,G]+lowrank:1"),
        nn.GELU(),
        gm.GMLinear(32, 8, "lowrank:3"),
        gm.GMLinear(8, 16, "C4[G,G/<2>]+adapted:1:2x2"),
    )
    generator = torch.Generator().manual_seed(seed)
    for each in model.parameters():
        nn.init.normal_(each, std=0.5, generator=generator)
    return model.eval()


def images(batch=2, size=8):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def runner(name, path):
    """The file as somebody without this package runs it."""
    if name == "torch-export":
        return torch.export.load(path).module()
    if name == "dense":
        model = gm.densify(every_kind(seed=1))
        model.load_state_dict(load_file(path))
        return model
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize(("name", "file"), FIT)
def test_the_file_computes_what_the_model_does_and_nothing_is_printed(name, file, tmp_path, capfd):
    model = every_kind()
    found = gm.export(model.train(), tmp_path / file, images(), format=name)
    assert tuple(capfd.readouterr()) == ("", "")
    assert model.training
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert (found.dynamic, found.batches, found.notes) == (True, (1, 3), ())
    assert found.bytes == (tmp_path / file).stat().st_size
    assert 0 <= found.difference < 1e-5
    model.eval()
    again = runner(name, tmp_path / file)
    with torch.no_grad():
        for batch in (1, 5):
            assert_close(again(images(batch)), model(images(batch)))
            must_fail(assert_close, again(images(batch)), every_kind(seed=1)(images(batch)))


def test_onnxruntime_computes_the_dense_weights_when_it_loads_the_file(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    gm.export(nn.Sequential(gm.GMLinear(32, 32, "C8", rank=1)), tmp_path / "small.onnx", torch.randn(2, 32))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "loaded.onnx"), 3
    onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), options, providers=["CPUExecutionProvider"])
    stored, loaded = (onnx.load(tmp_path / f"{name}.onnx").graph for name in ("small", "loaded"))
    assert [each.op_type for each in loaded.node] == ["Gemm"]
    assert len(stored.node) > 5
    axis = stored.input[0].type.tensor_type.shape.dim[0]
    assert axis.dim_param == "batch"


def test_dense_is_what_timm_takes(tmp_path):
    dense = timm.create_model("test_resnet", num_classes=5).eval()
    result = gm.compress(dense, "C4xC4", rank=1, inputs=images(2, 32))
    gm.export(result, tmp_path / "small.safetensors", format="dense")  # the inputs are those of the result
    state = load_file(tmp_path / "small.safetensors")
    assert set(state) == set(dense.state_dict())
    fresh = timm.create_model("test_resnet", num_classes=5).eval()
    fresh.load_state_dict(state)
    with torch.no_grad():
        assert_close(fresh(images(3, 32)), result.model.eval()(images(3, 32)))
        must_fail(assert_close, fresh(images(3, 32)), dense(images(3, 32)))


def test_tied_tensors_keep_all_their_names(tmp_path):
    model, tokens = zoo.MODELS["tied"].build().eval(), zoo.MODELS["tied"].inputs()
    small = gm.compress(model, "C4", rank=1)
    gm.export(small, tmp_path / "small.safetensors", tokens, format="dense")
    fresh = zoo.Tied()
    fresh.load_state_dict(load_file(tmp_path / "small.safetensors"))
    assert torch.equal(fresh.head.weight, small.model.embedding.weight)


class TwoInputs(nn.Module):
    """Takes arguments by name, one of them without a batch, and returns a dictionary."""

    def __init__(self):
        super().__init__()
        self.body = gm.GMLinear(8, 8, "C4", rank=1)

    def forward(self, tokens, shift):
        hidden = self.body(nn.functional.one_hot(tokens, 8).float() + shift)
        return {"hidden": hidden, "sum": hidden.sum(-1)}


@pytest.mark.parametrize(("name", "file"), FIT)
def test_inputs_by_name_and_integers(name, file, tmp_path):
    inputs = {"shift": torch.randn(8), "tokens": torch.arange(6).view(2, 3)}
    found = gm.export(TwoInputs(), tmp_path / file, inputs, format=name)
    assert found.dynamic
    assert found.difference < 1e-5


def test_weights_too_large_for_protobuf_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "INLINE", 0)
    found = gm.export(every_kind(), tmp_path / "small.onnx", images())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.onnx", "small.onnx.data"]
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert_close(runner("onnx", tmp_path / "small.onnx")(images(4)), every_kind()(images(4)).detach())


def test_a_layer_whose_labels_outweigh_it_is_written_dense(tmp_path):
    layers = [gm.GMLinear(64, 64, text) for text in ("C8xC8", "C8", "lowrank:2")]
    found = gm.export(nn.Sequential(*layers), tmp_path / "small.pt2", torch.randn(2, 64), format="torch-export")
    assert found.notes == ("1 of 3 structured layers are written dense, which takes fewer bytes there",)
    names = set(torch.export.load(tmp_path / "small.pt2").state_dict)
    assert {"0.weight", "1.kernel", "2.left"} < names
    assert "0.kernel" not in names


class Fixed(nn.Module):
    """Runs at one batch size only."""

    def __init__(self):
        super().__init__()
        self.body = gm.GMLinear(8, 8, "C4", rank=1)

    def forward(self, x):
        return self.body(x.view(4, 8))


class Branches(Fixed):
    """Runs at every batch size, but does something else at one."""

    def forward(self, x):
        return self.body(x) if x.shape[0] == 4 else 2 * self.body(x)


@pytest.mark.parametrize(
    ("model", "reason"), [(Fixed, "the model runs on no other"), (Branches, "torch.export cannot")]
)
def test_a_model_that_fixes_its_batch_is_exported_so_and_says_it(model, reason, tmp_path):
    found = gm.export(model(), tmp_path / "small.pt2", torch.randn(4, 8), format="torch-export")
    assert not found.dynamic
    assert found.batches == (4, 4)
    assert found.notes[0].startswith("the batch size is fixed to 4")
    assert reason in found.notes[0]
    assert found.notes[0] in str(found)


class Bags(nn.Module):
    """Takes places in its first input, of which not all values will do."""

    def __init__(self):
        super().__init__()
        self.table, self.body = nn.EmbeddingBag(12, 8), gm.GMLinear(8, 8, "C4", rank=1)

    def forward(self, words, starts):
        return self.body(self.table(words, starts))


def test_a_model_that_runs_on_no_random_inputs_is_checked_on_those_given(tmp_path):
    found = gm.export(Bags(), tmp_path / "small.safetensors", [torch.arange(7), torch.tensor([0, 3])], format="dense")
    assert found.batches == (7,)
    assert "the check made on the inputs given, because the model runs on no random ones" in found.notes[0]


class Graph(Fixed):
    """Takes the links of a graph as a sparse matrix."""

    def forward(self, x, links):
        return torch.sparse.mm(links, self.body(x))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_inputs(tmp_path):
    given = [torch.randn(4, 8), torch.eye(4)]
    for sparse in (torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr):
        found = gm.export(Graph(), tmp_path / "small.safetensors", [given[0], sparse(given[1])], format="dense")
        assert found.batches == (4, 4)
        with pytest.raises(gm.GMError, match="cannot"):
            gm.export(Graph(), tmp_path / "small.onnx", [given[0], sparse(given[1])])


# ---------------------------------------------------------------------------------------------------------------------
# What is refused leaves everything as it was


def spoiled(amount):
    """Every writer, as if what it wrote computed something else."""

    def wrap(writer):
        def write(model, inputs, file):
            example, again, notes = writer(model, inputs, file)
            return example, lambda given: [each + amount for each in again(given)], notes

        return write

    return {name: wrap(writer) for name, writer in exporting._WRITERS.items()}


@pytest.mark.parametrize("amount", [1.0, float("nan")])
@pytest.mark.parametrize(("name", "file"), FIT)
def test_a_file_that_computes_something_else_does_not_stay(name, file, amount, tmp_path, monkeypatch):
    (tmp_path / file).write_text("older")
    monkeypatch.setattr(exporting, "_WRITERS", spoiled(amount))
    model, inputs = zoo.mlp(), torch.randn(2, 8)
    with pytest.raises(gm.GMError, match=r"outputs differ by .* more than the tolerance of 0\.0001"):
        gm.export(model, tmp_path / file, inputs, format=name)
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_text() == "older"
    if amount == 1:
        gm.export(model, tmp_path / file, inputs, format=name, tolerance=1e6)  # the control
        assert (tmp_path / file).read_bytes() != b"older"


class Uncertain(nn.Module):
    """Draws from what it predicts, and rules out the least likely class."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.body(x)
        logits = self.head(x + torch.randn_like(x))
        return logits.masked_fill(logits == logits.amin(1, keepdim=True), float("-inf")), x * float("nan")


@pytest.mark.parametrize(("name", "file"), [each for each in FIT if each[0] != "onnx"])
def test_random_numbers_and_infinite_outputs_are_no_difference(name, file, tmp_path, monkeypatch):
    result = gm.compress(Uncertain(), "C4", rank=1, inputs=torch.randn(2, 8))
    assert gm.export(result, tmp_path / file, format=name).difference < 1e-5
    monkeypatch.setattr(exporting, "_WRITERS", spoiled(1.0))
    with pytest.raises(gm.GMError, match="outputs differ by"):
        gm.export(result, tmp_path / file, format=name)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(_program, file):
        file.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(gm.GMError, match=r"cannot write .*small\.pt2: No space left"):
        gm.export(zoo.mlp(), tmp_path / "small.pt2", torch.randn(2, 8), format="torch-export")
    assert not list(tmp_path.iterdir())


CONTROL = zoo.MODELS["control flow"]


@pytest.mark.parametrize(
    ("model", "file", "inputs", "name", "message"),
    [
        (zoo.mlp(), "x.onnx", torch.ones(2, 8), "onxn", "a format is onnx, torch-export, dense, not 'onxn'"),
        (zoo.mlp(), "x.pt", torch.ones(2, 8), "onnx", r"is named \*\.onnx, not 'x\.pt'"),
        (zoo.mlp(), "x.onnx", None, "onnx", "pass inputs="),
        (zoo.mlp(), "x.pt2", 1.0, "torch-export", "none of them empty, not float"),
        (zoo.mlp(), "x.pt2", [1.0], "torch-export", "are tensors of real numbers, none of them empty"),
        (zoo.mlp(), "x.pt2", torch.ones(0, 8), "torch-export", "are tensors of real numbers, none of them empty"),
        (zoo.mlp(), "x.pt2", torch.ones(2, 7), "torch-export", r"does not run on inputs of shape \(2, 7\)"),
        (zoo.mlp(), "none/x.safetensors", torch.ones(2, 8), "dense", "cannot write .*: No such file or directory"),
        (zoo.mlp(torch.bfloat16), "x.onnx", torch.ones(2, 8).bfloat16(), "onnx", "does not run bfloat16"),
        (CONTROL.build(), "x.pt2", CONTROL.inputs(), "torch-export", "torch.export cannot follow this ControlFlow"),
        (zoo.MODELS["reads weight"].build(), "x.onnx", torch.ones(2, 5, 8), "onnx", "cannot be written as ONNX"),
        (torch.compile(zoo.mlp()), "x.onnx", torch.ones(2, 8), "onnx", "wrapped in OptimizedModule"),
    ],
)
def test_what_cannot_be_exported(model, file, inputs, name, message, tmp_path):
    with pytest.raises(gm.GMError, match=message):
        gm.export(model, tmp_path / file, inputs, format=name)
    assert not list(tmp_path.iterdir())


def test_a_program_that_has_no_serial_form(tmp_path, monkeypatch):
    def refuse(_program, _file):
        raise TypeError("no such operator")

    monkeypatch.setattr(torch.export, "save", refuse)
    with pytest.raises(gm.GMError, match=r"torch\.export cannot write this Sequential: TypeError: no such operator"):
        gm.export(zoo.mlp(), tmp_path / "small.pt2", torch.randn(2, 8), format="torch-export")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_target(tmp_path):
    (tmp_path / "x.onnx").mkdir()
    with pytest.raises(gm.GMError, match="is a folder; a file is needed"):
        gm.export(zoo.mlp(), tmp_path / "x.onnx", torch.ones(2, 8))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_what_to_install(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(gm.GMError, match=rf'needs {package}, .*: pip install "gmcompress\[onnx\]"'):
        gm.export(zoo.mlp(), tmp_path / "x.onnx", torch.ones(2, 8))


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("saved") / "small"
    torch.manual_seed(0)
    result = gm.compress(timm.create_model("test_resnet", num_classes=5).eval(), "C4xC4", rank=1)
    gm.save(result, place, source="timm:test_resnet", source_options={"num_classes": 5})
    return place


@pytest.mark.parametrize(("name", "file"), FIT)
def test_the_command(name, file, folder, tmp_path, capfd):
    flags = ["--format", name, "--output", str(tmp_path / file), "--img-size", "32", "--batch-size", "4"]
    assert main(["export", str(folder), *flags, "--json"]) == 0
    printed = capfd.readouterr()
    found = json.loads(printed.out)
    assert not printed.err
    assert (found["path"], found["batches"], found["dynamic"]) == (str(tmp_path / file), [1, 5], True)
    assert found["difference"] <= found["tolerance"] == 1e-4
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_the_command_prints_the_difference_and_refuses_in_one_line(folder, tmp_path, capfd):
    flags = ["--format", "dense", "--output", str(tmp_path / "x.safetensors"), "--img-size", "32"]
    assert main(["export", str(folder), *flags]) == 0
    assert "outputs differ by " in capfd.readouterr().out
    for more, said in ((["--tolerance", "-1"], "more than the tolerance of -1"), (["-b", "0"], "must be at least 1")):
        assert main(["export", str(folder), *flags, *more]) == 2
        printed = capfd.readouterr()
        assert said in printed.err
        assert printed.err.count("\n") == 1
        assert not printed.out


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile, autocast, dtypes and memory formats


def run_compiled(model, mark, **options):
    """How often the model is compiled for three batch sizes; its outputs are those of the model each time."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, **options)
    with torch.no_grad():
        for batch in (5, 8, 4):  # the first is no size of a label table, with which dynamic=True would identify it
            x = images(batch)
            if mark:
                torch._dynamo.mark_dynamic(x, 0)
            assert_close(compiled(x), model(images(batch)))
    return counter.frame_count


@pytest.mark.parametrize(("mark", "options"), [(False, {"dynamic": True}), (True, {})], ids=["dynamic", "marked"])
def test_a_second_batch_size_is_not_compiled_again(mark, options):
    assert run_compiled(every_kind(), mark, **options) == 1
    assert run_compiled(every_kind(), mark=False, dynamic=False) == 3  # the control


def test_compiled_through_aot_autograd():
    model = every_kind()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    expected = torch.autograd.grad(model(images()).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(compiled(images()).square().sum(), list(model.parameters()))
    for new, old in zip(found, expected, strict=True):
        assert_close(new, old, slack=10)


def convnet():
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(2), nn.Linear(16, 8), nn.Linear(8, 4)]
    return nn.Sequential(*parts).eval()


@pytest.mark.parametrize("budget", [{"rank": 1}, {"budget": "60%"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_through_compress(dtype, budget):
    model = convnet().to(dtype)
    result = gm.compress(model, "C4", inputs=images().to(dtype), **budget)
    assert any(isinstance(each, GMLayer) for each in result.model.modules())
    assert {each.dtype for each in result.model.parameters()} == {dtype}
    assert result.model(images().to(dtype)).dtype == dtype
    assert {each.dtype for each in gm.densify(result.model).parameters()} == {dtype}


def test_autocast_gives_the_dtype_that_the_dense_model_gives():
    model = convnet()
    small = gm.compress(model, "C4", rank=1, inputs=images()).model.eval()
    with torch.no_grad():
        exact = small(images())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert small(images()).dtype == model(images()).dtype == torch.bfloat16
            assert_close(small(images()), exact.bfloat16())
    assert exact.dtype == torch.float32


def test_channels_last_comes_through_compress():
    wide, inputs = convnet().to(memory_format=torch.channels_last), images().to(memory_format=torch.channels_last)
    small = gm.compress(wide, "C4", rank=1, inputs=inputs).model.eval()
    assert isinstance(small[2], gm.GMConv2d)
    assert small[0].weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        found = small[:3](inputs)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert_close(small(inputs), gm.compress(convnet(), "C4", rank=1).model.eval()(images()))
