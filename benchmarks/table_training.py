"""Training for the tables: images on the device, drawn, moved and scaled there; AdamW, one rise and a cosine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cifar import Images, moved_and_flipped
from table_data import rotated
from torch import Tensor, nn

from gmcompress import GMError, tuning

TURNS = ("none", "quarter", "any")
SCALES = ("channel", "image")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; everything that the result depends on, besides network, data and seed.

    Training images are shifted by up to `shift` pixels, black coming in, mirrored left to right (`flip`) and top to
    bottom (`flip_rows`) or not, by equal chances, and turned by "quarter" turns or by "any" angle. `scale` is
    "channel", by mean and deviation of each channel over the training images, or "image", by those of the image itself
    first and then by those of each pixel over the training images. The rate rises over the share `warmup` of the steps
    and falls by a cosine to zero. `distillation` is the weight of a teacher in the loss, at `temperature`, and what is
    left to 1 that of the labels.
    """

    epochs: int
    lr: float = 1e-2
    weight_decay: float = 1e-2
    batch_size: int = 128
    warmup: float = 0.2
    shift: int = 0
    flip: bool = False
    flip_rows: bool = False
    turns: str = "none"
    scale: str = "channel"
    distillation: float = 0.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        for name, value, known in (("turns", self.turns, TURNS), ("scale", self.scale, SCALES)):
            if value not in known:
                raise GMError(f"{name} is one of {', '.join(known)}, not {value!r}")


class Scaling:
    """Pixels as a network wants them, by what was learned from training images; see `Recipe`."""

    def __init__(self, pixels: Tensor, kind: str) -> None:
        self.kind = kind
        over = (0,) if kind == "image" else (0, 2, 3)
        parts = pixels.split(2000)
        self.mean = sum(self._own(each).sum(over, keepdim=True) for each in parts) / self._count(pixels, over)
        square = sum((self._own(each) - self.mean).square().sum(over, keepdim=True) for each in parts)
        self.deviation = (square / self._count(pixels, over)).sqrt().clamp_min(1e-3)

    @staticmethod
    def _count(pixels: Tensor, over: tuple[int, ...]) -> int:
        return math.prod(pixels.shape[each] for each in over)

    def _own(self, pixels: Tensor) -> Tensor:
        """In [0, 1], and where `kind` is "image" by the mean and the deviation of each image."""
        found = pixels.float() / 255
        if self.kind == "image":
            deviation, mean = torch.std_mean(found, (1, 2, 3), keepdim=True)
            found = (found - mean) / (deviation + 0.05)  # what an image of one grey does not divide by zero
        return found

    def __call__(self, pixels: Tensor) -> Tensor:  # uint8 (batch, channels, height, width) -> float32, same shape
        return (self._own(pixels) - self.mean) / self.deviation


def augmented(pixels: Tensor, recipe: Recipe) -> Tensor:  # uint8 (batch, channels, side, side) -> same
    """Moved, mirrored and turned as the recipe says, by torch's global random numbers on the CPU."""
    count, device = len(pixels), pixels.device
    if recipe.shift or recipe.flip:
        moves = torch.randint(0, 2 * recipe.shift + 1, (2, count)).to(device)
        flips = torch.rand(count).to(device) < (0.5 if recipe.flip else 0.0)
        pixels = moved_and_flipped(pixels, moves, flips, shift=recipe.shift)
    if recipe.flip_rows:
        flips = (torch.rand(count) < 0.5).to(device)
        pixels = torch.where(flips[:, None, None, None], pixels.flip(2), pixels)
    if recipe.turns == "any":
        pixels = rotated(pixels, 2 * math.pi * torch.rand(count))
    elif recipe.turns == "quarter":
        turns = torch.randint(0, 4, (count,)).to(device)[:, None, None, None]
        for number in (1, 2, 3):
            pixels = torch.where(turns == number, pixels.rot90(number, (2, 3)), pixels)
    return pixels


def batches(images: Images, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:  # uint8 pixels, int64 labels
    """One pass over augmented training images in random order; what does not fill the last batch is left out."""
    count = len(images.labels)
    size = min(recipe.batch_size, count)
    for chosen in torch.randperm(count)[: count // size * size].split(size):
        at = chosen.to(images.labels.device)
        yield augmented(images.pixels[at], recipe), images.labels[at]


def rate(done: int, steps: int, warmup: float) -> float:
    """The share of the peak rate at a step.

    >>> [round(rate(each, 10, 0.2), 2) for each in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    rise = warmup * steps
    if done < rise:
        return (done + 1) / (math.ceil(rise))
    return (1 + math.cos(math.pi * (done - rise) / max(1.0, steps - rise))) / 2


def train(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    seed: int,
    amp: str = "no",
    teacher: nn.Module | None = None,
    progress: Callable[[int, float], Any] = lambda _epoch, _loss: None,
) -> tuple[Scaling, float]:
    """Trains the network where it lies; returns how its pixels are scaled, and the seconds.

    Raises:
        GMError: the loss is no longer a number.
    """
    begun, device = time.perf_counter(), images.labels.device
    scaling = Scaling(images.pixels, recipe.scale)
    shares = tuning.Recipe(
        distillation=recipe.distillation, task=1 - recipe.distillation, temperature=recipe.temperature
    )
    torch.manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * (len(images.labels) // min(recipe.batch_size, len(images.labels)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda done: rate(done, steps, recipe.warmup))
    for epoch in range(recipe.epochs):
        model.train()
        total, count = torch.zeros((), device=device), 0
        for pixels, labels in batches(images, recipe):
            ready = scaling(pixels)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
                with torch.no_grad():
                    taught = None if teacher is None else teacher(ready)
                found = model(ready)
            loss = tuning.distillation_loss(found, taught, labels, shares)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total, count = total + loss.detach(), count + 1
        if not torch.isfinite(total):
            raise GMError(
                f"the loss is no number after epoch {epoch + 1}; take a smaller learning rate than {recipe.lr}"
            )
        progress(epoch, float(total) / count)
    return scaling, time.perf_counter() - begun
