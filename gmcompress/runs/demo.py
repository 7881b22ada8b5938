"""The demo: a small network trained, compressed, fine-tuned and reported on the handwritten digits of scikit-learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ..data import make_loaders
from ..files import usable
from ..freezing import freeze
from ..pipeline import compress, tuned_result
from ..reporting import Report, Result
from ..tuning import Progress as TrainingProgress
from ..tuning import Recipe, fine_tune
from .compressing import shown_settings, write_model, write_reports
from .folders import make_folder
from .networks import Progress, accuracy, build, example_inputs, find_device, silent
from .settings import Settings
from .training import with_ranks

DEMO = {
    "model": "resnet18",
    "model_kwargs": ("channels=(32, 64, 128, 256)",),
    "num_classes": 10,
    "in_chans": 1,
    "dataset": "digits",
    "rank": 1,
    "batch_size": 64,
    "epochs": 8,
    "lr": 0.05,
}
DENSE_EPOCHS, DENSE_LR = 8, 0.05
SMOKE = {"model": "test_resnet", "model_kwargs": (), "img_size": 8, "group": "C4xC4", "epochs": 1}


def demo_run(folder: str | Path, *, smoke: bool = False, seed: int = 0, progress: Progress = silent) -> Report:
    """Train a small timm network on 1,437 digits, compress it, fine-tune it against itself, and judge on 360 others.

    Latency is that of the network frozen for one image, as `gmcompress.freeze` does by measurement. Nothing is
    downloaded. The folder gets model/, report.json and report.html, over those of an earlier demo. `smoke` makes the
    steps so short that only their working is shown. Runs on one thread: the layers are too small to be shared, and its
    numbers then do not depend on how many processors there are.

    Raises:
        GMError: scikit-learn is missing, or the folder cannot be written.
    """
    settings = Settings.read(DEMO | (SMOKE if smoke else {}) | {"seed": seed})
    place = usable(folder)
    make_folder(place)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = _demonstrate(settings, DENSE_EPOCHS if not smoke else 1, progress)
    finally:
        torch.set_num_threads(threads)
    write_model(result, place, settings)
    write_reports(result.report, place)
    return result.report


def _demonstrate(settings: Settings, dense_epochs: int, progress: Progress) -> Result:
    """The demo, all but the writing."""
    dense = build(settings, trained=False).to(find_device(settings.device))
    training, validation = make_loaders(settings.images, dense)
    scratch = Recipe(epochs=dense_epochs, lr=DENSE_LR, warmup=1, recalibrate=False, seed=settings.seed)
    told = _told("training the dense network", dense_epochs, progress)
    dense, _ = fine_tune(dense, training, scratch, progress=told)
    result = compress(dense, inputs=example_inputs(settings.images, dense), **settings.compression())
    recipe = settings.recipe()
    told = _told("fine-tuning the compressed one", recipe.epochs, progress)
    tuned, history = fine_tune(result.model, training, recipe, teacher=dense, progress=told)
    final = freeze(with_ranks(tuned_result(result, tuned, history), progress))
    networks = {"dense": dense, "compressed": result.model, "tuned": tuned, "frozen": final.model}
    measured = {name: accuracy(each, validation).top1 for name, each in networks.items()}
    report = replace(final.report, accuracy=measured, settings=shown_settings("demo", settings))
    return replace(final, report=report)


def _told(what: str, epochs: int, progress: Progress) -> TrainingProgress:
    """Progress over all epochs of a training as one bar."""

    def told(epoch: int, step: int, steps: int, loss: float) -> None:
        progress(what, epoch * steps + step, epochs * steps, f"loss {loss:.3f}")

    return told
