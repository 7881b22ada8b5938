"""Trained group convolutions of a whole model made separable: the nearest kernels of a kind, layer by layer."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from .errors import GMError, shown
from .files import parse_json
from .groupconv import GroupConv
from .kinds import kind_of
from .rules import Rules, listed, matching
from .separation import Factors
from .structure import check_kind
from .surgery import Site, check_model, replace


def separate_layers(
    model: nn.Module,
    kind: str,
    *,
    terms: int = 1,
    factors: Factors | None = None,
    include: Rules = "*",
    exclude: Rules = (),
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A copy of a model in which `GroupConv` layers have the separable kernels nearest to theirs, and what was done.

    Kinds, terms and factors are those of `GroupConv.separated`. Residuals and biases stay. There is a row for each of
    these layers: `layer`, `kind` ("" where it is left), `dense` and `stored` numbers before and after, without the
    bias, `relative_error` of the kernel, Frobenius, and the `reason` why it is left: a rule, it would not get smaller,
    its group names no two factors, it is separable already, has hooks, or is tied. Rules are those of `compress`:
    globs, "re:" patterns or module types.

    `save` writes such a model, and `load` rebuilds it on one like that given here.

    Raises:
        GMError: an unknown kind, a rule that matches nothing, a model without such layers, or all of them are left.
    Source: Knigge et al. 2022, section 3.

    >>> small, rows = separate_layers(nn.Sequential(GroupConv("D4", 8, 8)), "separable")
    >>> small, [(row["dense"], row["stored"]) for row in rows]
    (Sequential(
      (0): GroupConv('D4', 8, 8, separable='separable')
    ), [(512, 160)])
    """
    check_model(model)
    check_kind(kind)
    layers = {name: each for name, each in model.named_modules() if isinstance(each, GroupConv)}
    if not layers:
        raise GMError("the model has no GroupConv, and no other layer has kernels to separate")
    sites = [_site(name, each) for name, each in layers.items()]
    out = {name for rule in listed(exclude) for name in matching(rule, sites)}
    named = {name for rule in listed(include) for name in matching(rule, sites)}
    made: dict[str, nn.Module] = {}
    rows: list[dict[str, Any]] = []
    for name, layer in layers.items():
        reason = "excluded" if name in out else "" if name in named else "not included"
        reason = reason or _obstacle(model, layer)
        found = reason or _separated(layer, kind, terms=terms, factors=factors)
        dense = _numbers(layer)
        row = {"layer": name, "kind": "", "dense": dense, "stored": dense, "relative_error": 0.0, "reason": found}
        if isinstance(found, GroupConv):
            made[name] = found
            row |= {"kind": kind, "stored": _numbers(found), "relative_error": _error(layer, found), "reason": ""}
        rows.append(row)
    if not made:
        told = "; ".join(f"{row['layer'] or 'the model itself'}: {row['reason']}" for row in rows)
        raise GMError(f"no layer can be made {kind}: {told}")
    return replace(model, made), rows


def separations(model: nn.Module) -> dict[str, str]:
    """The separable kernels of a model, by name of the layer: kind, terms and factors as JSON.

    >>> separations(nn.Sequential(GroupConv("D4", 8, 8), GroupConv("D4", 8, 8, separable="separable")))
    {'1': '{"kind": "separable", "terms": 1, "factors": null}'}
    """
    layers = {name: each for name, each in model.named_modules() if isinstance(each, GroupConv)}
    return {name: _told(each) for name, each in layers.items() if each.kind != "nonseparable"}


def _told(layer: GroupConv) -> str:
    factors = layer.factors
    told = None if factors is None else [each if isinstance(each, str) else [int(e) for e in each] for each in factors]
    return json.dumps({"kind": layer.kind, "terms": layer.terms, "factors": told})


def like_told(layer: GroupConv, text: str) -> GroupConv:
    """A layer with the kind, terms and factors of a text of `separations` and else as this one.

    Raises:
        GMError: it is no such JSON, or the group has no such factors.

    >>> like_told(GroupConv("D4", 8, 8), '{"kind": "separable", "terms": 2, "factors": null}')
    GroupConv('D4', 8, 8, separable='separable', terms=2)
    """
    found = parse_json(text, "a separable kernel")
    if not isinstance(found, dict) or set(found) != {"kind", "terms", "factors"}:
        raise GMError(f"a separable kernel is an object with the fields kind, terms and factors, not {shown(found)}")
    factors = found["factors"]
    if factors is not None and not (isinstance(factors, list) and all(map(_is_subgroup, factors))):
        raise GMError(f"factors are two subgroups, each a text or elements, not {shown(factors)}")
    made = layer.like(found["kind"], factors=factors, terms=found["terms"])
    _keep_frozen(layer, made)
    return made


def _is_subgroup(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(type(each) is int for each in value))


def _site(name: str, layer: GroupConv) -> Site:
    """What rules go by."""
    shape = (layer.out_channels, layer.in_channels, len(layer.stencil.taps))
    return Site(name, (), kind_of(type(layer)), shape, 1, _numbers(layer), None, "", "")


def _numbers(layer: GroupConv) -> int:
    """Of kernel and residual, whose filters have a value for each tap of the kernel."""
    return sum(each.numel() for each in layer.parts().values())


def _obstacle(model: nn.Module, layer: GroupConv) -> str:
    """Why another layer could not take the place of this one, "" where it can."""
    if layer.kind != "nonseparable":
        return f"it is {layer.kind} already"
    if type(layer) is not GroupConv or layer._forward_hooks or layer._forward_pre_hooks:
        return f"it is a {type(layer).__name__} with code or hooks of its own"
    own = {id(each) for each in layer.parameters()}
    others = (each for each in model.modules() if each is not layer)
    tied = any(id(each) in own for module in others for each in module._parameters.values())
    return "another module holds its parameters too" if tied else ""


def _separated(layer: GroupConv, kind: str, *, terms: int, factors: Factors | None) -> GroupConv | str:
    """The separable layer, or why there is none."""
    try:
        made = layer.separated(kind, factors=factors, terms=terms)
    except GMError as problem:
        return str(problem)
    if _numbers(made) >= _numbers(layer):
        return f"{kind} with {terms} terms would store {_numbers(made):,} numbers, the layer {_numbers(layer):,}"
    _keep_frozen(layer, made)
    return made


def _keep_frozen(layer: GroupConv, made: GroupConv) -> None:
    """What is frozen in the layer is in the other one; the parts that it lacks are frozen as its kernel is."""
    for part, each in made.named_parameters():
        old = layer._parameters.get(part)
        each.requires_grad_((next(layer.parameters()) if old is None else old).requires_grad)


@torch.no_grad()
def _error(layer: GroupConv, made: GroupConv) -> float:
    """‖found − kernel‖/‖kernel‖ over the taps of both; those of the first are among those of the second."""
    number = {int(tap): place for place, tap in enumerate(made.stencil.taps)}
    wanted, found = layer.full_kernel().double(), made.full_kernel().double()
    size = float(wanted.norm())
    found[..., [number[int(tap)] for tap in layer.stencil.taps]] -= wanted
    return float(found.norm()) / max(size, torch.finfo(torch.float64).tiny)
