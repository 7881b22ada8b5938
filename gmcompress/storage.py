"""Save and load compressed models: safetensors and JSON in a folder, no pickle, nothing imported by a name in a file.

A folder holds `gmcompress.json` (format, structures and separable kernels by layer, plan, dtypes, aliases of tied
tensors, digests of the other files), `model.safetensors`, and `check.safetensors`: example inputs with the outputs they
gave, which loading runs again.
"""

from __future__ import annotations

import math
import platform
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .attaching import CHILD, empty, exchange, structured
from .batches import is_divisible, moved
from .copies import device_of, evaluating, parameters_of, state_of, whole_state
from .errors import GMError, nearest_names, said, shown
from .files import (
    file_digest,
    is_storable,
    new_folder,
    parse_json,
    read_json,
    read_tensors,
    sealed,
    unsealed,
    usable,
    write_json,
    write_tensors,
)
from .forward import Inputs, run_seeded, shell
from .groupconv import GroupConv
from .layers import GMWeight
from .nesting import ROOT, by_name, laid_open, nested, settings_text
from .planning import Plan
from .reporting import Result
from .separables import like_told, separations
from .surgery import check_model, find_weight

FORMAT = 1
DESCRIPTION, WEIGHTS, CHECK = "gmcompress.json", "model.safetensors", "check.safetensors"
OWN_OPTIONS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}  # name files
FIELDS = {"format", "versions", "source", "layers", "plan", "dtypes", "aliases", "check", "digests", "digest"}


def save(
    model: nn.Module | Result,
    folder: str | Path,
    *,
    inputs: Inputs | None = None,
    source: str | None = None,  # "timm:resnet50", from which load() can build the dense model itself
    source_options: Mapping[str, Any] | None = None,  # of timm.create_model: num_classes, in_chans, ...
) -> None:
    """Write a compressed model to a folder that takes the place of an older one, whole or not at all.

    `inputs` (those of a Result, or one random image for a timm model, where left out) make the stored pair of inputs
    and outputs by which `load` checks itself. Without any, where those of a Result cannot be stored, or where the model
    does not take the random image, there is no such pair, and a warning says so.

    Raises:
        GMError: a wrapped model, state that safetensors cannot hold, inputs, given or a Result's, that the model does
            not accept, inputs given that cannot be stored, a source that is not "timm:...", or no place to write.
    """
    place = usable(folder)
    plan = model.plan if isinstance(model, Result) else None
    known = model.inputs if isinstance(model, Result) else None
    model = model.model if isinstance(model, Result) else model
    check_model(model)
    if source is not None and not source.startswith("timm:"):
        raise GMError(f'a source is "timm:" and the name of a model, not {source!r}')
    tensors, aliases = _distinct(model)
    pair, missing = _own_pair(model, known) if inputs is None else (_pair(model, inputs), "")
    if missing:
        warnings.warn(
            f"saved without example inputs, so load() cannot run the model to check it{missing}", stacklevel=2
        )
    layers = {name: str(each.structure) for name, each in structured(model).items()} | separations(model)
    content: dict[str, Any] = {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("gmcompress", "torch", "timm")}
        | {"python": platform.python_version()},
        "source": None if source is None else {"name": source, "options": dict(source_options or {})},
        "layers": layers,
        "plan": None if plan is None else plan.to_dict(),
        "dtypes": {name: str(each.dtype).removeprefix("torch.") for name, each in tensors.items()},
        "aliases": aliases,
        "check": settings_text({name: each for name, each in pair.items() if name.startswith(ROOT)}),
    }
    with new_folder(place) as beside:
        write_tensors(beside / WEIGHTS, tensors)
        write_tensors(beside / CHECK, {name: each for name, each in pair.items() if isinstance(each, Tensor)})
        content["digests"] = {name: file_digest(beside / name) for name in (WEIGHTS, CHECK)}
        write_json(beside / DESCRIPTION, sealed(content))


