"""The data of the tables: CIFAR-10 in colour and grey, and the variations on MNIST, made by their published recipes.

Source of the recipes: Larochelle, Erhan, Courville, Bergstra and Bengio 2007, section 3; their files are not used.
"""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from cifar import Images, load_images
from torch import Generator, Tensor

from gmcompress import GMError

SIDE = 28
TRAIN, TEST = 12_000, 50_000  # images of a variation on MNIST
RECTANGLES = 1_200  # of which the training set of that task consists
SCENES = 20  # photographs that the backgrounds are cut from
PLAIN = 10.0  # a background whose grey values deviate less than this, of 255, is drawn anew
GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Task:
    """Images to learn from and to be judged on; `made` says how, and where that departs from what was published."""

    name: str
    train: Images
    test: Images
    classes: int
    made: str

    def held_out(self, count: int) -> Task:
        """The same judged on the last `count` training images, which are then not learned from: to choose settings."""
        if not 0 < count < len(self.train.labels):
            raise GMError(f"{self.name} has {len(self.train.labels)} training images; {count} cannot be held out")
        order = torch.randperm(len(self.train.labels), generator=Generator().manual_seed(0))
        parts = [Images(self.train.pixels[each], self.train.labels[each]) for each in order.tensor_split([-count])]
        return Task(self.name, *parts, self.classes, f"{self.made}; judged on {count} training images held out")

    def first(self, count: int) -> Task:
        """The same with `count` random training images to learn from, always the same ones."""
        order = torch.randperm(len(self.train.labels), generator=Generator().manual_seed(1))[:count]
        kept = Images(self.train.pixels[order], self.train.labels[order])
        return Task(self.name, kept, self.test, self.classes, f"{self.made}; learned from {len(order)} of them")

    def to(self, device: torch.device) -> Task:
        """The same on another device."""
        return Task(self.name, self.train.to(device), self.test.to(device), self.classes, self.made)


@dataclass(frozen=True)
class Sources:
    """What tasks are made from, each read when it is asked for."""

    cifar: Callable[[str], Images]  # "train" or "validation"
    digits: Callable[[], Images]  # all of MNIST, training images first
    scenes: Callable[[], list[Tensor]]  # uint8 (height, width) each
    sizes: tuple[int, int] = (TRAIN, TEST)


def from_folder(data: Path, cache: Path | None) -> Sources:
    """`cifar10`/train.tar and validation.tar, `mnist`/mnist.npz, `imagenet_sample`/validation.tar in a folder."""
    return Sources(
        lambda split: load_images(data / "cifar10", split, cache=cache),
        lambda: _digits(data / "mnist" / "mnist.npz"),
        lambda: _scenes(data / "imagenet_sample" / "validation.tar"),
    )


def made_up(count: int) -> Sources:
    """Random images of the right shapes, `count` to learn from and as many to judge: to see that all runs."""

    def images(number: int, *shape: int) -> Images:
        generator = Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (number, *shape), generator=generator, dtype=torch.uint8)
        return Images(pixels, torch.arange(number) % 10)

    scene = images(1, 64, 64).pixels[0]
    return Sources(
        lambda _: images(count, 3, 32, 32), lambda: images(2 * count, 1, SIDE, SIDE), lambda: [scene], (count, count)
    )


def _digits(path: Path) -> Images:
    if not path.is_file():
        raise GMError(f"there is no file {str(path)!r}; it holds train_x, train_y, test_x and test_y of MNIST")
    with np.load(path, allow_pickle=False) as file:
        pixels, labels = (np.concatenate([file[f"{part}_{key}"] for part in ("train", "test")]) for key in "xy")
    if len(pixels) != 70_000:
        raise GMError(f"{path.name} holds {len(pixels)} images, and MNIST 70,000")
    return Images(torch.from_numpy(pixels).reshape(-1, 1, SIDE, SIDE), torch.from_numpy(labels).long())


