"""Models that have broken compressors, each with inputs it runs on and the layers that C4 compresses in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hazards_zoo
import kinds_zoo
import timm
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class TwoNames(nn.Module):
    """One module that is reached by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(F.relu(self.first(x))))


class CalledTwice(nn.Module):
    """One module that runs twice, and a list outside the registry that holds it too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.steps = [self.body, self.body]
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = torch.tanh(step(x))
        return self.head(x)


class Tied(nn.Module):
    """A language model whose output head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.gelu(self.body(self.embedding(tokens))))


class Convolutions(nn.Module):
    """Strided, dilated, grouped, depthwise and oddly padded convolutions with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.dilated = nn.Conv2d(8, 16, 3, padding=2, dilation=2, bias=False)
        self.grouped = nn.Conv2d(16, 16, (3, 1), groups=2, padding="same")
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, padding=1, padding_mode="reflect")
        self.odd = nn.Conv2d(16, 7, 1)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.odd(self.depthwise(self.grouped(self.dilated(x))))
        return self.head(x.mean((2, 3)))


class ReadsWeight(nn.Module):
    """Reads a weight functionally, as timm's BEiT does, and never calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return self.head(self.proj(F.scaled_dot_product_attention(q, k, v)))


class PassesParameter(nn.Module):
    """Hands a parameter of its own to a layer as an argument, as timm's CaiT does with its class token."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 8))
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) + self.body(self.token))


class Unreachable(nn.Module):
    """Holds a head that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.aux = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class ControlFlow(nn.Module):
    """Branches on values, which torch.fx cannot trace; takes keyword arguments and returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(8, 8)
        self.right = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, *, x: Tensor, scale: Tensor) -> dict[str, Any]:
        hidden = self.left(x) if x.sum() > 0 else self.right(x)
        return {"logits": self.head(hidden * scale), "hidden": (hidden, [scale])}


def frozen_strided() -> nn.Module:
    """A frozen layer and one whose weight is not contiguous."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    model[2].weight = nn.Parameter(torch.randn(8, 8).t())
    return model


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


@dataclass(frozen=True)
class Exhibit:
    """A model, inputs for it, and what C4 at rank 1 compresses."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    compressed: tuple[str, ...]


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


MODELS = {
    "mlp": Exhibit(mlp, rows(4, 8), ("0", "2")),
    "bfloat16": Exhibit(lambda: mlp(torch.bfloat16), rows(4, 8, dtype=torch.bfloat16), ("0", "2")),
    "float16": Exhibit(lambda: mlp(torch.float16), rows(4, 8, dtype=torch.float16), ("0", "2")),
    "root": Exhibit(lambda: nn.Linear(8, 16), rows(4, 8), ("",)),
    "two names": Exhibit(TwoNames, rows(4, 8), ("first",)),
    "called twice": Exhibit(CalledTwice, rows(4, 8), ("body",)),
    "tied": Exhibit(Tied, lambda: torch.arange(6).view(2, 3), ("embedding", "body")),
    "convolutions": Exhibit(Convolutions, rows(2, 3, 9, 9), ("dilated", "grouped")),
    "reads weight": Exhibit(ReadsWeight, rows(2, 5, 8), ("qkv", "proj")),
    "passes parameter": Exhibit(PassesParameter, rows(4, 8), ("body",)),
    "unreachable": Exhibit(Unreachable, rows(4, 8), ("body", "aux")),
    "control flow": Exhibit(
        ControlFlow, lambda: {"x": torch.ones(4, 8), "scale": torch.full((4, 1), 2.0)}, ("left", "right")
    ),
    "frozen, strided": Exhibit(frozen_strided, rows(4, 8), ("0", "2")),
    "parametrized": Exhibit(
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 3)),
        rows(4, 8),
        ("1",),
    ),
    "encoder layer": Exhibit(
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), nn.Linear(8, 3)),
        rows(2, 5, 8),
        ("0.self_attn.in_proj_weight", "0.self_attn.out_proj", "0.linear1", "0.linear2"),
    ),
    "timm convnet": Exhibit(
        lambda: timm.create_model("test_resnet", num_classes=5),
        rows(1, 3, 64, 64),
        (
            *("conv1.3", "conv1.6", "layer3.0.conv3"),
            *(f"layer{n}.0.conv{k}" for n in (1, 2, 3, 4) for k in (1, 2)),
            *(f"layer{n}.0.downsample.1" for n in (2, 3, 4)),
        ),
    ),
    "timm transformer": Exhibit(
        lambda: timm.create_model("test_vit", num_classes=5),
        rows(1, 3, 160, 160),
        tuple(f"blocks.{n}.{part}" for n in range(6) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    ),
}

MODELS |= {name: Exhibit(*each) for name, each in (kinds_zoo.MODELS | hazards_zoo.MODELS).items()}
