"""How much a model minds the errors of each of its layers, measured on data before any layer is replaced.

Low ranks of two sizes stand for all that may become of a weight. What they do to the model's outputs follows, for all
layers at once, from the gradients at the layers' outputs; where no gradient arrives, the model is run with each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .batches import count_examples, first_examples, split_batch
from .calibration import (
    BACKWARD,
    are_classes,
    backpropagate,
    classes_last,
    divergence,
    gradient_hook,
    outputs,
    spread_of,
)
from .factors import Tensors, views_of
from .forward import Inputs
from .lowranks import leading
from .moments import mean_output
from .plain import is_plain
from .reconstruction import Calibration, absorb
from .selection import Candidate
from .streams import seeded
from .structure import Structure, expand
from .subjects import Subject, rank_within
from .surgery import find_weight, read_weight, write_weight

PROBES = (0.45, 0.18)  # shares of a layer's weight that its low ranks may store
RUNS = 1.5e12  # multiply-adds of the runs with one layer replaced, where gradients do not tell
FEWEST = 8  # examples of each of these in any case
BACKWARD_PASSES = 2e12  # multiply-adds of the pass that tells of all layers at once
FEWEST_BACKWARD = 64  # examples in any case
EXPONENTS = (0.5, 2.0)  # between which the growth of the divergence with the loss is believed


@dataclass(frozen=True)
class Sensitivity:
    """The divergence of the model's outputs when one layer alone loses `loss`: scale × loss^exponent."""

    scale: float
    exponent: float

    def weigh(self, candidate: Candidate) -> Candidate:
        """The candidate with its loss as the divergence that it is expected to cause."""
        lost = self.scale * candidate.loss**self.exponent if candidate.loss > 0 else 0.0
        return replace(candidate, loss=lost)

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Sensitivity:
        """The power law through two measured (loss, divergence), the exponent kept within EXPONENTS.

        >>> Sensitivity.through([(0.1, 0.01), (0.4, 0.04)])
        Sensitivity(scale=0.1, exponent=1.0)
        """
        tiny = 1e-12
        (x0, y0), (x1, y1) = ((max(x, tiny), max(y, tiny)) for x, y in sorted(points))
        slope = math.log(y1 / y0) / math.log(x1 / x0) if x1 > x0 * 1.01 else 1.0
        exponent = round(min(max(slope, EXPONENTS[0]), EXPONENTS[1]), 6)
        scale = math.sqrt(y0 / x0**exponent * (y1 / x1**exponent))
        return cls(float(f"{scale:.6g}"), exponent)


