"""Modules that hold their weights otherwise than Linear and Conv2d do; a part of the zoo."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import gmcompress as gm


class Signals(nn.Module):
    """Convolutions over one, two and three axes, forwards and transposed, in groups too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, 8, 3, padding=1)
        self.conv1 = nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular")
        self.up1 = nn.ConvTranspose1d(8, 8, 2, stride=2)
        self.up2 = nn.ConvTranspose2d(8, 16, 3, groups=2, padding=1, output_padding=1, stride=2)
        self.conv3 = nn.Conv3d(16, 16, (1, 3, 3), groups=2)
        self.up3 = nn.ConvTranspose3d(16, 8, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4, 8)
        x = self.up1(F.relu(self.conv1(F.relu(self.stem(x)))))
        x = self.up2(x.unflatten(2, (4, 4)))
        return self.head(self.up3(self.conv3(x[:, :, None])).mean((2, 3, 4)))


class Tables(nn.Module):
    """Embeddings of several kinds, one looked up together with another's sum."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 8, padding_idx=0)
        self.places = nn.Embedding(12, 8)
        self.bag = nn.EmbeddingBag(20, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, tokens)
        places = self.places(torch.arange(tokens.shape[1]))
        return self.head(self.words(tokens) + places + self.bag(tokens)[:, None])


class Attention(nn.Module):
    """Self-attention, and attention to keys and values of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.other = nn.MultiheadAttention(8, 2, batch_first=True, kdim=12, vdim=4, add_bias_kv=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        x = x + self.own(x, x, x, need_weights=False)[0]
        found, weights = self.other(x, keys, values)
        return self.head(found) + weights.sum()


class Standardised(nn.Conv2d):
    """A convolution that standardises its weight and scales it by a parameter of its own, as those of timm do."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 0.5))

    def forward(self, input: Tensor) -> Tensor:
        spread, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        return self._conv_forward(input, self.gain * (self.weight - mean) * (spread + 1e-4).rsqrt(), self.bias)


class Projections(nn.Module):
    """A user's layer: one matrix used as x @ w, one of three axes, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 12, generator=torch.Generator().manual_seed(2)) / 3)
        self.heads = nn.Parameter(torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(3)) / 3)
        self.gain = nn.Parameter(torch.ones(1, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,hoi->bho", torch.relu(x @ self.w) * self.gain, self.heads).flatten(1)


gm.register(Projections, w="io", heads="ooi")


class Recurrent(nn.Module):
    """An LSTM, whose weights are one flat list, and a cell, whose weights are not."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.cell = nn.GRUCell(8, 8)
        self.pair = nn.Bilinear(8, 4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        last = self.lstm(x)[0][:, -1]
        return self.head(self.pair(self.cell(last), last[:, :4]))


class Hooked(nn.Module):
    """Layers with hooks, with an attribute, with a further parameter, and with a bias that another layer shares."""

    def __init__(self) -> None:
        super().__init__()
        self.hooked, self.marked, self.more = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.hooked.register_forward_hook(double)
        self.marked.scale = 0.5
        self.more.gain = nn.Parameter(torch.full((8,), 0.5))
        self.two.bias = self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.more(self.marked(self.hooked(x)) * self.marked.scale) * self.more.gain
        return self.head(self.two(torch.tanh(self.one(x))))


def double(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


class Normed(nn.Module):
    """Weights that are computed from other tensors, in all of torch's ways."""

    def __init__(self) -> None:
        super().__init__()
        self.new = parametrizations.spectral_norm(nn.Linear(8, 8))
        self.pruned = prune.l1_unstructured(nn.Linear(8, 8), "weight", amount=0.5)
        self.body = nn.Linear(8, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.pruned(self.new(x))))


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# name: (how it is built, inputs, what C4 at rank 1 compresses)
MODELS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "signals": (Signals, lambda: rows(2, 4, 8), ("conv1", "up1", "up2", "conv3", "up3")),
    "tables": (Tables, lambda: torch.arange(8).view(2, 4), ("words", "places", "bag")),
    "attention": (
        Attention,
        lambda: [rows(2, 5, 8), rows(2, 3, 12), rows(2, 3, 4)],
        (
            *("own.in_proj_weight", "own.out_proj", "other.out_proj"),
            *(f"other.{key}_proj_weight" for key in "qkv"),
        ),
    ),
    "decoder layer": (
        lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, dropout=0.0),
        lambda: [rows(2, 5, 8), rows(2, 3, 8)],
        (
            *(f"{part}.{key}" for part in ("self_attn", "multihead_attn") for key in ("in_proj_weight", "out_proj")),
            "linear1",
        ),
    ),
    "standardised": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Standardised(8, 8, 3), nn.Flatten(), nn.Linear(8, 3)),
        lambda: rows(2, 3, 5, 5),
        ("1",),
    ),
    "registered": (
        lambda: nn.Sequential(Projections(), nn.Linear(12, 3)),
        lambda: rows(4, 8),
        ("0.w", "0.heads"),
    ),
    "recurrent": (Recurrent, lambda: rows(2, 5, 8), ("cell.weight_ih", "cell.weight_hh", "pair")),
    "hooked": (Hooked, lambda: rows(4, 8), ("hooked", "marked", "more", "one", "two")),
    "normed": (Normed, lambda: rows(4, 8), ("body",)),
}
