"""Digits turned by any angle: a network on SE(2) against a plain CNN of as many parameters, both from scratch.

Trained on handwritten digits turned by random angles of up to --turn degrees, tested at all angles, seen or not:
python examples/rotated_digits.py --turn 30 --picture rotated_digits.png
"""

import argparse
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F  # noqa: N812
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import gmcompress as gm
from gmcompress.motions import move


def digits(count: int) -> list[Tensor]:
    data = load_digits()
    images = F.pad(torch.tensor(data.images[:count] / 16, dtype=torch.float32)[:, None], (1, 1, 1, 1))
    images = F.interpolate(images, 16, mode="bicubic")
    return train_test_split(images, torch.tensor(data.target[:count]), test_size=0.25, random_state=0)


def plain(width: int) -> nn.Module:
    steps: list[nn.Module] = []
    for before, after, pool in ((1, width, 2), (width, 2 * width, 2), (2 * width, 4 * width, 1)):
        steps += [nn.Conv2d(before, after, 5, padding=2), nn.BatchNorm2d(after), nn.ReLU(), nn.AvgPool2d(pool)]
    return nn.Sequential(*steps, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def size(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def train(model: nn.Module, images: Tensor, labels: Tensor, *, turn: float, epochs: int) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=0.003)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in range(epochs):
        for part in torch.randperm(len(images))[: len(images) // 32 * 32].split(32):
            turned = move(images[part], math.radians(turn) * (2 * float(torch.rand(())) - 1))
            loss = F.cross_entropy(model(turned), labels[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turn", type=float, default=30, help="the largest angle in training, in degrees")
    parser.add_argument("--picture", default="", help="where to draw accuracy by angle")
    parser.add_argument("--smoke", action="store_true", help="few images, one epoch")
    args = parser.parse_args()
    torch.manual_seed(0)
    angles = range(0, 360, 15)
    images, test_images, labels, test_labels = digits(128 if args.smoke else 1797)
    kinds = {"samples": 8, "sampling": "random", "separable": "separable", "head": "max"}
    models = {"SE(2)": gm.LieCNN("SE(2)", 1, 10, channels=(8, 16, 32), shrink=(2, 2, 1), **kinds)}
    models["plain CNN"] = min(map(plain, range(1, 20)), key=lambda each: abs(size(each) - size(models["SE(2)"])))
    rows = {}
    for name, model in models.items():
        train(model, images, labels, turn=args.turn, epochs=1 if args.smoke else 12)
        model.eval().requires_grad_(False)
        found = [model(move(test_images, math.radians(angle))).argmax(1) == test_labels for angle in angles]
        row = rows[name] = [100 * float(each.float().mean()) for each in found]
        print(f"{name}: {size(model):,} parameters, {sum(row) / len(row):.1f} % on average, {min(row):.1f} % at worst")
    if args.picture:
        plt.plot(angles, list(zip(*rows.values(), strict=True)), "o-", label=list(rows))
        plt.gca().set(xlabel="angle, degrees", ylabel="accuracy, %", ylim=(0, 100))
        plt.legend()
        plt.savefig(args.picture, bbox_inches="tight")


if __name__ == "__main__":
    main()
