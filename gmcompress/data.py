"""Images in batches: whatever timm reads, and the handwritten digits that come with scikit-learn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sized
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from .errors import GMError
from .layers import GMConv2d

DIGITS = "digits"
DIGITS_SIZE = 32  # pixels a side, unless img_size says otherwise
CALIBRATION_BATCH = 32  # images at most: the inputs of all layers are held at once
TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("validation", "val", "valid", "eval", "evaluation", "test")
BY_NAME = ("hfds/", "hfids/", "tfds/", "wds/", "torch/")  # data sets that timm finds by name, in folders of their own
FOLDERS = ("", "folder", "imagefolder", "image_folder")


@dataclass(frozen=True)
class Images:
    """Where images come from and how they become batches; the names are timm's flags, None is "as the model says".

    `dataset` is "" for a folder of class folders or a tar of them at `data_dir`, a name such as "hfds/..." or
    "torch/cifar10" that timm knows, or "digits". A folder may hold its splits as folders or as tars ("train.tar").
    """

    dataset: str = ""
    data_dir: str | None = None
    train_split: str = "train"
    val_split: str = "validation"
    dataset_download: bool = False
    class_map: str = ""
    batch_size: int = 128
    workers: int = 2
    img_size: int | None = None
    use_test_size: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    no_aug: bool = False
    train_crop_mode: str | None = None
    scale: tuple[float, ...] | None = None
    ratio: tuple[float, ...] | None = None
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    aa: str | None = None
    train_interpolation: str = "random"
    reprob: float = 0.0
    remode: str = "pixel"
    recount: int = 1

    def __post_init__(self) -> None:
        for key, least in (("batch_size", 1), ("workers", 0), ("img_size", 1), ("recount", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise GMError(f"{key} must be at least {least}, not {value}")
        for key in ("hflip", "vflip", "reprob"):
            if not 0 <= getattr(self, key) <= 1:
                raise GMError(f"{key} is a probability, not {getattr(self, key)}")
        for key in ("scale", "ratio"):
            pair = getattr(self, key)
            if pair is not None and not (len(pair) == 2 and 0 < pair[0] <= pair[1]):
                raise GMError(f"{key} is a pair from small to large, not {pair}")
        if not (self.by_name or self.dataset.lower() in (*FOLDERS, DIGITS)):
            raise GMError(
                f"dataset {self.dataset!r} is unknown: leave it out for a folder or tar at data_dir, or give "
                f"{DIGITS!r} or a name that begins with {', '.join(BY_NAME)}"
            )

    @property
    def by_name(self) -> bool:
        """Whether timm finds the data set by its name."""
        return self.dataset.lower().startswith(BY_NAME)


def input_size(images: Images, model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the batches that a model gets.

    >>> input_size(Images(dataset="digits"), nn.Sequential(nn.Conv2d(1, 8, 3)))
    (1, 32, 32)
    """
    return _config(images, model)["input_size"]


def make_loaders(images: Images, model: nn.Module) -> tuple[DataLoader, DataLoader]:
    """The loaders of training, shuffled and augmented, and of validation, with one numbering of the classes.

    Raises:
        GMError: as `make_loader`; or the two splits are the same images, or validation has classes of its own.
    """
    if images.dataset == DIGITS:
        return make_loader(images, model, training=True), make_loader(images, model)
    splits = (images.train_split, images.val_split)
    places: tuple[Any, ...] = splits if images.by_name else tuple(find_split(images.data_dir, each) for each in splits)
    if places[0] == places[1]:
        raise GMError(
            f"training and validation would read the same images, {places[0]}; data_dir needs a folder that holds "
            "both, such as train/ and validation/ or train.tar and validation.tar"
        )
    train = _dataset(images, model, training=True)
    index = class_index(train)
    _check_classes(index, model, str(places[0]))
    validation = _dataset(images, model, training=False)
    own = class_index(validation)
    if index is not None and own is not None and index != own:
        foreign = sorted(set(own) - set(index))
        if foreign:
            raise GMError(f"{places[1]} has classes that {places[0]} has not: {', '.join(map(str, foreign[:3]))}")
        validation = _dataset(images, model, training=False, class_map=index)
    return _loader(train, images, model, training=True), _loader(validation, images, model, training=False)


def make_loader(images: Images, model: nn.Module, *, training: bool = False) -> DataLoader:
    """One loader: in order and unaugmented, or, for training, shuffled, augmented and without a last smaller batch.

    All random numbers follow torch's seed, and Python's and numpy's where `workers` is 0, so an epoch can be repeated.

    Raises:
        GMError: the images are missing, empty or unreadable, or have other classes than the model.

    >>> len(make_loader(Images(dataset="digits"), nn.Conv2d(1, 8, 3)).dataset)
    360
    """
    if images.dataset == DIGITS:
        return _digits_loader(images, model, training=training)
    dataset = _dataset(images, model, training=training)
    _check_classes(class_index(dataset), model, images.dataset or str(images.data_dir))
    return _loader(dataset, images, model, training=training)


