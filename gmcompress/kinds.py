"""Which parameters of which module classes are matrices, and how a matrix lies in a parameter."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from numbers import Integral

from torch import Tensor, nn

from .errors import GMError, nearest_names

ORDER = "goik"  # of the axes of a matrix: convolution groups and outputs are its rows, inputs its columns, then taps

# by full name, so that no package is imported for them; a subclass is what its base is
LAYOUTS: dict[type[nn.Module] | str, dict[str, str]] = {
    "torch.nn.modules.linear.Linear": {"weight": "oi"},
    "torch.nn.modules.linear.Bilinear": {"weight": "oii"},
    "torch.nn.modules.conv.Conv1d": {"weight": "oik"},
    "torch.nn.modules.conv.Conv2d": {"weight": "oikk"},
    "torch.nn.modules.conv.Conv3d": {"weight": "oikkk"},
    "torch.nn.modules.conv.ConvTranspose1d": {"weight": "iok"},
    "torch.nn.modules.conv.ConvTranspose2d": {"weight": "iokk"},
    "torch.nn.modules.conv.ConvTranspose3d": {"weight": "iokkk"},
    # a table has a row for each entry, as the output head has that is often tied to it
    "torch.nn.modules.sparse.Embedding": {"weight": "oi"},
    "torch.nn.modules.sparse.EmbeddingBag": {"weight": "oi"},
    "torch.nn.modules.rnn.RNNCellBase": {"weight_ih": "oi", "weight_hh": "oi"},
    "torch.nn.modules.activation.MultiheadAttention": dict.fromkeys(
        ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), "oi"
    ),
    "transformers.pytorch_utils.Conv1D": {"weight": "io"},
    "gmcompress.groupconv.GroupConv": {"kernel": "oik", "filters": "ooik"},
}
# the matrices of all experts of a layer in one parameter (experts, outputs, inputs), as transformers names the classes
EXPERTS = re.compile(r"transformers\.models\.\w+\.modeling_\w+\.\w*Experts")
FUSED = dict.fromkeys(("gate_up_proj", "up_proj", "down_proj", "weight"), "ooi")
LAYOUTS |= {  # those of these have (experts, inputs, outputs)
    f"transformers.models.{each}": dict.fromkeys(("gate_up_proj", "down_proj"), "oio")
    for each in (
        "aria.modeling_aria.AriaExperts",
        "gpt_oss.modeling_gpt_oss.GptOssExperts",
        "llama4.modeling_llama4.Llama4TextExperts",
        "openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts",
    )
}
REGISTERED: set[type[nn.Module]] = set()


@dataclass(frozen=True)
class View:
    """How a matrix (rows, columns, *taps) lies in a parameter of this shape, one letter for each of its axes.

    o: outputs, the rows; i: inputs, the columns; k: a tap. Axes of one letter are joined, first to last; taps are not.
    In `groups` convolution groups of a transposed layout the input axis holds the groups, which go to the rows.

    >>> View("iok", (8, 2, 3), groups=4).matrix_shape
    (8, 2, 3)
    """

    letters: str
    shape: tuple[int, ...]
    groups: int = 1
    matrix_shape: tuple[int, ...] = field(init=False, compare=False, repr=False)  # (rows, columns, *taps)
    # worked out once, and not by cached properties, which torch.compile cannot follow
    _apart: tuple[int, ...] = field(init=False, compare=False, repr=False)  # the shape with the groups apart
    _order: tuple[int, ...] = field(init=False, compare=False, repr=False)  # its axes in the order of the matrix
    _sorted: tuple[int, ...] = field(init=False, compare=False, repr=False)  # its sizes in that order
    _back: tuple[int, ...] = field(init=False, compare=False, repr=False)  # from there to the parameter's

    def __post_init__(self) -> None:
        letters, sizes = self.letters, self.shape
        if self.groups > 1:
            at = letters.index("i")
            sizes = (*sizes[:at], self.groups, sizes[at] // self.groups, *sizes[at + 1 :])
            letters = letters[:at] + "g" + letters[at:]
        order = tuple(sorted(range(len(letters)), key=lambda at: ORDER.index(letters[at])))
        back = tuple(sorted(range(len(letters)), key=lambda at: order[at]))
        by_letter = {each: [size for a, size in zip(letters, sizes, strict=True) if a == each] for each in ORDER}
        found = (prod(by_letter["g"] + by_letter["o"]), prod(by_letter["i"]), *by_letter["k"])
        named = {"matrix_shape": found, "_apart": tuple(sizes), "_order": order, "_back": back}
        named["_sorted"] = tuple(sizes[at] for at in order)
        for name, value in named.items():
            object.__setattr__(self, name, value)

    def matrix(self, parameter: Tensor) -> Tensor:  # (rows, columns, *taps)
        """The matrix in a parameter.

        >>> View("io", (2, 3)).matrix(Tensor([[1, 2, 3], [4, 5, 6]])).tolist()
        [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
        """
        return parameter.reshape(self._apart).permute(self._order).reshape(self.matrix_shape)

    def parameter(self, matrix: Tensor) -> Tensor:
        """The parameter that holds a matrix."""
        return matrix.reshape(self._sorted).permute(self._back).reshape(self.shape).contiguous()


def kind_of(cls: type[nn.Module]) -> str:
    """The full name of a module class: 'torch.nn.modules.linear.Linear'."""
    return f"{cls.__module__}.{cls.__qualname__}"


def register(cls: type[nn.Module], /, **layouts: str) -> None:
    """Say which parameters of a module class of your own are matrices, so that they are compressed as those of Linear.

    One letter for each axis of a parameter: o for outputs, i for inputs, k for a tap of a kernel. A Linear's weight is
    "oi", a Conv2d's "oikk", one applied as x @ w is "io"; axes of the same letter count as one, so that projections
    (heads, size, inputs) are "ooi". Subclasses are included. Call it again before `load`: no file names classes.

    Raises:
        GMError: no module class, no parameter, or a layout that is not made of these letters, o and i among them.

    >>> class Scaled(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.w, self.gain = nn.Parameter(Tensor(range(24)).view(4, 6)), nn.Parameter(Tensor([2.0]))
    ...     def forward(self, x):
    ...         return self.gain * (x @ self.w)
    >>> register(Scaled, w="io")
    >>> layouts_of(Scaled)
    {'w': 'io'}
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise GMError(f"register takes a class of torch.nn.Module, not {cls!r}")
    if not layouts:
        raise GMError(f'which parameters of {cls.__name__} are matrices? Write register({cls.__name__}, weight="oi")')
    for name, letters in layouts.items():
        known = isinstance(letters, str) and set(letters) <= set("oik")
        if not known or not set("oi") <= set(letters):
            raise GMError(
                f"the layout of {name!r} has a letter for each axis, o for outputs, i for inputs and k for taps, "
                f'o and i among them: "oi", "io", "oikk"; not {letters!r}'
            )
    LAYOUTS[cls] = dict(layouts)
    REGISTERED.add(cls)


def layouts_of(cls: type[nn.Module]) -> dict[str, str]:
    """The layouts of a class's matrices by name of the parameter, inherited ones included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= FUSED if EXPERTS.fullmatch(kind_of(base)) else {}
        found |= LAYOUTS.get(kind_of(base), {}) | LAYOUTS.get(base, {})
    return found


def view_of(module: nn.Module, key: str, parameter: Tensor) -> View | None:
    """How the matrix in one parameter of a module lies there; None where it is not known to hold one.

    Raises:
        GMError: the class was registered with another number of axes.
    """
    letters = layouts_of(type(module)).get(key)
    if letters is None:
        return None
    if len(letters) != parameter.dim():
        if any(key in LAYOUTS[cls] for cls in type(module).__mro__ if cls in REGISTERED):
            raise GMError(
                f"{type(module).__name__} was registered with {key}={letters!r}, but its {key} has "
                f"{parameter.dim()} axes: {tuple(parameter.shape)}"
            )
        return None
    transposed = letters.index("i") < letters.index("o")
    groups = conv_groups(module) if transposed and "k" in letters else 1
    return View(letters, tuple(parameter.shape), groups)


def taps_of(module: nn.Module, key: str) -> str:
    """How the taps of a module's matrix lie on a grid, as `TapGrid` writes it; "" where the module does not say.

    A module says so by an attribute `tap_grid`, a text.
    """
    found = getattr(module, "tap_grid", "") if "k" in layouts_of(type(module)).get(key, "") else ""
    return found if isinstance(found, str) else ""


def check_registered(module: nn.Module, names: Iterable[str]) -> None:
    """Refuse a module that has not the parameters that its class was registered with; one may be None.

    Raises:
        GMError: naming the nearest.
    """
    known = list(names)
    for cls in type(module).__mro__:
        for key in LAYOUTS[cls] if cls in REGISTERED else ():
            if key not in known:
                near = nearest_names(key, known)
                raise GMError(f"{cls.__name__} was registered with {key!r}, but has no such parameter; near: {near}")


def rows_in_groups(module: nn.Module, key: str) -> int:
    """The convolution groups in which the rows of a module's matrix are."""
    return conv_groups(module) if "k" in layouts_of(type(module)).get(key, "") else 1


def conv_groups(module: nn.Module) -> int:
    """The convolution groups of a module, 1 where it has none; numpy's integers, which torch takes too, as Python's.

    >>> import numpy
    >>> conv_groups(nn.Conv2d(8, 8, 3, groups=numpy.int64(2))), conv_groups(nn.ReLU())
    (2, 1)
    """
    groups = getattr(module, "groups", 1)
    return int(groups) if isinstance(groups, Integral) else 1
