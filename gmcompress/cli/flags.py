"""The flags: one for every setting, in groups, named as timm names them; their types and defaults are the settings'."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, get_args, get_origin

from ..errors import GMError, nearest_names
from ..exporting import FORMATS
from ..runs import BUDGETS, WAYS, read_yaml, setting_defaults, setting_kinds, typed

NETWORK = {
    "model": "a network that timm knows: resnet50, vit_base_patch16_224, hf-hub:..., local-dir:...",
    "pretrained": "with the weights that timm has for it (downloaded once)",
    "checkpoint": "with the trained weights in this file, .safetensors or a checkpoint of timm",
    "compressed": "the folder of a compressed network, written by compress or train",
    "num_classes": "number of classes, where it is not the model's own",
    "in_chans": "channels of the images, where they are not the model's own",
    "model_kwargs": "further arguments of timm.create_model",
}
RULES = {
    "group": "the largest symmetry allowed; a layer gets a quotient that fits, if any (see: gmcompress groups)",
    "include": "layers to compress although they are stem or classifier: globs, or re:PATTERN",
    "exclude": "layers to leave dense",
    "override": "a group or structure for some layers, or none to leave them dense; the first match wins",
    "ties": "layers of one block that get the same structure under a budget, such as re:.*[.](q|k|v)",
}
COMPRESSION = {
    "budget": "size of the result: a share of the parameters such as 25%, or limits such as params=100000 bytes=25% "
    "macs=50%; each layer gets the structure that loses least (default: 50%)",
    "rank": "in place of a budget, for every layer: group matrices with a residual of this rank, or less; 0 for none",
    "residual": "kind of that residual (default: displacement)",
    **RULES,
}
PLAN = {"plan": "carry out the plan in this file, of plan --json or sweep --output, in place of a budget"}
CALIBRATION = {
    "calibrate": "under a budget, measure on training images what each layer's errors cost, and fit the layers to them "
    "(default: where images are given)",
    "samples": "training images at most to calibrate on",
    "effort": "work on choosing and fitting under a budget, as a multiple of the usual; 0.1 is a quick look",
}
IMAGES = {
    "data_dir": "folder of class folders, or a tar of them; splits inside it as train/ and validation/, or .tar",
    "dataset": "digits (scikit-learn's), or a data set that timm finds by name: hfds/..., torch/cifar10, wds/...",
    "dataset_download": "download it, where timm can",
    "val_split": "name of the split to judge on",
    "class_map": "file that numbers the classes, one name a line",
    "batch_size": "images in a batch",
    "workers": "processes that load images",
    "img_size": "pixels a side, where it is not the model's own",
    "use_test_size": "judge at the larger size at which timm publishes accuracies, where the model has one",
    "mean": "mean of the normalisation, one number or one for each channel",
    "std": "standard deviation of the normalisation",
    "crop_pct": "share of the resized image that the centre crop keeps",
    "crop_mode": "how the centre of a resized image is taken",
    "interpolation": "how images are resized: bilinear, bicubic",
}
TRAIN_SPLIT = {"train_split": "name of the split to train and to calibrate on"}
AUGMENTATION = {
    "no_aug": "no augmentation at all",
    "train_crop_mode": "random crops: rrc takes any part, rkrc and rkrr most of the image",
    "scale": "smallest and largest share of the image that a crop takes",
    "ratio": "smallest and largest aspect ratio of a crop",
    "hflip": "probability of a mirror image, left to right",
    "vflip": "probability of a mirror image, top to bottom",
    "color_jitter": "strength of random brightness, contrast and saturation",
    "aa": "AutoAugment or RandAugment policy, such as rand-m9-mstd0.5",
    "train_interpolation": "how crops are resized: random, bilinear, bicubic",
    "reprob": "probability of erasing a random rectangle",
    "remode": "what erased rectangles are filled with",
    "recount": "largest number of erased rectangles",
}
TRAINING = {
    "epochs": "passes over the training images; by default 10, where there are no --minutes",
    "minutes": "train for so long, in place of --epochs; validation comes on top",
    "opt": "optimizer, by timm's name; auto is Nesterov SGD for networks with BatchNorm, else AdamW",
    "lr": "learning rate; by default the best in a trial of several",
    "trial_lrs": "learning rates to try; by default 0.001 to 0.1 with SGD and its kin, 1e-5 to 0.01 with others",
    "trial_steps": "steps for each of them; by default 5 % of all steps, between 5 and 40",
    "weight_decay": "weight decay",
    "decay": "what it acts on in compressed layers: their computed weight, or the factors that they store",
    "momentum": "momentum of the optimizer",
    "warmup_epochs": "epochs over which the learning rate rises, before its cosine falls to zero",
    "clip_grad": "largest norm of the gradients; 0 for no limit",
    "model_ema": "the result is a moving average of the weights",
    "model_ema_decay": "decay of that average",
    "distillation": "weight of the loss against the dense network's outputs",
    "task": "weight of the loss against the labels",
    "temperature": "temperature of the distillation (default: found from the dense network's answers)",
    "features": "weight of the loss against the outputs of the dense network's blocks, which fades (default: 300)",
    "blocks": "these blocks; by default those found, such as layer1.0",
    "anneal": "share of the steps over which what compression took away fades, in place of being gone at once",
    "recalibrate": "re-estimate BatchNorm statistics before training: auto is where it helps",
    "amp": "mixed precision; by default on a GPU only",
    "amp_dtype": "its type",
}
MACHINE = {
    "device": "cpu, cuda or cuda:1; by default the first GPU, if there is one",
    "seed": "seed of all random numbers",
}
EXPORT: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("folder",), {"metavar": "FOLDER", "help": "a compressed network, as compress and train write it"}),
    (
        ("--format",),
        {"choices": tuple(FORMATS), "help": "dense is the state dict of the dense network (default: onnx)"},
    ),
    (
        ("--output",),
        {"metavar": "FILE", "required": True, "help": f"what to write, one of *{', *'.join(FORMATS.values())}"},
    ),
    (("-b", "--batch-size"), {"type": int, "metavar": "N", "help": "images in the example batch (default: 2)"}),
    (
        ("--tolerance",),
        {"type": float, "metavar": "X", "help": "largest difference of outputs, of the largest (default: 1e-4)"},
    ),
)
SHORT = {"batch_size": "-b", "workers": "-j"}
CHOICES = {
    "residual": ("displacement", "lowrank"),
    "recalibrate": ("auto", "always", "never"),
    "decay": ("weight", "factors"),
    "amp_dtype": ("bfloat16", "float16"),
    "train_crop_mode": ("rrc", "rkrc", "rkrr"),
    "crop_mode": ("center", "squash", "border"),
    "remode": ("const", "rand", "pixel"),
}
UNDONE = ("pretrained", "calibrate", "model_ema", "amp")  # also as --no-..., against a file of defaults
METAVARS = {
    "budget": "LIMIT",
    "group": "GROUP",
    "model_kwargs": "KEY=VALUE",
    "override": "PATTERN=VALUE",
    "blocks": "LAYER",
    "include": "PATTERN",
    "exclude": "PATTERN",
    "ties": "PATTERN",
    "plan": "FILE",
    "checkpoint": "FILE",
    "class_map": "FILE",
    "compressed": "FOLDER",
    "data_dir": "FOLDER",
}
CONFIG = (("-c", "--config"), {"metavar": "FILE", "help": "YAML file that sets defaults; the command line wins"})
OUTPUT = (("--output",), {"metavar": "FOLDER", "help": "where to write (default: gmcompress-MODEL)"})
EXPERIMENT = (("--experiment",), {"metavar": "NAME", "help": "a folder of this name inside --output"})
RESUME = (("--resume",), {"metavar": "FOLDER", "help": "go on with the run in this folder, exactly where it stopped"})
BUDGET_LIST = (
    ("--budgets",),
    {
        "nargs": "+",
        "metavar": "LIMIT",
        "help": "one each: a share of the parameters, or limits such as params=100000,macs=50%% "
        f"(default: {' '.join(BUDGETS).replace('%', '%%')})",
    },
)
MEASURE = (
    ("--measure",),
    {"action": "store_true", "help": "carry out each plan; print its accuracy beside that of SVD of the same size"},
)
PLANS = (
    ("--output",),
    {
        "metavar": "FOLDER",
        "help": "keep the plans there, for --plan; the same command goes on where it was interrupted",
    },
)
EXAMINED = (
    ("model",),
    {"metavar": "MODEL", "help": "a network of timm's, or package.module:function, which builds one"},
)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are GMErrors, so that they are told like all others."""

    def error(self, message: str) -> NoReturn:
        """What argparse calls when it cannot go on."""
        raise GMError(f"{message} (see: {self.prog} --help)")


