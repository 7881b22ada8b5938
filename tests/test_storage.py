"""Folders: saved and loaded bit for bit, checked against truncation, edits and foreign content, never half-written."""

import json
import warnings

import pytest
import timm
import torch
import zoo
from torch import nn
from torch.utils._pytree import tree_leaves

import gmcompress as gm
from gmcompress.files import json_digest, new_folder, read_json, read_tensors, write_json, write_text
from gmcompress.forward import run


def assert_bit_identical(found, expected):
    for new, old in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert torch.equal(new, old)


@pytest.fixture
def folder(tmp_path):
    """A saved model, and the dense model it came from."""
    model = zoo.mlp()
    gm.save(gm.compress(model, "C4", inputs=torch.randn(2, 8), rank=1), tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize("name", zoo.MODELS)
def test_the_zoo_survives_the_disk(name, tmp_path):
    exhibit = zoo.MODELS[name]
    model, inputs = exhibit.build().eval(), exhibit.inputs()
    result = gm.compress(model, "C4", inputs=inputs, rank=1)
    gm.save(result, tmp_path / "small")
    loaded = gm.load(tmp_path / "small", exhibit.build())
    assert_bit_identical(run(loaded, inputs), run(result.model.eval(), inputs))
    assert [each.requires_grad for each in loaded.parameters()] == [
        each.requires_grad for each in result.model.parameters()
    ]
    assert (tmp_path / "small" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_folder_with_a_source_builds_its_own_model(name, tmp_path):
    model = timm.create_model(name, num_classes=5).eval()
    result = gm.compress(model, "C8xC8", rank=1)
    gm.save(result.model, tmp_path, source=f"timm:{name}", source_options={"num_classes": 5})
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    assert_bit_identical(run(gm.load(tmp_path), images), run(result.model.eval(), images))


def test_ties_and_dtypes_are_kept(tmp_path):
    model = zoo.Tied().bfloat16()
    result = gm.compress(model, "C4", inputs=torch.arange(6).view(2, 3), rank=1)
    gm.save(result, tmp_path / "small")
    loaded = gm.load(tmp_path / "small", zoo.Tied())
    assert loaded.head.structured_weight.same_as(loaded.embedding.structured_weight)
    assert loaded.body.kernel.dtype == torch.bfloat16
    stored = read_tensors(tmp_path / "small" / "model.safetensors")
    tied = [f"{name}.structured_weight.kernel" for name in ("head", "embedding")]
    assert [name in stored for name in tied] == [False, True]


@pytest.mark.parametrize("include", ["body", "*"])
@pytest.mark.filterwarnings("ignore:.*saved without")
def test_weights_that_are_no_longer_tied_are_not_loaded_into_tied_ones(include, tmp_path):
    small = gm.compress(zoo.Tied(), "C4", rank=0, include=include).model
    small.load_state_dict({name: each.clone() for name, each in small.state_dict().items()}, assign=True)
    gm.save(small, tmp_path / "alike")
    gm.load(tmp_path / "alike", zoo.Tied())
    with torch.no_grad():
        next(small.head.parameters()).mul_(2)
    gm.save(small, tmp_path / "other")
    with pytest.raises(gm.GMError, match=r"'embedding.* and 'head.* differ there, but are tied"):
        gm.load(tmp_path / "other", zoo.Tied())


@pytest.mark.parametrize("text", ["lowrank:2", "adapted:2:4x2", "C4+adapted:1:4x2"])
def test_factor_parts_survive_the_disk(text, tmp_path):
    model, inputs = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).eval(), torch.randn(2, 8)
    result = gm.compress(model, "C4", inputs=inputs, overrides={"*": text}, rank=1)
    gm.save(result, tmp_path / "small")
    loaded = gm.load(tmp_path / "small", model)
    assert [str(each.structure) for each in loaded] == [text, text]
    assert_bit_identical(loaded(inputs), result.model.eval()(inputs))
    stored = {name.split(".")[1] for name in read_tensors(tmp_path / "small" / "model.safetensors")}
    assert ("kernel" in stored, "scales" in stored) == ("C4" in text, "adapted" in text)


def test_loading_leaves_the_given_model_alone(folder):
    model = zoo.mlp().train()
    before = {key: each.clone() for key, each in model.state_dict().items()}
    loaded = gm.load(folder, model)
    assert isinstance(model[0], nn.Linear)
    assert model.training
    assert not loaded.training
    assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())


