"""What all structured weights share: stored tensors, the computed dense weight, and the path a frozen layer takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from ..costs import is_fast, multiply_adds
from ..errors import GMError
from ..factored import Window
from ..linalg import usual_strides
from ..nesting import is_plain
from ..products import Layout, keep, layout_of, prepare, why_slow
from ..readonly import check_assigned, check_registered, read_only
from ..sharing import SharingModule
from ..shortcut import Shortcut
from ..structure import Structure, expand
from .labels import label_table

Path = Literal["dense", "structured"]  # a product with the computed weight, or the fast product of its structure
READY = "ready_"  # and a name: the buffers that a frozen layer keeps
STORED_READY = ("gates", "left", "right", "scales")  # parameters that the fast product takes as they are stored


@dataclass(frozen=True)
class Verdict:
    """Which path a frozen layer takes, and why: the median milliseconds of both where they were measured."""

    path: Path
    dense_ms: float | None = None
    structured_ms: float | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


class GMLayer(SharingModule):
    """What all structured weights share: the stored tensors of a structure, and `.weight`, computed from them.

    Parameters: `kernel` (o, i, n, *taps) for o × i blocks of group matrices, with displacement rank r `gates` (o, r, n)
    and `filters` (o, r, i, n, *taps); for a factor part of rank s `left` (rows, s) and `right` (s, columns, *taps), or
    (rows, ky, s) and (s, columns, kx) where split, and with adapted bases `scales` (P, Q, s); `bias` (rows).
    `.weight` is differentiable and has the shape, dtype and device of the dense layer's (under autocast, where there is
    no group part, the dtype of autocast); it can be neither assigned nor written to.

    Until `freeze_` chooses a path and keeps what does not depend on the input, the weight is computed at every call,
    but for those calls on the CPU of which the fast product takes far fewer multiply-adds.
    """

    PARTS: Final = ("kernel", "gates", "filters", "left", "right", "scales", "mixing", "outer", "inner")
    _ALL_PARTS: Final = frozenset(PARTS)
    SHARED = ("labels",)

    def __init__(
        self,
        structure: Structure,
        shape: tuple[int, ...],  # of the dense weight
        *,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        nn.Module.__init__(self)  # and not that of Linear or Conv2d, which would make a weight of its own
        self.structure = structure
        self.weight_shape = shape
        self.path: Path = "dense"
        self.verdict: Verdict | None = None
        self.layout: Layout | None = None
        self._stamp: tuple[tuple[int, int], ...] | None = None  # of the tensors that the kept buffers are made of
        self._names: tuple[tuple[str, str], ...] = ()  # of what is kept, and of its buffers
        self._shortcut: Shortcut | None = None  # past all that is the same at every call with few inputs
        shapes = structure.shapes(shape)
        for part in self.PARTS:
            stored = nn.Parameter(torch.empty(shapes[part], device=device, dtype=dtype)) if part in shapes else None
            self.register_parameter(part, stored)
        self.bias: nn.Parameter | None
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None
        )
        self.labels: Tensor | None  # follows from the structure, so not part of what is saved
        labels = None if structure.group is None else label_table(structure, device)
        self.register_buffer("labels", labels, persistent=labels is None)  # some move what is not persistent unasked
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a start for training from scratch: the variance of torch's own layers, residuals zero but trainable.

        Without a group part the d factors of r products have entries of such a variance that those of their sum have
        b²/3, as entries uniform in ±b = ±1/√(columns·taps) have.
        """
        bound = 1 / math.sqrt(math.prod(self.weight_shape[1:]))
        alone = self.structure.group is None  # then the factors are no residual but the weight itself
        separable = self.structure.separable
        terms = self.structure.lowrank if separable is None else separable.terms
        factors = 2 if separable is None else len(self.parts())  # scales are ones
        for part, tensor in self.parts().items():
            if part == "scales":
                nn.init.ones_(tensor)
            elif alone:
                nn.init.normal_(tensor, std=(bound / math.sqrt(3 * terms)) ** (1 / factors))
            elif part in ("filters", "left"):
                nn.init.zeros_(tensor)
            else:
                nn.init.uniform_(tensor, *((-math.sqrt(3), math.sqrt(3)) if part == "gates" else (-bound, bound)))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def share_(self) -> None:
        """Take the table of labels that all layers of this structure share where the stored tensors are."""
        if self.structure.group is not None:
            self.labels = label_table(self.structure, self.parts()["kernel"].device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `.to` goes through; a memory format is for images, whatever number of axes the stored tensors have."""

        def applied(tensor: Tensor) -> Tensor:
            try:
                return fn(tensor)
            except RuntimeError:
                if tensor.dim() not in (4, 5):
                    raise
                return fn(tensor.reshape(-1)).reshape(tensor.shape)

        return super()._apply(applied, recurse)

    def parts(self) -> dict[str, Tensor]:
        """The stored tensors of the weight by name."""
        named = {part: getattr(self, part) for part in self.PARTS}
        return {part: tensor for part, tensor in named.items() if tensor is not None}

    def _operands(self) -> dict[str, Tensor]:
        """The stored tensors as products take them."""
        return {part: usual_strides(tensor) for part, tensor in self.parts().items()}

    @property
    def weight(self) -> Tensor:
        """The dense weight, computed at every read.

        Raises:
            GMError: something is written into it, or it is assigned another.
        """
        return read_only(self._expanded(), self)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        check_assigned(value, self)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """What assigning a parameter goes through."""
        if name == "weight":
            check_assigned(param, self)
        else:
            check_registered(name, param)
        super().register_parameter(name, param)

    def _expanded(self) -> Tensor:
        return expand(self._operands(), self.structure, self.weight_shape, labels=self.labels)

    @torch.no_grad()
    def assign(self, tensors: Mapping[str, Tensor], *, bias: Tensor | None = None) -> None:
        """Copy stored tensors (as a Fit holds them) and a bias into this layer.

        Raises:
            GMError: names or shapes are not those of this layer.
        """
        given = dict(tensors) | ({} if bias is None else {"bias": bias})
        own = self.parts() | ({} if self.bias is None else {"bias": self.bias})
        wanted = {name: tuple(each.shape) for name, each in own.items()}
        came = {name: tuple(each.shape) for name, each in given.items()}
        if wanted != came:
            raise GMError(f"this layer stores {wanted}, but was given {came}")
        for name, tensor in given.items():
            own[name].copy_(tensor)

    @torch.no_grad()
    def freeze_(self, path: Path, verdict: Verdict | None = None) -> None:
        """Take a path from now on, and keep what it needs of the weight: computed anew after every change of it.

        The buffers kept are not part of what is saved. In training mode nothing is kept and the path is the same, but
        of compiled layers the dense one. In evaluation mode the stored tensors get no gradients; the inputs do. Changes
        through `.data` are not seen in that mode.

        Raises:
            GMError: the structure has no fast product.
        """
        problem = self.why_slow() if path == "structured" else None
        if problem is not None:
            raise GMError(f"{self} has no fast product: {problem}")
        self.thaw_()
        with torch.inference_mode(False):
            made = keep(self._operands(), self.structure) if path == "structured" else {"weight": self._computed()}
            for name, tensor in made.items():
                if name not in STORED_READY:
                    self.register_buffer(READY + name, tensor.detach(), persistent=False)
            if path == "structured" and self.structure.group is not None:
                self.layout = layout_of(self.structure.group)
            self._names = tuple((each[len(READY) :], each) for each in self._buffers if each.startswith(READY))
            self._shortcut = self._shorten() if path == "structured" else None
        self.path, self.verdict, self._stamp = path, verdict, _stamps(self._stored())

    def _shorten(self) -> Shortcut | None:
        """The shortest way of the fast product from what is kept, where there is one."""

    def train(self, mode: bool = True) -> Any:
        """What is kept is made anew after training: not all that trains, as fused optimizers, leaves a sign of it."""
        if mode:
            self._outdate()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        """A compiled layer, for one, does not see by itself that what it keeps is of other values."""
        super()._load_from_state_dict(*args, **options)
        self._outdate()

    def _outdate(self) -> None:
        """Have what a frozen layer keeps made anew at its next call."""
        if self._stamp is not None:
            self._stamp = ()
        if self._shortcut is not None:
            self._shortcut = Shortcut()

    def thaw_(self) -> None:
        """Undo `freeze_`: the weight is computed at every call."""
        for name in [each for each in self._buffers if each.startswith(READY)]:
            delattr(self, name)
        self._names = ()
        self.path, self.verdict, self._stamp, self._shortcut = "dense", None, None, None

    @property
    def is_frozen(self) -> bool:
        """Whether `freeze_` chose the path."""
        return self._stamp is not None

    def why_slow(self) -> str | None:
        """Why there is no fast product, None where there is one."""
        return why_slow(self.structure)

    def _computed(self) -> Tensor:
        """What the dense path needs: the weight."""
        return self._expanded()

    @property
    def computes_a_part(self) -> bool:
        """Whether a part is no parameter any more but made of others, as pruning and parametrizations do."""
        return not self._parameters.keys() >= self._ALL_PARTS

    def _stored(self) -> list[nn.Parameter]:
        return [each for name in self.PARTS if (each := self._parameters.get(name)) is not None]

    @property
    def computes_with_others(self) -> bool:
        """Whether it has other tensors for the time of one call, as `torch.func.functional_call` puts in."""
        return _are_others(self._stored())

    def _kept(self) -> dict[str, Tensor] | None:
        """The kept buffers by name, made anew where the weight changed; None where they cannot be used."""
        if self._stamp is None or self.training:
            return None
        if self.computes_a_part:
            return None
        if torch.compiler.is_compiling():
            if not self._stamp:
                return None
        else:  # at every call, so in few steps: with one input they take a part of the time that is seen
            stored = self._stored()
            if _are_others(stored):
                return None
            if self._stamp != _stamps(stored):
                self.freeze_(self.path, self.verdict)
        return self._held()

    def _held(self) -> dict[str, Tensor]:
        """The kept buffers by name."""
        return {name: self._buffers[buffer] for name, buffer in self._names}  # type: ignore[misc]

    def takes_fast_product(self, given: Tensor) -> bool:
        """Whether a call with this input takes the fast product: as frozen, or as is faster for its shape."""
        if self.is_frozen:
            return self.path == "structured" and is_plain(given)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or not self._is_usual(given):
            return False
        moves = self._moves(given)
        return moves is not None and is_fast(self.structure, self.weight_shape, *moves)

    def _is_usual(self, given: Tensor) -> bool:
        """Whether input and stored tensors are of the kinds for which both products are alike."""
        stored = self._stored()
        if type(given) is not Tensor or is_functorch_wrapped_tensor(given) or given.device.type != "cpu":
            return False
        if not is_plain(given) or self.computes_with_others:
            return False
        if torch.is_autocast_enabled("cpu"):
            return True
        exact = given.dtype in (torch.float32, torch.float64) or self.structure.group is None
        return exact and all(each.dtype == given.dtype for each in stored)

    def _moves(self, given: Tensor) -> tuple[tuple[int, ...], Window | None, int] | None:
        """Size of an input, how it is moved over, and convolution groups, as `costs` takes them; None of no input."""

    def fast_macs(self, given: Tensor) -> int:
        """Multiply-adds of the fast product on an input."""
        if not given.numel():  # as of an expert to which nothing is routed
            return 0
        moves = self._moves(given)
        assert moves is not None, "a layer that was called has an input"
        size, window, _ = moves
        return multiply_adds(self.structure, self.weight_shape, size, window)

    def _ready(self, given: Tensor) -> dict[str, Tensor] | None:
        """What the fast product needs; None on the dense path."""
        if not self.takes_fast_product(given):
            return None
        kept = self._kept()
        if kept is None:  # a compiler, which follows no step of what is to be prepared, gets the dense weight
            return None if torch.compiler.is_compiling() else prepare(self._operands(), self.structure)
        return kept | self._taken()

    def _taken(self) -> dict[str, Tensor]:
        """The stored tensors that the fast product takes as they are."""
        own = self._parameters
        return {name: own[name] for name in STORED_READY if own.get(name) is not None}  # type: ignore[misc]

    def _dense(self) -> Tensor:
        """The computed weight, kept or made."""
        kept = self._kept() if self.path == "dense" else None  # else for inputs that the fast product does not take
        return self._computed() if kept is None else kept["weight"]

    @property
    def trains(self) -> bool:
        """Whether any of the stored tensors takes a gradient."""
        return any(part.requires_grad for part in self.parts().values())


def filled(empty: nn.Module, layer: GMLayer) -> nn.Module:
    """The plain layer with weight, bias and flags of a structured one, and with what else was set on it."""
    own = {*vars(empty), "structure", "weight_shape", "path", "verdict", "layout", "_stamp", "_names", "_shortcut"}
    vars(empty).update({key: each for key, each in vars(layer).items() if key not in own})
    empty.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.trains)
    if layer.bias is not None:
        empty.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
    return empty.train(layer.training)


def _are_others(stored: list[nn.Parameter]) -> bool:
    return any(type(each) is not nn.Parameter for each in stored)


def _stamps(stored: list[nn.Parameter]) -> tuple[tuple[int, int], ...]:
    return tuple((0 if each.is_inference() else each._version, each.data_ptr()) for each in stored)


def kept_random(parameter: Tensor) -> Any:
    """The caller's stream of random numbers stays put inside."""
    return torch.random.fork_rng(devices=[parameter.device] if parameter.is_cuda else [])