def add_settings(parser: argparse.ArgumentParser, title: str, texts: Mapping[str, str]) -> None:
    """One flag for each of these settings; what is not given does not appear in the result."""
    kinds, defaults = setting_kinds(), setting_defaults()
    group = parser.add_argument_group(title)
    for name, text in texts.items():
        flags = [*([SHORT[name]] if name in SHORT else []), "--" + name.replace("_", "-")]
        default = defaults[name]
        shown = "" if isinstance(default, bool) or default in (None, "", []) else f" (default: {default})"
        group.add_argument(*flags, help=text.replace("%", "%%") + shown, **_kind_options(name, kinds[name]))


def _kind_options(name: str, kind: Any) -> dict[str, Any]:
    """The arguments of add_argument for a setting of this type."""
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
    if isinstance(kind, UnionType):
        kind = next(each for each in get_args(kind) if each is not type(None))
    if kind is bool:
        return options | {"action": argparse.BooleanOptionalAction if name in UNDONE else "store_true"}
    names = {int: "N", float: "X", str: "NAME"}
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
        options |= {"nargs": "+"} | ({"action": "extend"} if kind is str else {})
    options |= {"type": partial(_read, name, kind)}
    if name in CHOICES:
        return options | {"choices": CHOICES[name]}
    return options | {"metavar": METAVARS.get(name, names[kind])}


