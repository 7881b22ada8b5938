"""compress(): the steps in order, from a dense model to a smaller one with its report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from dataclasses import replace as changed
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from . import metrics
from .errors import GMError, nearest_names
from .groups import Group
from .layers import GMLayer, counterpart
from .metrics import measure_together
from .planning import Override, Plan, Rule, Rules, choose
from .projection import Fit, project, svd_error
from .reporting import Report, Result
from .structure import Structure, distance, expand
from .surgery import Inputs, check_model, describe, get_modules, replace, run, shell, trace
from .tuning import Recipe, fine_tune

Progress = Callable[[str, int, int], None]  # layer, done, of


def make_plan(
    model: nn.Module,
    group: str | Group = "C32xC32",
    *,
    rank: int = 1,
    residual: str = "displacement",
    inputs: Inputs | None = None,
    include: Rules = (),
    exclude: Rules = (),
    overrides: Mapping[Rule, Override] | None = None,
) -> Plan:
    """What `compress` would do with the same arguments; no weight is touched. Public as `gmcompress.plan`.

    Raises:
        GMError: as `compress`.

    >>> make_plan(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), "C8xC8").layers
    {'0': 'C8xC8+displacement:1'}
    """
    sites = trace(model, inputs)
    rules: dict[str, Any] = {"include": include, "exclude": exclude, "overrides": overrides}
    total = sum(each.numel() for each in model.parameters())
    return choose(sites, group, model_parameters=total, rank=rank, residual=residual, **rules)


def compress(
    model: nn.Module,
    group: str | Group = "C32xC32",
    *,
    rank: int = 1,
    residual: str = "displacement",
    inputs: Inputs | None = None,
    include: Rules = (),
    exclude: Rules = (),
    overrides: Mapping[Rule, Override] | None = None,
    plan: Plan | None = None,
    inplace: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Replace the weights of a trained model by group matrices plus residuals; the model given stays as it is.

    `group` is the largest symmetry allowed: on a layer it acts through its largest quotient whose order divides both
    widths. `rank` is that of the residual, "displacement" or "lowrank", on every layer. Stem and classifier stay dense
    unless `include` names them. Rules are globs on layer names, "re:" patterns or module types; `overrides` maps them
    to another group, a structure such as "C4+displacement:2", or None; the first match wins. `plan` carries out a plan
    made before, in place of all of these. With example `inputs`, multiply-adds and latency are measured too.

    Raises:
        GMError: an unknown group, a negative rank, a rule or plan that does not fit, no eligible layer, weights that
            hold NaN, a wrapped model, or inputs that the model does not accept. The model is left untouched.

    >>> result = compress(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), "C8xC8")
    >>> result.model[0]
    GMLinear(64, 64, 'C8xC8+displacement:1', bias=True)
    """
    check_model(model)
    if plan is None:
        rules: dict[str, Any] = {"include": include, "exclude": exclude, "overrides": overrides}
        plan = make_plan(model, group, rank=rank, residual=residual, inputs=inputs, **rules)
    dense = shell(model) if inplace else model
    expected = None if inputs is None else run(shell(model), inputs)
    originals = get_modules(model, plan.layers)
    new_layers: dict[str, GMLayer] = {}
    rows: list[dict[str, Any]] = []
    for done, (name, structure) in enumerate(plan.layers.items()):
        if progress is not None:
            progress(name, done, len(plan.layers))
        new_layers[name], fit = _compress_layer(name, originals[name], Structure.parse(structure))
        rows.append(_row(name, originals[name], fit))
    small = replace(model, new_layers, inplace=inplace)
    try:
        if inputs is not None:
            check_outputs(expected, run(shell(small), inputs))
        before, after = measure_together([dense, small], inputs)
    except GMError:
        if inplace:
            replace(model, originals, inplace=True)  # as it was
        raise
    report = Report(model_name(model), plan, before, after, tuple(rows))
    return Result(small, plan, report, teacher=None if inplace else model, inputs=inputs)


