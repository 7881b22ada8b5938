"""The networks of a run: dense ones from timm's registry, compressed ones from their folders, and their accuracy."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Images, input_size
from ..errors import GMError, nearest_names
from ..files import usable
from ..forward import run, shell
from ..storage import describe_folder, load
from .settings import Settings, read_yaml

Progress = Callable[[str, int, int, str], None]  # what, done, of, note

INHERITED = ("model", "pretrained", "checkpoint", "num_classes", "in_chans", "model_kwargs")  # and those of Images


def silent(what: str, done: int, of: int, note: str) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Accuracy:
    """Shares of correct answers over a whole data set, in percent."""

    top1: float
    top5: float
    images: int


def find_device(name: str | None) -> torch.device:
    """The device asked for, or the first GPU where there is one, else the CPU; in a launched process its own GPU.

    Raises:
        GMError: torch does not know the device, or has no such GPU.

    >>> find_device("cpu")
    device(type='cpu')
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise GMError(f"device {name!r} is unknown; give cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise GMError(f"device {name!r} is not supported; give cpu, cuda or cuda:1")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise GMError(f"device {name!r} was asked for, but torch finds no GPU here")
    number = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise GMError(f"device {name!r} was asked for, but there are {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(number)  # accelerate goes where this points
    return torch.device("cuda", number)


def is_main() -> bool:
    """Whether this process is the only one, or the first of those that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


def build(settings: Settings, *, trained: bool = True) -> nn.Module:
    """The dense network, with its trained weights, or without, where only its shape matters.

    Raises:
        GMError: no or an unknown model, options that do not fit, weights that are missing or of another network.
    """
    import timm

    name, options = settings.model, model_options(settings)
    if not name:
        raise GMError("which network? give the name of a timm model, such as resnet18, as model")
    if ":" not in name and not timm.is_model(name):
        raise GMError(f"timm knows no model {name!r}; the nearest are {nearest_names(name, timm.list_models())}")
    if trained and settings.pretrained == bool(settings.checkpoint):
        which = "both pretrained and a checkpoint were given" if settings.pretrained else "it has no trained weights"
        raise GMError(f"{name}: {which}; give either pretrained or the file of its weights as checkpoint")
    if trained and settings.pretrained:
        _check_classifier(name, settings.num_classes)
    torch.manual_seed(settings.seed)
    try:
        model = timm.create_model(name, pretrained=trained and settings.pretrained, **options)
    except Exception as problem:  # networks refuse options, and downloads fail, in many ways
        said = " ".join(str(problem).split())[:300]
        raise GMError(f"timm cannot build {name!r} with {options}: {type(problem).__name__}: {said}") from problem
    if trained and settings.checkpoint:
        _load_weights(model, settings.checkpoint, name)
    return model.eval()


def model_options(settings: Settings) -> dict[str, Any]:
    """The arguments of `timm.create_model`, besides name and weights.

    >>> model_options(Settings(num_classes=10, model_kwargs=("channels=(16, 32, 64, 128)",)))
    {'channels': (16, 32, 64, 128), 'num_classes': 10}
    """
    import timm

    options: dict[str, Any] = {}
    for each in settings.model_kwargs:
        key, found, text = each.partition("=")
        if not found or not key.isidentifier():
            raise GMError(f"an option of a model is KEY=VALUE, not {each!r}")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    options |= {
        name: getattr(settings, name) for name in ("num_classes", "in_chans") if getattr(settings, name) is not None
    }
    config = timm.get_pretrained_cfg(settings.model) if settings.model and ":" not in settings.model else None
    if settings.images.img_size and config is not None and config.fixed_input_size:
        options["img_size"] = settings.images.img_size
    return options


def _check_classifier(name: str, wanted: int | None) -> None:
    import timm

    config = None if ":" in name else timm.get_pretrained_cfg(name)
    if config is not None and wanted not in (None, config.num_classes):
        raise GMError(
            f"the pretrained {name} knows {config.num_classes} classes, so with num_classes={wanted} its classifier "
            "would be random; train the dense network on your classes first and give its weights as checkpoint"
        )


def _load_weights(model: nn.Module, file: str, name: str) -> None:
    from timm.models import load_checkpoint

    if not usable(file).is_file():
        raise GMError(f"the checkpoint {file} does not exist")
    try:
        load_checkpoint(model, file)
    except Exception as problem:  # truncated, foreign, or of another network
        lines = [line.strip() for line in str(problem).split("\n") if line.strip()]
        said = (lines[1] if len(lines) > 1 else lines[0] if lines else type(problem).__name__)[:300]
        raise GMError(f"the checkpoint {file} does not fit {name}: {said}") from problem


def compressed_folder(place: str) -> Path:
    """The folder of the model itself in the output of a run, or the one given.

    Raises:
        GMError: neither holds a compressed model.
    """
    given = usable(place)
    for each in (given, given / "model"):
        if (each / "gmcompress.json").is_file():
            return each
    raise GMError(f"{place} holds no compressed model: no gmcompress.json there, nor in {given / 'model'}")


def load_compressed(settings: Settings) -> nn.Module:
    """The compressed network of a folder, built by its own account, or on `model` where the folder gives none."""
    assert settings.compressed is not None
    folder = compressed_folder(settings.compressed)
    source = describe_folder(folder)["source"]
    return load(folder, build(settings, trained=False) if source is None and settings.model else None)


def with_inherited(given: dict[str, Any]) -> dict[str, Any]:
    """Settings on network and images that the run which made a compressed folder had, unless given anew."""
    place = given.get("compressed")
    if not place:
        return given
    folder = compressed_folder(place)
    for each in (folder.parent, folder):
        if (each / "args.yaml").is_file():
            old = read_yaml(each / "args.yaml")
            wanted = {*INHERITED, *(each.name for each in fields(Images))}
            if {"model", "pretrained", "checkpoint"} & set(given):
                wanted -= {"pretrained", "checkpoint"}  # other weights were asked for
            return {name: value for name, value in old.items() if name in wanted} | given
    return given


def example_inputs(
    images: Images, model: nn.Module, *, batch_size: int = 1
) -> Tensor:  # (batch, channels, height, ...)
    """Random images of the size, device and dtype that a model takes; the same in every run."""
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(batch_size, *input_size(images, model), generator=generator)
    return found.to(device=first.device, dtype=first.dtype)


def accuracy(
    model: nn.Module, loader: Iterable[Any], *, progress: Progress = silent, what: str = "validating"
) -> Accuracy:
    """Top-1 and top-5 accuracy over everything that a loader gives; the model is left as it is.

    With fewer than five classes, top-5 counts all of them.

    Raises:
        GMError: the loader is empty, the model does not run on its batches, or a label is no class of the model.

    >>> accuracy(nn.Linear(4, 2), [(torch.zeros(3, 4), torch.tensor([0, 0, 1]))]).top5
    100.0
    """
    ready = shell(model, private=True)
    device = next(model.parameters()).device
    total, of = 0, len(loader)  # type: ignore[arg-type]
    hits = torch.zeros(2, dtype=torch.int64)
    for step, (inputs, labels) in enumerate(loader):
        logits = run(ready, inputs.to(device, non_blocking=True))
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise GMError("accuracy needs a classifier, whose output is one row of logits for each image")
        if int(labels.max()) >= logits.shape[1]:
            raise GMError(f"a label is {int(labels.max())}, but the model has {logits.shape[1]} classes")
        best = logits.float().topk(min(5, logits.shape[1])).indices.cpu()
        found = best == labels[:, None]
        hits += torch.stack([found[:, 0].sum(), found.any(1).sum()])
        total += len(labels)
        progress(what, step + 1, of, f"top-1 {100 * int(hits[0]) / total:.2f} %")
    if not total:
        raise GMError("the loader is empty: it gave no batch")
    return Accuracy(100 * int(hits[0]) / total, 100 * int(hits[1]) / total, total)
