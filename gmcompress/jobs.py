"""One call of compress or plan: the model, its data, and everything that is learnt about it on the way."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import slowness
from .allocation import Table, check_budgets, tabulate
from .batches import count_examples, first_of, is_divisible, take, whole
from .blocks import Refit, refit_blocks
from .budgets import Budget
from .calibration import ends_in_classes
from .copies import WRITTEN, count_parameters, device_of, duplicate, evaluating, parameters_of
from .errors import GMError
from .factors import Metric
from .files import json_digest
from .forward import Inputs, run_seeded, shell
from .groups import Group
from .groups import group as parse_group
from .metrics import count_macs, replaced_positions, stored_bytes
from .nesting import describe, floating
from .notes import Notes, data_digest, model_digest
from .planning import Plan, eligible
from .projection import Fit, project
from .reconstruction import Calibration, Reconstruction, best_fit, calibrate, plan_digest, reconstruct
from .rehearsal import rehearsed_sites
from .structure import Structure, check_weight
from .surgery import find_weight, read_weight
from .workers import side_by_side

Progress = Callable[[str, int, int], None]  # layer, done, of
EFFORT = 1e10  # multiply-adds of the fit of one layer without data, where it is not slower than usual
EXAMPLES = 8  # of the calibration data, on which latency is measured where no inputs are given


@dataclass(frozen=True)
class Job:
    """What a call was given: `batches` of calibration data, none without, and a multiple of the usual `effort`."""

    model: nn.Module
    group: str | Group
    batches: list[Inputs]
    inputs: Inputs | None
    effort: float
    progress: Progress | None
    known: list[tuple[frozenset[str], Calibration]] = field(default_factory=list)  # by the layers that it is of

    @classmethod
    def of(
        cls,
        model: nn.Module,
        group: str | Group,
        inputs: Inputs | None,
        data: Iterable[Any] | None,
        samples: int,
        effort: float,
        progress: Progress | None,
        *,
        inplace: bool = False,
    ) -> Job:
        """The job, its data read; of the model itself where it is to be changed.

        Raises:
            GMError: the data is empty or of another kind, or the effort is not a positive number.
        """
        if not (isinstance(effort, int | float) and 0 < effort < math.inf):
            raise GMError(f"effort is a positive multiple of the usual one, not {effort!r}")
        device = device_of(model)
        batches = [] if data is None else _taken(model, data, samples=samples, device=device)
        trial = private(model) if batches else None
        kept = [] if trial is None else undivided(trial, batches)
        if inputs is None and batches:
            inputs = first_of(batches[0], EXAMPLES) if is_divisible(kept[0]) else batches[0]
        free = apart(model, inputs, trial=trial, inplace=inplace)
        return cls(free, group, kept, inputs, float(effort), progress)

    def watched(self) -> nn.Module:
        """A shell of the model for the many runs over the data, laid out so that they take least."""
        return laid_out(self.model, first_of(self.batches[0], 1)) if self.batches else shell(self.model)

    def calibration(self, dense: nn.Module, names: Sequence[str]) -> Calibration | None:
        """What the data says about the dense model, once for all layers asked for together; None without data."""
        if not self.batches:
            return None
        for covered, found in self.known:
            if covered.issuperset(names):
                return found
        examples = [first_of(each, 1) for each in self.batches]
        for each in {describe(each): each for each in examples}.values():
            run_seeded(dense, each)  # says what does not fit before any work is done
        macs = count_macs(dense, examples[0])[0] // max(1, count_examples(examples[0]))  # whole batches hold several
        found = calibrate(
            dense, self.batches, names, logits=ends_in_classes(dense, self.inputs), macs=macs, effort=self.effort
        )
        self.known.append((frozenset(names), found))
        return found

    def notes(self, folder: str | Path | None, kind: str, rules: Mapping[str, Any]) -> Notes:
        """Where what is done is kept, where a folder is given."""
        if folder is None:
            return Notes(None, {})
        folder = Path(folder) / kind
        key = {
            "model": model_digest(self.model),
            "data": data_digest([*self.batches, self.inputs]),
            "group or rule": json_digest({"group": str(self.group), **{k: repr(v) for k, v in rules.items()}}),
        }
        return Notes(folder, key)

    def table(self, rules: Mapping[str, Any], notes: Notes, budgets: Iterable[Sequence[Budget]]) -> Table:
        """What every layer may become, and what that would cost.

        Raises:
            GMError: rules, weights or inputs that cannot be used; or, before anything is fitted, budgets that the
                shapes show to be out of reach.
        """
        dense, sites = self.watched(), rehearsed_sites(self.model, self.inputs)
        bound = parse_group(self.group) if isinstance(self.group, str) else self.group
        chosen = eligible(sites, **rules)
        names = [site.name for site in chosen.free]
        for name in names:
            with _naming(name):
                check_weight(_matrix(dense, name))
        itemsizes = {name: _matrix(dense, name).element_size() for name in [*names, *chosen.prescribed]}
        totals = {"params": count_parameters(self.model), "bytes": stored_bytes(self.model)}
        positions = None
        if self.inputs is not None:
            positions = replaced_positions(dense, self.inputs, [*names, *chosen.prescribed])
            totals["macs"] = count_macs(dense, self.inputs)[0]
        table = Table(chosen, sites, {}, str(bound), totals, positions, itemsizes, bool(self.batches))
        for each in budgets:
            check_budgets(table, dense, bound, each)
        options: dict[str, Any] = {"positions": positions, "notes": notes, "progress": self.progress}
        options["effort"] = self.effort
        options["calibration"] = self.calibration(dense, [*names, *chosen.prescribed])
        return replace(table, candidates=tabulate(private(dense), chosen.free, bound, **options))

    def fits(self, plan: Plan, notes: Notes) -> Reconstruction:
        """The fit of every layer of a plan: to the dense layers' outputs where there is data, else to their weights."""
        structures = {name: Structure.parse(text) for name, text in plan.layers.items()}
        dense = self.watched()
        calibration = self.calibration(dense, list(structures))
        if calibration is not None:
            return reconstruct(dense, private(dense), structures, calibration, notes=notes, progress=self.progress)
        fits: dict[str, Fit] = {}
        effort = None if plan.optimum is None else EFFORT * self.effort

        def work(each: tuple[str, Tensor]) -> Fit:
            return _nearest(*each, structures[each[0]], effort=effort)

        weights = ((name, _named_matrix(self.model, name)) for name in structures)
        if effort is None:  # closed forms are few large factorisations, which torch's threads share well
            found: Iterator[Fit] = map(work, weights)
        else:
            shapes = [plan.site(name).shape for name in structures]
            found = side_by_side(work, weights, shapes, device=device_of(self.model))
        for name in structures:
            if self.progress is not None:
                self.progress(name, len(fits), len(structures))
            fits[name] = next(found)
        return Reconstruction(fits, {}, {})

    def refit(self, plan: Plan, dense: nn.Module, small: nn.Module, notes: Notes) -> list[Refit]:
        """Refit the blocks of the compressed model, where there is data; its parameters change."""
        if not self.batches:
            return []
        dense = shell(dense)  # in evaluation mode
        known = self.calibration(dense, list(plan.layers))  # asked already for the fits
        assert known is not None, "there is data"
        kind = "block-" + plan_digest({name: Structure.parse(text) for name, text in plan.layers.items()}, self.effort)
        options: dict[str, Any] = {
            "macs": known.macs,
            "logits": known.logits,
            "effort": self.effort,
            "notes": notes,
            "kind": kind,
        }
        return refit_blocks(dense, small, self.batches, **options, progress=self.progress)


