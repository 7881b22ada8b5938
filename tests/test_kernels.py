"""The kernels against the dense weight, in Triton's interpreter and, where there is one, on a CUDA device."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import TOLERANCE, must_fail
from kernel_cases import CASES, DTYPES
from torch.utils.flop_counter import FlopCounterMode

from gmcompress import kernels
from gmcompress.fewrows import SPECTRUM
from gmcompress.kernels import Case, Tiles, candidates
from gmcompress.products import keep, layout_of, linear, prepare
from gmcompress.structure import Structure

LAWS = pytest.mark.parametrize(("case", "name"), list(product(CASES, DTYPES)), ids=str)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def errors_on(device: str) -> dict[str, dict[str, float | str]]:
    path = os.pathsep.join([str(Path(kernels.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    more = {"PYTHONPATH": path, "TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    script = Path(__file__).with_name("kernel_cases.py")
    done = subprocess.run([sys.executable, str(script), device], env=os.environ | more, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted():
    return errors_on("cpu")


@pytest.fixture(scope="module")
def compiled():
    return errors_on("cuda")


def assert_law(error: float, name: str) -> None:
    assert error < TOLERANCE[DTYPES[name]]


def assert_case(found: dict[str, float | str], name: str) -> None:
    assert found["why"] == ""
    assert found["launches"] == 2  # with the right spectrum and with a wrong one
    assert found["dtype"] == str(DTYPES[name])
    assert_law(found["kernel"], name)
    assert_law(found["tiles"], name)
    assert_law(found["torch"], name)
    must_fail(assert_law, found["control"], name)


@TRITON
@LAWS
def test_interpreted(case, name, interpreted):
    assert_case(interpreted[f"{case} {name}"], name)


@TRITON
@CUDA
@LAWS
def test_on_a_device(case, name, compiled):
    assert_case(compiled[f"{case} {name}"], name)


def reason(text: str, shape: tuple[int, int], change=lambda x, ready: (x, ready)) -> str | None:
    structure = Structure.parse(text)
    stored = structure.shapes(shape)
    ready = prepare({name: torch.ones(size) for name, size in stored.items()}, structure)
    x, ready = change(torch.ones(2, shape[1]), ready)
    return kernels.supports(x, ready, layout_of(structure.acting).combinations[0].sizes, interpret=True)


@TRITON
@pytest.mark.parametrize(
    ("text", "shape", "wanted"),
    [
        ("C8", (16, 8), None),
        ("C3", (6, 6), "more than one combination"),
        ("C4xC2", (16, 8), "more than one combination"),
        ("C6xC10", (60, 60), None),
        ("D4", (16, 16), "several copies|more than one combination"),
        ("C64xC32", (2048, 2048), "above 1024"),
        ("C32xC16xC4", (2048, 2048), "above 1024"),
        ("C10xC10xC10", (1000, 1000), "more than two axes"),
    ],
)
def test_groups_without_a_kernel(text, shape, wanted):
    found = reason(text, shape)
    if wanted is None:
        assert found is None
    else:
        assert any(each in str(found) for each in wanted.split("|")), found


@TRITON
@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda x, ready: (x.requires_grad_(), ready), "gradient"),
        (lambda x, ready: (x.double(), ready), "all bfloat16"),
        (lambda x, ready: (x.half(), ready), "all bfloat16"),
        (lambda x, ready: (x[:0], ready), "no inputs"),
        (lambda x, ready: (x, {name: each.to("meta") for name, each in ready.items()}), "several devices"),
    ],
)
def test_calls_without_a_kernel(change, wanted):
    assert wanted in str(reason("C8+displacement:1", (16, 8), change))


@TRITON
def test_states_of_torch_without_a_kernel():
    with FlopCounterMode(display=False):
        assert "watched" in str(reason("C8", (8, 8)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in str(reason("C8", (8, 8)))
    seen: list[str | None] = []

    def called(x: torch.Tensor) -> torch.Tensor:
        seen.append(reason("C8", (8, 8), lambda _, ready: (x, ready)))
        return x

    torch.vmap(called)(torch.ones(3, 2, 8))
    assert "transformed" in str(seen[0])


@TRITON
def test_few_rows_take_the_kernel_too(monkeypatch):
    structure = Structure.parse("C2^3")
    ready = keep({name: torch.ones(size) for name, size in structure.shapes((16, 8)).items()}, structure)
    assert SPECTRUM in ready
    launched = []
    monkeypatch.setattr(kernels, "product", lambda rows, *_: launched.append(len(rows)) or torch.zeros(len(rows), 16))
    for rows in (1, 9):
        linear(torch.ones(rows, 8), ready, structure, interpret=True)
        linear(torch.ones(rows, 8), ready, structure)
    assert launched == [1, 9]


def test_on_the_cpu_there_is_none():
    ready = prepare({"kernel": torch.ones(1, 1, 8)}, Structure.parse("C8"))
    assert kernels.supports(torch.ones(1, 8), ready, (2,)) == "the inputs are not on a CUDA device"


def assert_covers(case: Case, tiles: Tiles, narrow: int) -> None:
    assert all(each & (each - 1) == 0 for each in vars(tiles).values())
    assert tiles.MP >= case.MORE
    assert max(narrow, case.A) <= tiles.AP
    assert (max(narrow, case.B) if case.B > 1 else 1) <= tiles.BP
    assert narrow <= tiles.PT <= tiles.AP
    assert narrow <= tiles.IT * case.S * case.T


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("batch", [1, 64, 8192])
@pytest.mark.parametrize(
    "case",
    [
        Case(4, 4, 1, 32, 32, 2, 2),
        Case(4, 4, 3, 32, 32, 2, 2),
        Case(512, 512, 1, 8, 1, 2, 1),
        Case(1, 1, 2, 1024, 1, 2, 1),
    ],
)
def test_every_case_has_tiles(case, batch, itemsize):
    found = candidates(case, batch, itemsize)
    assert found
    for each in found:
        assert_covers(case, each, 32 // itemsize)
        assert batch >= each.BN
    must_fail(assert_covers, Case(1, 1, 5, 2048, 1, 2, 1), found[0], 16)


@TRITON
def test_the_faster_one_is_measured_once(monkeypatch):
    asked: list[str] = []

    def measured(call, **_options):
        asked.append(call())
        return {"kernel": 2.0, "torch": 3.0 if len(asked) == 2 else 1.0}[asked[-1]]

    monkeypatch.setattr("triton.testing.do_bench", measured)
    monkeypatch.setattr(kernels, "_launch", lambda *_given: "kernel")
    ready = prepare({"kernel": torch.ones(1, 1, 8)}, Structure.parse("C8"))
    for count, wanted in ((3, True), (4, True), (5, False), (8, False)):
        assert kernels.pays(torch.ones(count, 8), ready, (2,), lambda *_given: "torch") == wanted
    assert asked == ["kernel", "torch"] * 2
