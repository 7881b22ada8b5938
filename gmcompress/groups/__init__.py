"""Finite groups and the sets they act on; integer arrays only, no torch."""

from .embedding import as_given, axes_of, embed, factor_generators, transversal
from .families import alternating, cyclic, dihedral, direct, quaternion, semidirect, symmetric
from .group import Group, cycle_notation, from_permutations, from_table
from .gsets import GSet, cosets, fixed, grid, gset, regular
from .parsing import group
from .subgroups import (
    ball,
    diagonal,
    identify,
    is_normal,
    isomorphism,
    largest_quotient,
    normal_subgroups,
    quotient,
    quotients,
    subgroup,
    word_lengths,
)

__all__ = [
    "GSet",
    "Group",
    "alternating",
    "as_given",
    "axes_of",
    "ball",
    "cosets",
    "cycle_notation",
    "cyclic",
    "diagonal",
    "dihedral",
    "direct",
    "embed",
    "factor_generators",
    "fixed",
    "from_permutations",
    "from_table",
    "grid",
    "group",
    "gset",
    "identify",
    "is_normal",
    "isomorphism",
    "largest_quotient",
    "normal_subgroups",
    "quaternion",
    "quotient",
    "quotients",
    "regular",
    "semidirect",
    "subgroup",
    "symmetric",
    "transversal",
    "word_lengths",
]