def test_saving_without_inputs_warns(tmp_path):
    model = zoo.mlp()
    with pytest.warns(UserWarning, match="pass inputs="):
        gm.save(gm.compress(model, "C4", rank=1), tmp_path / "small")
    assert gm.load(tmp_path / "small", model)(torch.zeros(1, 8)).shape == (1, 3)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def flip(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def rewrite(**changes):
    """Change the description as somebody would who also knows to repair its digest."""

    def change(folder):
        found = read_json(folder / "gmcompress.json")
        found.update(changes)
        found.pop("digest")
        write_json(folder / "gmcompress.json", found | {"digest": json_digest(found)})

    return change


def edit_json(folder):
    path = folder / "gmcompress.json"
    path.write_text(path.read_text().replace("C4+displacement:1", "C2+displacement:1"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model\.safetensors was changed, truncated or replaced"),
        (flip, r"model\.safetensors was changed, truncated or replaced"),
        (edit_json, r"gmcompress\.json was changed after it was written"),
        (lambda folder: (folder / "gmcompress.json").write_text("{"), r"gmcompress\.json is not readable as JSON"),
        (lambda folder: (folder / "gmcompress.json").write_text("[]"), r"must hold a JSON object, not a list"),
        (lambda folder: (folder / "gmcompress.json").write_bytes(b"\xff\xfe"), "not readable as JSON"),
        (lambda folder: (folder / "gmcompress.json").unlink(), r"is no folder of a compressed model"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors does not exist"),
        (lambda folder: (folder / "check.safetensors").unlink(), r"check\.safetensors does not exist"),
        (rewrite(format=99), "has format 99; this version reads format 1"),
        (rewrite(surprise=1), "lacks or adds fields: surprise"),
        (rewrite(layers={"0": "C2"}), "saved from another model"),
        (rewrite(layers={"7": "C4"}), "saved from another model: the model has no module '7'"),
        (rewrite(layers={"0": "os.system"}), "saved from another model: "),
        (rewrite(layers=[]), "'layers' must be of type dict"),
        (rewrite(dtypes={}), "is missing or of another dtype"),
        (rewrite(check=["input.9"]), "lacks inputs"),
        (rewrite(plan={"group": "C4"}), "a plan is an object with the fields"),
    ],
)
def test_damaged_folders_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(gm.GMError, match=message):
        gm.load(folder, zoo.mlp())


@pytest.mark.parametrize("source", ["os.system", {"name": "timm:resnet9000", "options": {}}, {"name": 3}, 7])
def test_foreign_sources_are_refused(folder, source):
    rewrite(source=source)(folder)
    with pytest.raises(gm.GMError, match=r"does not know|not understood"):
        gm.load(folder)


def test_a_folder_without_a_source_needs_the_model(folder):
    with pytest.raises(gm.GMError, match="pass it: load"):
        gm.load(folder)
    with pytest.raises(gm.GMError, match='a source is "timm:"'):
        gm.save(zoo.mlp(), folder, inputs=torch.zeros(1, 8), source="module:function")


def test_another_model_is_refused(folder):
    with pytest.raises(gm.GMError, match="another model"):
        gm.load(folder, zoo.TwoNames())

    class Other(nn.Sequential):  # the same tensors in another function: only the stored pair sees it
        def forward(self, x):
            return super().forward(x) + 1

    other = Other(*zoo.mlp())
    with pytest.raises(gm.GMError, match="on the stored inputs the loaded model's outputs differ"):
        gm.load(folder, other)
    assert gm.load(folder, nn.Sequential(*zoo.mlp())) is not None


def test_saving_replaces_a_folder_whole_or_not_at_all(folder):
    before = sorted(path.name for path in folder.parent.iterdir())
    with pytest.raises(gm.GMError, match="does not run on inputs"):
        gm.save(zoo.mlp(), folder, inputs=torch.zeros(1, 3))
    with pytest.raises(ZeroDivisionError), new_folder(folder) as beside:
        (beside / "model.safetensors").write_bytes(bytes(1 // 0))
    assert sorted(path.name for path in folder.parent.iterdir()) == before
    assert gm.load(folder, zoo.mlp()) is not None
    gm.save(gm.compress(zoo.mlp(), "C2", rank=0, inputs=torch.zeros(1, 8)), folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "check.safetensors",
        "gmcompress.json",
        "model.safetensors",
    ]
    assert json.loads((folder / "gmcompress.json").read_text())["layers"]["0"].startswith("C2")


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(gm.GMError, match="is a file; a folder is needed"):
        gm.save(zoo.mlp(), tmp_path / "file", inputs=torch.zeros(1, 8))
    with pytest.raises(gm.GMError, match="cannot"):
        gm.save(zoo.mlp(), tmp_path / "file" / "below", inputs=torch.zeros(1, 8))
    with pytest.raises(gm.GMError, match="cannot write"):
        write_text(tmp_path / "nowhere" / "x.json", "{}")


def test_no_pickle_and_no_dense_weight_on_disk(folder):
    with warnings.catch_warnings():
        for path in folder.iterdir():
            assert path.suffix in (".json", ".safetensors")
    assert not any(name in ("0.weight", "2.weight") for name in read_tensors(folder / "model.safetensors"))


def test_inputs_by_name_and_by_position_are_stored(tmp_path):
    exhibit = zoo.MODELS["control flow"]
    gm.save(gm.compress(exhibit.build(), "C4", rank=1), tmp_path / "named", inputs=exhibit.inputs())
    assert gm.load(tmp_path / "named", exhibit.build()) is not None
    with pytest.raises(gm.GMError, match="numbers, texts, and lists and mappings of these, but input:scale is object"):
        gm.save(exhibit.build(), tmp_path / "other", inputs={"x": torch.ones(1, 8), "scale": object()})
    assert not (tmp_path / "other").exists()


def test_a_list_of_images_is_stored_whole(tmp_path):
    class Colours(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(8, 8)

        def forward(self, images):
            return [self.body(each).mean(0) for each in images]  # which runs on a part of the colours too

    images = [torch.randn(3, 6, 8), torch.randn(3, 4, 8)]
    small = gm.compress(Colours(), "C4", rank=1, inputs=[images], include="*").model
    gm.save(small, tmp_path / "small", inputs=[images])
    stored = read_tensors(tmp_path / "small" / "check.safetensors")
    assert [each.shape for name, each in sorted(stored.items()) if name.startswith("input")] == [(3, 6, 8), (3, 4, 8)]
    assert gm.load(tmp_path / "small", Colours())


def test_models_that_draw_numbers_are_checked_on_the_same_ones(tmp_path):
    class Masks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.body(x) * (torch.rand_like(x) > 0.5))

    result = gm.compress(Masks(), "C4", rank=1, inputs=torch.randn(4, 8))
    gm.save(result, tmp_path / "small")
    other = Masks()
    state = torch.get_rng_state()
    assert torch.equal(gm.load(tmp_path / "small", other).body.kernel, result.model.body.kernel)
    assert torch.equal(torch.get_rng_state(), state)


class Kept(nn.Module):
    """A network whose further state is made by the function given to it."""

    def __init__(self, prepare):
        super().__init__()
        self.body, self.head, self.factor = nn.Linear(8, 8), nn.Linear(8, 3), 1.0
        prepare(self)

    def forward(self, x):
        return self.head(self.body(x)) * self.factor


class Extra(Kept):
    def get_extra_state(self):
        return torch.tensor(self.factor)

    def set_extra_state(self, state):
        self.factor = float(state)


class Partial(Kept):
    def state_dict(self):
        return {"head": self.head.weight}


def test_state_of_every_kind_that_can_be_stored(tmp_path):
    def buffers(model):
        model.register_buffer("turns", torch.polar(torch.ones(4), torch.arange(4.0)))
        model.register_buffer("seen", torch.arange(3.0) if vars(model).pop("filled", False) else torch.zeros(1))

    def filled(model):
        model.filled = True
        buffers(model)

    x = torch.randn(2, 8)
    for number, (saved, fresh) in enumerate(
        ((Kept(filled), Kept(buffers)), (Extra(lambda model: vars(model).update(factor=2.0)), Extra(lambda _: None)))
    ):
        result = gm.compress(saved, "C4", rank=1, inputs=x)
        gm.save(result, tmp_path / str(number))
        loaded = gm.load(tmp_path / str(number), fresh)
        assert_bit_identical(run(loaded, x), run(result.model, x))
        assert_bit_identical(dict(loaded.named_buffers()), dict(result.model.named_buffers()))
    gm.save(gm.compress(Partial(lambda _: None), "C4", rank=1, inputs=x), tmp_path / "partial")
    assert gm.load(tmp_path / "partial", Partial(lambda _: None)).body.kernel.any()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), r"'graph' \(float32, sparse_coo\) is no tensor that safetensors can hold"),
        (lambda: torch.ones(3, dtype=torch.complex128), r"'graph' \(complex128, strided\)"),
    ],
)
def test_state_that_cannot_be_stored_is_named(state, message, tmp_path):
    model = Kept(lambda model: model.register_buffer("graph", state()))
    with pytest.raises(gm.GMError, match=message):
        gm.save(gm.compress(model, "C4", rank=1, inputs=torch.randn(2, 8)), tmp_path / "small")
    model.register_buffer("graph", state(), persistent=False)
    gm.save(gm.compress(model, "C4", rank=1, inputs=torch.randn(2, 8)), tmp_path / "small")


