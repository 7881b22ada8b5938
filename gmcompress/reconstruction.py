"""Fit the layers of a plan one after another, each on what the layers compressed before it produce."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .calibration import Moments, collect, norms_after, output_moments
from .candidates import Subject, plain_svd
from .fitting import Metric
from .projection import Fit, project, relative_error
from .structure import Structure, expand
from .surgery import Inputs

PASSES = 2e13  # multiply-adds spent on running the model for the moments of its layers
HELD = 1.5e9  # bytes of moments held at once
OUTPUT_DAMPING = 0.3  # of the mean diagonal of the output moments, added to it: they are a rough model

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Calibration:
    """Data that runs through a model, and what is known of the model from it.

    `outputs` holds the damped moments of the gradients at the layers' outputs; `norms` names the BatchNorm that a layer
    feeds directly; `passes` is how often the model may be run over all the batches.
    """

    batches: Sequence[Inputs]
    outputs: Mapping[str, Tensor]
    norms: Mapping[str, str]
    passes: int
    logits: bool

    def absorbs(self, name: str, layer: nn.Module) -> bool:
        """Whether a bias or a BatchNorm takes up a shift of the layer's mean output."""
        return isinstance(layer.bias, Tensor) or name in self.norms

    def metric(self, name: str, layer: nn.Module, moments: Moments | None) -> Metric:
        """What an error of this layer's weight costs; Frobenius for a layer that was never called."""
        if moments is None:
            return Metric()
        moments = moments.centred() if self.absorbs(name, layer) else moments
        return Metric(moments.gram(), self.outputs.get(name))

    def chunks(self, model: nn.Module, names: Sequence[str]) -> list[list[str]]:
        """Consecutive layers whose moments are collected in one pass: as few as passes and memory allow."""
        most = -(-len(names) // max(1, self.passes))
        found: list[list[str]] = []
        held = 0.0
        for name in names:
            weight = model.get_submodule(name).get_parameter("weight")
            size = 16.0 * weight[0].numel() ** 2 * getattr(model.get_submodule(name), "groups", 1)
            if not found or len(found[-1]) >= most or held + size > HELD:
                found.append([])
                held = 0.0
            found[-1].append(name)
            held += size
        return found


def calibrate(
    dense: nn.Module, batches: Sequence[Inputs], names: Sequence[str], *, logits: bool, macs: int, seed: int = 0
) -> Calibration:
    """What is known before any layer is replaced; `macs` are the multiply-adds of one example."""
    found = output_moments(dense, batches, names, logits=logits, seed=seed)
    damped = {}
    for name, moment in found.items():
        eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        damped[name] = (moment + OUTPUT_DAMPING * eye) / (1 + OUTPUT_DAMPING)
    examples = sum(_examples(each) for each in batches)
    passes = max(4, int(PASSES / max(1, 2 * macs * examples)))
    return Calibration(tuple(batches), damped, norms_after(dense, batches[0], names), passes, logits)


def _examples(inputs: Inputs) -> int:
    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    return len(first)


@dataclass(frozen=True)
class Reconstruction:
    """The fits of a plan's layers, and what was changed around them: new biases, and means of BatchNorms by name."""

    fits: Mapping[str, Fit]
    biases: Mapping[str, Tensor]
    means: Mapping[str, Tensor]


def reconstruct(
    dense: nn.Module,  # in evaluation mode; not changed
    small: nn.Module,  # a copy of it with memory of its own; its weights become the fitted ones
    structures: Mapping[str, Structure],  # in the order in which the layers run
    calibration: Calibration,
    *,
    progress: Progress | None = None,
) -> Reconstruction:
    """Fit every layer to the dense layer's outputs, given the inputs that the compressed model gives it.

    The shift of the mean output that a fit leaves is taken out of the layer's bias or of the BatchNorm behind it.
    """
    fits: dict[str, Fit] = {}
    biases: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}
    for chunk in calibration.chunks(dense, list(structures)):
        moments = collect(dense, small, chunk, calibration.batches)
        for name in chunk:
            if progress is not None:
                progress(name, len(fits), len(structures))
            layer, changed = dense.get_submodule(name), small.get_submodule(name)
            found = moments.pop(name, None)
            fits[name] = _fit(name, layer, structures[name], calibration, found)
            fitted = expand(fits[name].tensors, fits[name].structure, layer.get_parameter("weight").shape)
            with torch.no_grad():
                changed.get_parameter("weight").copy_(fitted)
            if found is None or not calibration.absorbs(name, layer):
                continue
            shift = found.shift(layer.get_parameter("weight").detach().double(), fitted.double())
            if isinstance(layer.bias, Tensor):
                biases[name] = layer.bias.detach() - shift.to(layer.bias)
                with torch.no_grad():
                    changed.get_parameter("bias").copy_(biases[name])
            else:
                norm = small.get_submodule(calibration.norms[name])
                norm.get_buffer("running_mean").add_(shift.to(norm.get_buffer("running_mean")))
                means[calibration.norms[name]] = norm.get_buffer("running_mean").clone()
    return Reconstruction(fits, biases, means)


def _fit(name: str, layer: nn.Module, structure: Structure, calibration: Calibration, moments: Moments | None) -> Fit:
    """The fit of one layer, or plain whitened SVD of at most its size, should that be nearer."""
    weight = layer.get_parameter("weight").detach()
    metric, wanted = calibration.metric(name, layer, moments), weight.double()
    if moments is not None:
        wanted = (moments.centred() if calibration.absorbs(name, layer) else moments).target(wanted)
    return best_fit(weight, wanted, structure, metric)


def best_fit(weight: Tensor, wanted: Tensor, structure: Structure, metric: Metric) -> Fit:
    """The fit of the wanted weight, in the dtype of the weight, or truncated (whitened) SVD of no more numbers.

    Plain SVD is what anyone can have; a plan that gave a layer something farther off would be a bad one.
    """
    fit = project(wanted, structure, metric=metric)
    if structure.group is None and structure.grid is not None:
        control, loss = plain_svd(Subject(wanted, metric), structure.parameters(weight.shape))
        if loss < fit.loss:
            fit = project(wanted, control, metric=metric)
    found = expand(fit.tensors, fit.structure, weight.shape)
    stored = {part: each.to(weight.dtype) for part, each in fit.tensors.items()}
    return replace(fit, tensors=stored, relative_error=relative_error(found, weight.double()))
