"""Drop-in layers whose weight is a group matrix plus residuals; a layer is built empty and then filled."""

from .base import GMLayer, Path, Verdict
from .convolution import GMConv2d
from .counterparts import COUNTERPARTS, counterpart
from .linear import GMLinear
from .parameter import GMWeight

__all__ = ["COUNTERPARTS", "GMConv2d", "GMLayer", "GMLinear", "GMWeight", "Path", "Verdict", "counterpart"]
