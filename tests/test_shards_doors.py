"""Shards at the doors: interrupted and called again, what is refused and leaves nothing behind, the command line."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from checkpoint_files import net, snapshot, stored
from doors import door, mutations
from safetensors.torch import load_file, save_file
from test_fuzz_files import FILES, one, tensor_file
from torch import nn

import gmcompress as gm
from gmcompress.cli import main
from gmcompress.files import read_json, sealed, unsealed
from gmcompress.shards import target
from gmcompress.shards.description import DESCRIPTION
from gmcompress.shards.source import INDEX
from gmcompress.shards.target import STATE


@pytest.fixture
def dense(tmp_path):
    return stored(net(), tmp_path / "dense")


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted


class StopError(Exception):
    """An interruption."""


def stop(*_):
    raise StopError


def stopping(monkeypatch, place, name, after, end=stop):
    """Something else at a later call of a function."""
    calls, kept = [], getattr(place, name)

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            end()
        return kept(*arguments)

    monkeypatch.setattr(place, name, stops)
    return calls


@pytest.mark.parametrize("after", range(4))
def test_it_goes_on_where_it_was_interrupted(after, dense, tmp_path, monkeypatch):
    options = {"group": "C8", "shard_size": 2000}
    expected = gm.compress_shards(dense, tmp_path / "whole", **options)
    small = tmp_path / "small"
    with monkeypatch.context() as inside:
        stopping(inside, target, "fit_entry" if after < 3 else "_bytes_of", after)
        with pytest.raises(StopError):
            gm.compress_shards(dense, small, **options)
    assert {each.name for each in small.iterdir()} == {STATE, *read_json(small / STATE)["done"]}
    times = {each: each.stat().st_mtime_ns for each in small.glob("*.safetensors")}
    fitted = stopping(monkeypatch, target, "fit_entry", 99)
    assert gm.compress_shards(dense, small, **options) == expected
    assert len(fitted) <= 3 - min(after, 1)
    assert all(each.stat().st_mtime_ns == time for each, time in times.items())
    names = {each.name: each.read_bytes() for each in (tmp_path / "whole").iterdir()}
    assert {each.name: each.read_bytes() for each in small.iterdir()} == names
    before = snapshot(small)
    assert gm.compress_shards(dense, small, **options) == expected, "nothing is left to do"
    assert snapshot(small) == before


KILLED = """
import sys, gmcompress as gm
from gmcompress.shards import target
kept = target.fit_entry
def slow(*arguments):
    print("fitting", flush=True)
    if slow.calls: sys.stdin.read()
    slow.calls += 1
    return kept(*arguments)