def test_inputs_of_a_result_that_cannot_be_stored_are_left_out(tmp_path):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x, adjacency):
            return torch.sparse.mm(adjacency, self.head(self.body(x))), adjacency

    inputs = [torch.randn(4, 8), torch.eye(4).to_sparse()]
    result = gm.compress(Graph(), "C4", rank=1, inputs=inputs)
    with pytest.warns(
        UserWarning, match=r"cannot run the model to check it: .* input.0001 is torch.float32, torch.spa"
    ):
        gm.save(result, tmp_path / "small")
    loaded = gm.load(tmp_path / "small", Graph())
    assert torch.equal(run(loaded, inputs)[0], run(result.model, inputs)[0])
    with pytest.raises(gm.GMError, match="plain tensors"):
        gm.save(result, tmp_path / "other", inputs=inputs)


def test_a_result_that_does_not_run_on_its_own_inputs_is_not_saved_without_a_check(tmp_path):
    result = gm.compress(zoo.mlp(), "C4", rank=1, inputs=torch.randn(2, 8))
    result.model[2] = nn.Linear(5, 3)
    with pytest.raises(gm.GMError, match="though it was compressed on these; pass inputs="):
        gm.save(result, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_strides_are_those_of_the_model_given(tmp_path):
    def build():
        return nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last)

    x = torch.randn(1, 8, 6, 6)
    gm.save(gm.compress(build(), "C4", rank=1, inputs=x), tmp_path / "small")
    assert gm.load(tmp_path / "small", build())[0].weight.is_contiguous(memory_format=torch.channels_last)