def _read(name: str, kind: Any, text: str) -> Any:
    try:
        return typed(name, kind, text)
    except GMError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def parse(parser: Parser, commands: Mapping[str, Parser], argv: Sequence[str] | None) -> dict[str, Any]:
    """What was given, by name: the values in the file of --config, and over them the command line.

    Raises:
        GMError: an unknown flag, or an unknown name in the file; with the nearest ones.
    """
    found, extra = parser.parse_known_args(argv)
    given = vars(found)
    own = commands.get(given.get("command") or "", parser)
    for each in extra:
        flag = each.split("=")[0]
        if flag.startswith("-"):
            raise GMError(f"unknown flag {flag}; the nearest are {nearest_names(flag, _flags(own))}")
        raise GMError(f"{each!r} belongs to no flag (see: {own.prog} --help)")
    file = given.pop("config", None)
    if file is None:
        return given
    config = read_yaml(Path(file))
    known = {action.dest for action in own._actions} | set(setting_kinds())
    for name in config:
        if name not in known - {"help", "config", "command"}:
            flags = {"--" + each.replace("_", "-") for each in known}
            near = nearest_names("--" + name.replace("_", "-"), flags)
            raise GMError(f"{file}: there is no flag for {name!r}; the nearest are {near}")
    return _not_overruled(config, given) | given


def _not_overruled(config: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The file's values, without its ways to choose the structures where the command line has one of its own."""
    if not any(way in given for way in WAYS):
        return config
    belonging = {"budget": ["ties"], "rank": ["residual"]}
    void = {name for way in WAYS if way not in given for name in (way, *belonging.get(way, []))}
    return {name: value for name, value in config.items() if name not in void}


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings]
