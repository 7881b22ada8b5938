"""Digits turned by any angle: a network on SE(2) against a plain CNN of as many parameters, both from scratch.

Both are trained on handwritten digits turned by random angles of up to --turn degrees, 0 for upright ones, and tested
at every angle. What a 6 is and what a 9 then only strokes can tell.

python examples/rotated_digits.py --turn 0 --picture rotated_digits.png   a few minutes on two cores
"""

import argparse
import math

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import gmcompress as gm
from gmcompress.motions import move

SIDE, ANGLES = 20, range(0, 360, 15)


def digits(count: int) -> list[Tensor]:
    """Images of 20 × 20 pixels with a dark border, and labels, three quarters to train on."""
    data = load_digits()
    images = torch.tensor(data.images[:count] / 16, dtype=torch.float32)[:, None]
    images = nn.functional.interpolate(nn.functional.pad(images, (1, 1, 1, 1)), SIDE, mode="bicubic")
    return train_test_split(images, torch.tensor(data.target[:count]), test_size=0.25, random_state=0)


def plain(parameters: int) -> nn.Module:
    """A CNN with layers as those of the network on SE(2), as wide as its parameters allow."""
    steps: list[nn.Module] = []
    width = int((math.sqrt(35**2 + 4 * 25 * parameters) - 35) / 50)  # 25 width² + 35 width is about what it has
    for channels, side in ((1, 2), (width, 1)):
        steps += [nn.Conv2d(channels, width, 5, padding=2), nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(side)]
    return nn.Sequential(*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def train(model: nn.Module, images: Tensor, labels: Tensor, *, turn: float, epochs: int) -> nn.Module:
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(64):
            angle = math.radians(turn) * (2 * float(torch.rand(())) - 1)
            loss = nn.functional.cross_entropy(model(move(images[part], angle)), labels[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracies(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """In percent, at every angle."""
    turned = (move(images, math.radians(angle)) for angle in ANGLES)
    return [100 * float((model(each).argmax(1) == labels).float().mean()) for each in turned]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turn", type=float, default=180, help="the largest angle in training, in degrees")
    parser.add_argument("--picture", help="where to draw accuracy by angle")
    parser.add_argument("--smoke", action="store_true", help="a few images and one epoch, to see that it runs")
    args = parser.parse_args()
    torch.manual_seed(0)
    train_images, test_images, train_labels, test_labels = digits(128 if args.smoke else 1797)
    ours = gm.LieCNN("SE(2)", 1, 10, samples=8, channels=(12, 24), separable="separable", shrink=(2, 1))
    size = sum(each.numel() for each in ours.parameters())
    rows = {}
    for name, model in (("SE(2)", ours), ("plain CNN", plain(size))):
        train(model, train_images, train_labels, turn=args.turn, epochs=1 if args.smoke else 30)
        rows[name] = accuracies(model, test_images, test_labels)
        mean, least, count = sum(rows[name]) / len(ANGLES), min(rows[name]), sum(p.numel() for p in model.parameters())
        print(f"{name:10}{count:7,} parameters: {mean:6.2f} % over all angles, {least:6.2f} % at the worst")
    if args.picture:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(6, 3))
        for name, row in rows.items():
            axes.plot(ANGLES, row, "o-", label=name)
        axes.set(xlabel="angle, degrees", ylabel="accuracy, %", ylim=(0, 100))
        axes.legend()
        figure.savefig(args.picture, bbox_inches="tight")


if __name__ == "__main__":
    main()