def _matrix(model: nn.Module, name: str) -> Tensor:
    """The dense matrix of this name.

    Raises:
        GMError: there is none.
    """
    weight = read_weight(model, name)
    if weight is None:
        raise GMError(f"{type(find_weight(model, name)[0]).__name__} holds no weight matrix")
    return weight


def _named_matrix(model: nn.Module, name: str) -> Tensor:
    with _naming(name):
        return _matrix(model, name)


def _nearest(name: str, weight: Tensor, structure: Structure, *, effort: float | None) -> Fit:
    """The fit of a weight without data, under a budget with so many multiply-adds where a fit is not slower than usual.

    Raises:
        GMError: the weight cannot have the structure; with the name of the layer.
    """
    with _naming(name):
        if effort is None:
            return project(weight, structure)
        allowed = effort * slowness(structure.parameters(weight.shape) / weight.numel())
        return best_fit(weight, check_weight(weight), structure, Metric(), effort=allowed)


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """What goes wrong inside is told with the name of the layer.

    Raises:
        GMError: in place of one without the name, or of an AttributeError.
    """
    try:
        yield
    except (GMError, AttributeError) as problem:
        raise GMError(f"layer {layer or '(the model itself)'!r}: {problem}") from None


def _taken(model: nn.Module, data: Iterable[Any], *, samples: int, device: torch.device | None) -> list[Inputs]:
    """The inputs of the data, with the labels that a mapping holds where the model does not run without them.

    So it is with translators, which make of the labels what their decoders read.
    """
    form = signature(model.forward)
    batches = take(data, samples=samples, device=device, labels="labels" in form.parameters, form=form)
    bare: list[Inputs] = [
        {key: each for key, each in inputs.items() if key != "labels"} if isinstance(inputs, Mapping) else inputs
        for inputs in batches
    ]
    labelled = next(
        (at for at, inputs in enumerate(batches) if isinstance(inputs, Mapping) and "labels" in inputs), None
    )
    if labelled is None or _runs(private(model), bare[labelled]) or not _runs(private(model), batches[labelled]):
        return bare
    return list(batches)


