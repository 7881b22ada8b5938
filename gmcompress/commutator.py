"""How far a network is from commuting with a group: the error of its outputs, beside the distances of its weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .attaching import structured
from .errors import GMError, shown
from .groupconv import GroupConv, flat_signal
from .groups import Group, axes_of, embed, factor_generators
from .groups import group as parse
from .groups.group import Indices
from .structure import distance, index_tensor
from .surgery import run

MOST = 64  # elements of a group that are all tried


def act(
    group: Group | str,
    element: int,
    signal: Tensor,  # (batch, channels, n) or (batch, channels, *axes)
) -> Tensor:  # of the same shape
    """The action on signals, (g·x)[y] = x[g⁻¹·y].

    >>> act("C3", 1, torch.tensor([[[1.0, 2.0, 3.0]]]))
    tensor([[[3., 1., 2.]]])
    """
    whole = parse(group)
    [g] = whole.check_elements([element])
    sources = index_tensor(whole.table[whole.inverse[g]], signal)
    return flat_signal(signal, whole).index_select(2, sources).reshape(signal.shape)


def equivariance_error(
    model: nn.Module,
    group: Group | str,
    inputs: Tensor,  # (batch, channels, n) or (batch, channels, *axes)
    *,
    stride: str | Iterable[int] | None = None,
    invariant: bool | None = None,
    elements: Iterable[int] | None = None,
) -> dict[str, Any]:
    """By how much f(g·x) and g·f(x) differ, relative to f(x), over elements g ≠ 1 of the group; 0 when equivariant.

    `stride` is the subgroup on which the outputs live where the network strides or pools onto it; g then runs over it.
    Outputs (batch, outputs) are compared as invariants, others as signals, unless `invariant` says otherwise.
    `elements` are by default all of a subgroup of order up to 64, and else generators and 64 drawn at random (seed 0).
    The network runs as in evaluation, in its own dtype.

    Fields: `error`, the root mean square over the elements of ‖f(g·x) − g·f(x)‖/‖f(x)‖; `worst`, the largest, and the
    `element` where it is; `elements`, how many were tried; `outputs`, "invariant" or "equivariant"; `layers`, for every
    layer of group matrices its name, kind, group and relative `distance` of the weight from the equivariant ones. A
    network of distance 0 everywhere can have an error, from a nonlinearity or a head that is not equivariant.

    Raises:
        GMError: the inputs are no signal on the group, the network does not run on them, its outputs are no signal on
            the subgroup, or an element is not in it.

    >>> error = equivariance_error(GroupConv("D4", 1, 2), "D4", torch.ones(3, 1, 8).cumsum(2))
    >>> error["error"] < 1e-6, error["outputs"], error["layers"]
    (True, 'equivariant', [{'layer': '', 'kind': 'GroupConv', 'group': 'D4', 'distance': 0.0}])
    """
    whole = parse(group)
    flat_signal(inputs, whole)
    everything = np.arange(whole.order, dtype=np.int64)
    small, members = (whole, everything) if stride is None else embed(whole, stride)
    tried = _elements(small, members, elements)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        plain = _output(model, inputs)
        moves = _is_signal(plain, small, invariant)
        size = max(float(plain.double().norm()), torch.finfo(torch.float64).tiny)
        errors = []
        for h in tried:
            moved = _output(model, act(whole, int(members[h]), inputs))
            expected = act(small, h, plain) if moves else plain
            errors.append(float((moved.double() - expected.double()).norm()) / size)
    finally:
        for module, mode in modes.items():
            module.training = mode
    worst = int(np.argmax(errors)) if errors else None
    return {
        "error": float(np.sqrt(np.mean(np.square(errors)))) if errors else 0.0,
        "worst": 0.0 if worst is None else errors[worst],
        "element": 0 if worst is None else int(members[tried[worst]]),
        "elements": len(tried),
        "outputs": "equivariant" if moves else "invariant",
        "layers": layer_distances(model),
    }


def layer_distances(model: nn.Module) -> list[dict[str, Any]]:
    """Name, kind, group and relative distance to the equivariant weights of every layer of group matrices.

    >>> layer_distances(nn.Sequential(GroupConv("C4", 1, 2), nn.ReLU()))
    [{'layer': '0', 'kind': 'GroupConv', 'group': 'C4', 'distance': 0.0}]
    """
    rows = {
        name: {"kind": "GroupConv", "group": str(module.group), "distance": module.distance(relative=True)}
        for name, module in model.named_modules()
        if isinstance(module, GroupConv)
    }
    for name, layer in structured(model).items():
        if layer.structure.group is not None:
            found = distance(layer.weight, layer.structure, relative=True)
            rows[name] = {"kind": type(layer).__name__, "group": str(layer.structure.group), "distance": found}
    return [{"layer": name} | row for name, row in rows.items()]


def _elements(small: Group, members: Indices, elements: Iterable[int] | None) -> list[int]:
    """The elements to try, as numbers of the subgroup, without the identity."""
    if elements is not None:
        known = {int(member): number for number, member in enumerate(members)}
        given = list(elements)
        if not given or not all(each in known for each in given):
            raise GMError(f"elements are some of the subgroup {members.tolist()[:12]}, not {shown(given)}")
        return [known[each] for each in given]
    if small.order <= MOST:
        return list(range(1, small.order))
    drawn = np.random.default_rng(0).choice(np.arange(1, small.order), MOST, replace=False)
    return sorted({*factor_generators(small), *drawn.tolist()})


def _output(model: nn.Module, inputs: Tensor) -> Tensor:
    found = run(model, inputs)
    if not isinstance(found, Tensor):
        raise GMError(f"equivariance is measured on a tensor, but {type(model).__name__} gives {type(found).__name__}")
    return found


def _is_signal(output: Tensor, small: Group, invariant: bool | None) -> bool:
    """Whether the group moves the outputs."""
    fits = output.dim() > 2 and tuple(output.shape[2:]) in ((small.order,), axes_of(small))
    if invariant is None and output.dim() > 2 and not fits:
        raise GMError(
            f"outputs of shape {tuple(output.shape)} are no signal on {small}; name the subgroup they live on with "
            f"stride=, or say invariant=True"
        )
    if invariant is False and not fits:
        raise GMError(f"outputs of shape {tuple(output.shape)} are no signal on {small}, so it cannot move them")
    return fits if invariant is None else not invariant
