"""gmcompress: make a trained PyTorch network smaller with group matrices, and say what it cost.

>>> import gmcompress as gm
>>> gm.group("C4xC2").order
8
"""

from . import groups
from .attaching import densify
from .commutator import equivariance_error
from .doctor import Examination
from .doctor import examine as doctor
from .errors import GMError
from .exporting import Export, export
from .freezing import freeze, verdicts
from .groupconv import GroupConv
from .groups import Group, GSet, group
from .homogeneous import HomogeneousConv
from .kinds import register
from .lattice import LatticeConv
from .layers import GMConv2d, GMLinear, GMWeight, Verdict
from .lieconv import LieConv
from .metrics import Metrics, measure
from .networks import GMCNN, LieCNN
from .pipeline import compress, equivariance, sweep, tune
from .pipeline import make_plan as plan
from .planning import Plan
from .pooling import GroupPool, GroupUnpool, LiePool
from .projection import Fit, project
from .reporting import Report, Result
from .separables import separate_layers
from .separation import separate
from .shards import Shards, compress_shards, load_shards
from .storage import load, save
from .structure import (
    Structure,
    diagonals,
    displacement,
    displacement_rank,
    distance,
    expand,
    generator_displacement,
    generator_displacement_rank,
    nearest,
)
from .surgery import Site, replace, trace

__all__ = [
    "GMCNN",
    "Examination",
    "Export",
    "Fit",
    "GMConv2d",
    "GMError",
    "GMLinear",
    "GMWeight",
    "GSet",
    "Group",
    "GroupConv",
    "GroupPool",
    "GroupUnpool",
    "HomogeneousConv",
    "LatticeConv",
    "LieCNN",
    "LieConv",
    "LiePool",
    "Metrics",
    "Plan",
    "Report",
    "Result",
    "Shards",
    "Site",
    "Structure",
    "Verdict",
    "compress",
    "compress_shards",
    "densify",
    "diagonals",
    "displacement",
    "displacement_rank",
    "distance",
    "doctor",
    "equivariance",
    "equivariance_error",
    "expand",
    "export",
    "freeze",
    "generator_displacement",
    "generator_displacement_rank",
    "group",
    "groups",
    "load",
    "load_shards",
    "measure",
    "nearest",
    "plan",
    "project",
    "register",
    "replace",
    "save",
    "separate",
    "separate_layers",
    "sweep",
    "trace",
    "tune",
    "verdicts",
]
