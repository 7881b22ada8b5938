"""Settings: everything that a run depends on, under the names of the command line's flags."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from ..batches import SAMPLES
from ..budgets import Budget, parse_budget
from ..data import Images
from ..errors import GMError, nearest_names, shown
from ..files import usable, write_text
from ..planning import Override
from ..tuning import Recipe

AMP = {"bfloat16": "bf16", "float16": "fp16"}
EPOCHS = 10  # where neither epochs nor minutes are given
RECALIBRATE: dict[str, bool | str] = {"auto": "auto", "always": True, "never": False}
WAYS = ("budget", "rank", "plan", "compressed")  # to choose the structures; one of them at a time


@dataclass(frozen=True)
class Settings:
    """What a command is asked for; names as in timm where timm has one, None is "as the network or its kind says".

    Flat outside (`read` and `flat`), so that a YAML file and a command line say the same; the flags on images are in
    `images`.
    """

    model: str = ""
    pretrained: bool = False
    checkpoint: str | None = None
    compressed: str | None = None
    num_classes: int | None = None
    in_chans: int | None = None
    model_kwargs: tuple[str, ...] = ()  # KEY=VALUE

    group: str = "C32xC32"
    budget: tuple[str, ...] = ()  # SHARE, or KIND=LIMIT; without it, rank or plan half of the parameters
    rank: int | None = None
    residual: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    override: tuple[str, ...] = ()  # PATTERN=VALUE
    ties: tuple[str, ...] = ()
    plan: str | None = None
    calibrate: bool = True
    samples: int = SAMPLES
    effort: float = 1.0

    epochs: int | None = None
    minutes: float | None = Recipe.minutes
    opt: str = Recipe.optimizer
    lr: float | None = Recipe.lr
    trial_lrs: tuple[float, ...] = Recipe.trial_lrs
    trial_steps: int | None = Recipe.trial_steps
    weight_decay: float = Recipe.weight_decay
    decay: str = Recipe.decay
    momentum: float = Recipe.momentum
    warmup_epochs: float = Recipe.warmup
    clip_grad: float | None = Recipe.clip
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    temperature: float | None = Recipe.temperature
    distillation: float = Recipe.distillation
    task: float = Recipe.task
    features: float | None = Recipe.features
    blocks: tuple[str, ...] = Recipe.blocks
    anneal: float = Recipe.anneal
    recalibrate: str = "auto"
    amp: bool | None = None
    amp_dtype: str = "bfloat16"

    device: str | None = None
    seed: int = Recipe.seed
    images: Images = field(default_factory=Images)

    def __post_init__(self) -> None:
        if self.model_ema and not 0 < self.model_ema_decay < 1:
            raise GMError(f"model_ema_decay is a number between 0 and 1, not {self.model_ema_decay}")
        for key, known in (("amp_dtype", AMP), ("recalibrate", RECALIBRATE)):
            if getattr(self, key) not in known:
                raise GMError(f"{key} is {' or '.join(known)}, not {getattr(self, key)!r}")
        for key, least in (("samples", 1), ("num_classes", 0), ("in_chans", 1)):
            if (given := getattr(self, key)) is not None and given < least:
                raise GMError(f"{key} must be at least {least}, not {given}")
        self._check_way()

    def _check_way(self) -> None:
        """Refuse settings of several ways to choose the structures."""
        given = [name for name in WAYS if getattr(self, name) not in (None, ())]
        if len(given) > 1:
            raise GMError(
                f"{given[0]} and {given[1]} do not go together: a budget chooses a structure for each layer, rank is "
                "the same for every layer, a plan names the structures, and a compressed network has them"
            )
        if self.residual is not None and self.rank is None:
            raise GMError("residual is the kind of the residual of every layer alike; it goes with rank")
        if self.ties and given and given != ["budget"]:
            raise GMError(f"ties bind what a budget chooses; they do not go with {given[0]}")
        rules = [name for name in ("include", "exclude", "override") if getattr(self, name)]
        if self.plan is not None and rules:
            raise GMError(f"a plan names the structures of all layers, so {rules[0]} does not go with it")
        read_budget(self.budget)

    @property
    def has_images(self) -> bool:
        """Whether images are given."""
        return bool(self.images.data_dir or self.images.dataset)

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Settings:
        """Settings from flat names and values, as a command line or a YAML file gives them.

        Raises:
            GMError: a name is unknown, or a value is not of its type.

        >>> Settings.read({"model": "resnet18", "lr": "1e-3", "batch_size": 64}).images.batch_size
        64
        """
        kinds = setting_kinds()
        for name in given:
            if name not in kinds:
                raise GMError(f"there is no setting {name!r}; the nearest are {nearest_names(name, kinds)}")
        values = {name: typed(name, kinds[name], value) for name, value in given.items()}
        own = {each.name for each in fields(Images)}
        images = Images(**{name: value for name, value in values.items() if name in own})
        return cls(**{name: value for name, value in values.items() if name not in own}, images=images)

    def flat(self) -> dict[str, Any]:
        """All settings by their flat names, as YAML and JSON can hold them."""
        found = {name: getattr(self, name, None) for name in setting_kinds()}
        found |= {each.name: getattr(self.images, each.name) for each in fields(Images)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    def recipe(self) -> Recipe:
        """How to fine-tune."""
        same = "minutes lr trial_lrs trial_steps weight_decay decay momentum temperature distillation task features "
        same += "blocks anneal device seed"
        amp = None if self.amp is None else (AMP[self.amp_dtype] if self.amp else "no")
        default = EPOCHS if self.minutes is None else 0
        return Recipe(
            **{name: getattr(self, name) for name in same.split()},
            epochs=default if self.epochs is None else self.epochs,
            optimizer=self.opt,
            warmup=self.warmup_epochs,
            recalibrate=RECALIBRATE[self.recalibrate],
            clip=self.clip_grad or None,  # 0 is timm's "no clipping"
            ema=self.model_ema_decay if self.model_ema else None,
            amp=amp,
        )

    def rules(self) -> dict[str, Any]:
        """The arguments of `compress` that say which layers, and with which symmetry at most.

        >>> Settings(override=("layer3.*=C4", "fc=none")).rules()["overrides"]
        {'layer3.*': 'C4', 'fc': None}
        """
        overrides: dict[str, Override] = {}
        for each in self.override:
            pattern, found, value = each.rpartition("=")
            if not found or not pattern or not value or pattern in overrides:
                raise GMError(f"an override is PATTERN=VALUE, each pattern once, not {each!r}")
            overrides[pattern] = None if value.lower() == "none" else value
        names = ("group", "include", "exclude", "ties")
        return {name: getattr(self, name) for name in names} | {"overrides": overrides}

    def compression(self) -> dict[str, Any]:
        """The arguments of `compress` without data: those of `rules`, and a budget or a rank.

        >>> Settings(rank=2).compression()["residual"]
        'displacement'
        """
        if self.rank is None:
            return self.rules() | {"budget": read_budget(self.budget)}
        return self.rules() | {"rank": self.rank, "residual": self.residual or "displacement"}


LARGEST = {int: 1 << 63, float: float("inf")}
_NAMES = [each.name for each in fields(Settings)]
RECIPE = tuple(_NAMES[_NAMES.index("epochs") : _NAMES.index("device")])  # the settings of training


def read_budget(texts: Sequence[str]) -> tuple[Budget, ...] | None:
    """What all of these limits say together; None where there are none.

    Raises:
        GMError: one of them is neither a share of the parameters nor KIND=LIMIT, or a kind is limited twice.

    >>> [str(each) for each in read_budget(["params=100000", "macs=50%"])]
    ['at most 100,000 parameters', '50 % of the multiply-adds']
    """
    found: dict[str, str | float] = {}
    for each in texts:
        kind, sign, limit = each.rpartition("=")
        if (kind or "params") in found:
            raise GMError(f"a budget limits each kind once, but {each!r} is the second for {kind or 'params'}")
        found[kind if sign else "params"] = limit if "%" in limit else _number(limit, each)
        if not sign and "%" not in each and not 0 < float(each) < 1:
            raise GMError(f"{each} of what? write params={each}, or a share of the parameters such as 25%")
    return parse_budget(found) if found else None


def _number(text: str, whole: str) -> float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise GMError(f"a budget is a share such as 25%, or limits such as params=100000 bytes=25% macs=50%, not {whole!r}")


def setting_kinds() -> dict[str, Any]:
    """The type of every setting by its flat name, in order."""
    own = {name: kind for name, kind in get_type_hints(Settings).items() if name != "images"}
    return own | get_type_hints(Images)


def setting_defaults() -> dict[str, Any]:
    """The default of every setting by its flat name.

    >>> setting_defaults()["batch_size"]
    128
    """
    return Settings().flat()


def typed(name: str, kind: Any, value: Any) -> Any:
    """A value as its type: strings become numbers (YAML reads 1e-3 as a string), lists become tuples.

    Raises:
        GMError: it cannot be read as that type.

    >>> typed("lr", float | None, "1e-3")
    0.001
    """
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(each for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is tuple:
        entries = value if isinstance(value, list | tuple) else [value]
        return tuple(typed(name, get_args(kind)[0], each) for each in entries)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    accepted = {bool: (bool,), int: (int, str), float: (int, float, str), str: (str,)}[kind]
    if isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)):
        try:
            found = kind(value)
            if kind not in (int, float) or abs(found) < LARGEST[kind]:  # which NaN is not
                return found
        except (ValueError, OverflowError):
            pass
    raise GMError(f"{name} is {words[kind]}, not {shown(value)}")


MAX_YAML = 1 << 17  # bytes
LEAKED = (ValueError, LookupError, AttributeError, TypeError)  # what PyYAML raises for !!bool x, !!timestamp x and such


def write_yaml(path: Path, settings: Settings) -> None:
    """Write settings as YAML that `read_yaml` and `-c` read."""
    write_text(path, yaml.safe_dump(settings.flat(), sort_keys=False, allow_unicode=True))


def read_yaml(path: Path) -> dict[str, Any]:
    """The names and values in a YAML file; names may be written with dashes, as flags are.

    Raises:
        GMError: the file is missing, is no YAML, or holds something else than names with values.
    """
    try:
        if usable(path).stat().st_size > MAX_YAML:
            raise GMError(f"{path} has {path.stat().st_size:,} bytes; settings have at most {MAX_YAML:,}")
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GMError(f"{path} does not exist") from None
    except GMError:
        raise
    except (OSError, yaml.YAMLError, RecursionError, *LEAKED) as problem:
        said = " ".join(str(problem).split())
        raise GMError(f"{path} is not readable as YAML: {said}") from None
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise GMError(f"{path} must hold names with values, such as 'lr: 0.01'")
    return {name.replace("-", "_"): value for name, value in found.items()}
