"""CIFAR-10 for benchmarks: the small ResNets, the images in memory, a fast training loader, and the accuracy."""

from __future__ import annotations

import io
import os
import tarfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gmcompress import GMError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # with which the weights were trained
SIZES = {"train": 50_000, "validation": 10_000}


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters: every second pixel, the new channels zero.

    Source: He, Zhang, Ren and Sun 2016, section 4.2, option A.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.new = stride, channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:  # (batch, in, height, width) -> (batch, channels, height / stride, ...)
        """ReLU of the residual branch plus the shortcut."""
        shortcut = x
        if self.stride > 1 or self.new:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new // 2))
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class ResNet(nn.Module):
    """The CIFAR ResNet of 6n + 2 layers: three stages of n blocks with 16, 32 and 64 channels.

    Source: He, Zhang, Ren and Sun 2016, section 4.2.

    >>> sum(each.numel() for each in ResNet(20).parameters())
    269722
    """

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise GMError(f"a CIFAR ResNet has 6n + 2 layers, such as 20, 32, 44 or 56, not {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 3, 32, 32) -> (batch, classes)
        """The logits."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(in_channels, channels, stride)
    return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))


ARCHITECTURES = {f"resnet{depth}": depth for depth in (20, 32, 44, 56)}


def load_resnet(arch: str, weights: Path) -> ResNet:
    """A trained ResNet in evaluation mode, every tensor of the file used and none missing.

    Raises:
        GMError: there is no such file, or its tensors are not those of this network.
    """
    if not weights.is_file():
        raise GMError(f"there is no file of weights {str(weights)!r}")
    model = ResNet(ARCHITECTURES[arch])
    counters = {name: each for name, each in model.state_dict().items() if name.endswith("num_batches_tracked")}
    try:
        model.load_state_dict(counters | load_file(weights))  # files from before torch 0.4.1 lack the counters
    except RuntimeError as problem:
        said = " ".join(str(problem).split())[:200]
        raise GMError(f"the tensors of {weights.name!r} are not those of {arch}: {said}") from None
    return model.eval()


@dataclass(frozen=True)
class Images:
    """Images and labels in memory: `pixels` uint8 (n, channels, height, width), `labels` int64 (n), on one device."""

    pixels: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Images:
        """The same on another device."""
        return Images(self.pixels.to(device), self.labels.to(device))


def load_images(data: Path, split: str, *, cache: Path | None = None) -> Images:
    """The images of `data`/`split`.tar (class folders of WebP or PNG), read once into memory.

    With `cache`, a safetensors file, decoded images are kept there and read from there the next time.

    Raises:
        GMError: the tar is missing, or holds another number of images than CIFAR-10 has.
    """
    kept = None if cache is None else cache.with_name(f"{cache.stem}_{split}.safetensors")
    if kept is not None and kept.is_file():
        return Images(**load_file(kept))
    images = _decode(data / f"{split}.tar", SIZES[split])
    if kept is not None:
        beside = kept.with_name(f".{kept.name}.{uuid.uuid4().hex[:8]}")
        save_file({"pixels": images.pixels, "labels": images.labels}, beside)
        os.replace(beside, kept)
    return images


def _decode(path: Path, wanted: int) -> Images:
    from PIL import Image

    if not path.is_file():
        raise GMError(f"there is no file {str(path)!r}; the folder of the data must hold train.tar and validation.tar")
    pixels, classes = [], []
    with tarfile.open(path) as tar:
        for member in tar:
            if not member.isfile():
                continue
            file = tar.extractfile(member)
            assert file is not None
            pixels.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
            classes.append(member.name.split("/")[-2])
    names = sorted(set(classes))  # the order of the classes in CIFAR-10 is that of the alphabet
    if len(pixels) != wanted or len(names) != 10:
        raise GMError(f"{path.name} holds {len(pixels)} images in {len(names)} classes, not {wanted} in 10")
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Images(stacked, torch.tensor([names.index(each) for each in classes]))


def normalise(pixels: Tensor) -> Tensor:  # uint8 (batch, 3, height, width) -> float32, same shape
    """Pixels as the networks want them: scaled to [0, 1], then centred and scaled by channel.

    In memory the channels come last: convolutions on the CPU are faster so.
    """
    mean, std = (pixels.new_tensor(each, dtype=torch.float32)[:, None, None] * 255 for each in (MEAN, STD))
    return ((pixels.float() - mean) / std).contiguous(memory_format=torch.channels_last)


class TrainLoader:
    """Batches of flipped and shifted training images, each pass drawn anew from torch's global random numbers.

    A pass goes over `images_per_epoch` images drawn without replacement, all of them where None; what does not fill
    the last batch is left out. The random numbers are drawn on the CPU, so that a seed means the same on every device.

    >>> len(TrainLoader(Images(torch.zeros(300, 3, 32, 32, dtype=torch.uint8), torch.zeros(300, dtype=torch.int64))))
    2
    """

    def __init__(
        self, images: Images, *, batch_size: int = 128, images_per_epoch: int | None = None, shift: int = 4
    ) -> None:
        total = len(images.labels)
        self.images, self.batch_size, self.shift = images, batch_size, shift
        self.images_per_epoch = total if images_per_epoch is None else images_per_epoch
        if not batch_size <= self.images_per_epoch <= total:
            raise GMError(f"an epoch has from {batch_size} to {total} images, not {self.images_per_epoch}")

    def __len__(self) -> int:
        return self.images_per_epoch // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # (batch, 3, 32, 32) float32, (batch) int64
        device = self.images.labels.device
        order = torch.randperm(len(self.images.labels))[: len(self) * self.batch_size]
        for chosen in order.split(self.batch_size):
            moves = torch.randint(0, 2 * self.shift + 1, (2, len(chosen)))
            flips = torch.rand(len(chosen)) < 0.5
            chosen, moves, flips = chosen.to(device), moves.to(device), flips.to(device)
            moved = moved_and_flipped(self.images.pixels[chosen], moves, flips, shift=self.shift)
            yield normalise(moved), self.images.labels[chosen]


def moved_and_flipped(
    pixels: Tensor,  # (batch, channels, height, width)
    moves: Tensor,  # (2, batch), from 0 to 2·shift
    flips: Tensor,  # (batch) bool
    *,
    shift: int,
) -> Tensor:  # as pixels
    """Images shifted by `moves` minus `shift` pixels, black coming in from outside, left and right changed if told."""
    count, channels, height, width = pixels.shape
    device = pixels.device
    padded = F.pad(pixels, (shift,) * 4)
    rows = torch.arange(height, device=device) + moves[0, :, None]  # (batch, height)
    columns = torch.arange(width, device=device).expand(count, width)
    columns = torch.where(flips[:, None], columns.flip(1), columns) + moves[1, :, None]
    image = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def plain_batches(images: Images, count: int, size: int, *, seed: int) -> list[tuple[Tensor, Tensor]]:
    """`count` batches of `size` images as they are, drawn without replacement."""
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed))[: count * size]
    parts = order.to(images.labels.device).split(size)
    return [(normalise(images.pixels[each]), images.labels[each]) for each in parts]


@torch.no_grad()
def accuracy(
    model: nn.Module, images: Images, *, batch_size: int = 100, prepare: Callable[[Tensor], Tensor] = normalise
) -> float:
    """Top-1 accuracy in percent, in evaluation mode, over all the images."""
    model.eval()
    right = 0
    for pixels, labels in zip(images.pixels.split(batch_size), images.labels.split(batch_size), strict=True):
        right += int((model(prepare(pixels)).argmax(1) == labels).sum())
    return 100 * right / len(images.labels)
