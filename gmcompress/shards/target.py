"""The folder that is being filled: whole shards only, and a note of which are done, by which a later call goes on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import GMError, shown
from ..files import file_digest, read_json, sealed, unsealed, usable, write_json
from .description import DESCRIPTION
from .fitting import fit_entry
from .layout import Unit, header_of
from .source import INDEX

STATE = "gmcompress-unfinished.json"
BESIDE = ".unfinished-"  # before the name of a shard that is being written


class Target:
    """A folder to be filled with the shards of one compression, which `key` stands for.

    Raises:
        GMError: it holds something else, is a file, or cannot be made.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder, self.key = usable(folder), key
        self.done: dict[str, dict[str, Any]] = {}  # by file: its digest, and the relative errors in it
        self.new = not self.folder.exists()
        if self.folder.exists() and not self.folder.is_dir():
            raise GMError(f"{self.folder} is a file; a folder is needed")
        if (self.folder / STATE).is_file():
            self._go_on()
        elif not self.new and any(self.folder.iterdir()):
            raise GMError(f"{self.folder} holds something already; give a new or an empty folder")

    def _go_on(self) -> None:
        path = self.folder / STATE
        content = unsealed(read_json(path), path)
        if content.get("key") != self.key:
            said = "of another source, or with other settings; give those again, or remove the folder"
            raise GMError(f"{self.folder} holds an unfinished compression {said}")
        done = content.get("done")
        for name, each in done.items() if isinstance(done, dict) else ():
            if not isinstance(each, dict) or Path(name).name != name:
                raise GMError(f"{path} holds {shown(name)}, which is no finished shard")
            errors, whole = each.get("errors"), self.folder / name
            if whole.is_file() and isinstance(errors, dict) and file_digest(whole) == each.get("digest"):
                self.done[name] = {"digest": each["digest"], "errors": errors}
        self.new = content.get("new") is True

    def begin(self) -> None:
        """Make the folder, and remove what an interrupted call left half-written.

        Raises:
            GMError: the folder cannot be made or written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise GMError(f"cannot create {self.folder}: {problem.strerror}") from problem
        for each in self.folder.glob(f"{BESIDE}*"):
            each.unlink()
        self._note()

    def _note(self) -> None:
        write_json(self.folder / STATE, sealed({"key": self.key, "new": self.new, "done": self.done}))

    def write(self, name: str, units: Sequence[Unit], tell: Callable[[str], None]) -> None:
        """Compress and copy the units of a shard into its file, which appears when it is whole.

        Raises:
            GMError: a tensor cannot be read or fitted; from an OSError, that the file cannot be written.
        """
        beside, errors, digest = self.folder / (BESIDE + name), {}, hashlib.sha256()
        try:
            with open(beside, "wb") as file:

                def put(data: bytes) -> None:
                    file.write(data)
                    digest.update(data)

                put(header_of(units))
                for unit in units:
                    if unit.structure is None:
                        for piece in unit.entry.pieces():
                            put(piece)
                        continue
                    tell(unit.name)
                    tensors, errors[unit.name] = fit_entry(unit.entry, unit.view, unit.structure)
                    for part in unit.structure.shapes(unit.view.matrix_shape):
                        put(_bytes_of(tensors[part]))
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.folder / name)
        except OSError as problem:
            raise GMError(f"cannot write {self.folder / name}: {problem.strerror or problem}") from problem
        finally:
            beside.unlink(missing_ok=True)
        self.done[name] = {"digest": digest.hexdigest(), "errors": errors}
        self._note()

    def finish(self, index: dict[str, Any], describe: Callable[[], None]) -> None:
        """Write the index and the description, with which the folder is whole."""
        write_json(self.folder / INDEX, index)
        describe()
        (self.folder / STATE).unlink()

    def discard(self) -> None:
        """Remove everything that the compression has put here."""
        for name in (*self.done, INDEX, DESCRIPTION, STATE):
            (self.folder / name).unlink(missing_ok=True)
        if self.new and self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
