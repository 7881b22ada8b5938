"""What benchmarks/speed.py compares: our layers, dense ones, and products of public libraries with as many numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from gmcompress import GMConv2d, GMError, GMLinear, Structure

Makers = Mapping[str, Callable[[], nn.Module]]


@dataclass(frozen=True)
class LinearCase:
    """A linear layer of equal widths, and how much faster than dense it is to be at which batch."""

    structure: str
    width: int
    goals: Mapping[int, float]


@dataclass(frozen=True)
class ConvCase:
    """A 3×3 convolution of equal widths on square images."""

    structure: str
    width: int
    size: int
    batch: int
    goal: float


LINEAR = (
    LinearCase("C32xC32", 4096, {1: 50, 64: 10, 1024: 5}),
    LinearCase("C32xC32+displacement:2", 4096, {1: 25, 64: 5, 1024: 2.5}),
    LinearCase("C2^4", 1024, {1: 1, 256: 3}),
)
CONV = (ConvCase("C2^3", 256, 14, 32, 2.5), ConvCase("C8", 256, 14, 32, 2.0))


def frozen(layer: Any) -> nn.Module:
    """Our layer on its fast path."""
    layer.eval().freeze_("structured")
    return layer  # type: ignore[no-any-return]


def low_rank(width: int, numbers: int) -> nn.Module:
    """Two dense layers with at most as many numbers, at least of rank 1."""
    rank = max(1, numbers // (2 * width))
    return nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))


class C3A(nn.Module):
    """PEFT's block-circulant product (its C3A adapter), with blocks as large as the number of parameters asks for."""

    def __init__(self, width: int, numbers: int) -> None:
        super().__init__()
        try:
            from peft.tuners.c3a.utils import BlockCircularConvolution
        except ImportError as problem:
            raise GMError("PEFT is missing: pip install '.[benchmark]'") from problem
        self.product = BlockCircularConvolution
        block = max(b for b in range(1, width + 1) if width % b == 0 and (b == 1 or width * width // b >= numbers))
        self.weight = nn.Parameter(torch.randn(width // block, width // block, block))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.product.apply(x, self.weight) + self.bias


class Monarch(nn.Module):
    """Block-diagonal × permutation × block-diagonal (Dao et al. 2022), by two of torch's batched products."""

    def __init__(self, width: int, numbers: int) -> None:
        super().__init__()
        blocks = max(k for k in range(1, width + 1) if width % k == 0 and 2 * width * width // k >= numbers)
        side = width // blocks
        self.first = nn.Parameter(torch.randn(blocks, side, side))
        self.second = nn.Parameter(torch.randn(blocks, side, side))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        blocks, side, _ = self.first.shape
        inner = torch.bmm(x.reshape(-1, blocks, side).transpose(0, 1), self.first)  # (blocks, N, side)
        mixed = inner.permute(1, 2, 0).reshape(-1, blocks, side).transpose(0, 1)
        return torch.bmm(mixed, self.second).transpose(0, 1).flatten(1) + self.bias


class FFT(nn.Module):
    """The same group matrices by torch.fft: circular convolutions along every axis of a product of cyclic groups."""

    def __init__(self, kernel: Tensor, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.axes = axes
        dims = tuple(range(2, 2 + len(axes)))
        self.spectrum = torch.fft.rfftn(kernel.detach().reshape(*kernel.shape[:2], *axes), dim=dims)
        self.bias = nn.Parameter(torch.zeros(kernel.shape[0] * kernel.shape[2]))

    def forward(self, x: Tensor) -> Tensor:
        dims = tuple(range(2, 2 + len(self.axes)))
        given = torch.fft.rfftn(x.reshape(x.shape[0], -1, *self.axes), dim=dims)
        found = torch.einsum("ni...,oi...->no...", given, self.spectrum)
        return torch.fft.irfftn(found, s=self.axes, dim=dims).flatten(1) + self.bias


def tensor_train(width: int, numbers: int) -> nn.Module:
    """A tensor-train layer of tensorly-torch, the largest with no more numbers."""
    tltorch = _tltorch()
    side = round(width ** (1 / 3)) if round(width ** (1 / 3)) ** 3 == width else isqrt(width)
    sizes = (side,) * (3 if side**3 == width else 2)
    best = None
    for rank in (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003):
        options = {"factorization": "blocktt", "rank": rank, "implementation": "factorized"}
        best = tltorch.FactorizedLinear(sizes, sizes, **options)
        if sum(each.numel() for each in best.parameters()) <= numbers + width:
            break
    return best  # type: ignore[no-any-return]


def tucker(width: int, numbers: int) -> nn.Module:
    """A Tucker convolution of tensorly-torch, the largest with no more numbers."""
    tltorch = _tltorch()
    best = None
    for share in (0.5, 0.25, 0.2, 0.15, 0.125, 0.1, 0.05):
        options = {"order": 2, "factorization": "tucker", "rank": share, "implementation": "factorized"}
        best = tltorch.FactorizedConv(width, width, 3, padding=1, **options)
        if sum(each.numel() for each in best.parameters()) <= numbers + width:
            break
    return best  # type: ignore[no-any-return]


def _tltorch() -> Any:
    try:
        import tltorch
    except ImportError as problem:
        raise GMError("tensorly-torch is missing: pip install '.[benchmark]'") from problem
    return tltorch


def linear_competitors(case: LinearCase) -> Makers:
    """Every competitor by name, ours first, then the dense layer."""
    ours = GMLinear(case.width, case.width, case.structure)
    numbers = ours.structure.parameters((case.width, case.width))
    makers: dict[str, Callable[[], nn.Module]] = {
        "ours": lambda: frozen(ours),
        "dense": lambda: nn.Linear(case.width, case.width),
        "low rank": lambda: low_rank(case.width, numbers),
        "C3A": lambda: C3A(case.width, numbers),
        "Monarch": lambda: Monarch(case.width, numbers),
        "tensor train": lambda: tensor_train(case.width, numbers),
    }
    group = ours.structure.acting
    if not ours.structure.displacement:
        axes = tuple(each.order for each in group.factors or (group,))
        makers["torch.fft"] = lambda: FFT(ours.kernel, axes)  # type: ignore[arg-type]
    return makers


def conv_competitors(case: ConvCase) -> Makers:
    """Every competitor of a convolution by name."""
    numbers = Structure.parse(case.structure).parameters((case.width, case.width, 3, 3))
    rank = max(1, numbers // (10 * case.width))

    def pair() -> nn.Module:
        spatial = nn.Conv2d(case.width, rank, 3, padding=1, bias=False)
        return nn.Sequential(spatial, nn.Conv2d(rank, case.width, 1))

    return {
        "ours": lambda: frozen(GMConv2d(case.width, case.width, 3, case.structure, padding=1)),
        "dense": lambda: nn.Conv2d(case.width, case.width, 3, padding=1),
        "low rank": pair,
        "Tucker": lambda: tucker(case.width, numbers),
    }
