"""What a folder of compressed shards says about itself."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

from ..errors import GMError, shown
from ..files import file_digest, read_json, sealed, unsealed, usable, write_json
from ..structure import Structure
from ..tables import percent, table_text

FORMAT = 2
DESCRIPTION = "gmcompress-shards.json"


@dataclass(frozen=True)
class Shards:
    """What was done to the tensors of a model in files: a structure for some, by module name, a reason for others.

    `shapes` are those of all matrices before, rows first; `transposed` names those that lie as columns × rows;
    `relative_errors` are those of the compressed, Frobenius; `parameters` and
    `bytes` are of all tensors, before and after; `files` maps each file to its SHA-256, and `key` stands for what was
    compressed and how. Embeddings and classifiers are told by their names alone: see `skipped` for what was left.
    """

    group: str
    layers: Mapping[str, str]
    skipped: Mapping[str, str]
    shapes: Mapping[str, list[int]]
    transposed: list[str]
    relative_errors: Mapping[str, float]
    parameters: list[int]
    bytes: list[int]
    files: Mapping[str, str]
    key: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON holds them."""
        return asdict(self)

    @property
    def summary(self) -> str:
        """One line."""
        (dense, stored), (before, after) = self.parameters, self.bytes
        found = f"{len(self.layers)} of {len(self.shapes)} matrices compressed with {self.group}: "
        found += f"{dense:,} → {stored:,} parameters ({percent(stored, dense)}), "
        return found + f"{before / 1e6:,.1f} → {after / 1e6:,.1f} MB in {len(self.files)} files"

    def __str__(self) -> str:
        columns = ["matrix", "shape", "structure", "dense#", "stored#", "relative error#", "left dense because"]
        rows = []
        for name, shape in self.shapes.items():
            text = self.layers.get(name)
            stored = prod(shape) if text is None else Structure.parse(text).parameters(shape)
            error = f"{self.relative_errors[name]:.3f}" if text is not None else ""
            sizes = (f"{prod(shape):,}", f"{stored:,}")
            cells = (name or "(root)", "×".join(map(str, shape)), text or "", *sizes, error)
            rows.append((*cells, self.skipped.get(name, "")))
        return table_text(f"Shards for {self.group}", columns, rows) + "\n" + self.summary


def write_description(folder: Path, found: Shards) -> None:
    """Write what `describe_shards` reads."""
    versions = {name: version(name) for name in ("gmcompress", "torch")} | {"python": platform.python_version()}
    write_json(folder / DESCRIPTION, sealed({"format": FORMAT, "versions": versions, **found.to_dict()}))


def describe_shards(folder: str | Path) -> Shards:
    """The description in a folder of compressed shards; the files are looked at by `load_shards`.

    Raises:
        GMError: it is missing, edited or foreign.
    """
    path = usable(folder) / DESCRIPTION
    if not path.is_file():
        raise GMError(f"{folder} is no folder of compressed shards: it has no {DESCRIPTION}")
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise GMError(f"{path} has format {shown(content.get('format'))}; this version reads format {FORMAT}")
    content = unsealed(content, path)
    names = {each.name for each in fields(Shards)}
    if set(content) != {"format", "versions", *names}:
        raise GMError(
            f"{path} lacks or adds fields: {', '.join(sorted(set(content) ^ {'format', 'versions', *names}))}"
        )
    _check(content, path)
    return Shards(**{name: content[name] for name in names})


def _check(content: Mapping[str, Any], path: Path) -> None:
    """Refuse fields of other types than those of `Shards`, and structures that do not fit.

    Raises:
        GMError: naming the field.
    """
    values = {"layers": str, "skipped": str, "shapes": list, "relative_errors": float, "files": str}
    for key, kind in values.items():
        if not isinstance(content[key], dict) or not all(type(each) is kind for each in content[key].values()):
            raise GMError(f"{path}: {key!r} must be an object that holds values of type {kind.__name__}")
    for key in ("parameters", "bytes", *content["shapes"]):
        found = content[key] if key in ("parameters", "bytes") else content["shapes"][key]
        good = isinstance(found, list) and len(found) >= 2 and all(type(each) is int and each >= 0 for each in found)
        if not good or (key in ("parameters", "bytes") and len(found) > 2):
            raise GMError(f"{path}: {shown(key)} has {shown(found)}, which are no sizes")
    turned = content["transposed"]
    if not isinstance(turned, list) or not all(isinstance(each, str) and each in content["shapes"] for each in turned):
        raise GMError(f"{path}: 'transposed' must be a list of names of matrices")
    if not isinstance(content["group"], str) or not isinstance(content["key"], str):
        raise GMError(f"{path}: 'group' and 'key' must be texts")
    if set(content["layers"]) != set(content["relative_errors"]):
        raise GMError(f"{path}: every layer has a relative error, and nothing else has")
    for name, text in content["layers"].items():
        if name not in content["shapes"]:
            raise GMError(f"{path}: {shown(name)} has a structure and no shape")
        Structure.parse(text).shapes(content["shapes"][name])


def check_files(folder: Path, files: Mapping[str, str]) -> None:
    """Refuse files that are not those described.

    Raises:
        GMError: one is missing, or has another digest.
    """
    for name, digest in files.items():
        if Path(name).name != name:
            raise GMError(f"{folder / DESCRIPTION} names {shown(name)}, which is no file beside it")
        if file_digest(folder / name) != digest:
            raise GMError(f"{folder / name} was changed, truncated or replaced after it was written")
