"""Which layers train faster by the fast product of their structure than with their weight computed at every step."""

from __future__ import annotations

from math import prod

from torch import nn

from ..attaching import structured
from ..factored import Window
from ..layers import GMLayer
from ..products import multiply_adds

LOW_RANK, OTHERS = 2.0, 6.0  # times fewer multiply-adds, from which on it was faster wherever it was measured
SIDE = 8  # of the images for which they are counted


def quick_layers(model: nn.Module) -> list[GMLayer]:
    """The layers that nobody froze whose fast product takes so few multiply-adds that training with it is faster.

    The rule knows the shapes alone, so that a training that is resumed, or done again, takes the same paths.
    """
    return [each for each in structured(model).values() if not each.is_frozen and _is_quick(each)]


def _is_quick(layer: GMLayer) -> bool:
    if layer.why_slow() is not None:
        return False
    plain = layer.structure.group is None and layer.structure.grid is None
    return gain(layer) >= (LOW_RANK if plain else OTHERS)


def gain(layer: GMLayer) -> float:
    """How many times fewer multiply-adds the fast product takes than the dense one.

    >>> from ..layers import GMLinear
    >>> gain(GMLinear(64, 64, "lowrank:8"))
    4.0
    """
    shape = layer.weight_shape
    taps = tuple(shape[2:])
    window = Window(padding=(taps[0] // 2, taps[1] // 2)) if taps else None
    size = (1, SIDE, SIDE) if taps else (1,)
    places = 1 if window is None else prod(window.size(axis, SIDE, taps[axis]) for axis in range(2))
    return places * prod(shape) / multiply_adds(layer.structure, shape, size, window)
