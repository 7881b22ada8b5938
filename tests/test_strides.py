"""Gradients have the strides of their parameters, also on axes of length 1, so that DistributedDataParallel is content.

It warns, and copies, where `grad.stride()` is not that of its contiguous bucket.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gmcompress as gm
from gmcompress.linalg import usual_strides
from gmcompress.products import why_slow

GROUPED = [
    {"rank": 1},
    {"rank": 1, "stride": "C4xC4", "radius": 0},
    {"rank": 1, "residual": "row"},
    {"rank": 1, "residual": "diagonal"},
    {"separable": "separable"},
    {"separable": "gseparable"},
    {"separable": "dseparable"},
    {"separable": "dgseparable", "rank": 1},
]


def wrong_strides(module: nn.Module, x: Tensor) -> dict[str, tuple[int, ...]]:
    """The strides of those gradients that have others than their parameters."""
    module.train()(x).square().sum().backward()
    grads = {name: (each, each.grad) for name, each in module.named_parameters()}
    assert all(grad is not None for _, grad in grads.values())
    return {name: grad.stride() for name, (each, grad) in grads.items() if grad.stride() != each.stride()}


@pytest.mark.parametrize("path", ["dense", "structured"])
@pytest.mark.parametrize(
    "text",
    ["C8", "C8+displacement:1", "C4xC4+displacement:1+lowrank:1", "lowrank:1", "adapted:1:2x2", "C4[G,G,grid3x3]"],
)
def test_structured_layers(text: str, path: Any) -> None:
    for shape in ((16, 16), (16, 32), (16, 16, 3, 3), (16, 32, 1, 1)):
        if "grid" in text and shape[2:] != (3, 3):
            continue
        o, i, *taps = shape
        layer = gm.GMConv2d(i, o, taps[0], text) if taps else gm.GMLinear(i, o, text)
        if path == "structured" and why_slow(layer.structure) is None:
            layer.freeze_("structured")
        assert not wrong_strides(layer, torch.randn(3, i, *((4, 5) if taps else ())))


@pytest.mark.parametrize("options", GROUPED, ids=str)
@pytest.mark.parametrize("widths", [(1, 1), (1, 4), (3, 1)], ids=str)
def test_group_convolutions(options: dict[str, Any], widths: tuple[int, int]) -> None:
    layer = gm.GroupConv("C8xC8", *widths, **options)
    assert not wrong_strides(layer, torch.randn(2, widths[0], 8, 8))


def test_other_layers_on_groups() -> None:
    assert not wrong_strides(gm.LatticeConv("Z^2:C4", 1, 1, 3), torch.randn(2, 1, 4, 5, 5))
    assert not wrong_strides(gm.HomogeneousConv("D4", 1, 1, source=[1], target=()), torch.randn(2, 1, 4))


class Gates(nn.Module):
    """A parameter whose gradient comes through a transposition."""

    def __init__(self, *, usual: bool) -> None:
        super().__init__()
        self.gates, self.usual = nn.Parameter(torch.ones(2, 1, 8)), usual

    def forward(self, x: Tensor) -> Tensor:
        return (usual_strides(self.gates) if self.usual else self.gates).transpose(1, 2) @ x


def test_without_the_view_strides_differ() -> None:
    x = torch.randn(2, 1, 5)
    assert set(wrong_strides(Gates(usual=False), x)) == {"gates"}
    assert not wrong_strides(Gates(usual=True), x)
