"""What becomes of each tensor, known before anything is computed: its structure, its new names, and its shard."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from ..errors import GMError, shown
from ..kinds import View
from ..planning import Plan
from ..rules import Rules, listed, matching
from ..structure import Structure
from ..surgery import Site
from .source import BYTES, Entry

FLOATS = ("F16", "BF16", "F32", "F64")
EMBEDDINGS = ("*embed*", "*emb", "wte", "wpe", "shared", "relative_attention_bias")  # of either of the last two parts
HEADS = ("lm_head", "head", "head.fc", "classifier", "score", "output", "fc", "cls.predictions.decoder")  # whole names
# the last part of the names of weights that lie as inputs × outputs, by the model_type of a config.json
_OF_GPT2 = ("c_attn", "q_attn", "c_fc", "c_proj")
TRANSPOSED = dict.fromkeys(("gpt2", "imagegpt", "decision_transformer", "openai-gpt"), _OF_GPT2)
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Unit:
    """A tensor with what becomes of it: the same bytes, or the parts of a structure, by their new names."""

    entry: Entry
    view: View  # how the matrix lies in it, where it is compressed
    structure: Structure | None
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        """The name of the module, for a weight that is compressed."""
        return module_name(self.entry.name)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by new name."""
        if self.structure is None:
            return {self.entry.name: self.entry.size}
        return {name: prod(shape) * BYTES[self.entry.dtype] for name, shape in self.shapes.items()}

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return sum(self.sizes.values())

    @property
    def numbers(self) -> int:
        """Numbers stored."""
        return sum(map(prod, self.shapes.values()))


def module_name(name: str) -> str:
    """The name of the module whose weight a tensor is; its own, where it is no weight.

    >>> module_name("layers.0.weight"), module_name("weight"), module_name("layers.0.bias")
    ('layers.0', '', 'layers.0.bias')
    """
    return "" if name == "weight" else name.removesuffix(".weight")


def site_of(entry: Entry) -> Site | None:
    """The facts about a tensor of two axes or more, as far as names and shapes tell them; None for all others.

    A name tells no lookup from a product. By name an embedding is what matches `EMBEDDINGS` in one of the last two
    parts of its module's name, a classifier what has a name of `HEADS`.
    """
    shape, name = entry.shape, entry.name
    if not 2 <= len(shape) <= 8 or min(shape) < 1:
        return None
    path = module_name(name)
    obstacle = ""
    if path == name:
        obstacle = "its name does not end in weight, so it is not known to be a matrix"
    elif len(shape) not in (2, 4):
        obstacle = f"it has {len(shape)} axes, and is the weight of neither a linear layer nor a 2-d convolution"
    elif entry.dtype not in FLOATS:
        obstacle = f"its type is {entry.dtype}"
    kind = "convolution" if len(shape) == 4 else "matrix"
    return Site(path, (name,) if path != name else (), kind, shape, 1, prod(shape), None, _role(path), obstacle)


def _role(path: str) -> str:
    parts = path.lower().split(".")
    if any(fnmatch.fnmatchcase(part, each) for part in parts[-2:] for each in EMBEDDINGS):
        return "embedding, by its name"
    return "classifier, by its name" if path.lower() in HEADS else ""


def sites_of(
    entries: Sequence[Entry], transposed: Rules | None = None, *, model_type: str = ""
) -> tuple[tuple[Site, ...], frozenset[str]]:
    """The sites among these tensors, and the names of those whose weight lies as inputs × outputs.

    These are what the rules name, or without rules what `TRANSPOSED` knows of the type of the model.

    Raises:
        GMError: two have one name, or a rule matches nothing.
    """
    found = [site for site in map(site_of, entries) if site is not None]
    if len({site.name for site in found}) < len(found):
        raise GMError("two tensors have the same name, once with .weight behind it")
    if transposed is None:
        last = TRANSPOSED.get(model_type, ())
        named = {site.name for site in found if site.name.split(".")[-1] in last}
    else:
        named = {name for rule in listed(transposed) for name in matching(rule, found)}
    turned = frozenset(site.name for site in found if site.name in named and not site.obstacle)
    sites = (replace(each, shape=_view(each.shape, turned=each.name in turned).matrix_shape) for each in found)
    return tuple(sites), turned


def _view(shape: tuple[int, ...], *, turned: bool) -> View:
    """How a matrix lies in a tensor of this shape."""
    return View(("io" if turned else "oi") + "k" * (len(shape) - 2), shape)


def units_of(entries: Sequence[Entry], plan: Plan, transposed: Collection[str] = ()) -> list[Unit]:
    """What the plan makes of all tensors.

    Raises:
        GMError: a new name is taken.
    """
    found, taken = [], {each.name for each in entries}
    for entry in entries:
        path = module_name(entry.name)
        if path == entry.name or path not in plan.layers:
            found.append(Unit(entry, View("o" * len(entry.shape), entry.shape), None, {entry.name: entry.shape}))
            continue
        structure, view = Structure.parse(plan.layers[path]), _view(entry.shape, turned=path in transposed)
        shapes = structure.shapes(view.matrix_shape).items()
        unit = Unit(entry, view, structure, {f"{path}.{part}" if path else part: shape for part, shape in shapes})
        for name in unit.shapes:
            if name in taken:
                raise GMError(
                    f"{shown(entry.name)} would be stored as {shown(name)}, which is another tensor; exclude it"
                )
        taken |= set(unit.shapes)
        found.append(unit)
    return found


def packed(units: Sequence[Unit], shard_size: int) -> dict[str, list[Unit]]:
    """The units of each shard by its file name: in their order, as many as fit, at least one.

    In a shard the wider types come first, so that every tensor starts at a multiple of the size of its numbers.
    """
    shards: list[list[Unit]] = [[]]
    full = 0
    for unit in units:
        if shards[-1] and full + unit.size > shard_size:
            shards.append([])
            full = 0
        shards[-1].append(unit)
        full += unit.size
    count = len(shards)
    for shard in shards:
        shard.sort(key=lambda unit: -BYTES.get(unit.entry.dtype, 1))
    return {f"model-{at:05d}-of-{count:05d}.safetensors": shard for at, shard in enumerate(shards, 1)}


def header_of(units: Sequence[Unit]) -> bytes:
    """What a safetensors file of these units begins with."""
    found: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, unit, start, stop in _placed(units):
        offsets = [start, stop]
        found[name] = {"dtype": unit.entry.dtype, "shape": list(unit.shapes[name]), "data_offsets": offsets}
    text = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _placed(units: Sequence[Unit]) -> Iterator[tuple[str, Unit, int, int]]:
    at = 0
    for unit in units:
        for name, size in unit.sizes.items():
            yield name, unit, at, at + size
            at += size


def read_size(given: int | str) -> int:
    """Bytes, as a number or as a text such as "5GB".

    Raises:
        GMError: it is neither, or less than a byte.

    >>> read_size("1.5 MB")
    1500000
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([KMGT]B)?", str(given).strip(), re.IGNORECASE | re.ASCII)
    size = int(float(match[1]) * UNITS[(match[2] or "").upper()]) if match and not isinstance(given, bool) else 0
    if size < 1:
        raise GMError(f'a shard size is a number of bytes, or a text such as "500MB" or "5GB", not {shown(given)}')
    return size
