"""Files: JSON and tensors, written so that a reader never sees half of one, read so that a bad one is named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import GMError

MAX_JSON = 64 << 20  # bytes


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, flush it to the disk and rename it there.

    Raises:
        GMError: the folder does not exist or cannot be written to.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as problem:
        beside.unlink(missing_ok=True)
        raise GMError(f"cannot write {path}: {problem.strerror}") from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends well, and vanishes when it does not.

    Raises:
        GMError: `path` is a file, or cannot be created.
    """
    if path.exists() and not path.is_dir():
        raise GMError(f"{path} is a file; a folder is needed")
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        beside.mkdir(parents=True)
    except OSError as problem:
        raise GMError(f"cannot create {path}: {problem.strerror}") from None
    try:
        yield beside
        for each in beside.iterdir():
            _flush(each)
        old = path.with_name(f"{beside.name}.old")
        if path.exists():
            os.replace(path, old)
        os.replace(beside, path)
        _flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder beside it, from which all files move when the block ends well.

    Files that the block writes next to the one named keep their names; the one named moves last.

    Raises:
        GMError: the folder does not exist or cannot be written to.
    """
    folder = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        folder.mkdir()
        yield folder / path.name
        written = sorted(folder.iterdir(), key=lambda each: each.name == path.name)
        for each in written:
            _flush(each)
        for each in written:
            os.replace(each, path.with_name(each.name))
        _flush(path.parent)
    except OSError as problem:
        raise GMError(f"cannot write {path}: {problem.strerror or problem}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as indented JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        GMError: the file is missing, too large, not JSON, or holds no object.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise GMError(f"{path} has {path.stat().st_size:,} bytes; a description has at most {MAX_JSON:,}")
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GMError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as problem:
        raise GMError(f"{path} is not readable as JSON: {problem}") from None
    if not isinstance(found, dict):
        raise GMError(f"{path} must hold a JSON object, not a {type(found).__name__}")
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors; no two of them may share memory.

    Raises:
        GMError: the file cannot be written.
    """
    try:
        save_file({name: each.detach().contiguous().cpu() for name, each in tensors.items()}, path)
    except (OSError, SafetensorError) as problem:
        raise GMError(f"cannot write {path}: {problem}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        GMError: the file is missing, truncated, or not safetensors.
    """
    if not path.is_file():
        raise GMError(f"{path} does not exist")
    try:
        return load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError) as problem:
        raise GMError(f"{path} is no complete safetensors file: {problem}") from None


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        GMError: the file does not exist.
    """
    if not path.is_file():
        raise GMError(f"{path} does not exist")
    running = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            running.update(block)
    return running.hexdigest()


def json_digest(content: Mapping[str, Any]) -> str:
    """The SHA-256 of an object's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
