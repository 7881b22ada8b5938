"""Structured weights: what they look like, and what follows from the orbits of a group on rows, columns and taps."""

from .algebra import (
    as_structure,
    check_weight,
    diagonals,
    distance,
    expand,
    factor_weight,
    index_tensor,
    nearest,
    orbit_means,
)
from .description import Structure
from .displacement import (
    displacement,
    displacement_rank,
    generator_displacement,
    generator_displacement_rank,
    numerical_rank,
)
from .separable import KINDS, MAX_TERMS, Separable, TapGrid, check_kind, combine, separable_shapes

__all__ = [
    "KINDS",
    "MAX_TERMS",
    "Separable",
    "Structure",
    "TapGrid",
    "as_structure",
    "check_kind",
    "check_weight",
    "combine",
    "diagonals",
    "displacement",
    "displacement_rank",
    "distance",
    "expand",
    "factor_weight",
    "generator_displacement",
    "generator_displacement_rank",
    "index_tensor",
    "nearest",
    "numerical_rank",
    "orbit_means",
    "separable_shapes",
]
