"""compress_shards(): a model in files to a smaller one in files, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import GMError
from ..files import json_digest, usable
from ..groups import Group
from ..planning import Override, Plan, choose
from ..rules import Rule, Rules
from .description import DESCRIPTION, Shards, check_files, describe_shards, write_description
from .layout import Unit, packed, read_size, sites_of, units_of
from .source import Entry, model_type, read_source
from .target import STATE, Target

Progress = Callable[[str, int, int], None]  # layer, done, of
SHARD_SIZE = "5GB"


def compress_shards(
    source: str | Path,
    target: str | Path,
    *,
    group: str | Group = "C32xC32",
    rank: int = 1,
    residual: str = "displacement",
    include: Rules = (),
    exclude: Rules = (),
    overrides: Mapping[Rule, Override] | None = None,
    transposed: Rules | None = None,
    shard_size: int | str = SHARD_SIZE,
    progress: Progress | None = None,
) -> Shards:
    """Compress the weights in safetensors files to a folder of safetensors files, without the model's code.

    `source` is one file, or a folder of them with or without an index. Every floating tensor of two axes (rows,
    columns) or four (a convolution's, in one group) named `<module>.weight` gets the largest fitting quotient of
    `group` with a residual of this rank, as `compress(rank=...)` does on layers of these shapes; its parts are stored
    as `<module>.kernel`, `.gates` and so on, in its own type. All other tensors are copied byte for byte. What is an
    embedding or the classifier by its name (`EMBEDDINGS`, `HEADS`) stays dense unless `include` names it. Weights
    stored as inputs × outputs are compressed as their transposes: those that `transposed` names, (columns, rows) or
    (columns, rows, height, width), and without it those of a model like GPT-2, which a config.json beside the files
    tells. Rules are globs and "re:" patterns on module names, `include`, `exclude` and `overrides` as in `compress`.

    At most a block of rows is in memory, with a residual of low rank at most one tensor, in float64. Shards have at
    most `shard_size` bytes, where no tensor has more. Interrupted, the same call goes on after the last whole shard;
    when all is done it returns at once. `load_shards` builds the model.

    Raises:
        GMError: files that are not complete or contradict each other, a group that fits nothing, a rule that matches
            nothing, weights that hold NaN, or a folder that holds something else. Nothing is left behind then; where
            the disk is full, the finished shards are, to go on from.

    >>> compress_shards("llama", "llama")
    Traceback (most recent call last):
    gmcompress.errors.GMError: llama cannot be both source and target, nor one inside the other
    """
    _check_apart(usable(source), place := usable(target))
    entries, size = read_source(source), read_size(shard_size)
    options: dict[str, Any] = {"include": include, "exclude": exclude, "overrides": overrides}
    sites, turned = sites_of(entries, transposed, model_type=model_type(source))
    options |= {"model_parameters": sum(each.numbers for each in entries), "rank": rank, "residual": residual}
    plan = choose(sites, group, **options)
    shards = packed(units_of(entries, plan, turned), size)
    key = _key(entries, plan.layers, turned, size)
    found = _planned(plan, turned, key)
    if (place / DESCRIPTION).is_file() and not (place / STATE).is_file():
        return _finished(place, key)
    filled = Target(place, key)
    try:
        filled.begin()
        _write(filled, shards, progress)
        found = _described(found, filled, entries, shards)
        filled.finish(_index(shards), lambda: write_description(place, found))
    except GMError as problem:
        if not isinstance(problem.__context__, OSError):  # with other input another compression is needed
            filled.discard()
        raise
    return found


def _planned(plan: Plan, turned: Collection[str], key: str) -> Shards:
    """What is known before anything is computed."""
    shapes = {site.name: list(site.shape) for site in plan.sites}
    return Shards(plan.group, plan.layers, plan.skipped, shapes, sorted(turned), {}, [], [], {}, key)


def _write(filled: Target, shards: Mapping[str, list[Unit]], progress: Progress | None) -> None:
    layers = [unit.name for units in shards.values() for unit in units if unit.structure is not None]
    place = {name: at for at, name in enumerate(layers)}

    def tell(layer: str) -> None:
        if progress is not None:
            progress(layer, place[layer], len(layers))

    for name, units in shards.items():
        if name not in filled.done:
            filled.write(name, units, tell)


def _check_apart(source: Path, target: Path) -> None:
    here, there = source.resolve(), target.resolve()
    inside = there.is_relative_to(here) or here.is_relative_to(there)
    if inside:
        raise GMError(
            f"{source} cannot be both source and target, nor one inside the other"
            if here == there
            else f"{source} and {target}: one is inside the other, so that they cannot be source and target"
        )


def _key(entries: Iterable[Entry], layers: Mapping[str, str], turned: Collection[str], size: int) -> str:
    """What stands for this compression: the files as they are, the structures and of what, the size of the shards."""
    files = sorted({each.file for each in entries})
    told = [[each.name, each.stat().st_size, each.stat().st_mtime_ns] for each in files]
    tensors = [[each.name, each.dtype, list(each.shape), each.start] for each in entries]
    facts = {"files": told, "tensors": tensors, "layers": dict(layers), "shard_size": size}
    return json_digest(facts | {"transposed": sorted(turned)})


def _finished(place: Path, key: str) -> Shards:
    """What an earlier call of the same kind has done."""
    found = describe_shards(place)
    if found.key != key:
        raise GMError(f"{place} holds shards of another source, or compressed with other settings; give a new folder")
    check_files(place, found.files)
    return found


def _described(found: Shards, filled: Target, entries: list[Entry], shards: Mapping[str, list[Unit]]) -> Shards:
    units = [unit for each in shards.values() for unit in each]
    errors: dict[str, float] = {}
    for name in shards:
        errors |= filled.done[name]["errors"]
    return replace(
        found,
        relative_errors={name: errors[name] for name in found.layers},
        parameters=[sum(each.numbers for each in entries), sum(unit.numbers for unit in units)],
        bytes=[sum(each.size for each in entries), sum(unit.size for unit in units)],
        files={name: filled.done[name]["digest"] for name in shards},
    )


def _index(shards: Mapping[str, list[Unit]]) -> dict[str, object]:
    """The index of shards as Hugging Face writes it."""
    places = {name: file for file, units in shards.items() for unit in units for name in unit.sizes}
    size = sum(unit.size for units in shards.values() for unit in units)
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
