"""What all tests share: tolerances by dtype, a control that must fail, and a seeded source of randomness."""

import copy
import importlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once by torch: idle threads then leave the cores to others

import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
torch.set_flush_denormal(True)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_close(actual: Tensor | float, expected: Tensor | float, *, slack: float = 1.0) -> None:
    """Equal within the tolerance of the dtype, relative to the largest entry expected; `slack` widens it."""
    actual, expected = (
        each if isinstance(each, Tensor) else torch.as_tensor(each, dtype=torch.float64) for each in (actual, expected)
    )
    tolerance = slack * TOLERANCE[actual.dtype] * max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def must_fail(law: Callable[..., None], *subjects: Any) -> None:
    """The control: the law does not hold for these subjects."""
    with pytest.raises(AssertionError):
        law(*subjects)


@pytest.fixture
def generator() -> torch.Generator:
    """A source of random numbers, the same in every test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the benchmarks by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {  # ways to come by another model that must share its tables
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "to float64": lambda model: copy.deepcopy(model).double(),
    "to meta and back": lambda model: copy.deepcopy(model).to("meta").to_empty(device="cpu"),
}


def assert_own_weights(other: nn.Sequential, model: nn.Sequential, x: Tensor, *, at: int) -> None:
    """A copy computes what its original does, and what is written into its layer at a place is not in the original."""
    other.load_state_dict(model.state_dict())
    assert_close(other(x.to(other[0].kernel)).float(), model(x), slack=10)
    with torch.no_grad():
        other[at].kernel.zero_()
    assert model[at].kernel.abs().sum() > 0, "only the tables are shared"
