"""Accuracy at equal size: a CIFAR ResNet compressed to a budget by this package and by every control, tuned alike.

python benchmarks/accuracy.py --data DATA --weights WEIGHTS --budgets 50% 35% 25% --epochs 1 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from cifar import ARCHITECTURES, Images, TrainLoader, accuracy, load_images, load_resnet, plain_batches
from comparison import Bench, add_options, compare, print_tables, recipe_of, shared_facts
from competitors import COMPETITORS, Case
from rich.console import Console
from rows import machine, prepare_device, shown_command
from torch import nn

from gmcompress import GMError

PATHS = ("data", "weights", "output", "cache", "notes")
BATCH = 250  # calibration images in a batch
STILL = 40  # batches of that size for the recalibration of BatchNorm


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train.tar and validation.tar")
    add("--weights", type=Path, required=True, help="safetensors file of the dense model")
    add("--arch", choices=ARCHITECTURES, default="resnet20")
    add("--samples", type=int, default=2000, help="training images to calibrate on")
    add("--images-per-epoch", type=int, help="random images in one epoch (default: all)")
    add("--test-images", type=int, help="random images to judge on (default: all 10,000)")
    add("--batch-size", type=int, default=128)
    add("--cache", type=Path, help="decoded images are kept beside this path")
    add_options(add, competitors=list(COMPETITORS), budgets=["50%", "25%"])
    parser.set_defaults(output=Path("accuracy_budgets.jsonl"))
    return parser.parse_args(arguments)


def subset(images: Images, count: int | None) -> Images:
    """Some images, always the same, or all where `count` is None."""
    if count is None:
        return images
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(0))[:count]
    return Images(images.pixels[order], images.labels[order])


def calibration(images: Images, samples: int, *, seed: int) -> list[torch.Tensor]:
    """Training images as they are, in batches of 250, the last one smaller where they do not go up."""
    ((pixels, _),) = plain_batches(images, 1, samples, seed=seed)
    return list(pixels.split(BATCH))


def prepare(options: argparse.Namespace, arguments: Sequence[str], notes: Path) -> Bench:
    """Model, images and recipe on the device, and the facts that every row states."""
    device = prepare_device(options.device, threads=options.threads)
    train, test = (load_images(options.data, each, cache=options.cache).to(device) for each in ("train", "validation"))
    test = subset(test, options.test_images)
    dense = load_resnet(options.arch, options.weights).to(device)
    loader = TrainLoader(train, batch_size=options.batch_size, images_per_epoch=options.images_per_epoch)
    data = calibration(train, options.samples, seed=options.calibration_seed)
    folder = notes / f"{options.arch}_{options.samples}_{options.calibration_seed}"
    case = Case(dense, data, folder, options.calibration_seed)
    recipe = recipe_of(options)

    def judge(model: nn.Module) -> Mapping[str, float]:
        return {"accuracy": accuracy(model, test)}

    facts = {
        "arch": options.arch,
        "images_per_epoch": loader.images_per_epoch,
        "batch_size": options.batch_size,
        "test_images": len(test.labels),
        **shared_facts(options, recipe, case),
        "command": shown_command("accuracy.py", {name: getattr(options, name) for name in PATHS}, arguments),
        **machine(device, amp=options.amp, threads=options.threads),
    }
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    still = plain_batches(train, STILL, BATCH, seed=options.calibration_seed)
    where = (facts, console, options.output, options.resume)
    return Bench("accuracy", case, judge, loader, still, recipe, options.seeds, *where)


def main(arguments: Sequence[str]) -> int:
    """Measure the dense model, then every competitor at every budget."""
    options = parse(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            bench = prepare(options, arguments, options.notes or Path(scratch))
            failed = compare(bench, options.budgets, options.competitors)
    except GMError as problem:
        print(f"accuracy.py: {problem}", file=sys.stderr)
        return 2
    images = f"{bench.facts['test_images']:,} test images of CIFAR-10"
    print_tables(bench, f"{options.arch}, top-1 accuracy in percent on {images},")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
