"""compress(): the steps in order, from a dense model to a smaller one with its report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from . import metrics
from .allocation import allocate
from .attaching import empty, exchange, remember, set_bias, structured
from .batches import SAMPLES
from .budgets import Given, parse_budget
from .copies import count_parameters, parameters_of, settled
from .errors import GMError, nearest_names
from .forward import Inputs, run_seeded, shell
from .groups import Group
from .jobs import Job, private
from .layers import GMLayer, GMWeight
from .metrics import measure_together
from .nesting import describe, is_plain, laid_open
from .planning import Override, Plan, Rule, Rules, choose
from .projection import Fit, fitted_distance, relative_error, svd_error
from .reconstruction import Reconstruction
from .rehearsal import rehearsed_sites, training_problem
from .reporting import Report, Result
from .structure import distance, expand
from .surgery import check_model, conv_groups_of, find_weight, read_weight
from .tuning import Recipe, fine_tune

Progress = Callable[[str, int, int], None]  # layer, done, of
DEFAULT_BUDGET = "50%"
JOINTLY = (
    "layers that its code takes jointly need one structure: name them in ties=, leave them with exclude=, "
    "or give all layers the same kind with rank="
)


def make_plan(
    model: nn.Module,
    group: str | Group = "C32xC32",
    *,
    budget: Given | None = None,
    data: Iterable[Any] | None = None,
    samples: int = SAMPLES,
    rank: int | None = None,
    residual: str = "displacement",
    inputs: Inputs | None = None,
    include: Rules = (),
    exclude: Rules = (),
    overrides: Mapping[Rule, Override] | None = None,
    ties: Sequence[Rules] = (),
    effort: float = 1.0,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """What `compress` would do with the same arguments; the model is not changed. Public as `gmcompress.plan`.

    Raises:
        GMError: as `compress`.

    >>> make_plan(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), "C8xC8", rank=1).layers
    {'0': 'C8xC8+displacement:1'}
    """
    check_model(model)
    job = Job.of(model, group, inputs, data, samples, effort, progress)
    rules: dict[str, Any] = {"include": include, "exclude": exclude, "overrides": overrides, "ties": ties}
    return _planned(job, budget=budget, rank=rank, residual=residual, checkpoint=checkpoint, **rules)


def _planned(
    job: Job,
    *,
    budget: Given | None,
    rank: int | None,
    residual: str,
    checkpoint: str | Path | None,
    ties: Sequence[Rules],
    **rules: Any,
) -> Plan:
    """The plan of a job, within a budget or of one rank."""
    if rank is None:
        if residual != "displacement":
            raise GMError("residual= is for every layer alike; it goes with rank=, and under a budget the plan chooses")
        budgets, rules["ties"] = parse_budget(DEFAULT_BUDGET if budget is None else budget), ties
        return allocate(job.table(rules, job.notes(checkpoint, "table", rules), [budgets]), budgets)
    if budget is not None or ties:
        raise GMError("rank= is for every layer alike; it goes with neither budget= nor ties=")
    sites = rehearsed_sites(job.model, job.inputs)
    total = count_parameters(job.model)
    return choose(sites, job.group, model_parameters=total, rank=rank, residual=residual, **rules)


def sweep(
    model: nn.Module,
    group: str | Group = "C32xC32",
    *,
    budgets: Sequence[Given] = ("75%", "50%", "35%", "25%", "15%", "10%"),
    data: Iterable[Any] | None = None,
    samples: int = SAMPLES,
    inputs: Inputs | None = None,
    include: Rules = (),
    exclude: Rules = (),
    overrides: Mapping[Rule, Override] | None = None,
    ties: Sequence[Rules] = (),
    effort: float = 1.0,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Plan]:
    """A plan for each of several budgets, from one table; carry one out with `compress(model, plan=...)`.

    Raises:
        GMError: as `compress`.

    >>> plans = sweep(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), "C8", budgets=["75%", "50%"])
    >>> [plan.parameters <= share * plan.model_parameters for plan, share in zip(plans, (0.75, 0.5))]
    [True, True]
    """
    check_model(model)
    parsed = [parse_budget(each) for each in budgets]
    job = Job.of(model, group, inputs, data, samples, effort, progress)
    rules: dict[str, Any] = {"include": include, "exclude": exclude, "overrides": overrides, "ties": ties}
    table = job.table(rules, job.notes(checkpoint, "table", rules), parsed)
    return [allocate(table, each) for each in parsed]


@torch.inference_mode(False)  # whatever mode a caller is in: weights made in that one could not be trained
def compress(
    model: nn.Module,
    group: str | Group = "C32xC32",
    *,
    budget: Given | None = None,
    data: Iterable[Any] | None = None,
    samples: int = SAMPLES,
    rank: int | None = None,
    residual: str = "displacement",
    inputs: Inputs | None = None,
    include: Rules = (),
    exclude: Rules = (),
    overrides: Mapping[Rule, Override] | None = None,
    ties: Sequence[Rules] = (),
    plan: Plan | None = None,
    effort: float = 1.0,
    checkpoint: str | Path | None = None,
    inplace: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Replace the weights of a trained model by structured ones within a budget; the model given stays as it is.

    `budget` is what the whole model may take: "25%" of its parameters, or a mapping of "params", "bytes" or "macs" to a
    share or a number; half of the parameters where neither it nor `rank` is given. Every layer gets the structure with
    which the model is expected to lose least: dense, a low rank, adapted bases, group matrices of a quotient of
    `group`, the largest symmetry allowed, or in a `GroupConv` a sum of separable kernels. With `data` (a loader; labels
    are not read where the model runs without them) at most `samples` examples measure what each layer's errors cost,
    the layers are fitted one after another to the outputs of the dense ones, and those of a block then together, with
    its biases and norms; without, to their weights.

    `rank` is the literal mode: on every layer the largest fitting quotient of `group` with a residual of this rank,
    "displacement" or "lowrank", or of the largest lower one if only then the layer gets smaller. Stem and classifier
    stay dense unless `include` names them. Rules are globs on layer names, "re:" patterns or module types; `overrides`
    maps them to a group, a structure such as "C4+displacement:2" or "adapted:8:4x4", or None; the first match wins.
    Layers of one parent module and of one shape that match an entry of `ties` get the same structure. `plan` carries
    out a plan made before, in place of all of these. With example `inputs`, or data, multiply-adds and latency are
    measured too. `effort` multiplies the time that fits and passes over the data may take: 4 gives better fits of large
    layers. `checkpoint` is a folder in which every layer's table and fit are kept as soon as they are known: a call
    that was interrupted goes on from there, and one with another budget spares the table.

    Raises:
        GMError: an unknown group, a budget that cannot be reached, a rule or plan that does not fit, no eligible layer,
            weights that hold NaN, a wrapped model, or inputs or data that the model does not accept. The model is left
            untouched.

    >>> result = compress(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), "C8xC8", rank=1)
    >>> result.model[0]
    GMLinear(64, 64, 'C8xC8+displacement:1', bias=True)
    """
    check_model(model)
    if plan is not None:
        check_plan(plan, model)
    job = Job.of(model, group, inputs, data, samples, effort, progress, inplace=inplace)
    if plan is None:
        rules: dict[str, Any] = {"include": include, "exclude": exclude, "overrides": overrides, "ties": ties}
        plan = _planned(job, budget=budget, rank=rank, residual=residual, checkpoint=checkpoint, **rules)
        check_plan(plan, model)
    return carry_out(plan, job, checkpoint=checkpoint, inplace=inplace)