@torch.inference_mode(False)  # as compress
def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The compressed model in a folder, in evaluation mode, rebuilt on a copy of an uncompressed `model`.

    The dense model may be left out where the folder was saved with a source. The stored inputs are run again and must
    give the stored outputs.

    Raises:
        GMError: a file is missing, truncated, edited or foreign, the model is another one, or the outputs differ.
    """
    place = usable(folder)
    content = _description(place)
    dense = _built(content["source"], place) if model is None else model
    check_model(dense)
    tensors = read_tensors(place / WEIGHTS)
    small = _rebuilt(dense, content["layers"], tensors, place)
    _fill(small, tensors, content, place)
    _check_pair(evaluating(small), read_tensors(place / CHECK), content["check"], place)
    return small


def describe_folder(folder: str | Path) -> dict[str, Any]:
    """The checked content of a folder's gmcompress.json.

    Raises:
        GMError: a file is missing, truncated, edited or foreign.
    """
    return _description(usable(folder))


def _description(place: Path) -> dict[str, Any]:
    """The description of a folder, all digests checked."""
    path = place / DESCRIPTION
    if not path.is_file():
        raise GMError(f"{place} is no folder of a compressed model: it has no {DESCRIPTION}")
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise GMError(f"{path} has format {shown(content.get('format'))}; this version reads format {FORMAT}")
    if set(content) != FIELDS:
        raise GMError(f"{path} lacks or adds fields: {', '.join(sorted(set(content) ^ FIELDS))}")
    content = unsealed(content, path)
    for key, kind in (("layers", dict), ("dtypes", dict), ("aliases", dict), ("check", list), ("digests", dict)):
        held = content[key].values() if isinstance(content[key], dict) else content[key]
        if not isinstance(content[key], kind) or not all(isinstance(each, str) for each in held):
            raise GMError(f"{path}: {key!r} must be of type {kind.__name__} and hold texts")
    for name in (WEIGHTS, CHECK):
        if file_digest(place / name) != content["digests"].get(name):
            raise GMError(f"{place / name} was changed, truncated or replaced after it was written")
    if content["plan"] is not None:
        content["plan"] = Plan.from_dict(content["plan"])
    return content


def _distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the state dict, tied ones once, and for every other name the one it stands for."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    state = whole_state(model)
    check_storable(state)
    for name, tensor in state.items():
        kept = first.setdefault(id(tensor), name)
        if kept == name:
            tensors[name] = tensor.detach().clone()
        else:
            aliases[name] = kept
    return tensors, aliases


def check_storable(state: Mapping[str, Any]) -> None:
    """Refuse state of a model that safetensors cannot hold.

    Raises:
        GMError: naming it.
    """
    for name, each in state.items():
        if not isinstance(each, Tensor):
            remedy = "let get_extra_state return a tensor" if name.endswith("_extra_state") else "make it a buffer"
            raise GMError(
                f"the model's state {name!r} is no tensor but {type(each).__name__}, which cannot be written; {remedy}"
            )
        if not is_storable(each):
            kind = f"{each.dtype}, {each.layout}".replace("torch.", "")
            raise GMError(
                f"the model's state {name!r} ({kind}) is no tensor that safetensors can hold; "
                "register it with persistent=False, or as another"
            )


def _example(model: nn.Module) -> Tensor | None:
    """One random image of the size that a timm model declares, else None."""
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if not size:
        return None
    first = next(iter(parameters_of(model).values()))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *size, generator=generator).to(device=first.device, dtype=first.dtype)


def _pair(model: nn.Module, inputs: Inputs | None) -> dict[str, Any]:
    """Example inputs, cut down to one sample where the model runs on that, and the outputs they give."""
    if inputs is None:
        return {}
    named, ready = by_name(list(inputs) if isinstance(inputs, tuple) else inputs), shell(model, private=True)
    if is_divisible(inputs):
        try:
            first = {key: value[:1].clone() if isinstance(value, Tensor) else value for key, value in named.items()}
            return _run_pair(ready, first)
        except GMError:
            pass  # a model bound to its batch size is checked on the whole batch
    return _run_pair(ready, named)


def _own_pair(model: nn.Module, known: Inputs | None) -> tuple[dict[str, Any], str]:
    """The pair of a model without inputs given, of a Result's `known` ones or a random image; and why there is none.

    Raises:
        GMError: the model does not run on known inputs.
    """
    try:
        if known is None:
            pair = _pair(model, _example(model))
            return pair, "" if pair else "; pass inputs="
        by_name(list(known) if isinstance(known, tuple) else known)
    except GMError as problem:
        return {}, f": {problem}"
    try:
        return _pair(model, moved(known, device_of(model))), ""  # it may have been moved since
    except GMError as problem:
        raise GMError(f"{problem}, though it was compressed on these; pass inputs= on which it runs") from problem


def _run_pair(model: nn.Module, named: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: each.detach().clone() if isinstance(each, Tensor) else each for key, each in named.items()}
    outputs = _tensors(run_seeded(model, _unnamed(named)))
    return given | {f"output.{index:04d}": each.detach().clone() for index, each in enumerate(outputs)}


def _unnamed(named: Mapping[str, Any]) -> Inputs:
    return nested({name.removeprefix(ROOT): each for name, each in named.items()})


def _tensors(output: Any) -> list[Tensor]:
    """The tensors in an output, as such that can be stored."""
    found = [each for each in tree_leaves(laid_open(output)) if isinstance(each, Tensor) and not each.is_nested]
    found = [each if each.layout is torch.strided else each.to_dense() for each in found]
    return [torch.view_as_real(each) if each.dtype == torch.complex128 else each for each in found]


def _built(source: Any, place: Path) -> nn.Module:
    """The dense model that a folder names; only timm's own registry is consulted."""
    import timm

    if source is None:
        raise GMError(f"{place} does not say how to build the dense model; pass it: load(folder, model)")
    name = source.get("name") if isinstance(source, dict) else None
    options = source.get("options") if isinstance(source, dict) else None
    if not isinstance(name, str) or not name.startswith("timm:") or not isinstance(options, dict):
        raise GMError(f"{place / DESCRIPTION}: the source {shown(source)} is not understood")
    if unwanted := sorted(OWN_OPTIONS & set(options)):
        raise GMError(
            f"{place / DESCRIPTION}: a source may not say {', '.join(unwanted)}; the weights are in {WEIGHTS}"
        )
    name = name.removeprefix("timm:")
    if not timm.is_model(name):
        raise GMError(f"{place} needs timm's model {name[:80]!r}, which this timm ({timm.__version__}) does not know")
    try:
        return timm.create_model(name, pretrained=False, **options)
    except Exception as problem:
        raise GMError(f"timm cannot build {name!r} with {shown(options)}: {problem}") from problem