def _scenes(path: Path) -> list[Tensor]:
    """Every fiftieth image of a tar, in grey."""
    from PIL import Image

    if not path.is_file():
        raise GMError(f"there is no file {str(path)!r}; backgrounds are cut from its photographs")
    with tarfile.open(path) as tar:
        members = sorted((each for each in tar if each.isfile()), key=lambda each: each.name)
        found = []
        for member in members[:: max(1, len(members) // SCENES)][:SCENES]:
            file = tar.extractfile(member)
            assert file is not None
            found.append(torch.from_numpy(np.array(Image.open(io.BytesIO(file.read())).convert("L"))))
    return found


def rotated(pixels: Tensor, angles: Tensor) -> Tensor:  # uint8 or float (n, c, side, side), (n) -> same
    """Images turned about their middle by angles in radians, bilinear, black coming in from outside.

    >>> corner = torch.zeros(1, 1, 4, 4)
    >>> corner[..., 0, 1] = 1
    >>> rotated(corner, torch.tensor([math.pi / 2])).round()[0, 0].nonzero().tolist()
    [[2, 0]]
    """
    cosine, sine = torch.cos(angles), torch.sin(angles)
    zero = torch.zeros_like(cosine)
    turns = torch.stack([cosine, -sine, zero, sine, cosine, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(turns, list(pixels.shape), align_corners=False)
    found = F.grid_sample(pixels.float(), grid.to(pixels.device), align_corners=False)
    return found.to(pixels.dtype) if pixels.is_floating_point() else found.round().clamp(0, 255).to(pixels.dtype)


def _turned(pixels: Tensor, generator: Generator) -> Tensor:
    """Each turned by an angle of its own, uniform on the circle."""
    angles = 2 * math.pi * torch.rand(len(pixels), generator=generator)
    return torch.cat([rotated(*each) for each in zip(pixels.split(5000), angles.split(5000), strict=True)])


def _backgrounds(scenes: list[Tensor], count: int, generator: Generator) -> Tensor:  # uint8 (count, 1, 28, 28)
    """Patches at random places of random scenes, none of them plain."""
    found: list[Tensor] = []
    for scene in scenes:
        patches = scene.unfold(0, SIDE, 1).unfold(1, SIDE, 1)  # (rows, columns, 28, 28), a view
        share = math.ceil(count / len(scenes))
        kept: list[Tensor] = []
        for _ in range(50):
            rows, columns = (torch.randint(size, (share,), generator=generator) for size in patches.shape[:2])
            drawn = patches[rows, columns]
            kept.append(drawn[drawn.float().std((1, 2)) >= PLAIN])
            if sum(map(len, kept)) >= share:
                break
        found.append(torch.cat(kept)[:share])
    every = torch.cat(found)
    if len(every) < count:
        raise GMError(f"only {len(every)} of {count} backgrounds are not plain; give livelier photographs")
    return every[torch.randperm(len(every), generator=generator)[:count], None]


def variation(sources: Sources, name: str) -> Task:
    """MNIST "rotated", with "noise", or with "rotated-backgrounds": 12,000 images to learn from, 50,000 to judge."""
    generator = Generator().manual_seed(2007)
    digits, (train, test) = sources.digits(), sources.sizes
    order = torch.randperm(len(digits.labels), generator=generator)[: train + test]
    pixels, labels = digits.pixels[order], digits.labels[order]
    made = "12,000 and 50,000 of all 70,000 digits by a random split of ours (validation images are learned from too)"
    if name != "noise":
        pixels = _turned(pixels, generator)
        made += "; angles uniform on the circle, bilinear"
    if name == "noise":
        pixels = pixels.maximum(torch.randint(0, 256, pixels.shape, generator=generator, dtype=torch.uint8))
        made += "; every pixel the larger of digit and uniform noise, uncorrelated"
    if name == "rotated-backgrounds":
        pixels = pixels.maximum(_backgrounds(sources.scenes(), len(pixels), generator))
        made += (
            f"; every pixel the larger of digit and a patch, of standard deviation ≥ {PLAIN:g} of 255, of {SCENES} "
            "photographs of ImageNet in place of the published ones"
        )
    parts = (Images(*each) for each in zip(pixels.split([train, test]), labels.split([train, test]), strict=True))
    return Task(name, *parts, 10, made)


def rectangles(sources: Sources) -> Task:
    """Outlines of rectangles, white on black: is it taller than wide? Sides differ by at least 3 pixels."""
    generator = Generator().manual_seed(2007)
    train = min(RECTANGLES, sources.sizes[0])
    count = train + sources.sizes[1]
    sides = torch.randint(1, SIDE + 1, (2 * count, 2), generator=generator)
    sides = sides[(sides[:, 0] - sides[:, 1]).abs() >= 3][:count]
    corner = (torch.rand(count, 2, generator=generator) * (SIDE + 1 - sides)).long()
    last = corner + sides - 1
    place = torch.arange(SIDE)
    inside = [(place >= corner[:, axis, None]) & (place <= last[:, axis, None]) for axis in (0, 1)]
    edge = [(place == corner[:, axis, None]) | (place == last[:, axis, None]) for axis in (0, 1)]
    drawn = inside[0][:, :, None] & inside[1][:, None] & (edge[0][:, :, None] | edge[1][:, None])
    pixels, labels = (255 * drawn[:, None]).to(torch.uint8), (sides[:, 0] > sides[:, 1]).long()
    parts = (Images(*each) for each in zip(pixels.tensor_split([train]), labels.tensor_split([train]), strict=True))
    return Task("rectangles", *parts, 2, "1,200 and 50,000 images drawn anew; sides from 1 to 28 pixels")


def cifar(sources: Sources, name: str) -> Task:
    """CIFAR-10, all 50,000 and 10,000 images, in colour or "cifar-grey"."""
    parts = [sources.cifar(split) for split in ("train", "validation")]
    if name == "cifar-grey":
        parts = [Images(_grey(each.pixels), each.labels) for each in parts]
        return Task(name, *parts, 10, "grey is 0.299 R + 0.587 G + 0.114 B")
    return Task(name, *parts, 10, "all images")


def _grey(pixels: Tensor) -> Tensor:  # uint8 (n, 3, h, w) -> uint8 (n, 1, h, w)
    found = sum(share * pixels[:, channel].float() for channel, share in enumerate(GREY))
    assert isinstance(found, Tensor)
    return found.round().to(torch.uint8)[:, None]


def load_task(sources: Sources, name: str) -> Task:
    """The task of that name, always the same images."""
    if name == "rectangles":
        return rectangles(sources)
    return (cifar if name.startswith("cifar") else variation)(sources, name)
