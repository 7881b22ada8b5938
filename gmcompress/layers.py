"""Drop-in layers whose weight is a group matrix plus residuals; a layer is built empty and then filled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .errors import GMError
from .groups import Group
from .kinds import View
from .structure import Structure, expand


class GMLayer(nn.Module):
    """What all structured weights share: the stored tensors of a structure, and `.weight`, computed from them.

    Parameters: `kernel` (o, i, n, *taps) for o × i blocks of group matrices, with displacement rank r `gates` (o, r, n)
    and `filters` (o, r, i, n, *taps); for a factor part of rank s `left` (rows, s) and `right` (s, columns, *taps), or
    (rows, ky, s) and (s, columns, kx) where split, and with adapted bases `scales` (P, Q, s); `bias` (rows).
    `.weight` is differentiable and has the shape, dtype and device of the dense layer's (under autocast, where there is
    no group part, the dtype of autocast); it cannot be assigned.
    """

    PARTS: Final = ("kernel", "gates", "filters", "left", "right", "scales")

    def __init__(
        self,
        structure: Structure,
        shape: tuple[int, ...],  # of the dense weight
        *,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.structure = structure
        self.weight_shape = shape
        shapes = structure.shapes(shape)
        for part in self.PARTS:
            stored = nn.Parameter(torch.empty(shapes[part], device=device, dtype=dtype)) if part in shapes else None
            self.register_parameter(part, stored)
        self.bias: nn.Parameter | None
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None
        )
        self.labels: Tensor | None  # recomputed from the structure, so not part of what is saved
        labels = None
        if structure.group is not None:
            labels = torch.tensor(structure.labels, dtype=torch.int32, device=device)
        self.register_buffer("labels", labels, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a start for training from scratch: the variance of torch's own layers, residuals zero but trainable.

        Without a group part the entries of left and right have variance b/√(3r), so that those of their product have
        b²/3, as entries uniform in ±b = ±1/√(columns·taps) have.
        """
        bound = 1 / math.sqrt(math.prod(self.weight_shape[1:]))
        alone = self.structure.group is None  # then the factors are no residual but the weight itself
        for part, tensor in self.parts().items():
            if part == "scales":
                nn.init.ones_(tensor)
            elif alone:
                nn.init.normal_(tensor, std=(bound / math.sqrt(3 * self.structure.lowrank)) ** 0.5)
            elif part in ("filters", "left"):
                nn.init.zeros_(tensor)
            else:
                nn.init.uniform_(tensor, *((-math.sqrt(3), math.sqrt(3)) if part == "gates" else (-bound, bound)))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def parts(self) -> dict[str, Tensor]:
        """The stored tensors of the weight by name."""
        named = {part: getattr(self, part) for part in self.PARTS}
        return {part: tensor for part, tensor in named.items() if tensor is not None}

    @property
    def weight(self) -> Tensor:
        """The dense weight, computed at every read."""
        return expand(self.parts(), self.structure, self.weight_shape, labels=self.labels)

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

    @property
    def trains(self) -> bool:
        """Whether any of the stored tensors takes a gradient."""
        return any(part.requires_grad for part in self.parts().values())


def _filled(empty: nn.Module, layer: GMLayer) -> nn.Module:
    """The plain layer with weight, bias and flags of a structured one, and with what else was set on it."""
    own = {*vars(empty), "structure", "weight_shape"}
    vars(empty).update({key: each for key, each in vars(layer).items() if key not in own})
    empty.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.trains)
    if layer.bias is not None:
        empty.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
    return empty.train(layer.training)


