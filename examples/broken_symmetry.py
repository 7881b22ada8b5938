"""A symmetry that holds only in part: what a GroupConv of displacement rank 4 finds of it, against what was put in.

The target is a circular convolution plus s convolutions gated by position, so its displacement rank is s. The layer
learns it from noisy pairs of signals; the weight that it ends with tells rank and distance of the target's.

python examples/broken_symmetry.py --picture broken_symmetry.png
"""

import argparse

import torch

import gmcompress as gm

ORDER, RANK = 24, 4


def target(rank: int, strength: float) -> gm.GroupConv:
    """A random layer whose weight has this displacement rank."""
    layer = gm.GroupConv(f"C{ORDER}", 1, 1, radius=3, rank=rank, bias=False)
    for name, tensor in layer.named_parameters():
        torch.nn.init.normal_(tensor, std=strength if name == "filters" else 1)
    return layer.requires_grad_(False)


def learn(truth: gm.GroupConv, *, steps: int, noise: float) -> gm.GroupConv:
    """A layer of rank 4, fitted to signals and their noisy images, with weight decay on what breaks the symmetry."""
    layer = gm.GroupConv(f"C{ORDER}", 1, 1, radius=3, rank=RANK, bias=False)
    broken = {"params": [layer.gates, layer.filters], "weight_decay": 0.03}
    optimiser = torch.optim.AdamW([{"params": [layer.kernel], "weight_decay": 0}, broken], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        signal = torch.randn(64, 1, ORDER)
        wanted = truth(signal) + noise * torch.randn(64, 1, ORDER)
        loss = (layer(signal) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return layer


def draw(path: str, rows: list[tuple[int, float, float]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4, 4))
    for rank in sorted({row[0] for row in rows}):
        points = [(put, found) for each, put, found in rows if each == rank]
        axes.plot(*zip(*points, strict=True), "o-", label=f"rank {rank}")
    axes.plot([0, 1], [0, 1], "k:", linewidth=1)
    axes.set(xlabel="distance put in", ylabel="distance found", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", help="where to draw the distances found against those put in")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for rank in (0, 1, 2, 3):
        for strength in (0.3, 1.0) if rank else (0.0,):
            truth = target(rank, strength)
            layer = learn(truth, steps=20 if args.smoke else 1000, noise=0.05)
            found = gm.displacement_rank(layer.weight, layer.group, tolerance=0.05)
            rows.append((rank, truth.distance(relative=True), layer.distance(relative=True)))
            print(f"displacement rank {rank} -> {found}, relative distance {rows[-1][1]:.3f} -> {rows[-1][2]:.3f}")
    if args.picture:
        draw(args.picture, rows)


if __name__ == "__main__":
    main()