@dataclass(frozen=True)
class Probe:
    """Low ranks in place of one weight, with the relative loss of each.

    `tensors` are those of the largest rank, of which the leading parts are the others. `mean` is that of the layer's
    inputs, (conv_groups, columns·taps), where a bias or a BatchNorm takes up what an error makes of it.
    """

    ranks: tuple[int, ...]
    losses: tuple[float, ...]
    split: bool
    tensors: Tensors
    mean: Tensor | None

    @classmethod
    def of(cls, subject: Subject, mean: Tensor | None) -> Probe:
        """The low ranks of PROBES, in the view in which such a weight is the nearest to one."""
        split, size = views_of(subject.shape)[-1], subject.weight.numel()
        shares = (rank_within(subject.shape, int(share * size), grid=None, split=split) for share in PROBES)
        ranks = tuple(max(1, each) for each in shares)
        losses = tuple(subject.low_rank_loss(each, split=split) for each in ranks)
        largest = subject.low_ranks(max(ranks), split=split).leading(max(ranks))
        dtype = torch.float64 if subject.itemsize == 8 else torch.float32
        tensors = {key: each.to(dtype, copy=True) for key, each in largest.items()}
        return cls(ranks, losses, split, tensors, None if mean is None else mean.to(dtype))

    @classmethod
    def from_notes(cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Probe:
        """What `notes` gave."""
        parts = {key: tensors[key] for key in ("left", "right")}
        return cls(tuple(facts["ranks"]), tuple(facts["losses"]), facts["split"], parts, tensors.get("mean"))

    def notes(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Facts and tensors to be kept."""
        facts = {"ranks": list(self.ranks), "losses": list(self.losses), "split": self.split}
        return facts, self.tensors | ({} if self.mean is None else {"mean": self.mean})

    def fitted(self, rank: int, weight: Tensor) -> Tensor:
        """A low rank in place of the weight."""
        tensors = {key: each.to(weight) for key, each in leading(self.tensors, rank).items()}
        return expand(tensors, Structure.factors(rank, split=self.split), tuple(weight.shape))

    def shift(self, error: Tensor) -> Tensor | None:  # of the weight's shape -> (rows)
        """What an error adds to the mean output, where that is taken up."""
        return None if self.mean is None else mean_output(error, self.mean.to(error))

    def sensitivity(self, divergences: Sequence[float]) -> Sensitivity:
        """From the divergence that each of the low ranks causes."""
        return Sensitivity.through(list(zip(self.losses, divergences, strict=True)))


class Probes:
    """Measures how the model's outputs change when one layer alone is replaced."""

    def __init__(self, dense: nn.Module, calibration: Calibration, layers: int) -> None:
        self.dense, self.calibration = dense, calibration
        examples = int(RUNS / max(1, len(PROBES) * layers * calibration.macs))
        self.batches = first_examples(calibration.batches, max(FEWEST, examples))

    @cached_property
    def wanted(self) -> list[Tensor]:
        """The dense model's outputs."""
        return outputs(self.dense, self.batches)

    def sensitivities(self, probes: Mapping[str, Probe], *, seed: int = 0) -> dict[str, Sensitivity]:
        """The sensitivity to every layer."""
        most = int(BACKWARD_PASSES / max(1, 5 * self.calibration.macs))
        batches = first_examples(self.calibration.batches, max(FEWEST_BACKWARD, most))
        plain = {name: each for name, each in probes.items() if is_plain(self.dense, name)}
        known = expected_divergences(self.dense, batches, plain, logits=self.calibration.logits, seed=seed)
        return {
            name: probe.sensitivity(known[name]) if name in known else self.measure(name, probe)
            for name, probe in probes.items()
        }

    def measure(self, name: str, probe: Probe) -> Sensitivity:
        """The sensitivity to one layer, from runs with its low ranks in its place; all is put back.

        As in a compression, what they shift the mean output by is taken out of the bias.
        """
        weight = read_weight(self.dense, name)
        assert weight is not None, "only matrices are planned"
        weight = weight.clone()
        return probe.sensitivity([self._away(name, weight, probe, rank) for rank in probe.ranks])

    def _away(self, name: str, weight: Tensor, probe: Probe, rank: int) -> float:
        """How far the outputs lie from the dense model's with a low rank in a layer, and the bias for it."""
        fitted, bias = probe.fitted(rank, weight), getattr(find_weight(self.dense, name)[0], "bias", None)
        shift = probe.shift(fitted - weight)
        wanted = self.wanted  # of the dense model as it is
        before = bias.detach().clone() if isinstance(bias, Tensor) and shift is not None else None
        after = None if before is None or shift is None else before - shift
        try:
            write_weight(self.dense, name, fitted)
            absorb(self.dense, name, after, None)
            return divergence(wanted, outputs(self.dense, self.batches), logits=self.calibration.logits)
        finally:
            write_weight(self.dense, name, weight)
            absorb(self.dense, name, before, None)


def expected_divergences(
    model: nn.Module,  # in evaluation mode
    batches: Sequence[Inputs],
    probes: Mapping[str, Probe],  # of plain layers
    *,
    logits: bool,
    seed: int = 0,
) -> dict[str, list[float]]:
    """The divergence that each low rank of each layer by itself causes, to second order in what it changes.

    That is half of the mean of ⟨g, δ⟩², δ what it adds to the layer's outputs of one example and g the gradients there
    of a random `projection` of the model's. Layers that no gradient reaches, and those of which the inputs are changed
    by later code, are left out.

    Source: Martens 2020, New insights and perspectives on the natural gradient method, for the expansion.
    """
    changes = {name: _Changes(model.get_submodule(name), each) for name, each in probes.items()}
    generator = torch.Generator().manual_seed(seed)
    totals = {name: [0.0] * len(PROBES) for name in changes}
    count = 0
    with ExitStack() as stack, seeded(model, seed), torch.enable_grad():
        for each in changes.values():
            stack.callback(each.module.register_forward_hook(gradient_hook(each.watch)).remove)
        for inputs in (piece for whole in batches for piece in split_batch(whole, BACKWARD)):
            output, examples = backpropagate(model, inputs, generator, logits=logits), max(1, count_examples(inputs))
            rows, unit = (0, 0.0) if output is None or not output.numel() else _units(output, logits=logits)
            for name, each in changes.items():
                totals[name] = [a + unit * b for a, b in zip(totals[name], each.squares(examples), strict=True)]
            count += rows
    means = {name: [each / max(1, count) for each in found] for name, found in totals.items() if changes[name].usable}
    return {name: found for name, found in means.items() if all(0 < each < math.inf for each in found)}


def _units(output: Tensor, *, logits: bool) -> tuple[int, float]:
    """Over how many rows or examples `divergence` takes the mean, and what an example's ⟨g, δ⟩² adds to their sum."""
    if logits and are_classes(output):
        return len(classes_last(output)), 0.5
    examples = len(output) if output.dim() else 1
    return examples, examples / (output.numel() * float(spread_of(output.double())))


class _Changes:
    """What the low ranks of one layer change, seen through the gradients at its outputs."""

    def __init__(self, module: nn.Module, probe: Probe) -> None:
        self.module, self.probe = module, probe
        self.products: list[list[Tensor]] = []  # ⟨g, δ⟩ of one backward pass, by call and rank, along the first axis
        self.reached, self.lost = False, False

    @property
    def usable(self) -> bool:
        """Whether all gradients came, and the inputs were those that the layer had been given."""
        return self.reached and not self.lost

    def watch(self, arguments: tuple[Any, ...]) -> Callable[[Tensor], None]:
        """What takes in the gradient at the outputs for these inputs."""
        given = arguments[0].detach() if arguments and isinstance(arguments[0], Tensor) else None
        version = None if given is None else given._version

        @torch.no_grad()
        def take_in(gradient: Tensor) -> None:
            self.reached = True
            if given is None or given._version != version:
                self.lost = True
            elif given.numel():
                rows = gradient if gradient.dim() > 1 else gradient[None]
                changes = (self._change(given, rank).reshape(rows.shape) for rank in self.probe.ranks)
                self.products.append([(rows * each).flatten(1).sum(1) for each in changes])

        return take_in

    def _change(self, given: Tensor, rank: int) -> Tensor:
        """What a low rank adds to the outputs, in float32 at least: it is a small difference."""
        weight = self.module.get_parameter("weight").detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        error = self.probe.fitted(rank, weight) - weight
        shift = self.probe.shift(error)
        bias = None if shift is None else -shift
        if isinstance(self.module, nn.Conv2d):
            return self.module._conv_forward(given.to(error), error, bias)
        return F.linear(given.to(error), error, bias)

    def squares(self, examples: int) -> list[float]:
        """The sums over examples of ⟨g, δ⟩² in the last pass, rank by rank; the next one begins."""
        found: list[Tensor] = []
        for call in self.products:
            divided = [each.reshape(examples if len(each) % examples == 0 else 1, -1).sum(1) for each in call]
            alike = not found or found[0].shape == divided[0].shape
            found = [a + b for a, b in zip(found, divided, strict=True)] if found and alike else divided
            self.lost |= not alike
        self.products = []
        return [float(each.double().square().sum()) for each in found] or [0.0] * len(self.probe.ranks)