class GMLinear(GMLayer):
    """A linear layer whose weight is made of group matrices; drop-in for `nn.Linear`.

    `structure` is a string such as "C8xC8+displacement:2" or "adapted:8:4x4", a Group or a Structure; `rank` and
    `residual` add a residual to it. The layer stores `structure.parameters((out_features, in_features))` numbers and
    the bias.

    Raises:
        GMError: a width is not a multiple of the order of the group.

    >>> layer = GMLinear(8, 16, "C4", rank=1)
    >>> layer
    GMLinear(8, 16, 'C4+displacement:1', bias=True)
    >>> layer(torch.ones(2, 8)).shape
    torch.Size([2, 16])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: Structure | Group | str,
        *,
        rank: int = 0,
        residual: str = "displacement",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        found = Structure.parse(structure, rank=rank, residual=residual)
        super().__init__(found, (out_features, in_features), bias=bias, device=device, dtype=dtype)
        self.in_features = in_features
        self.out_features = out_features

    def __repr__(self) -> str:
        bias = self.bias is not None
        return f"GMLinear({self.in_features}, {self.out_features}, {str(self.structure)!r}, bias={bias})"

    def forward(self, input: Tensor) -> Tensor:  # (*batch, in_features) -> (*batch, out_features)
        """x W(kernel, ...)ᵀ + bias."""
        return F.linear(input, self.weight, self.bias)

    def dense(self) -> nn.Linear:
        """The `nn.Linear` with the same function."""
        empty = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        return _filled(empty, self)  # type: ignore[return-value]


class GMConv2d(GMLayer):
    """A convolution whose channel matrices, one for each tap, are made of group matrices; drop-in for `nn.Conv2d`.

    The group acts on the channels; the taps are carried along, or acted upon where the structure says so, as in
    "C4[G,G,grid3x3]". In a grouped convolution the columns are the input channels of one convolution group.

    Raises:
        GMError: out_channels/groups or in_channels/groups is not a multiple of the order of the group.

    >>> layer = GMConv2d(8, 16, 3, "C4", padding=1)
    >>> layer
    GMConv2d(8, 16, (3, 3), 'C4', stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, bias=True)
    >>> layer(torch.ones(2, 8, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        structure: Structure | Group | str,
        *,
        rank: int = 0,
        residual: str = "displacement",
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # nn.Conv2d checks these arguments and works out the padding; on meta it costs no memory
        twin = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        found = Structure.parse(structure, rank=rank, residual=residual)
        if found.rows is not None and out_channels // groups % found.rows.size:
            raise GMError(
                f"{found} needs output channels in each of the {groups} convolution groups divisible by "
                f"{found.rows.size}, not {out_channels // groups}"
            )
        super().__init__(found, tuple(twin.weight.shape), bias=bias, device=device, dtype=dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = twin.kernel_size
        self.stride = twin.stride
        self.padding = twin.padding
        self.dilation = twin.dilation
        self.groups = groups
        self.padding_mode = padding_mode
        self.transposed = False
        self.output_padding = (0, 0)
        self._reversed_padding_repeated_twice = twin._reversed_padding_repeated_twice

    def _options(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation", "groups")
        options: dict[str, Any] = {name: getattr(self, name) for name in names} | {"bias": self.bias is not None}
        return options | ({"padding_mode": self.padding_mode} if self.padding_mode != "zeros" else {})

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._options().items())
        widths = f"{self.in_channels}, {self.out_channels}, {self.kernel_size}"
        return f"GMConv2d({widths}, {str(self.structure)!r}, {options})"

    def forward(self, input: Tensor) -> Tensor:  # (batch, in_channels, height, width)
        """The convolution of `nn.Conv2d` with the computed weight."""
        if self.padding_mode == "zeros":
            return F.conv2d(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def dense(self) -> nn.Conv2d:
        """The `nn.Conv2d` with the same function."""
        widths: tuple[Any, ...] = (self.in_channels, self.out_channels, self.kernel_size)
        empty = nn.Conv2d(*widths, **(self._options() | {"device": "meta"}))
        return _filled(empty, self)  # type: ignore[return-value]


class GMWeight(GMLayer):
    """The structured weight of any other module, called without arguments for the dense parameter that it stands for.

    `shape` is that of the parameter, `layout` has a letter for each of its axes as in `gmcompress.register`, `groups`
    are convolution groups. `.weight` is the matrix, (rows, columns, *taps). It is attached to its module, which goes on
    as before, by `gmcompress.attaching`.

    Raises:
        GMError: the matrix has not the shape that the structure needs.

    >>> weight = GMWeight((8, 16), "C4", layout="io")
    >>> weight
    GMWeight((8, 16), 'C4', layout='io')
    >>> weight().shape, weight.weight.shape
    (torch.Size([8, 16]), torch.Size([16, 8]))
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        structure: Structure | Group | str,
        *,
        layout: str = "oi",
        groups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self_view = View(layout, tuple(shape), groups)
        super().__init__(Structure.parse(structure), self_view.matrix_shape, bias=False, device=device, dtype=dtype)
        self.view = self_view

    def __repr__(self) -> str:
        options = f", layout={self.view.letters!r}" if self.view.letters != "oi" else ""
        options += f", groups={self.view.groups}" if self.view.groups > 1 else ""
        return f"GMWeight({self.view.shape}, {str(self.structure)!r}{options})"

    def forward(self) -> Tensor:
        """The dense parameter, computed at every call."""
        return self.view.parameter(self.weight)

    @classmethod
    @torch.no_grad()
    def like(cls, parameter: Tensor, view: View, structure: Structure | Group | str) -> GMWeight:
        """An empty structured weight with the device, dtype and frozen flag of a parameter."""
        options: dict[str, Any] = {"layout": view.letters, "groups": view.groups}
        options |= {"device": parameter.device, "dtype": parameter.dtype}
        with _kept_random(parameter):
            made = cls(view.shape, structure, **options)
        return made.requires_grad_(parameter.requires_grad)


def _kept_random(parameter: Tensor) -> Any:
    """The caller's stream of random numbers stays put inside."""
    return torch.random.fork_rng(devices=[parameter.device] if parameter.is_cuda else [])


def _like_linear(dense: nn.Linear, structure: Structure, options: dict[str, Any]) -> GMLayer:
    return GMLinear(dense.in_features, dense.out_features, structure, **options)


def _like_conv2d(dense: nn.Conv2d, structure: Structure, options: dict[str, Any]) -> GMLayer:
    return GMConv2d(
        dense.in_channels,
        dense.out_channels,
        dense.kernel_size,  # type: ignore[arg-type]
        structure,
        stride=dense.stride,  # type: ignore[arg-type]
        padding=dense.padding,  # type: ignore[arg-type]
        dilation=dense.dilation,  # type: ignore[arg-type]
        groups=dense.groups,
        padding_mode=dense.padding_mode,
        **options,
    )


COUNTERPARTS: dict[type[nn.Module], Callable[[Any, Structure, dict[str, Any]], GMLayer]] = {
    nn.Linear: _like_linear,
    nn.Conv2d: _like_conv2d,
}


def counterpart(dense: nn.Module, structure: Structure | Group | str) -> GMLayer:
    """An empty structured layer with the hyperparameters, device, dtype, mode and frozen flags of a dense one.

    Whatever else was set on the dense layer is set on this one too.

    Raises:
        GMError: there is no structured layer for this type, or the widths do not fit.

    >>> counterpart(nn.Linear(8, 8), "C8")
    GMLinear(8, 8, 'C8', bias=True)
    """
    if type(dense) not in COUNTERPARTS:
        known = ", ".join(each.__name__ for each in COUNTERPARTS)
        raise GMError(f"there is no structured layer for {type(dense).__name__}; there is one for {known}")
    weight, bias = dense.get_parameter("weight"), dense.bias
    options = {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
    with _kept_random(weight):
        layer = COUNTERPARTS[type(dense)](dense, Structure.parse(structure), options).train(dense.training)
    for part in layer.parts().values():
        part.requires_grad_(weight.requires_grad)
    if isinstance(bias, nn.Parameter) and layer.bias is not None:
        layer.bias.requires_grad_(bias.requires_grad)
    vars(layer).update({key: each for key, each in vars(dense).items() if key not in vars(layer)})
    return layer