def _compress_layer(name: str, dense: nn.Module, structure: Structure) -> tuple[GMLayer, Fit]:
    """The structured layer in place of a dense one, filled with the nearest weight.

    Raises:
        GMError: naming the layer, that its weight holds NaN or the structure does not fit.
    """
    try:
        fit = project(dense.get_parameter("weight"), structure)
        layer = counterpart(dense, structure)
    except (GMError, AttributeError) as problem:
        raise GMError(f"layer {name or '(the model itself)'!r}: {problem}") from None
    bias = dense.bias
    layer.assign(fit.tensors, bias=bias if isinstance(bias, Tensor) else None)
    return layer, fit


def _row(name: str, dense: nn.Module, fit: Fit) -> dict[str, Any]:
    """The row of the report on one layer, with plain SVD of the same size as its control."""
    weight = dense.get_parameter("weight")
    stored = fit.structure.parameters(weight.shape)
    with_fit = _distance_of(fit, tuple(weight.shape))
    return {
        "layer": name,
        "structure": str(fit.structure),
        "dense": weight.numel(),
        "stored": stored,
        "relative_error": fit.relative_error,
        "svd_error": svd_error(weight, stored, conv_groups=getattr(dense, "groups", 1)),
        "distance_before": fit.distance,
        "distance_compressed": with_fit,
        "distance_tuned": None,
    }


def _distance_of(fit: Fit, shape: tuple[int, ...]) -> float:
    """The relative distance of a fitted weight to the group matrices; exactly 0 without a residual."""
    structure = fit.structure
    if not (structure.displacement or structure.lowrank):
        return 0.0
    return distance(expand(fit.tensors, structure, shape), structure, relative=True)


def check_outputs(expected: Any, found: Any) -> None:
    """The same nesting and shapes of outputs, all finite where they were.

    Raises:
        GMError: they differ, so that the compressed model could not take the place of the dense one.
    """
    (old, old_form), (new, new_form) = tree_flatten(expected), tree_flatten(found)
    if old_form != new_form or describe(old) != describe(new):
        raise GMError(f"the compressed model returns {describe(new)} where the dense one returned {describe(old)}")
    for before, after in zip(old, new, strict=True):
        if isinstance(before, Tensor) and torch.isfinite(before).all() and not torch.isfinite(after).all():
            raise GMError("the compressed model's outputs are not finite on the inputs given; try a larger rank")


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
    epochs: int,
    lr: float | None = None,
    **options: Any,
) -> Any:
    """Fine-tune a copy of a compressed model against the dense one; a Result gives a Result, a module a module.

    The teacher defaults to the dense model of the Result. `options` are those of `gmcompress.tuning.fine_tune`: the
    fields of `Recipe` (temperature, distillation, task, optimizer, weight_decay, recalibrate, ema, amp, seed, ...) and
    `evaluate`, `folder`, `resume`, `progress`.

    Raises:
        GMError: an empty loader, a teacher with other outputs, a training that diverges, or an option of another name.
    """
    student = model.model if isinstance(model, Result) else model
    if teacher is None and isinstance(model, Result):
        teacher = model.teacher
    ours, run_options = {each.name for each in fields(Recipe)}, {"evaluate", "folder", "resume", "progress"}
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
    layers = get_modules(tuned, [row["layer"] for row in result.report.layers])
    rows = []
    for row in result.report.layers:
        layer = layers[row["layer"]]
        assert isinstance(layer, GMLayer)
        rows.append({**row, "distance_tuned": distance(layer.weight.detach(), layer.structure, relative=True)})
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


def densify(model: nn.Module) -> nn.Module:
    """A copy of the model with plain torch layers of the same function in place of the structured ones.

    >>> small = compress(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), "C8xC8").model
    >>> densify(small)[0]
    Linear(in_features=64, out_features=64, bias=True)
    """
    dense = {name: module.dense() for name, module in model.named_modules() if isinstance(module, GMLayer)}
    return replace(model, dense)