def carry_out(plan: Plan, job: Job, *, checkpoint: str | Path | None, inplace: bool) -> Result:
    """Fit the layers of a plan, put them in place, refit the blocks, and measure; on failure all is as it was."""
    model, notes = job.model, job.notes(checkpoint, "fits", {})
    dense = (private(model) if job.batches else shell(model)) if inplace else model
    expected = None if job.inputs is None else run_seeded(shell(model), job.inputs)
    fits = job.fits(plan, notes)
    new_layers = {name: _layer(model, name, fits) for name in plan.layers}
    put_back, kept, vectors = remember(model), {}, small_tensors(model) if inplace else []
    try:
        small = exchange(model, new_layers, inplace=inplace)
        for name in fits.biases:
            if isinstance(new_layers[name], GMWeight):  # its module keeps its bias
                set_bias(small, name, fits.biases[name])
        kept = set_means(small, fits.means)
        if job.inputs is not None:
            check_outputs(expected, _run_small(small, job.inputs))
            if problem := training_problem(dense, small, job.inputs):
                raise GMError(f"the compressed model cannot be trained, though the dense one can: {problem}; {JOINTLY}")
        blocks = job.refit(plan, dense, small, notes)
        rows = [_row(dense, name, _present(fits.fits[name], dense, small, name)) for name in plan.layers]
        if blocks and job.inputs is not None:
            check_outputs(expected, _run_small(small, job.inputs))
        before, after = measure_together([dense, settled(small)], job.inputs)
    except BaseException:
        if inplace:
            put_back()
            set_means(model, kept)
            restore(vectors)
        raise
    report = Report(model_name(model), plan, before, after, tuple(rows), tuple(asdict(each) for each in blocks))
    return Result(small, plan, report, teacher=None if inplace else model, inputs=job.inputs)


