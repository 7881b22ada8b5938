"""Files: JSON and tensors, written so that a reader never sees half of one, read so that a bad one is named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import GMError, shown

MAX_JSON = 16 << 20  # characters or bytes; in memory, empty lists take thirty times as many
MAX_NESTED = 32  # objects and lists inside each other
MAX_DIGITS = 40  # of an integer
MAX_HEADER = 4 << 20  # bytes of the names and shapes in a safetensors file
MAX_SIDE = 1 << 40  # numbers along one axis of a tensor


def usable(given: str | Path) -> Path:
    """A path that the system understands, whether or not there is something.

    Raises:
        GMError: it is no path, or one of too many characters or of such as no name may hold.
    """
    try:
        path = Path(given)
        path.stat()
    except (TypeError, ValueError):  # a null byte, or half a character
        raise GMError(f"{shown(given)} is no path; give one as text, without null characters") from None
    except OSError as problem:
        if problem.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise GMError(f"{shown(given)} cannot be a path: {problem.strerror}") from None
    return path


def _beside(path: Path) -> Path:
    """A hidden name that nothing has, in the same folder."""
    return usable(path).with_name(f".{path.name[:60]}.{uuid.uuid4().hex[:8]}")


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, flush it to the disk and rename it there.

    Raises:
        GMError: the folder does not exist or cannot be written to, or the text holds what is no character.
    """
    beside = _beside(path)
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as problem:
        beside.unlink(missing_ok=True)
        raise GMError(f"cannot write {path}: {problem.strerror}") from None
    except UnicodeEncodeError as problem:
        beside.unlink(missing_ok=True)
        bad = shown(problem.object[problem.start : problem.end])
        raise GMError(f"cannot write {path}: {bad} in the text is no character; a name given may hold it") from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends well, and vanishes when it does not.

    Raises:
        GMError: `path` is a file, or cannot be created.
    """
    if usable(path).exists() and not path.is_dir():
        raise GMError(f"{path} is a file; a folder is needed")
    beside = _beside(path)
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
    folder = _beside(path)
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
        if usable(path).stat().st_size > MAX_JSON:
            raise GMError(f"{path} has {path.stat().st_size:,} bytes; a description has at most {MAX_JSON:,}")
        found = parse_json(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise GMError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise GMError(f"{path} is not readable as JSON: {problem}") from None
    if not isinstance(found, dict):
        raise GMError(f"{path} must hold a JSON object, not a {type(found).__name__}")
    return found


def parse_json(text: str, what: str = "this") -> Any:
    """What a JSON text holds, `what` in messages; NaN and Infinity are taken, as Python writes them.

    Raises:
        GMError: it is not JSON, is too large or nested too deeply, names a field twice, or holds an enormous integer or
            half a character.

    >>> parse_json('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    """
    if not isinstance(text, str):
        raise GMError(f"{what} is not readable as JSON, which is text, not {type(text).__name__}")
    if len(text) > MAX_JSON:
        raise GMError(f"{what} has {len(text):,} characters; a description has at most {MAX_JSON:,}")
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except (ValueError, RecursionError) as problem:
        raise GMError(f"{what} is not readable as JSON: {problem}") from None
    inside, depth = [found], 0
    while inside:
        if depth > MAX_NESTED:
            raise GMError(f"{what} is not readable as JSON: more than {MAX_NESTED} objects and lists inside each other")
        held = [each.values() if isinstance(each, dict) else each for each in inside if isinstance(each, dict | list)]
        inside, depth = [each for values in held for each in values], depth + 1
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as problem:
        raise GMError(f"{what} is not readable as JSON: half a character in a string ({problem.reason})") from None
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {shown(twice)} stands twice in one object")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"{digits[:12]}... has {len(digits)} digits")
    return int(digits)


def is_storable(tensor: Tensor) -> bool:
    """Whether safetensors can hold a tensor: a plain one, of a type that it knows."""
    plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested
    return plain and tensor.dtype not in (torch.complex32, torch.complex128)


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
    if not usable(path).is_file():
        raise GMError(f"{path} does not exist")
    read_header(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError) as problem:
        raise GMError(f"{path} is no complete safetensors file: {problem}") from None
    except MemoryError:
        raise GMError(f"{path} has {path.stat().st_size:,} bytes, for which there is not enough memory") from None


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, by name, and where in the file their bytes begin.

    Raises:
        GMError: the file is missing or is not safetensors; sizes that torch cannot hold, or so many names that reading
            them takes minutes.
    """
    try:
        with open(usable(path), "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER:
                raise GMError(f"its header is to have {size:,} bytes; at most {MAX_HEADER:,} are read")
            header = parse_json(file.read(size).decode("utf-8"))
    except FileNotFoundError:
        raise GMError(f"{path} does not exist") from None
    except (GMError, OSError, UnicodeDecodeError) as problem:
        raise GMError(f"{path} is no complete safetensors file: {problem}") from None
    if not isinstance(header, dict):
        raise GMError(f"{path} is no complete safetensors file: its header is no object")
    shapes = [each.get("shape") for each in header.values() if isinstance(each, dict)]
    if any(isinstance(side, int) and side > MAX_SIDE for shape in shapes if isinstance(shape, list) for side in shape):
        raise GMError(f"{path} is no safetensors file that can be read: more than {MAX_SIDE:,} numbers along an axis")
    return header, 8 + size


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        GMError: the file does not exist.
    """
    if not usable(path).is_file():
        raise GMError(f"{path} does not exist")
    running = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            running.update(block)
    return running.hexdigest()


def json_digest(content: Mapping[str, Any]) -> str:
    """The SHA-256 of an object's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """An object with its own digest as a further field."""
    return {**content, "digest": json_digest(content)}


def unsealed(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What was sealed, without its digest.

    Raises:
        GMError: the digest is another, or there is none.
    """
    inside = {key: value for key, value in content.items() if key != "digest"}
    if content.get("digest") != json_digest(inside):
        raise GMError(f"{path} was changed after it was written: its digest does not match")
    return inside
