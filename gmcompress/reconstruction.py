"""Fit the layers of a plan one after another, each on what the layers compressed before it produce."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import slowness
from .batches import count_examples, first_examples, split_batch
from .calibration import norms_after, output_gradients
from .candidates import plain_svd
from .copies import device_of
from .factors import Metric
from .files import json_digest
from .forward import Inputs
from .kinds import conv_groups
from .moments import Moments, collect
from .notes import Notes
from .plain import is_plain
from .projection import Fit, exactness, project, relative_error, svd_error
from .structure import Structure, expand
from .subjects import Subject
from .surgery import find_weight, read_weight, write_weight
from .workers import side_by_side

PASSES = 5e12  # multiply-adds spent on running each of the two models for the moments of their layers
FEWEST = 3  # passes in any case
EFFORT = 3e11  # multiply-adds of the fit of one layer, at most
TOTAL = 1.5e12  # multiply-adds of the fits of all layers, where none is slower than usual
PATIENCE = 3.0  # the power of the share of its numbers that a fit stores with which its time grows, where it is large
ITERATIONS = 4000  # of a fit, at most
BACKWARD_PASSES = 1e12  # multiply-adds spent on the outputs' gradients, which need no more examples than that allows
FEWEST_BACKWARD = 64  # examples in any case
HELD = 1.5e9  # bytes of moments held at once
PIECE = 2_500_000  # numbers of input in one run, which keeps what goes into many layers
OUTPUT_DAMPING = 0.3  # of the mean diagonal of the output moments, added to it: they are a rough model,
# and the rougher the fewer examples there are for each of its rows
PLACE_DAMPING = 0.1  # of the mean, added to what each place of a layer's output counts for

Progress = Callable[[str, int, int], None]
Mean = tuple[str, Tensor]  # a BatchNorm and its new running mean


@dataclass(frozen=True)
class Calibration:
    """Data that runs through a model, and what is known of the model from it.

    `outputs` holds the damped moments of the gradients at the layers' outputs, and `places` what places of an example's
    output count for, of mean 1; `norms` names the BatchNorm that a layer feeds directly; `passes` is how often the
    model may be run over all the batches, `macs` the multiply-adds of one example, `effort` a multiple of what fits
    usually take.
    """

    batches: Sequence[Inputs]
    outputs: Mapping[str, Tensor]
    places: Mapping[str, Tensor]
    norms: Mapping[str, str]
    passes: int
    logits: bool
    macs: int = 1
    effort: float = 1.0

    def absorbs(self, name: str, layer: nn.Module) -> bool:
        """Whether a bias or a BatchNorm takes up a shift of the layer's mean output."""
        return isinstance(layer.bias, Tensor) or name in self.norms

    def absorbed(
        self, name: str, layer: nn.Module, model: nn.Module, fitted: Tensor, moments: Moments | None
    ) -> tuple[Tensor | None, Mean | None]:
        """The new bias of a layer of the dense model, or of the BatchNorm behind it in a model the new mean.

        They take up what the fitted weight shifts the layer's mean output by.
        """
        if moments is None or not self.absorbs(name, layer):
            return None, None
        shift = moments.shift(layer.get_parameter("weight").detach().double(), fitted.double())
        if isinstance(layer.bias, Tensor):
            return layer.bias.detach() - shift.to(layer.bias), None
        norm = self.norms[name]
        mean = model.get_submodule(norm).get_buffer("running_mean")
        return None, (norm, mean + shift.to(mean))

    def metric(self, name: str, layer: nn.Module, moments: Moments | None) -> Metric:
        """What an error of this layer's weight costs; Frobenius for a layer that was never called."""
        if moments is None:
            return Metric()
        moments = moments.centred() if self.absorbs(name, layer) else moments
        return Metric(moments.gram(), self.outputs.get(name))

    def moments(
        self, dense: nn.Module, small: nn.Module, names: Sequence[str], *, crossed: Sequence[str] = ()
    ) -> dict[str, Moments]:
        """The moments of layers' inputs, weighted by what the places of their outputs count for; see `collect`."""
        return collect(dense, small, names, self.batches, crossed=crossed, places=self.places)

    def chunks(self, model: nn.Module, names: Sequence[str], *, passes: int | None = None) -> list[list[str]]:
        """Consecutive layers whose moments are collected in one pass: as few as passes and memory allow."""
        most = -(-len(names) // max(1, passes or self.passes))
        found: list[list[str]] = []
        held = 0.0
        for name in names:
            weight = model.get_submodule(name).get_parameter("weight")
            size = 8.0 * weight[0].numel() ** 2 * conv_groups(model.get_submodule(name))
            if not found or len(found[-1]) >= most or held + size > HELD:
                found.append([])
                held = 5 * size  # the first one's moments are crossed, and in halves
            found[-1].append(name)
            held += size
        return found


def calibrate(
    dense: nn.Module,
    batches: Sequence[Inputs],
    names: Sequence[str],
    *,
    logits: bool,
    macs: int,
    effort: float = 1.0,
    seed: int = 0,
) -> Calibration:
    """What is known before any layer is replaced; `macs` are the multiply-adds of one example.

    `effort` multiplies what is spent on passes and fits. Only plain layers have moments, see `is_plain`.
    """
    names = [name for name in names if is_plain(dense, name)]
    few = first_examples(batches, max(FEWEST_BACKWARD, int(BACKWARD_PASSES / max(1, 3 * macs))))
    found = output_gradients(dense, few, names, logits=logits, seed=seed)
    damped, places, seen = {}, {}, sum(count_examples(each) for each in few)
    for name, each in found.items():
        eye = torch.eye(len(each.moment), dtype=each.moment.dtype, device=each.moment.device)
        damping = OUTPUT_DAMPING + len(each.moment) / seen
        damped[name] = (each.moment + damping * eye) / (1 + damping)
        if each.places is not None:
            places[name] = (each.places + PLACE_DAMPING) / (1 + PLACE_DAMPING)
    examples = sum(count_examples(each) for each in batches)
    passes = max(FEWEST, int(effort * PASSES / max(1, macs * examples)))
    pieces = tuple(piece for each in batches for piece in split_batch(each, PIECE))
    return Calibration(pieces, damped, places, norms_after(dense, batches[0], names), passes, logits, macs, effort)


@dataclass(frozen=True)
class Reconstruction:
    """The fits of a plan's layers, and what was changed around them: new biases, and means of BatchNorms by name."""

    fits: dict[str, Fit]
    biases: dict[str, Tensor]
    means: dict[str, Tensor]

    @torch.no_grad()
    def take_in(self, name: str, small: nn.Module, fit: Fit, bias: Tensor | None, mean: Mean | None) -> None:
        """Note the fit of one layer, and put it into the compressed model."""
        self.fits[name] = fit
        weight = read_weight(small, name)
        assert weight is not None, "a plan is checked to fit its model"
        fitted = expand({k: v.to(weight) for k, v in fit.tensors.items()}, fit.structure, weight.shape)
        write_weight(small, name, fitted)
        absorb(small, name, bias, mean)
        if bias is not None:
            self.biases[name] = bias
        if mean is not None:
            self.means[mean[0]] = mean[1]


@torch.no_grad()
def absorb(model: nn.Module, name: str, bias: Tensor | None, mean: Mean | None) -> None:
    """Put what `Calibration.absorbed` found into a model."""
    if bias is not None:
        find_weight(model, name)[0].get_parameter("bias").copy_(bias)
    if mean is not None:
        model.get_submodule(mean[0]).get_buffer("running_mean").copy_(mean[1])


def reconstruct(
    dense: nn.Module,  # in evaluation mode; not changed
    small: nn.Module,  # a copy of it with memory of its own; its weights become the fitted ones
    structures: Mapping[str, Structure],  # in the order in which the layers run
    calibration: Calibration,
    *,
    notes: Notes | None = None,
    progress: Progress | None = None,
) -> Reconstruction:
    """Fit every layer to the dense layer's outputs, given the inputs that the compressed model gives it.

    The shift of the mean output that a fit leaves is taken out of the layer's bias or of the BatchNorm behind it. Of
    layers run in one pass only the first makes up for the errors before it, in weight and mean: were several to do so
    that see the same errors, these would be made up for several times. Weights of other modules than plain layers have
    no moments; they are fitted first, so that the layers make up for their errors too.
    """
    notes, kind = notes or Notes(None, {}), "fit-" + plan_digest(structures, calibration.effort)
    found = Reconstruction({}, {}, {})
    plain = {name: is_plain(dense, name) for name in structures}
    effort = calibration.effort * min(EFFORT, TOTAL / max(1, sum(plain.values())))  # of one fit
    names = sorted(structures, key=lambda name: plain[name])
    while names and (kept := notes.read(kind, names[0])):
        found.take_in(names.pop(0), small, *_remembered(*kept))
    others = [name for name in names if not plain[name]]
    for chunk in ([others] if others else []) + calibration.chunks(dense, [name for name in names if plain[name]]):
        moments = calibration.moments(dense, small, chunk, crossed=chunk[:1]) if plain[chunk[0]] else {}
        work = partial(_fitted, structures=structures, calibration=calibration, first=chunk[0], effort=effort)
        weights = [Seen.of(dense, name, moments.get(name)) for name in chunk]
        fitted = side_by_side(work, weights, [each.weight.shape for each in weights], device=device_of(dense))
        for one in weights:
            if progress is not None:
                progress(one.name, len(found.fits), len(structures))
            fit, weight = next(fitted)
            bias, mean = calibration.absorbed(one.name, one.layer, small, weight, one.moments)
            found.take_in(one.name, small, fit, bias, mean)
            _remember(notes, kind, one.name, fit, bias, mean)
    return found


@dataclass(frozen=True)
class Seen:
    """A layer and its dense weight, with the moments of its inputs, where it has been seen."""

    name: str
    layer: nn.Module
    weight: Tensor
    moments: Moments | None

    @classmethod
    def of(cls, dense: nn.Module, name: str, moments: Moments | None) -> Seen:
        weight = read_weight(dense, name)
        assert weight is not None, "only matrices are planned"
        return cls(name, find_weight(dense, name)[0], weight, moments)


def _fitted(
    one: Seen,
    *,
    structures: Mapping[str, Structure],
    calibration: Calibration,
    first: str,  # the layer that makes up for the errors before it
    effort: float,
) -> tuple[Fit, Tensor]:
    """The fit of a layer, and the weight that it stands for."""
    structure, seen, target = structures[one.name], one.moments, one.weight.double()
    metric = calibration.metric(one.name, one.layer, seen)
    if seen is not None and one.name == first:
        target = (seen.centred() if calibration.absorbs(one.name, one.layer) else seen).target(target)
    share = structure.parameters(one.weight.shape) / one.weight.numel()
    fit = best_fit(one.weight, target, structure, metric, effort=effort * slowness(share, power=PATIENCE))
    return fit, expand(fit.tensors, fit.structure, one.weight.shape)


def plan_digest(structures: Mapping[str, Structure], effort: float) -> str:
    """What tells the fits of one plan from those of another."""
    return json_digest({"effort": effort, **{name: str(each) for name, each in structures.items()}})[:12]


def _remember(notes: Notes, kind: str, name: str, fit: Fit, bias: Tensor | None, mean: Mean | None) -> None:
    facts = {key: getattr(fit, key) for key in ("relative_error", "distance", "loss")}
    tensors = {f"part.{key}": each for key, each in fit.tensors.items()}
    tensors |= {} if bias is None else {"bias": bias}
    tensors |= {} if mean is None else {"mean": mean[1]}
    notes.write(kind, name, {**facts, "structure": str(fit.structure), "norm": mean and mean[0]}, tensors)


def _remembered(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Fit, Tensor | None, Mean | None]:
    parts = {key.removeprefix("part."): each for key, each in tensors.items() if key.startswith("part.")}
    numbers = {key: facts[key] for key in ("relative_error", "distance", "loss")}
    fit = Fit(Structure.parse(facts["structure"]), parts, **numbers)
    return fit, tensors.get("bias"), (facts["norm"], tensors["mean"]) if "mean" in tensors else None


def best_fit(weight: Tensor, wanted: Tensor, structure: Structure, metric: Metric, *, effort: float = EFFORT) -> Fit:
    """The fit of the wanted weight, in the dtype of the weight, or truncated (whitened) SVD of no more numbers.

    Plain SVD is what anyone can have; a plan that gave a layer something farther off would be a bad one.
    """
    how: dict[str, Any] = {"metric": metric, "effort": effort, "iterations": ITERATIONS}
    fit = project(wanted, structure, **how)
    if structure.group is None and structure.grid is not None:
        limit, exact = structure.parameters(weight.shape), exactness(weight)
        subject = Subject(wanted.to(exact), metric.to(exact))
        if metric != Metric() or svd_error(wanted, limit) ** 2 < fit.loss:
            control, loss = plain_svd(subject, limit)
            fit = project(wanted, control, **how) if loss < fit.loss else fit
    found = expand(fit.tensors, fit.structure, weight.shape)
    stored = {part: each.to(weight.dtype) for part, each in fit.tensors.items()}
    return replace(fit, tensors=stored, relative_error=relative_error(found, weight.double()))
