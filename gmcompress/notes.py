"""Notes of a long compression: what is done is kept in a folder, and a second call with the same model goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .copies import state_of
from .errors import GMError
from .files import (
    file_digest,
    json_digest,
    read_json,
    read_tensors,
    sealed,
    unsealed,
    usable,
    write_json,
    write_tensors,
)

KEY = "notes.json"


class Notes:
    """A folder of JSON and safetensors, one entry for each layer done; without a folder nothing is kept.

    Raises:
        GMError: the folder holds the notes on another model, other data or other rules, or something else.
    """

    def __init__(self, folder: str | Path | None, key: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else usable(folder)
        if self.folder is None:
            return
        path = self.folder / KEY
        if path.is_file():
            found = read_json(path)
            differing = sorted(name for name in key if found.get(name) != key[name])
            if differing:
                what = " and ".join(differing)
                raise GMError(f"{self.folder} holds the notes of a call with another {what}; give another folder")
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise GMError(f"{self.folder} holds something else; give a folder that is new or empty")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, dict(key))

    def read(self, kind: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Facts and tensors of an entry; None where it is not there.

        Raises:
            GMError: the entry was changed after it was written.
        """
        if self.folder is None or not (path := self._path(kind, name)).is_file():
            return None
        facts = unsealed(read_json(path), path)
        digest = facts.pop("tensors", None)
        if digest is None:
            return facts, {}
        beside = path.with_suffix(".safetensors")
        if file_digest(beside) != digest:
            raise GMError(f"{beside} was changed, truncated or replaced after it was written; give another folder")
        return facts, read_tensors(beside)

    def write(
        self, kind: str, name: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Keep an entry; the JSON comes last, so that an entry is complete or not there."""
        if self.folder is None:
            return
        path = self._path(kind, name)
        digest = None
        if tensors:
            beside = path.with_suffix(".safetensors")
            write_tensors(beside, {key: each.cpu() for key, each in tensors.items()})
            digest = file_digest(beside)
        write_json(path, sealed({**facts, "tensors": digest}))

    def _path(self, kind: str, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{kind}-{json_digest({'name': name})[:16]}.json"


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """A digest of the values of tensors, in order."""
    found = hashlib.sha256()
    for each in tensors:
        found.update(f"{each.dtype}{tuple(each.shape)}".encode())
        plain = each.dequantize() if each.is_quantized else each.to_dense() if each.layout != torch.strided else each
        found.update(plain.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def model_digest(model: nn.Module) -> str:
    """A digest of all parameters and buffers of a model."""
    return tensors_digest(each for _, each in sorted(state_of(model).items()) if isinstance(each, Tensor))


def data_digest(batches: Iterable[Any]) -> str:
    """A digest of the tensors in batches."""
    return tensors_digest(each for each in tree_flatten(list(batches))[0] if isinstance(each, Tensor))