def make_calibration_loader(images: Images, model: nn.Module, *, samples: int, seed: int) -> DataLoader:
    """At most `samples` training images, drawn by the seed and prepared as for validation; the same ones every time.

    Labels are not meant to be read: the classes are not checked. A data set that is a stream gives its own first
    images, shuffled as it shuffles for the seed, and its loader does not end after `samples`.

    Raises:
        GMError: as `make_loader`; or there are no training images apart from those for validation.

    >>> len(make_calibration_loader(Images(dataset="digits"), nn.Conv2d(1, 8, 3), samples=100, seed=0).dataset)
    100
    """
    quiet = replace(images, batch_size=min(images.batch_size, CALIBRATION_BATCH), no_aug=True)
    if images.dataset == DIGITS:
        loader = _digits_loader(quiet, model, training=True)
    else:
        _check_apart(images)
        dataset = _dataset(quiet, model, training=True, seed=seed)
        loader = _loader(dataset, quiet, model, training=False)
    everything: Any = loader.dataset
    if isinstance(everything, IterableDataset):
        return loader
    own = torch.Generator().manual_seed(seed)
    chosen = Subset(everything, torch.randperm(len(everything), generator=own)[:samples].tolist())
    options: dict[str, Any] = {"num_workers": loader.num_workers, "collate_fn": loader.collate_fn, "generator": own}
    return DataLoader(chosen, batch_size=quiet.batch_size, **options)


def _check_apart(images: Images) -> None:
    """Refuse a training split that is, or may be, what a network is judged on."""
    alone = not images.by_name and find_split(images.data_dir, images.train_split) == Path(images.data_dir or "")
    if alone or images.train_split == images.val_split:
        raise GMError(
            f"{images.data_dir or images.dataset} has no training images apart from those for validation; it needs "
            "both, such as train/ and validation/ or train.tar and validation.tar"
        )


def find_split(data_dir: str | None, split: str) -> Path:
    """The folder or tar that holds a split: `data_dir` itself, or what in it is named like the split.

    Raises:
        GMError: there is none.
    """
    if not data_dir:
        raise GMError("there are no images: give a folder or tar as data_dir, or a dataset that timm finds by name")
    root = Path(data_dir)
    if not root.exists():
        raise GMError(f"the data folder {data_dir} does not exist")
    if root.is_file():
        if root.suffix != ".tar":
            raise GMError(f"{data_dir} is neither a folder nor a .tar of images")
        return root
    synonyms: tuple[str, ...] = next((each for each in (TRAIN_NAMES, VALIDATION_NAMES) if split in each), ())
    found = _first_present(root, (split, *synonyms))
    if found is not None:
        return found
    other = _first_present(root, (*TRAIN_NAMES, *VALIDATION_NAMES))
    if other is not None:
        raise GMError(f"{data_dir} holds {other.name}, but no {split} (as a folder or a .tar)")
    return root


def _first_present(root: Path, names: tuple[str, ...]) -> Path | None:
    places = (root / file for name in names for file in (name, f"{name}.tar"))
    return next((each for each in places if each.exists()), None)


def class_index(dataset: Any) -> Mapping[Any, int] | None:
    """The number of each class by name, None where the data set does not say."""
    for holder in (getattr(dataset, "reader", None), dataset):
        for name in ("class_to_idx", "class_name_to_idx"):  # timm's folders and torchvision; timm's tars
            found = getattr(holder, name, None)
            if found:
                return found
    return None


def _dataset(images: Images, model: nn.Module, *, training: bool, class_map: Any = None, seed: int = 42) -> Any:
    """The data set of one split; the seed, by default timm's own, is that of a stream."""
    from timm.data import create_dataset
    from timm.data.readers.img_extensions import add_img_extensions, is_img_extension

    if not is_img_extension(".webp"):
        add_img_extensions(".webp")
    split = images.train_split if training else images.val_split
    place = images.data_dir if images.by_name else str(find_split(images.data_dir, split))
    options: dict[str, Any] = {"split": split, "search_split": False, "is_training": training, "seed": seed}
    options |= {"download": True} if images.dataset_download else {}
    if not images.dataset.lower().startswith("torch/"):
        options |= {"class_map": class_map or images.class_map, "batch_size": images.batch_size}
        options |= {"input_img_mode": "L" if _channels(model) == 1 else "RGB"}
    try:
        with redirect_stdout(io.StringIO()):  # timm prints what a missing package is called
            return create_dataset(images.dataset if images.by_name else "", root=place, **options)
    except ImportError as problem:
        raise GMError(f"the dataset {images.dataset!r} needs the package {problem.name!r}: pip install it") from None
    except Exception as problem:  # readers fail in their own ways on what is not what they read
        said = str(problem).strip().split("\n")[0] or type(problem).__name__
        which = images.dataset if images.by_name else place
        raise GMError(f"timm finds no images in {which} (split {split!r}): {said}") from problem


