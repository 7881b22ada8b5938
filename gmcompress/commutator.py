"""How far a network is from commuting with a group: the error of its outputs, beside the distances of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .attaching import structured
from .errors import GMError, shown
from .forward import run, shell
from .groupconv import GroupConv
from .groups import Group, axes_of, embed, factor_generators
from .groups import group as parse
from .groups.group import Indices
from .liegrids import FACTORS
from .motions import Motion, disc, motions, move, move_signal
from .signals import flat_signal
from .structure import distance, index_tensor

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
    inputs: Tensor,  # (batch, channels, n) or (batch, channels, *axes), on a Lie group (batch, channels, height, width)
    *,
    stride: str | Iterable[int] | None = None,
    invariant: bool | None = None,
    elements: Iterable[Any] | None = None,
) -> dict[str, Any]:
    """By how much f(g·x) and g·f(x) differ, relative to f(x), over elements g ≠ 1 of the group; 0 when equivariant.

    `stride` is the subgroup on which the outputs live where the network strides or pools onto it; g then runs over it.
    Outputs (batch, outputs) are compared as invariants, others as signals, unless `invariant` says otherwise.
    `elements` are by default all of a subgroup of order up to 64, and else generators and 64 drawn at random (seed 0).
    The network runs as in evaluation, in its own dtype.

    On "SE(2)", "R^2:R+" and "Sim(2)" inputs are images, and g rotates and dilates them about their middle: elements are
    angles in radians (by default every 15 degrees), ratios (√2 and its root, up and down) or pairs (angle, ratio).
    Images are interpolated: those without fine detail, and dark towards the border, show the error of the network.
    Outputs that are images are compared on the largest disc; signals on SE(2) move by multiples of their step.

    Fields: `error`, the root mean square over the elements of ‖f(g·x) − g·f(x)‖/‖g·f(x)‖; `worst`, the largest, and the
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
    trying: Callable[[Tensor], tuple[bool, Iterator[Trial]]]
    if isinstance(group, str) and group in FACTORS:
        if stride is not None:
            raise GMError(f"there are no strides on {group}; leave stride out")
        if inputs.dim() != 4:
            raise GMError(f"inputs on {group} are images (batch, channels, height, width), not {tuple(inputs.shape)}")
        trying = partial(_lie_trials, group, inputs, invariant, elements)
    else:
        whole = parse(group)
        flat_signal(inputs, whole)
        trying = partial(_finite_trials, whole, inputs, stride, invariant, elements)
    ready = shell(model, private=True)
    plain = _output(ready, inputs)
    moves, trials = trying(plain)
    errors = []
    for element, moved, expected, within in trials:
        found, wanted = (each.double() * within for each in (_output(ready, moved), expected))
        size = max(float(wanted.norm()), torch.finfo(torch.float64).tiny)
        errors.append((float((found - wanted).norm()) / size, element))
    worst, element = max(errors, key=itemgetter(0), default=(0.0, 0))
    return {
        "error": float(np.sqrt(np.mean([error**2 for error, _ in errors]))) if errors else 0.0,
        "worst": worst,
        "element": element,
        "elements": len(errors),
        "outputs": "equivariant" if moves else "invariant",
        "layers": layer_distances(model),
    }


Trial = tuple[Any, Tensor, Tensor, Any]  # an element g, g·x, what f(g·x) should be, and where that is to be compared


def _finite_trials(
    whole: Group,
    inputs: Tensor,
    stride: str | Iterable[int] | None,
    invariant: bool | None,
    elements: Iterable[int] | None,
    plain: Tensor,
) -> tuple[bool, Iterator[Trial]]:
    """Whether outputs move, and the elements of a finite group to try."""
    everything = np.arange(whole.order, dtype=np.int64)
    small, members = (whole, everything) if stride is None else embed(whole, stride)
    tried = _elements(small, members, elements)
    moves = _is_signal(plain, small, invariant)
    pairs = ((h, int(members[h])) for h in tried)
    return moves, ((g, act(whole, g, inputs), act(small, h, plain) if moves else plain, 1.0) for h, g in pairs)


def _lie_trials(
    group: str, inputs: Tensor, invariant: bool | None, elements: Iterable[Any] | None, plain: Tensor
) -> tuple[bool, Iterator[Trial]]:
    """Whether outputs move, and the rotations and dilations to try."""
    if not (invariant or plain.dim() in (2, 4, 5)) or (invariant is False and plain.dim() not in (4, 5)):
        raise GMError(f"outputs of shape {tuple(plain.shape)} are no images, nor signals on {group}")
    moves = plain.dim() > 2 if invariant is None else not invariant

    def trial(element: Any, motion: Motion) -> Trial:
        moved = move(inputs, *motion)
        if not moves:
            return element, moved, plain, 1.0
        return element, moved, move_signal(group, plain, motion), disc(plain, motion[1])

    return moves, (trial(element, motion) for element, motion in motions(group, elements))


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
