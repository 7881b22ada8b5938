"""Which structured layer takes the place of which dense one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import GMError
from ..groups import Group
from ..structure import Structure
from .base import GMLayer, kept_random
from .convolution import GMConv2d
from .linear import GMLinear


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
    with kept_random(weight):
        layer = COUNTERPARTS[type(dense)](dense, Structure.parse(structure), options).train(dense.training)
    for part in layer.parts().values():
        part.requires_grad_(weight.requires_grad)
    if isinstance(bias, nn.Parameter) and layer.bias is not None:
        layer.bias.requires_grad_(bias.requires_grad)
    vars(layer).update({key: each for key, each in vars(dense).items() if key not in vars(layer)})
    return layer
