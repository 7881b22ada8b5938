"""Models whose code does with its layers more than call them; a part of the zoo."""

from __future__ import annotations

import threading
import warnings
import weakref
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class AsksForKinds(nn.Module):
    """Skips without a word what is no Linear, and takes apart a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular", bias=False)
        self.steps = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.conv, nn.Conv2d)
        x = self.conv._conv_forward(self.stem(x), 2 * self.conv.weight, self.conv.bias)
        x = x.mean((2, 3)) + self.conv.in_channels + sum(self.conv.output_padding)
        for each in self.steps:
            x = torch.relu(each(x)) if isinstance(each, nn.Linear) else x
        return self.head(x)


class ClosesOver(nn.Module):
    """Functions and hooks that reach into the model they belong to, and what its last call left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.side, self.seen = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.apply_side = lambda x, side=self.side: side(x) + self.body(x)
        self.last: list[Tensor] = []
        self.seen.register_forward_hook(lambda _module, _inputs, output: self.last.append(output))
        self.forward = self.doubled(self.forward)  # type: ignore[method-assign]

    def doubled(self, forward: Any) -> Any:
        return lambda x: 2 * forward(x)

    def forward(self, x: Tensor) -> Tensor:
        self.last.clear()
        self.seen(self.apply_side(x))
        return self.head(self.last[-1])


def after_a_call() -> nn.Module:
    model = ClosesOver()
    model(torch.ones(1, 8))
    return model


class OtherParts(nn.Module):
    """Parts that are compiled, scripted, in parallel, and of no size."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.compiled = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend="eager")
        self.parallel = nn.DataParallel(nn.Linear(8, 8))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scripts are deprecated, and weights of no size not initialised
            self.scripted = torch.jit.script(nn.Linear(8, 8))
            self.nothing, self.from_nothing = nn.Linear(8, 0), nn.Linear(0, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scripted(self.parallel(self.compiled(self.body(x))))
        return self.head(x + self.from_nothing(self.nothing(x)))


class Forces(nn.Module):
    """An energy, and its gradient in the inputs, which it takes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.more, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.head(torch.tanh(self.more(torch.tanh(self.body(x)))))
            return energy, torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


class Nested(nn.Module):
    """Takes lists, tuples, settings and nothing; returns what is infinite here and there."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.more, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, xs: list[Tensor], *, pair: tuple[Tensor, float], mask: None, mode: str) -> dict[str, Any]:
        assert mode == "sum"
        assert isinstance(pair, tuple)
        assert mask is None
        x = sum(F.gelu(self.body(x)) for x in xs) + pair[0] * pair[1]
        logits = self.head(self.more(x))
        return {"logits": logits, "masked": [logits.masked_fill(logits == logits.amax(), float("-inf"))]}


class Habits(nn.Module):
    """Changes its inputs, reads what was set on a parameter, holds a lock; a part of it holds its owner."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.more, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.head.weight.scale = 0.5  # type: ignore[attr-defined]
        self.lock = {"held": [threading.Lock()]}
        self.body.owner = weakref.ref(self)  # type: ignore[assignment]

    def forward(self, x: Tensor, more: list[Tensor]) -> Tensor:
        x.sub_(1.0).add_(more.pop())
        with self.lock["held"][0]:
            x = torch.tanh(self.body(x)) + self.body.owner().more(x)
        return self.head(x) * self.head.weight.scale


class Altered(nn.Module):
    """Layers that are not as they were made, and attributes under names that structured layers use themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3)
        self.conv.stride, self.conv.padding = 2, (1, 1)  # type: ignore[assignment]
        self.wide, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.wide.weight, self.wide.bias = nn.Parameter(torch.randn(16, 8) / 3), nn.Parameter(torch.zeros(16))
        self.named = nn.Linear(16, 8)
        vars(self.named).update(path="here", labels="these", kernel=2.0, PARTS=3)

    def forward(self, x: Tensor) -> Tensor:
        named = self.named
        assert (named.path, named.labels, named.PARTS) == ("here", "these", 3)
        return self.head(named(self.wide(self.conv(self.stem(x)).mean((2, 3)))) * named.kernel)


class NumpySizes(nn.Module):
    """Layers whose sizes and settings are integers of numpy, as products of a shape are."""

    def __init__(self) -> None:
        super().__init__()
        one, three, eight = np.int64(1), np.int64(3), np.int64(8)
        self.stem = nn.Conv2d(three, eight, one)
        self.conv = nn.Conv2d(eight, eight, three, stride=one, padding=one, groups=np.int64(2))
        self.up = nn.ConvTranspose2d(eight, eight, three, stride=np.int64(2), groups=np.int64(2))
        self.body = nn.Linear(np.prod((8, 3, 3)), eight)
        self.head = nn.Linear(eight, three)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 3, 3, 3)
        x = torch.relu(self.conv(self.stem(x)))
        return self.head(torch.relu(self.body((x + self.up(x)[..., ::2, ::2][..., :3, :3]).flatten(1))))


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# name: (how it is built, inputs, what C4 at rank 1 compresses)
MODELS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "asks for kinds": (AsksForKinds, lambda: rows(2, 3, 4, 4), ("conv", "steps.0", "steps.1")),
    "closes over": (after_a_call, lambda: rows(4, 8), ("body", "side", "seen")),
    "other parts": (OtherParts, lambda: rows(4, 8), ("body", "compiled._orig_mod.0", "parallel.module")),
    "habits": (Habits, lambda: [rows(4, 8), [rows(4, 8)]], ("body", "more")),
    "altered": (Altered, lambda: rows(2, 3, 6, 6), ("conv", "wide", "named")),
    "sizes of numpy": (NumpySizes, lambda: rows(8, 3, 3, 3), ("conv", "up", "body")),
    "forces": (Forces, lambda: rows(4, 8), ("body", "more")),
    "nested": (
        Nested,
        lambda: {"xs": [rows(4, 8), rows(4, 8)], "pair": (rows(4, 8), 0.5), "mask": None, "mode": "sum"},
        ("body", "more"),
    ),
}