def _rebuilt(dense: nn.Module, layers: Mapping[str, Any], tensors: Mapping[str, Tensor], place: Path) -> nn.Module:
    """A copy of the dense model with empty structured layers and weights in place, as the names of the tensors say."""
    try:
        made: dict[str, nn.Module] = {}
        separable = separations(dense)
        for name, text in layers.items():
            module, key = find_weight(dense, name)
            if isinstance(module, GroupConv) and key == "weight":  # of the whole layer, and not of its kernel
                made |= {} if separable.get(name) == text else {name: like_told(module, text)}
                continue
            path = name if key == "weight" else name.rpartition(".")[0]
            child = f"{path}.{CHILD}{key}." if path else f"{CHILD}{key}."
            layer = empty(dense, name, text, replaced=not any(each.startswith(child) for each in tensors))
            if isinstance(layer, GMWeight):  # which row was zero is not a matter of the weights that the model has now
                layer.zero_row = tensors.get(child + "zero_row")
            made[name] = layer
        return exchange(dense, made)
    except GMError as problem:
        raise GMError(f"{place} was saved from another model: {problem}") from None


def _fill(model: nn.Module, tensors: dict[str, Tensor], content: Mapping[str, Any], place: Path) -> None:
    """Put the stored tensors in place: shapes must agree, dtypes become the stored ones, ties stay ties."""
    aliases = content["aliases"]
    known = {*tensors, *aliases}
    _make_buffers(
        model, {name: tensors[aliases.get(name, name)] for name in known if aliases.get(name, name) in tensors}
    )
    own, buffers = whole_state(model), dict(model.named_buffers(remove_duplicate=False))
    missing, foreign = sorted(set(state_of(model)) - known), sorted(known - set(own))
    if missing or foreign:
        name = (missing or foreign)[0]
        which = (
            f"lacks {name!r}"
            if missing
            else f"holds {name!r}, which the model has not; near: {nearest_names(name, own)}"
        )
        raise GMError(f"{place / WEIGHTS} was saved from another model: it {which}")
    own = {name: each for name, each in own.items() if name in known}
    for name, target in own.items():
        found = tensors.get(aliases.get(name, name))
        if found is None or str(found.dtype).removeprefix("torch.") != content["dtypes"].get(aliases.get(name, name)):
            raise GMError(f"{place / WEIGHTS}: {name!r} is missing or of another dtype than {DESCRIPTION} says")
        if found.dtype != target.dtype and not (found.is_floating_point() and target.is_floating_point()):
            raise GMError(f"{place / WEIGHTS}: {name!r} is of {found.dtype}, but in the model of {target.dtype}")
        unfilled = name in buffers and target.numel() <= 1  # as an observer's is that takes the shape of what it sees
        if found.shape != target.shape and not unfilled:
            shapes = f"{tuple(found.shape)} there, {tuple(target.shape)} in the model"
            raise GMError(f"{place / WEIGHTS} was saved from another model: {name!r} has shape {shapes}")
    stored = {name: tensors[aliases.get(name, name)] for name in own}
    _check_ties(own, {name: aliases.get(name, name) for name in own}, tensors, place)
    held = {id(each) for each in (*parameters_of(model).values(), *buffers.values())}
    with torch.no_grad():
        for name, target in own.items():
            found, (path, _, key) = stored[name], name.rpartition(".")
            if key == "_extra_state":
                model.get_submodule(path).set_extra_state(found)
            elif id(target) in held:
                # a fresh copy is aligned in memory, without which some CPU kernels round in another order
                like = target if found.shape == target.shape else found  # strides stay, as those of channels_last
                target.data = torch.empty_like(like, dtype=found.dtype, device=target.device).copy_(found)
    made = [name for name, each in own.items() if id(each) not in held and not name.endswith("_extra_state")]
    _fill_made(model, stored, made, place)


