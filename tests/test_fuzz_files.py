"""Files at the doors: a GMError is all that comes out, in bounded time; nothing is written or imported."""

import json
import shutil
import string
import struct

import pytest
import torch
import zoo
from doors import changed, door, fuzz, mutations
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import gmcompress as gm
from gmcompress.checkpoints import load_checkpoint, save_checkpoint
from gmcompress.files import file_digest, parse_json, read_json, read_tensors, sealed, unsealed
from gmcompress.notes import Notes
from gmcompress.planning import Plan
from gmcompress.reporting import Report

# ---------------------------------------------------------------------------------------------------------------------
# JSON


@pytest.fixture(scope="module")
def result():
    model = zoo.mlp()
    found = gm.compress(model, "C4", inputs=torch.randn(2, 8), rank=1)
    optimum = {"budget": "25 %", "measure": "loss", "loss": 1.0, "bound": 0.5, "gap": 0.1}
    return found, changed(found.plan.to_dict(), ("optimum",), optimum)


def test_plans(result):
    for each in mutations(result[1]):
        with door():
            plan = Plan.from_dict(each)
            assert Plan.from_json(plan.to_json()) == plan
            assert str(plan)
            assert plan.kinds() is not None
    for each in ({3: 4}, [], None, {**result[1], "layers": {3: "C4"}}, {**result[1], "sites": result[1]["sites"] * 2}):
        with pytest.raises(gm.GMError):
            Plan.from_dict(each)
    for huge in (10**5000, [10**5000] * 2):  # which Python cannot write
        for place in (("model_parameters",), ("sites", 0, "shape"), ("sites", 0, "calls")):
            with pytest.raises(gm.GMError):
                Plan.from_dict(changed(result[1], place, huge))


def test_reports(result):
    content = json.loads(result[0].report.to_json())
    content |= {"history": [{"epoch": 0, "loss": 1.0}], "accuracy": {"dense": 90.0, "compressed": 80}}
    for each in mutations(content, skip=[("plan",)]):
        with door():
            report = Report.from_json(json.dumps(each))
            assert str(report)
            assert report.summary
    report = Report.from_json(json.dumps(changed(content, ("layers", 0, "relative_error"), float("nan"))))
    assert "nan" in report.to_html()


@pytest.mark.parametrize(
    "text",
    [
        *("", "[" * 100_000, '{"a":' * 50_000, "[" * 900 + "]" * 900, "9" * 5000, '{"a": ' + "9" * 5000 + "}"),
        *(
            '"\\ud800"',
            '{"\\udfff": 1}',
            "\ud800",
            '{"a": 1, "a": 2}',
            "1" * (17 << 20),
            "\x00",
            "\ufeff{}",
            None,
            b"{}",
        ),
    ],
    ids=range(15),
)
def test_json(text):
    for reads in (parse_json, Plan.from_json, Report.from_json):
        with pytest.raises(gm.GMError):
            reads(text)