def undivided(trial: nn.Module, batches: Sequence[Inputs]) -> list[Inputs]:
    """The batches, marked as whole where the model runs on all of one but not on an example by itself.

    So it is where the first axis holds frames, or places of a sequence, or where the model fixes its size, or keeps a
    state of the size of its first batch; a last batch that is smaller than that is left out. `trial` is a copy of the
    model, whose tensors a run may change.
    """
    first: dict[str, tuple[Inputs, Inputs]] = {}
    for each in filter(is_divisible, batches):
        one = first_of(each, 1)
        first.setdefault(describe(one), (one, each))
    keeping = {key for key, (_, each) in first.items() if _keeps_size(trial, each)}
    bound = {
        key: each
        for key, (one, each) in first.items()
        if key in keeping or (not _runs(trial, one) and _runs(trial, each))
    }
    found = []
    for each in batches:
        key = describe(first_of(each, 1))
        fits = bound.get(key)
        if fits is None:
            found.append(each)
        elif describe(each) == describe(fits) or (key not in keeping and _runs(trial, each)):
            found.append(whole(each))
    return found


def _keeps_size(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a model that ran on some examples does not run on one fewer, as one that keeps a state for each does."""
    more = min(3, count_examples(inputs))
    if more < 2:
        return False
    once = shell(model)
    return _runs(once, first_of(inputs, more)) and not _runs(once, first_of(inputs, more - 1))


def _runs(model: nn.Module, inputs: Inputs) -> bool:
    try:
        run_seeded(model, inputs)
    except GMError:
        return False
    return True


def apart(
    model: nn.Module, inputs: Inputs | None, *, trial: nn.Module | None = None, inplace: bool = False
) -> nn.Module:
    """The model, or a copy of it where a run writes into its parameters, so that they stay as they are.

    That is tried on `trial`, a copy. A shell, which shares the parameters, has buffers of its own, and copies those
    parameters that are marked here; with inplace=True those of the model itself are.

    Raises:
        GMError: the model does not run on the inputs, or a run changes which parameters it has.
    """
    if inputs is None:
        return model
    trial = private(model) if trial is None else trial
    run_seeded(trial, inputs)
    before, after = parameters_of(model), parameters_of(trial)
    if unlike := sorted(before.keys() ^ after.keys()):
        what = f"{type(model).__name__} makes or drops parameters as it runs, such as {unlike[0]!r}"
        raise GMError(f"{what}; run it once before it is compressed")
    dense = (name for name, old in before.items() if old.layout is torch.strided)
    written = [name for name in dense if not torch.equal(before[name], after[name])]
    if not written:
        return model
    copied = model if inplace else duplicate(model, {})
    for name in written:  # so that one run does not find what another has written
        setattr(parameters_of(copied)[name], WRITTEN, True)
    return copied


def private(model: nn.Module) -> nn.Module:
    """A copy with memory of its own, in evaluation mode."""
    return evaluating(duplicate(model, {}))


def laid_out(model: nn.Module, inputs: Inputs) -> nn.Module:
    """A shell of the model in which the weights of convolutions are channels last, as CPUs multiply them faster.

    Outputs of convolutions are so too; where the model does not run like that, or gives others, all is as it was.
    """
    usual, found = shell(model), shell(model)
    held = Counter(id(each) for module in found.modules() for each in module._parameters.values())
    changed = False
    for each in found.modules():
        weight = each._parameters.get("weight") if type(each) is nn.Conv2d else None
        if weight is not None and weight.device.type == "cpu" and held[id(weight)] == 1:
            changed = True
            each.weight = nn.Parameter(weight.detach().to(memory_format=torch.channels_last), requires_grad=False)
    if not changed:
        return usual
    try:  # on copies, for a run may leave something behind in a model
        expected, outputs = (floating(run_seeded(shell(each), inputs)) for each in (usual, found))
        same = bool(expected) and all(
            torch.allclose(*pair, rtol=1e-3, atol=1e-5) for pair in zip(expected, outputs, strict=True)
        )
    except (GMError, RuntimeError, ValueError):  # views of what is no longer in order; outputs that differ in number
        return usual
    return found if same else usual
