"""Agreement at equal size: DeiT-tiny compressed to a budget, by this package and by low ranks, without any label.

python benchmarks/transformer.py --data DATA --weights WEIGHTS --budgets 75% 50% --minutes 30
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from comparison import Bench, add_options, compare, print_tables, recipe_of, shared_facts
from competitors import Case
from rich.console import Console
from rows import machine, prepare_device, shown_command
from safetensors.torch import load_file
from torch import Tensor, nn

from gmcompress import GMError

ARCH = "deit_tiny_patch16_224"
PATHS = ("data", "weights", "output", "notes")
COMPETITORS = ["ours", "ours-free", "svd", "svd-planned", "whitened"]  # those that need no BatchNorm
BATCH = 50  # images in a batch that is judged or calibrated on


@dataclass(frozen=True)
class Shuffled:
    """Batches of images without labels, each pass in a new order, every image cropped anew and half of them flipped.

    A crop is a rectangle, each of its sides drawn from `smallest` to 1 of the image's, brought back to the image's size
    bilinearly. The random numbers are torch's global ones, drawn on the CPU; what does not fill the last batch is left
    out.

    >>> [len(each) for each in Shuffled(torch.zeros(10, 3, 8, 8), 4)]
    [4, 4]
    """

    images: Tensor
    batch_size: int
    smallest: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.batch_size <= len(self.images):
            raise GMError(f"a batch has from 1 to {len(self.images)} images here, not {self.batch_size}")
        if not 0 < self.smallest <= 1:
            raise GMError(f"the smallest side of a crop is a share of the image's, not {self.smallest}")

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:  # (batch, 3, height, width)
        for chosen in torch.randperm(len(self.images))[: len(self) * self.batch_size].split(self.batch_size):
            sides = self.smallest + (1 - self.smallest) * torch.rand(len(chosen), 2)
            centres = (2 * torch.rand(len(chosen), 2) - 1) * (1 - sides)
            flips = torch.where(torch.rand(len(chosen)) < 0.5, -1.0, 1.0)
            moves = torch.diag_embed(sides * torch.stack([flips, torch.ones_like(flips)], 1))
            batch = self.images[chosen.to(self.images.device)]
            where = torch.cat([moves, centres[:, :, None]], 2).to(batch)
            grid = F.affine_grid(where, list(batch.shape), align_corners=False)
            yield F.grid_sample(batch, grid, padding_mode="border", align_corners=False)


def load_deit(weights: Path) -> nn.Module:
    """DeiT-tiny in evaluation mode, its weights in float32, every tensor of the file used and none missing.

    Raises:
        GMError: there is no such file, or its tensors are not those of this network.
    """
    import timm

    if not weights.is_file():
        raise GMError(f"there is no file of weights {str(weights)!r}")
    model = timm.create_model(ARCH)
    try:
        model.load_state_dict({name: each.float() for name, each in load_file(weights).items()})
    except RuntimeError as problem:
        said = " ".join(str(problem).split())[:200]
        raise GMError(f"the tensors of {weights.name!r} are not those of {ARCH}: {said}") from None
    return model.eval()


def load_images(data: Path, model: nn.Module) -> tuple[Tensor, Tensor]:  # (n, 3, 224, 224) float32, (n) int64
    """All images of a tar of class folders through timm's evaluation transform at crop_pct 1.0.

    Raises:
        GMError: there is no such file.
    """
    from timm.data import create_dataset, create_transform, resolve_data_config

    if not data.is_file():
        raise GMError(f"there is no file {str(data)!r}; --data is a tar of folders, one for each class")
    config = resolve_data_config({"crop_pct": 1.0}, model=model)
    pairs = list(create_dataset("", root=str(data), transform=create_transform(**config)))
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


@torch.no_grad()
def answers(model: nn.Module, images: Tensor) -> Tensor:  # (n, 3, height, width) -> (n, classes)
    """The logarithms of the probabilities of the classes, for every image, in evaluation mode."""
    model.eval()
    return torch.cat([model(each).log_softmax(1) for each in images.split(BATCH)])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="tar of ImageNet images, folder = class index")
    add("--weights", type=Path, required=True, help="safetensors file of the dense model, in timm's keys")
    add("--split-seed", type=int, default=0, help="draws the half that is judged on")
    add("--samples", type=int, help="images to calibrate on (default: the whole other half)")
    add("--test-images", type=int, help="judge on so many of the half only")
    add("--batch-size", type=int, default=32)
    add(
        "--smallest-crop",
        type=float,
        default=0.5,
        help="smallest side of a crop in training, as a share of the image's",
    )
    add_options(add, competitors=COMPETITORS, budgets=["75%", "50%"])
    parser.set_defaults(output=Path("transformer.jsonl"))
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace, arguments: Sequence[str], notes: Path) -> Bench:
    """Model, both halves of the images and the recipe on the device, and the facts that every row states."""
    device = prepare_device(options.device, threads=options.threads)
    dense = load_deit(options.weights).to(device)
    images, labels = load_images(options.data, dense)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.split_seed))
    first, second = order[: len(images) // 2], order[len(images) // 2 :][: options.test_images]
    drawn = torch.randperm(len(first), generator=torch.Generator().manual_seed(options.calibration_seed))
    unlabelled = images[first[drawn[: options.samples]]].to(device)
    judged, truth = images[second].to(device), labels[second].to(device)
    folder = notes / f"{ARCH}_{len(unlabelled)}_{options.split_seed}_{options.calibration_seed}"
    case = Case(dense, unlabelled.split(BATCH), folder, options.calibration_seed)
    recipe = recipe_of(options, task=0.0)
    wanted = answers(dense, judged)

    def judge(model: nn.Module) -> Mapping[str, float]:
        found = answers(model, judged)
        classes, divergence = found.argmax(1), F.kl_div(found, wanted, log_target=True, reduction="batchmean")
        return {
            "agreement": share(classes == wanted.argmax(1)),
            "top1": share(classes == truth),
            "divergence": round(float(divergence), 4),  # in nats
        }

    facts = {
        "arch": ARCH,
        "split_seed": options.split_seed,
        "batch_size": options.batch_size,
        "smallest_crop": options.smallest_crop,
        "test_images": len(judged),
        **shared_facts(options, recipe, case),
        "command": shown_command("transformer.py", {name: getattr(options, name) for name in PATHS}, arguments),
        **machine(device, amp=options.amp, threads=options.threads),
    }
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    loader = Shuffled(unlabelled, options.batch_size, options.smallest_crop)
    where = (facts, console, options.output, options.resume)
    return Bench("transformer", case, judge, loader, (), recipe, options.seeds, *where)


def share(right: Tensor) -> float:
    """How many are true, in percent.

    >>> share(torch.tensor([True, False]))
    50.0
    """
    return 100 * int(right.sum()) / len(right)


def main(arguments: Sequence[str]) -> int:
    """Measure the dense model, then every competitor at every budget."""
    options = parse(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            bench = prepare(options, arguments, options.notes or Path(scratch))
            failed = compare(bench, options.budgets, options.competitors)
    except GMError as problem:
        print(f"transformer.py: {problem}", file=sys.stderr)
        return 2
    top1 = bench.rows[0]["beside"]["top1"]["raw"][0]
    images = f"{bench.facts['test_images']:,} images (dense top-1 {top1:.1f} %)"
    print_tables(bench, f"{ARCH}, agreement with the dense top-1 in percent on {images},")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
