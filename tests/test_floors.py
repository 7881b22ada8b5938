"""The house: a room imports only from floors strictly below its own, and every room has a floor."""

import ast
from pathlib import Path

import pytest

import gmcompress

PACKAGE = Path(gmcompress.__file__).parent

FLOORS = (
    ("errors",),
    ("groups", "files", "tables", "linalg", "kinds", "liegrids", "copies", "sharing", "readonly", "workers"),
    ("fourier", "fewrows", "signals", "nesting", "streams", "optimizers"),
    ("forward",),
    ("structure", "surgery", "checkpoints", "budgets", "knapsack", "notes", "spectra", "kernels", "siren", "motions"),
    ("factors", "factored", "selection", "batches", "plain", "rules", "separation", "stencils", "moments"),
    ("calibration", "lowranks"),
    ("products", "shortcut"),
    ("costs",),
    ("fitting", "layers", "groupconv", "lattice", "lieconv", "subjects"),
    ("projection", "attaching", "pooling", "homogeneous", "separables", "adapted"),
    ("planning", "candidates", "metrics", "tuning", "data", "pages", "sensitivity"),
    ("networks", "commutator", "rehearsal"),
    ("reporting", "reconstruction", "blocks"),
    ("probes",),
    ("allocation", "freezing"),
    ("jobs",),
    ("pipeline", "storage", "shards"),
    ("exporting", "doctor"),
    ("runs",),
    ("cli", "__init__"),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ALGEBRA = {
    room: {"torch.nn"}
    for room in (
        *("structure", "projection", "fitting", "factors", "linalg", "lowranks", "fourier", "separation", "liegrids"),
    )
}
PURE = {
    "groups": {"torch"},
    "budgets": {"torch"},
    "selection": {"torch"},
    "knapsack": {"torch"},
    **ALGEBRA,
}  # what a room may never import


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path, source: str) -> list[tuple[str, str]]:
    """(kind, name) of every import: ("room", ...) of this package, ("module", ...) of others."""
    found = []
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [("module", alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [("module", node.module or "")] + [("module", f"{node.module}.{each.name}") for each in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == depth:  # from the package's own root
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            found += [("room", name) for name in names]
    return found


def assert_imports_point_down(path: Path, source: str) -> None:
    room = room_of(path)
    for kind, name in imported(path, source):
        if kind == "module" and name.split(".")[0] == "gmcompress":
            kind, name = "room", [*name.split("."), "__init__"][1]
        if kind == "room":
            assert FLOOR[name] < FLOOR[room] or name == room, f"{room} imports {name}, which is not below it"
        else:
            banned = PURE.get(room, set())
            assert not any(name == each or name.startswith(each + ".") for each in banned), f"{room} imports {name}"


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    assert_imports_point_down(path, path.read_text())


def test_every_room_has_a_floor():
    assert {room_of(path) for path in SOURCES} == set(FLOOR)


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("surgery.py", "from .structure import nearest"),
        ("surgery.py", "from . import pipeline"),
        ("groups/group.py", "import torch"),
        ("groups/group.py", "from ..layers import GMLinear"),
        ("structure.py", "from torch import nn"),
        ("layers.py", "from .projection import project"),
        ("planning.py", "from gmcompress.pipeline import compress"),
        ("planning.py", "import gmcompress"),
    ],
)
def test_an_import_that_points_up_is_seen(room, line):
    with pytest.raises(AssertionError, match="imports"):
        assert_imports_point_down(PACKAGE / room, line)
