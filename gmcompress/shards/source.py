"""The tensors in safetensors files: where each lies, and how to read rows or bytes of it without the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import GMError, shown
from ..files import read_header, read_json, usable

INDEX = "model.safetensors.index.json"
SIZES = {1: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 2: ("F16", "BF16", "I16", "U16")}
SIZES |= {4: ("F32", "I32", "U32"), 8: ("F64", "I64", "U64", "C64")}
BYTES = {name: size for size, names in SIZES.items() for name in names}  # of a number; others are only copied
PIECE = 1 << 24  # bytes copied at once


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: its type as safetensors writes it, its shape, and where in the file its bytes are."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int  # bytes

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, a piece at a time.

        Raises:
            GMError: the file has become shorter, or cannot be read.
        """
        left = self.size
        try:
            with open(self.file, "rb") as file:
                file.seek(self.start)
                while left and (piece := file.read(min(left, PIECE))):
                    left -= len(piece)
                    yield piece
        except OSError as problem:
            raise GMError(f"cannot read {self.file}: {problem.strerror}") from problem
        if left:
            raise GMError(f"{self.file} became shorter while it was read")


@contextmanager
def opened(entry: Entry) -> Iterator[Any]:
    """The tensor as safetensors' lazy slice: rows are read when they are indexed.

    Raises:
        GMError: safetensors cannot read the file.
    """
    try:
        with safe_open(entry.file, framework="pt") as file:
            yield file.get_slice(entry.name)
    except (OSError, SafetensorError) as problem:
        raise GMError(f"{entry.file} is no complete safetensors file: {problem}") from None


def read_source(source: str | Path) -> list[Entry]:
    """All tensors of a safetensors file, or of a folder of such, file by file in the order of their bytes.

    In a folder the index, where there is one, says which files count.

    Raises:
        GMError: no such files, one that is not complete, a tensor in two of them, or an index that does not agree.

    >>> read_source("nowhere")
    Traceback (most recent call last):
    gmcompress.errors.GMError: nowhere does not exist; a safetensors file, or a folder of such, is wanted
    """
    place = usable(source)
    if not place.exists():
        raise GMError(f"{place} does not exist; a safetensors file, or a folder of such, is wanted")
    indices = sorted(place.glob("*.safetensors.index.json")) if place.is_dir() else []
    if len(indices) > 1:
        raise GMError(f"{place} has several indices: {', '.join(each.name for each in indices)}; leave one")
    listed = _listed(indices[0]) if indices else None
    if listed is not None:
        files = [place / each for each in sorted(set(listed.values()))]
    else:
        found = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
        files = [each for each in found if not each.name.startswith(".")]
    if not files:
        raise GMError(f"{place} holds no *.safetensors")
    entries = read_entries(files)
    if listed is not None:
        _check_listed(listed, entries, indices[0])
    if not entries:
        raise GMError(f"{place} holds no tensors")
    return entries


def model_type(source: str | Path) -> str:
    """What the config.json beside the tensors, as Hugging Face writes it, says the model is; "" where there is none.

    Raises:
        GMError: the file is no JSON object.
    """
    place = usable(source)
    path = (place if place.is_dir() else place.parent) / "config.json"
    found = read_json(path).get("model_type") if path.is_file() else ""
    return found if isinstance(found, str) else ""


def _listed(index: Path) -> dict[str, str]:
    """The file of every tensor, by name, as an index says.

    Raises:
        GMError: it is no index, or names a file that is not beside it.
    """
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
        raise GMError(f"{index} has no weight_map from tensors to files")
    for each in sorted(set(found.values())):
        if Path(each).name != each or "\\" in each or not each.endswith(".safetensors"):
            raise GMError(f"{index} names {shown(each)}, which is no safetensors file beside it")
        if not usable(index.with_name(each)).is_file():
            raise GMError(f"{index} names {shown(each)}, which does not exist")
    return found


def _check_listed(listed: dict[str, str], entries: Sequence[Entry], index: Path) -> None:
    there = {each.name: each.file.name for each in entries}
    for name in sorted({*listed, *there}):
        if listed.get(name) != there.get(name):
            said, found = (shown(each) if each else "nowhere" for each in (listed.get(name), there.get(name)))
            raise GMError(f"{index}: the tensor {shown(name)} is in {found}, and according to the index in {said}")


def read_entries(files: Sequence[Path]) -> list[Entry]:
    """The tensors of these files.

    Raises:
        GMError: a file is not complete, or a tensor is in two of them.
    """
    entries: dict[str, Entry] = {}
    for file in files:
        for each in _entries(file):
            if each.name in entries:
                raise GMError(f"the tensor {shown(each.name)} is in both {entries[each.name].file} and {file}")
            entries[each.name] = each
    return list(entries.values())


def _entries(file: Path) -> list[Entry]:
    """The tensors of a file by their place, which together must fill it."""
    header, begin = read_header(file)
    found = [_entry(name, each, file, begin) for name, each in header.items() if name != "__metadata__"]
    found.sort(key=lambda each: (each.start, each.size))
    at = begin
    for each in found:
        if each.start != at:
            raise GMError(f"{file} is no complete safetensors file: {shown(each.name)} overlaps, or leaves a gap")
        at += each.size
    if at != file.stat().st_size:
        raise GMError(f"{file} is no complete safetensors file: {file.stat().st_size:,} bytes in place of {at:,}")
    return found


def _entry(name: str, told: Any, file: Path, begin: int) -> Entry:
    fields: dict[str, Any] = told if isinstance(told, dict) else {}
    dtype, shape, offsets = fields.get("dtype", ""), fields.get("shape"), fields.get("data_offsets", [])
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    good = isinstance(dtype, str) and dtype and all(type(each) is int and each >= 0 for each in numbers)
    if not good or not isinstance(shape, list) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise GMError(f"{file} is no complete safetensors file: {shown(name)} has no type, shape or place")
    size = offsets[1] - offsets[0]
    if dtype in BYTES and size != prod(shape) * BYTES[dtype]:
        raise GMError(f"{file} is no complete safetensors file: {shown(name)} has {size:,} bytes for {shown(shape)}")
    return Entry(name, file, dtype, tuple(shape), begin + offsets[0], size)