def _fill_made(model: nn.Module, stored: Mapping[str, Tensor], names: Sequence[str], place: Path) -> None:
    """Put back the state that is no parameter or buffer, but made by the model's own code for its state_dict.

    What is made of tensors that are in place by now is as it was stored; all else its own way of loading takes.
    """
    if not _unlike(model, stored, names):
        return
    try:
        nn.Module.load_state_dict(model, dict(stored), strict=False)
    except Exception as problem:  # of any kind, from hooks and methods
        raise GMError(f"{place}: this {type(model).__name__} cannot load its own state: {said(problem)}") from problem
    if unlike := _unlike(model, stored, names):
        what = f"{unlike[0]!r} is made by the model's own code for its state_dict, which does not take it back"
        raise GMError(f"{place / WEIGHTS}: {what}; give the class a _load_from_state_dict that does")


def _unlike(model: nn.Module, stored: Mapping[str, Tensor], names: Sequence[str]) -> list[str]:
    """Those of the tensors in the state of a model that are not the stored ones up to rounding."""
    own = state_of(model) if names else {}
    gaps = {name: difference(own[name].detach().cpu(), stored[name].cpu()) for name in names}
    return [name for name, (gap, limit) in gaps.items() if not gap <= limit]


def _check_ties(own: Mapping[str, Any], sources: Mapping[str, str], tensors: Mapping[str, Tensor], place: Path) -> None:
    """Refuse two stored tensors for what is one in the model, of which only the last would be left."""
    first: dict[int, str] = {}
    for name, target in own.items():
        other = first.setdefault(id(target), name)
        one, two = (tensors[sources[each]] for each in (other, name))
        if one is not two and not torch.equal(one, two):
            raise GMError(
                f"{place / WEIGHTS} was saved from another model: {other!r} and {name!r} differ there, but are tied in "
                "the model; pass one in which they are not"
            )


def _make_buffers(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make the buffers, not filled yet, that a first run fills, and had filled in the model that was saved."""
    device = device_of(model)
    for path, module in model.named_modules():
        for key in [key for key, each in module._buffers.items() if each is None]:
            found = tensors.get(f"{path}.{key}" if path else key)
            if found is not None:
                module._buffers[key] = torch.empty_like(found, device=device)


def _check_pair(model: nn.Module, pair: dict[str, Tensor], inputs: Sequence[str], place: Path) -> None:
    """Run the stored inputs again and compare with the stored outputs, to a tolerance of their dtype."""
    if not inputs:
        return
    device = device_of(model) or torch.device("cpu")
    named: dict[str, Any] = {}
    for text in inputs:
        name, is_setting, value = text.partition("=")
        if not is_setting and name not in pair:
            raise GMError(f"{place / CHECK} lacks inputs that {DESCRIPTION} names")
        named[name] = parse_json(value, text[:80]) if is_setting else pair[name].to(device)
    found = _tensors(run_seeded(shell(model, private=True), _unnamed(named)))
    wanted = [pair[name] for name in sorted(pair) if name.startswith("output.")]
    if [each.shape for each in found] != [each.shape for each in wanted]:
        raise GMError(
            f"{place}: the loaded model's outputs have other shapes than the saved one's; is it the same model?"
        )
    for new, old in zip(found, wanted, strict=True):
        if new.is_complex() != old.is_complex():
            raise GMError(f"{place}: the loaded model's outputs are of {new.dtype}, the saved one's of {old.dtype}")
        worst, limit = difference(new.detach().cpu(), old)
        if not worst <= limit:
            raise GMError(
                f"{place}: on the stored inputs the loaded model's outputs differ by {worst:.2g} of their size "
                f"(tolerance {limit:.2g}); the model passed is not the one that was saved"
            )


def difference(new: Tensor, old: Tensor) -> tuple[float, float]:
    """By how much of its size a tensor differs, where not both are infinite or NaN alike, and what its dtype allows."""
    exact = not (old.is_floating_point() or old.is_complex())
    wide = torch.complex128 if old.is_complex() else torch.float64
    limit = 0.0 if exact else math.sqrt(torch.finfo(old.dtype).eps)
    finite = torch.isfinite(old)
    if not torch.equal(finite, torch.isfinite(new)) or not torch.equal(new[~finite].isnan(), old[~finite].isnan()):
        return math.inf, limit
    new, old = new[finite].to(wide), old[finite].to(wide)
    if not old.numel():
        return 0.0, limit
    return float((new - old).abs().max()) / max(float(old.abs().max()), 1e-12), limit