slow.calls, target.fit_entry = 0, slow
gm.compress_shards(sys.argv[1], sys.argv[2], group="C8", shard_size=2000)
"""


def test_it_goes_on_after_a_kill(dense, tmp_path):
    small = tmp_path / "small"
    command = [sys.executable, "-c", KILLED, str(dense), str(small)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert [process.stdout.readline() for _ in range(2)] == ["fitting\n"] * 2
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    assert any(each.name.startswith(target.BESIDE) for each in small.iterdir())
    done = read_json(small / STATE)["done"]
    (small / next(iter(done))).write_bytes(b"damaged")  # is noticed, and written again
    found = gm.compress_shards(dense, small, group="C8", shard_size=2000)
    assert {each.name for each in small.iterdir()} == {DESCRIPTION, INDEX, *found.files}
    assert gm.load_shards(small, net())(torch.arange(3)).isfinite().all()


def test_another_compression_does_not_go_on(dense, tmp_path, monkeypatch):
    with monkeypatch.context() as inside:
        stopping(inside, target, "fit_entry", 1)
        with pytest.raises(StopError):
            gm.compress_shards(dense, tmp_path / "small", group="C8", shard_size=2000)
    before = snapshot(tmp_path)
    for options in ({"group": "C4"}, {"group": "C8", "rank": 2}, {"group": "C8"}):
        with pytest.raises(gm.GMError, match="holds an unfinished compression"):
            gm.compress_shards(dense, tmp_path / "small", **options)
    assert snapshot(tmp_path) == before
    state = tmp_path / "small" / STATE
    content = unsealed(read_json(state), state)
    for each in mutations(content):
        state.write_text(json.dumps(sealed(each) if isinstance(each, dict) else each))
        with door():
            gm.compress_shards(dense, tmp_path / "small", group="D4")
    assert snapshot(dense) == {path: data for path, data in before.items() if dense in path.parents}


def test_a_full_disk_leaves_the_finished_shards(dense, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as inside:
        stopping(inside, target, "fit_entry", 1, full)
        with pytest.raises(gm.GMError, match=r"cannot write .* No space left on device"):
            gm.compress_shards(dense, tmp_path / "small", group="C8", shard_size=2000)
    assert list((tmp_path / "small").glob("*.safetensors"))
    assert not list((tmp_path / "small").glob(f"{target.BESIDE}*"))
    assert gm.compress_shards(dense, tmp_path / "small", group="C8", shard_size=2000).files


# ---------------------------------------------------------------------------------------------------------------------
# Refused


def edit_index(**changes):
    def change(folder):
        content = json.loads((folder / INDEX).read_text())
        content["weight_map"] |= {name.replace("_", "."): file for name, file in changes.items()}
        (folder / INDEX).write_text(json.dumps(content))

    return change


def truncate(folder):
    path = folder / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def twice(folder):
    (folder / INDEX).unlink()
    save_file({"up.bias": torch.ones(3)}, folder / "other.safetensors")


def poison(folder):
    tensors = load_file(folder / "model-1.safetensors")
    tensors["up.weight"][-1, -1] = float("nan")
    save_file(tensors, folder / "model-1.safetensors")


def taken(folder):
    (folder / INDEX).unlink()
    save_file({"up.kernel": torch.ones(3)}, folder / "other.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model-1\.safetensors is no complete safetensors file"),
        (lambda folder: (folder / "model-1.safetensors").write_bytes(b"\xff" * 20), "header is to have"),
        (edit_index(x_weight="model-1.safetensors"), r"the tensor 'x\.weight' is in nowhere, and according to"),
        (edit_index(up_bias="model-3.safetensors"), r"names 'model-3\.safetensors', which does not exist"),
        (edit_index(up_bias="../dense/model-1.safetensors"), "which is no safetensors file beside it"),
        (edit_index(up_bias="/etc/passwd"), "which is no safetensors file beside it"),
        (edit_index(up_bias=["model-1.safetensors"]), "has no weight_map"),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}'), "stands twice"),
        (lambda folder: (folder / INDEX).write_text("[]"), "must hold a JSON object"),
        (lambda folder: (folder / f"b.{INDEX}").write_text("{}"), "has several indices"),
        (twice, r"the tensor 'up\.bias' is in both"),
        (poison, r"up\.weight in .* holds NaN or infinity"),
        (taken, r"'up\.weight' would be stored as 'up\.kernel', which is another tensor; exclude it"),
        (lambda folder: [each.unlink() for each in folder.iterdir()], r"holds no \*\.safetensors"),
    ],
    ids=range(14),
)
def test_bad_sources_are_refused(damage, message, dense, tmp_path):
    damage(dense)
    before = snapshot(tmp_path)
    with pytest.raises(gm.GMError, match=message):
        gm.compress_shards(dense, tmp_path / "small", group="C8", shard_size=2000)
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "C7"}, "no layer can be compressed with C7"),
        ({"group": "Y8"}, "group string 'Y8'"),
        ({"rank": -1}, "rank must be an integer"),
        ({"residual": "sparse"}, 'residual must be "displacement" or "lowrank"'),
        ({"exclude": "uo"}, "the rule 'uo' matches no layer; the nearest are 'up'"),
        ({"include": nn.Linear}, "the rule 'Linear' matches no layer"),
        ({"overrides": {"up": "C7+lowrank:1"}}, "no layer|C7"),
        ({"overrides": {"up": "C8+lowrank:99"}}, "lowrank rank 99|would store|no layer"),
        *[({"shard_size": each}, "a shard size is") for each in (0, -1, "5 apples", "", True, None, "1e9", "0.1")],
    ],
    ids=range(16),
)
def test_bad_settings_are_refused(options, message, dense, tmp_path):
    before = snapshot(tmp_path)
    if "overrides" in options:  # what does not fit stays dense, with its reason
        found = gm.compress_shards(dense, tmp_path / "small", **{"group": "C8", **options})
        assert "up" in found.skipped
        return
    with pytest.raises(gm.GMError, match=message):
        gm.compress_shards(dense, tmp_path / "small", **{"group": "C8", **options})
    assert snapshot(tmp_path) == before


def test_bad_places_are_refused(dense, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    before = snapshot(tmp_path)
    for place, message in (
        (dense, "both source and target"),
        (dense / "small", "inside the other"),
        (tmp_path, "inside the other"),
        (dense / ".." / "dense" / "x", "inside the other"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "x", "cannot create"),
        (tmp_path / "full", "holds something already"),
    ):
        with pytest.raises(gm.GMError, match=message):
            gm.compress_shards(dense, place, group="C8")
    with pytest.raises(gm.GMError, match="does not exist"):
        gm.compress_shards(tmp_path / "nowhere", tmp_path / "small")
    gm.compress_shards(dense, tmp_path / "small", group="C8")
    with pytest.raises(gm.GMError, match="compressed with other settings"):
        gm.compress_shards(dense, tmp_path / "small", group="C4")
    assert {path: data for path, data in snapshot(tmp_path).items() if "small" not in path.parts} == before


@pytest.mark.parametrize("content", [*FILES, tensor_file(one(offsets=(4, 12)), b"\0" * 12)], ids=range(len(FILES) + 1))
def test_files_of_all_kinds(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with door():
        gm.compress_shards(tmp_path / "x.safetensors", tmp_path / "small", group="C2")


# ---------------------------------------------------------------------------------------------------------------------
# On the command line


@pytest.mark.usefixtures("dense")
def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["compress", "--from-safetensors", "dense", "--to", "small", "--group", "C8", "--override", "up=none"]
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == {"conv": "C8+displacement:1", "down": "C8+displacement:1"}
    assert found["relative_errors"].keys() == found["layers"].keys()
    assert main(given) == 0
    assert "left dense by the override 'up'" in capsys.readouterr().out
    assert main([*given[:3], "--to", "other", "--group", "C8", "--rank", "0"]) == 0
    assert "compressing" in capsys.readouterr().err
    for more, said in (
        (["--model", "resnet18"], "--model does not go with --from-safetensors"),
        (["--budget", "25%"], "--budget does not go with --from-safetensors"),
        (["--output", "x"], "--output does not go with --from-safetensors"),
        (["--shard-size", "much"], "a shard size is"),
    ):
        assert main([*given, *more]) == 2
        assert said in capsys.readouterr().err
    assert main(["compress", "--to", "small"]) == 2
    assert "go together" in capsys.readouterr().err
