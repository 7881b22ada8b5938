"""Shards: the weights of `compress`, from files to files; copies, resumption, memory, and what is refused."""

import json

import pytest
import torch
from checkpoint_files import Net, net, stored
from conftest import must_fail
from doors import door, mutations
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import gmcompress as gm
from gmcompress.attaching import structured
from gmcompress.files import read_json, sealed, unsealed
from gmcompress.layers import GMWeight
from gmcompress.shards import fitting, source
from gmcompress.shards.description import DESCRIPTION, describe_shards
from gmcompress.shards.layout import site_of
from gmcompress.shards.source import INDEX, Entry, read_source

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def read(folder):
    """All tensors in the files of a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.fixture
def dense(tmp_path):
    return stored(net(), tmp_path / "dense")


# ---------------------------------------------------------------------------------------------------------------------
# What it computes


OPTIONS = [
    {"group": "C4xC4"},
    {"group": "D4", "rank": 0},
    {"group": "C8", "rank": 2, "residual": "lowrank"},
    {"group": "C4", "overrides": {"up": "adapted:2:4x4", "down": None, "conv": "C4[G,G,grid3x3]"}},
    {"group": "C8", "include": "head", "exclude": ["re:d.*"]},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_weights_are_those_of_compress(options, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "NUMBERS", 600)  # so that weights are fitted in several blocks of rows
    model = net(dtype=dtype)
    dense = stored(model, tmp_path / "dense")
    found = gm.compress_shards(dense, tmp_path / "small", shard_size="6KB", **options)
    more = {"include": "head"} if options.get("include") else {}  # without inputs compress sees no order of the layers
    exclude = ["embed", *options.get("exclude", ()), *([] if more else ["head"])]
    expected = gm.compress(model, **{"rank": 1, **options, "exclude": exclude, **more})
    assert dict(found.layers) == dict(expected.plan.layers)
    loaded = gm.load_shards(tmp_path / "small", net())
    state = expected.model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, each in loaded.state_dict().items():
        assert each.dtype == state[name].dtype, name
        torch.testing.assert_close(each, state[name])
    for row in expected.report.layers:
        assert found.relative_errors[row["layer"]] == pytest.approx(row["relative_error"], rel=1e-9)
    must_fail(torch.testing.assert_close, loaded.up.weight.clone(), model.up.weight.detach())
    assert found.parameters[1] == expected.report.after.parameters + 1  # and the count
    assert "left dense" in str(found)


def test_everything_else_is_copied_byte_for_byte(dense, tmp_path):
    odd = {"a": torch.arange(5), "b.weight": torch.ones(4, 4, dtype=torch.int8), "c": torch.zeros(0, 3)}
    odd |= {"d.weight": torch.full((3, 3), float("nan")), "e.weight": torch.zeros(8, 8, dtype=torch.float8_e4m3fn)}
    odd |= {"f.weight": torch.ones(2, 4, 4), "g": torch.tensor(True), "h.bias": torch.randn(3, dtype=torch.bfloat16)}
    save_file(odd, dense / "model-3.safetensors")
    (dense / INDEX).unlink()
    found = gm.compress_shards(dense, tmp_path / "small", group="C8")
    before = {each.name: b"".join(each.pieces()) for each in read_source(dense)}
    after = {each.name: b"".join(each.pieces()) for each in read_source(tmp_path / "small")}
    kept = {name for name in before if name.removesuffix(".weight") not in found.layers}
    assert set(odd) < kept
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert set(found.layers) == {"conv", "up", "down"}
    assert "its type is I8" in found.skipped["b"]
    assert "3 axes" in found.skipped["f"]
    assert set(read(tmp_path / "small")) == set(after)  # so that safetensors reads it, with its own checks
    index = read_json(tmp_path / "small" / INDEX)
    assert set(index["weight_map"]) == set(after)
    assert index["metadata"]["total_size"] == sum(map(len, after.values())) == found.bytes[1]
    with safe_open(tmp_path / "small" / index["weight_map"]["up.kernel"], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_single_file_and_small_shards(tmp_path):
    stored(net(), tmp_path / "dense", files=1)
    found = gm.compress_shards(tmp_path / "dense" / "model-1.safetensors", tmp_path / "small", group="C8", shard_size=1)
    assert len(found.files) == len(net().state_dict())
    assert gm.load_shards(tmp_path / "small", net())(torch.arange(3)).shape == (3, 16)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.embed_tokens", "embedding"),
        ("transformer.wte", "embedding"),
        ("patch_embed.proj", "embedding"),
        ("shared", "embedding"),
        ("lm_head", "classifier"),
        ("head.fc", "classifier"),
        ("model.layers.0.mlp.up_proj", ""),
        ("embedder.layers.0.attn.query", ""),
        ("encoder.head", ""),
    ],
)
def test_names_tell_lookups_and_classifiers(name, role, tmp_path):
    assert site_of(Entry(f"{name}.weight", tmp_path, "F32", (8, 8), 0, 256)).role.startswith(role)
    assert bool(site_of(Entry(f"{name}.weight", tmp_path, "F32", (8, 8), 0, 256)).role) == bool(role)


@pytest.mark.parametrize("transposed", [(), "*"])
def test_memory_is_bounded_by_blocks_of_rows(transposed, tmp_path, monkeypatch):
    save_file({"a.weight": torch.randn(512, 64), "b.weight": torch.randn(64, 512)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(fitting, "NUMBERS", 4096)
    monkeypatch.setattr(source, "PIECE", 1024)
    sizes, kept = [], fitting._read

    def watched(*given):
        weight = kept(*given)
        sizes.append(weight.numel())
        return weight

    monkeypatch.setattr(fitting, "_read", watched)
    gm.compress_shards(tmp_path / "x.safetensors", tmp_path / "small", group="C8", transposed=transposed)
    assert max(sizes) == 4096
    assert sum(sizes) == 2 * 512 * 64
    assert max(len(each) for entry in read_source(tmp_path / "x.safetensors") for each in entry.pieces()) == 1024


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def test_a_model_on_meta_is_filled(dense, tmp_path):
    gm.compress_shards(dense, tmp_path / "small", group="C8")
    with torch.device("meta"):
        bare = Net()
    with pytest.raises(gm.GMError, match=r"'scale' is in no file and on meta.*init_empty_weights"):
        gm.load_shards(tmp_path / "small", bare)
    bare.scale = torch.ones(1)
    loaded, expected = gm.load_shards(tmp_path / "small", bare, device="cpu"), gm.load_shards(tmp_path / "small", net())
    assert bare.up.weight.is_meta
    assert not loaded.training
    assert loaded.up.bias.requires_grad
    assert torch.equal(loaded(torch.arange(4)), expected(torch.arange(4)))
    assert gm.densify(loaded).up.weight.shape == (64, 32)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_ties_stay_ties(meta, twice, tmp_path):
    dense = stored(net(tied=True), tmp_path / "dense", files=1, index=False)
    if twice:  # as some checkpoints do
        state = read(dense)
        save_file({**state, "embed.weight": state["head.weight"].clone()}, dense / "model-1.safetensors")
    gm.compress_shards(dense, tmp_path / "small", group="C8", include="head" if not twice else ["head", "embed"])
    with torch.device("meta" if meta else "cpu"):
        model = Net(tied=True)
    model.scale = torch.ones(1)
    loaded = gm.load_shards(tmp_path / "small", model)
    assert isinstance(loaded.head.structured_weight, GMWeight)
    assert loaded.head.structured_weight.same_as(loaded.embed.structured_weight)
    assert loaded(torch.arange(4)).isfinite().all()
    gm.save(loaded, tmp_path / "saved", inputs=torch.arange(4))
    assert torch.equal(gm.load(tmp_path / "saved", net(tied=True))(torch.arange(4)), loaded(torch.arange(4)))


def test_subclasses_and_hooks_get_attached_weights(dense, tmp_path):
    gm.compress_shards(dense, tmp_path / "small", group="C8")
    model = net()
    model.up.register_forward_hook(lambda *_: None)
    loaded = gm.load_shards(tmp_path / "small", model)
    assert isinstance(structured(loaded)["up"], GMWeight)
    assert torch.equal(loaded(torch.arange(4)), gm.load_shards(tmp_path / "small", net())(torch.arange(4)))


def changed_net(**modules):
    model = net()
    for name, each in modules.items():
        setattr(model, name, each)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (changed_net(up=nn.Linear(32, 72)), r"'up' has shape \(64, 32\) there, \(72, 32\) in the model"),
        (changed_net(up=nn.Identity()), "is not known to be a matrix"),
        (
            changed_net(conv=nn.ConvTranspose2d(16, 8, 3)),
            r"as inputs × outputs, and was compressed as outputs × inputs: .* transposed=",
        ),
        (changed_net(conv=nn.Conv2d(32, 16, 3, groups=4)), "in each of the 4 convolution groups divisible by 8"),
        (changed_net(norm=nn.Identity()), r"it holds 'norm\.bias', which the model has not; near: "),
        (changed_net(more=nn.Linear(2, 2)), r"it lacks 'more\.bias'"),
        (changed_net(norm=nn.LayerNorm(16)), r"'norm\.\w+' has shape \(32,\) there, \(16,\) in the model"),
        (changed_net(seen=torch.ones(())), r"'seen' is of torch\.int64, but in the model of torch\.float32"),
        (nn.DataParallel(net()), "wrapped in DataParallel"),
    ],
    ids=range(9),
)
def test_another_model_is_refused(model, message, dense, tmp_path):
    gm.compress_shards(dense, tmp_path / "small", group="C8")
    with pytest.raises(gm.GMError, match=message):
        gm.load_shards(tmp_path / "small", model)


def test_tensors_that_the_model_ties_may_not_differ(dense, tmp_path):
    gm.compress_shards(dense, tmp_path / "small", group="C8")
    with pytest.raises(gm.GMError, match="are tied in the model, and differ"):
        gm.load_shards(tmp_path / "small", net(tied=True))


def test_damaged_folders_are_refused(dense, tmp_path):
    small = tmp_path / "small"
    gm.compress_shards(dense, small, group="C8", rank=0)
    path, name = small / DESCRIPTION, next(iter(describe_shards(small).files))
    content = unsealed(read_json(path), path)
    for number, each in enumerate(mutations(content, skip=[("versions",)])):
        path.write_text(json.dumps(sealed(each) if isinstance(each, dict) and number % 4 else each))
        with door():
            gm.load_shards(small, net())
    path.write_text(json.dumps(sealed(content)))
    whole = (small / name).read_bytes()
    for data in (whole[:-1], whole + b"\0", whole[:9] + b"x" + whole[10:], b""):
        (small / name).write_bytes(data)
        with pytest.raises(gm.GMError, match="was changed, truncated or replaced"):
            gm.load_shards(small, net())
    (small / name).unlink()
    with pytest.raises(gm.GMError, match="does not exist"):
        gm.load_shards(small, net())
    path.unlink()
    with pytest.raises(gm.GMError, match="is no folder of compressed shards"):
        gm.load_shards(small, net())
    with pytest.raises(gm.GMError, match="is no folder of a compressed model"):
        gm.load(small, net())