def _run_small(small: nn.Module, inputs: Inputs) -> Any:
    """One run of the compressed model, in a copy.

    Raises:
        GMError: it does not run, as one does not that stacks weights which by now have different structures.
    """
    try:
        return run_seeded(shell(small), inputs)
    except GMError as problem:
        raise GMError(
            f"the compressed model does not run, though the dense one does: {problem}; {JOINTLY}"
        ) from problem


def check_plan(plan: Plan, model: nn.Module) -> None:
    """Refuse the plan of another model.

    Raises:
        GMError: a layer of the plan is missing, or has another shape.
    """
    for name in plan.layers:
        there, weight = plan.site(name).shape, read_weight(model, name)
        here = "is not known to be a matrix" if weight is None else tuple(weight.shape)
        if there != here:
            raise GMError(f"the plan is for another network: {name!r} has shape {there} there, {here} here")


@torch.no_grad()
def set_means(model: nn.Module, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Set the running means of BatchNorms by name; returns those they had."""
    had = {}
    for name, mean in means.items():
        buffer = model.get_submodule(name).get_buffer("running_mean")
        had[name] = buffer.clone()
        buffer.copy_(mean)
    return had


def small_tensors(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The biases and the weights of norms, each with a copy of its values."""
    return [(each, each.detach().clone()) for each in parameters_of(model).values() if each.dim() <= 1]


@torch.no_grad()
def restore(tensors: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give every tensor the values that were kept of it."""
    for each, values in tensors:
        each.copy_(values)


def _present(fit: Fit, dense: nn.Module, small: nn.Module, name: str) -> Fit:
    """The fit as it is after its block was refitted."""
    layer, weight = structured(small)[name], read_weight(dense, name)
    assert weight is not None, "the plan was checked to fit the model"
    tensors = {part: each.detach() for part, each in layer.parts().items()}
    if all(torch.equal(each, fit.tensors[part].to(each)) for part, each in tensors.items()):
        return fit
    found = expand(tensors, fit.structure, weight.shape)
    return changed(fit, tensors=tensors, relative_error=relative_error(found, weight.double()))


def _layer(model: nn.Module, name: str, found: Reconstruction) -> GMLayer:
    """The structured layer or weight in place of a dense one, filled with the fitted weight.

    Raises:
        GMError: naming the layer, that the structure does not fit.
    """
    fit = found.fits[name]
    try:
        layer = empty(model, name, fit.structure)
    except GMError as problem:
        raise GMError(f"layer {name or '(the model itself)'!r}: {problem}") from None
    bias = None if layer.bias is None else found.biases.get(name, find_weight(model, name)[0].get_parameter("bias"))
    layer.assign(fit.tensors, bias=bias)
    return layer


def _row(model: nn.Module, name: str, fit: Fit) -> dict[str, Any]:
    """The row of the report on one layer, with plain SVD of the same size as its control."""
    weight = read_weight(model, name)
    assert weight is not None, "the plan was checked to fit the model"
    stored = fit.structure.parameters(weight.shape)
    return {
        "layer": name,
        "structure": str(fit.structure),
        "dense": weight.numel(),
        "stored": stored,
        "relative_error": fit.relative_error,
        "loss": fit.loss,
        "svd_error": svd_error(weight, stored, conv_groups=conv_groups_of(model, name)),
        "distance_before": fit.distance,
        "distance_compressed": fitted_distance(fit, tuple(weight.shape)),
        "distance_tuned": None,
    }


def check_outputs(expected: Any, found: Any) -> None:
    """The same nesting of outputs, tensors of as many axes, all finite where they were.

    Sizes may differ, and the lengths of lists: a detector returns as many boxes as it finds, and speech is as long as
    the words take.

    Raises:
        GMError: they differ, so that the compressed model could not take the place of the dense one.
    """
    (old, old_form), (new, new_form) = (tree_flatten(_folded(laid_open(each))) for each in (expected, found))
    if old_form != new_form or _axes(old) != _axes(new):
        raise GMError(f"the compressed model returns {describe(new)} where the dense one returned {describe(old)}")
    before, after = ([_finite(leaf) for leaf in tree_leaves(laid_open(each))] for each in (expected, found))
    if len(before) != len(after):  # of lists that have grown or shrunk
        before, after = [all(before)], [all(after)]
    if any(was and not is_now for was, is_now in zip(before, after, strict=True)):
        remedy = "try a larger rank or budget, or leave out with exclude= what its code inverts or divides by"
        raise GMError(f"the compressed model's outputs are not finite on the inputs given; {remedy}")


def _folded(outputs: Any) -> Any:
    """Nested outputs with one entry for all of a list that are alike: how many there are may follow from values.

    >>> _folded({"boxes": [torch.ones(1, 4), torch.ones(3, 4)], "pair": [1, "a"]})
    {'boxes': [tensor([[1., 1., 1., 1.]])], 'pair': [1, 'a']}
    """
    if isinstance(outputs, dict):
        return {key: _folded(each) for key, each in outputs.items()}
    if type(outputs) is tuple:
        return tuple(map(_folded, outputs))
    if type(outputs) is not list:
        return outputs
    items = [_folded(each) for each in outputs]
    forms = [(form, _axes(found)) for found, form in map(tree_flatten, items)]
    return items[:1] if all(each == forms[0] for each in forms) else items


def _finite(leaf: Any) -> bool:
    """Whether nothing in it is known to be infinite or NaN."""
    return not (isinstance(leaf, Tensor) and is_plain(leaf)) or bool(torch.isfinite(leaf).all())


def _axes(leaves: Iterable[Any]) -> list[Any]:
    """Of every tensor the number of axes, of anything else the type."""
    return [each.dim() if isinstance(each, Tensor) else type(each) for each in leaves]


def model_name(model: nn.Module) -> str:
    """What timm calls a model, else its class."""
    config = getattr(model, "pretrained_cfg", None)
    named = config.get("architecture") if isinstance(config, Mapping) else None
    return named or type(model).__name__


def tune(
    model: Result | nn.Module,
    loader: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    epochs: int = 0,
    lr: float | None = None,
    **options: Any,
) -> Any:
    """Fine-tune a copy of a compressed model against the dense one; a Result gives a Result, a module a module.

    The teacher defaults to the dense model of the Result. `options` are those of `gmcompress.tuning.fine_tune`: the
    fields of `Recipe` (temperature, distillation, task, optimizer, weight_decay, recalibrate, ema, amp, seed, ...) and
    `evaluate`, `folder`, `resume`, `progress`, `each_epoch`.

    Raises:
        GMError: an empty loader, a teacher with other outputs, a training that diverges, or an option of another name.
    """
    student = model.model if isinstance(model, Result) else model
    if teacher is None and isinstance(model, Result):
        teacher = model.teacher
    ours = {each.name for each in fields(Recipe)}
    run_options = {"evaluate", "folder", "resume", "progress", "each_epoch"}
    unknown = sorted(set(options) - ours - run_options)
    if unknown:
        near = nearest_names(unknown[0], ours | run_options)
        raise GMError(f"tune has no option {unknown[0]!r}; the nearest are {near}")
    recipe = Recipe(epochs=epochs, lr=lr, **{key: value for key, value in options.items() if key in ours})
    rest = {key: value for key, value in options.items() if key in run_options}
    tuned, history = fine_tune(student, loader, recipe, teacher=teacher, **rest)
    return tuned_result(model, tuned, history) if isinstance(model, Result) else tuned


def tuned_result(result: Result, tuned: nn.Module, history: Iterable[Mapping[str, Any]]) -> Result:
    """The result with its fine-tuned model, the distances and metrics measured again."""
    layers = structured(tuned)
    rows = []
    for row in result.report.layers:
        layer = layers[row["layer"]]
        tuned_distance = None
        if layer.structure.group is not None:
            tuned_distance = distance(layer.weight.detach(), layer.structure, relative=True)
        rows.append({**row, "distance_tuned": tuned_distance})
    before, after = result.report.before, result.report.after
    if result.inputs is not None and result.teacher is not None:
        before, after = measure_together([result.teacher, tuned], result.inputs)
    report = changed(result.report, layers=tuple(rows), history=tuple(history), before=before, after=after)
    return changed(result, model=tuned, report=report)


def equivariance(model: Result | nn.Module, *, tolerance: float | None = None) -> list[dict[str, Any]]:
    """Per structured layer, the distance to the group matrices and both displacement ranks, of the present weights.

    A Result adds `distance_before` (of the dense weight) and `distance_compressed` (before any fine-tuning). See
    `gmcompress.metrics.equivariance` for the other fields and for the tolerance of the ranks.

    Raises:
        GMError: the model has no structured layer.
    """
    if not isinstance(model, Result):
        return metrics.equivariance(model, tolerance=tolerance)
    known = {row["layer"]: row for row in model.report.layers}
    return [
        row | {key: known[row["layer"]][key] for key in ("distance_before", "distance_compressed")}
        for row in metrics.equivariance(model.model, tolerance=tolerance)
    ]