def _check_classes(index: Mapping[Any, int] | None, model: nn.Module, which: str) -> None:
    wanted = getattr(model, "num_classes", None)
    if index is None or wanted is None:
        return
    found = max(index.values()) + 1
    if found != wanted:
        raise GMError(
            f"{which} has {found} classes, the model {wanted}; give num_classes={found} with weights trained on them, "
            "or a class_map that numbers the classes as the model does"
        )


def _loader(dataset: Any, images: Images, model: nn.Module, *, training: bool) -> DataLoader:
    """timm's loader without its prefetcher, whose workers would outlive the seed of an epoch."""
    from timm.data import create_loader

    if isinstance(dataset, Sized):
        _check_enough(len(dataset), images, training=training)
    config = _config(images, model)
    interpolation = config["interpolation"]
    return create_loader(
        dataset,
        input_size=config["input_size"],
        batch_size=images.batch_size,
        is_training=training,
        no_aug=images.no_aug,
        re_prob=images.reprob,
        re_mode=images.remode,
        re_count=images.recount,
        train_crop_mode=images.train_crop_mode,
        scale=images.scale,
        ratio=images.ratio,
        hflip=images.hflip,
        vflip=images.vflip,
        color_jitter=images.color_jitter,
        auto_augment=images.aa,
        interpolation=images.train_interpolation if training and not images.no_aug else interpolation,
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        num_workers=images.workers,
        pin_memory=torch.cuda.is_available(),
        use_prefetcher=False,
        persistent_workers=False,
    )


def _check_enough(count: int, images: Images, *, training: bool) -> None:
    if not count:
        raise GMError(f"{images.dataset or images.data_dir} holds no images")
    if training and count < images.batch_size:
        raise GMError(f"{count} training images are fewer than one batch of {images.batch_size}; lower batch_size")


def _config(images: Images, model: nn.Module) -> dict[str, Any]:
    """Size, normalisation and cropping: as asked for, else as the model was trained."""
    from timm.data import resolve_data_config

    channels = _channels(model)
    for name in ("mean", "std"):
        given = getattr(images, name)
        if given is not None and len(given) not in (1, channels):
            raise GMError(f"{name} has {len(given)} values, but the model takes {channels} channels")
    names = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
    wanted: dict[str, Any] = {name: getattr(images, name) for name in names} | {"in_chans": channels}
    wanted["img_size"] = images.img_size or (DIGITS_SIZE if images.dataset == DIGITS else None)
    config = resolve_data_config(wanted, model=model, use_test_size=images.use_test_size)
    for name in ("mean", "std"):
        if len(config[name]) != channels:  # a network built with other channels than its configuration says
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    return config | {"input_size": (channels, *config["input_size"][1:])}


def _channels(model: nn.Module) -> int:
    """Channels of the images that a model takes: those of its first convolution."""
    first = next((each for each in model.modules() if isinstance(each, nn.Conv2d | GMConv2d)), None)
    return 3 if first is None else first.in_channels


class _Digits(Dataset):
    """Normalised images in memory, each moved by up to `shift` pixels in both directions."""

    def __init__(self, images: Tensor, labels: Tensor, *, shift: int, background: float) -> None:
        self.images, self.labels, self.shift = images, labels, shift
        self.padded = F.pad(images, (shift,) * 4, value=background)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not self.shift:
            return self.images[index], int(self.labels[index])
        down, right = torch.randint(2 * self.shift + 1, (2,)).tolist()
        height, width = self.images.shape[-2:]
        return self.padded[index, :, down : down + height, right : right + width], int(self.labels[index])


def _digits_loader(images: Images, model: nn.Module, *, training: bool) -> DataLoader:
    """Every fifth of the 1,797 digits is for validation, the others are for training."""
    _check_classes({digit: digit for digit in range(10)}, model, DIGITS)
    pixels, labels = _read_digits()
    channels, *size = _config(images, model)["input_size"]
    if min(size) < 8:
        raise GMError(f"the digits have 8×8 pixels; img_size must be at least 8, not {min(size)}")
    pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False).expand(-1, channels, -1, -1)
    held_out = torch.arange(len(pixels)) % 5 == 0
    mean, std = (
        torch.tensor(given or (found,)).reshape(1, -1, 1, 1)
        for given, found in (
            (images.mean, float(pixels[~held_out].mean())),
            (images.std, float(pixels[~held_out].std())),
        )
    )
    chosen = ~held_out if training else held_out
    _check_enough(int(chosen.sum()), images, training=training)
    normalised = ((pixels[chosen] - mean) / std).contiguous()
    shift = size[0] // 10 if training and not images.no_aug else 0
    dataset = _Digits(normalised, labels[chosen], shift=shift, background=float(normalised.min()))
    return DataLoader(dataset, batch_size=images.batch_size, shuffle=training, drop_last=training)


def _read_digits() -> tuple[Tensor, Tensor]:  # (1797, 1, 8, 8) in 0 ... 1, (1797,)
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise GMError(
            "the digits come with scikit-learn, which is not installed: pip install 'gmcompress[demo]'"
        ) from None
    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)