@fuzz
@given(
    st.recursive(
        st.one_of(
            st.none(), st.floats(allow_subnormal=False), st.integers(-(10**38), 10**39), st.text(string.printable)
        ),
        st.lists,
    )
)
def test_json_comes_back(value):
    assert json.dumps(parse_json(json.dumps(value))) == json.dumps(value)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def tensor_file(header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def one(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


TWO = {**one(), "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}
FILES = [
    *(b"", b"\0" * 7, b"\xff" * 8, tensor_file(b"{", size=1 << 62), tensor_file(b"[]"), tensor_file(one(), b"\0" * 7)),
    *(
        tensor_file(one(shape=[1 << 60], offsets=[0, 1 << 62])),
        tensor_file(one(shape=[0, (1 << 64) - 1], offsets=[0, 0])),
    ),
    *(tensor_file(one(shape=[0, 1 << 63], offsets=[0, 0])), tensor_file(one(shape=[-1]), b"\0" * 8)),
    *(tensor_file(one(offsets=[8, 0]), b"\0" * 8), tensor_file(one("F99"), b"\0" * 8), tensor_file(TWO, b"\0" * 12)),
    *(tensor_file(one("F4", [16]), b"\0" * 8), tensor_file(one("BOOL", [8]), b"\7" * 8), tensor_file(b"[" * 100_000)),
    *(tensor_file(b'{"a":1,"a":1}'), tensor_file(b'{"\xff":1}'), tensor_file({"__metadata__": {"a": 1}})),
    *(tensor_file(b" " * (5 << 20)), tensor_file(one(shape=[1] * 100_000, offsets=[0, 4]), b"\0" * 4)),
]


@pytest.mark.parametrize("content", FILES, ids=range(len(FILES)))
def test_tensor_files(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with door():
        read_tensors(tmp_path / "x.safetensors")


@fuzz
@given(st.binary(max_size=40), st.integers(0, 200))
def test_tensor_files_of_random_bytes(tmp_path, noise, at):
    good = tensor_file({**one(), "b": {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]}}, b"\0" * 12)
    (tmp_path / "x.safetensors").write_bytes(good[:at] + noise + good[at + len(noise) :])
    with door():
        read_tensors(tmp_path / "x.safetensors")


@pytest.fixture(scope="module")
def saved(result, tmp_path_factory):
    place = tmp_path_factory.mktemp("saved") / "small"
    gm.save(result[0], place)
    return place


@pytest.fixture
def opened(saved, tmp_path):
    """Write a folder with another description, sealed or not, or with other files, and load it."""

    def load(description=None, *, seal=True, files=(), dense=True):
        place = tmp_path / "copy"
        shutil.copytree(saved, place, dirs_exist_ok=True)
        content = read_json(saved / "gmcompress.json") if description is None else description
        for name, data in dict(files).items():
            (place / name).write_bytes(data)
            content["digests"][name] = file_digest(place / name)
        if seal and isinstance(content, dict):
            content = sealed({key: value for key, value in content.items() if key != "digest"})
        (place / "gmcompress.json").write_text(json.dumps(content))
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with door():
            gm.load(place, zoo.mlp() if dense else None)
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    return load


def test_folders(saved, opened):
    content = read_json(saved / "gmcompress.json")
    for number, each in enumerate(mutations(content, skip=[("plan",), ("versions",)])):
        opened(each, seal=number % 4 != 0)
    for options in ({"checkpoint_path": "/etc/passwd"}, {"pretrained_cfg": {"file": "x"}}, {"block": "os.system"}):
        opened({**content, "source": {"name": "timm:test_resnet", "options": options}}, dense=False)
        opened({**content, "source": {"name": "timm:hf-hub:a/b", "options": options}}, dense=False)


@pytest.mark.parametrize("name", ["model.safetensors", "check.safetensors"])
def test_folders_with_other_tensors(name, saved, opened, tmp_path):
    for data in FILES[::3]:
        opened(files={name: data})
    tensors = load_file(saved / name)
    kinds = [torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.bfloat16]
    for number, key in enumerate(tensors):
        for changes in (lambda each, kind=kinds[number % 6]: each.to(kind), torch.flatten, lambda each: each[:0]):
            found = changes(tensors[key]).contiguous()
            save_file({**tensors, key: found}, tmp_path / "x")
            content = read_json(saved / "gmcompress.json")
            content["dtypes"] |= {key: str(found.dtype).removeprefix("torch.")} if key in content["dtypes"] else {}
            opened(content, files={name: (tmp_path / "x").read_bytes()})


def trained():
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def test_checkpoints(tmp_path):
    save_checkpoint(tmp_path, trained(), [{"epoch": 0, "loss": 1.0}], {"lr": (1, 2)}, decided={"steps": 3})
    path = tmp_path / "checkpoint-0001" / "checkpoint.json"
    content = unsealed(read_json(path), path)
    for number, each in enumerate(mutations(content)):
        path.write_text(json.dumps(sealed(each) if isinstance(each, dict) and number % 4 else each))
        with door():
            load_checkpoint(tmp_path, trained(), {"lr": (1, 2)})
    path.write_text(json.dumps(sealed(content)))
    assert load_checkpoint(tmp_path, trained(), {"lr": (1, 2)})[1] == {"steps": 3}
    for data in FILES:
        (path.parent / "optimizer.safetensors").write_bytes(data)
        digests = {**content["digests"], "optimizer": file_digest(path.parent / "optimizer.safetensors")}
        path.write_text(json.dumps(sealed({**content, "digests": digests})))
        with door():
            load_checkpoint(tmp_path, trained(), {"lr": (1, 2)})


def test_notes(tmp_path):
    key = {"model": "a", "data": "b"}
    Notes(tmp_path / "notes", key).write("fit", "layer", {"loss": 1.0}, {"a": torch.ones(2)})
    notes = Notes(tmp_path / "notes", key)
    path = next((tmp_path / "notes").glob("fit-*.json"))
    assert notes.read("fit", "layer")[0] == {"loss": 1.0}
    good = read_json(path)
    for each in mutations(good):
        path.write_text(json.dumps(each))
        with pytest.raises(gm.GMError, match=r"was changed|must hold a JSON object"):
            notes.read("fit", "layer")
    path.write_text(json.dumps(good))
    path.with_suffix(".safetensors").write_bytes(FILES[-1])
    with pytest.raises(gm.GMError, match="was changed"):
        notes.read("fit", "layer")
