"""Compress: from settings to a compressed network, and to a folder with it and its report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..attaching import structured
from ..batches import take
from ..data import make_calibration_loader, make_loader
from ..errors import GMError
from ..files import usable
from ..layers import GMLayer
from ..metrics import measure_together
from ..pipeline import check_plan, compress, make_plan, model_name
from ..planning import Plan
from ..projection import relative_error, svd_error
from ..reporting import Report, Result
from ..storage import describe_folder, load, save
from ..structure import distance
from ..surgery import conv_groups_of, read_weight
from .folders import MODEL, NOTES, REPORTS, START, absolute, begun, check_new, resumed, wait_for
from .networks import (
    Progress,
    accuracy,
    build,
    compressed_folder,
    example_inputs,
    find_device,
    is_main,
    model_options,
    silent,
)
from .settings import Settings, setting_defaults

BETTER = "calibrated on training images (--data-dir or --dataset) the result is far better"
WEIGHTS_ALONE = f"no images were used, so the weights alone decided; {BETTER}"
FITTED_ALONE = f"no images were used, so the layers of the plan were fitted to their weights alone; {BETTER}"


def compress_run(
    settings: Mapping[str, Any], folder: str | Path, *, resume: bool = False, progress: Progress = silent
) -> Report:
    """Compress a trained network without training; the folder gets args.yaml, model/, report.json and report.html.

    With images (data_dir or dataset), training images calibrate what a budget or a plan does, unless `calibrate` is
    False, and the accuracy before and after is measured on those for validation. What is done is kept in the folder
    until the model is written, and `resume` goes on from it; of `settings` only the budget, `data_dir` and `workers`
    may then differ. Of several processes the first one works and the others wait for its report.

    Raises:
        GMError: the folder holds something already, or nothing to resume; a setting, weights or images cannot be used.
            Nothing is written then, but for work on the layers that `resume` can go on from.
    """
    place = usable(folder)
    chosen = resumed(settings, place) if resume else absolute(Settings.read(settings))
    if not is_main():
        wait_for(place / REPORTS[-1])
        return read_report(place)
    if not resume:
        check_new(place)
    elif (place / START).exists() or any(place.glob("checkpoint-*")):
        raise GMError(f"{place} holds a training, which goes on with: gmcompress train --resume {place}")
    elif (place / REPORTS[-1]).is_file() and (place / MODEL).is_dir():
        return read_report(place)
    dense = build(chosen).to(find_device(chosen.device))
    loader = make_loader(chosen.images, dense) if chosen.has_images else None
    with begun(place, chosen, resume=resume):
        result = compressed(chosen, dense, place / NOTES, progress)
        measured = {} if loader is None else both_accuracies(result, loader, progress)
        about = {**shown_settings("compress", chosen), **result.report.settings}
        report = replace(result.report, accuracy=measured, settings=about)
        write_model(result, place, chosen)
        shutil.rmtree(place / NOTES, ignore_errors=True)
        write_reports(report, place)
    return report


def compressed(settings: Settings, dense: nn.Module, notes: Path, progress: Progress) -> Result:
    """The dense network compressed as asked for, or as it stands in a folder.

    The settings in its report hold what decided, under `calibration`, where that was a budget or a plan.
    """
    if settings.compressed is not None:
        return _as_it_stands(settings, dense)
    plan, data = planned(settings, dense, notes=notes, progress=progress)
    options: dict[str, Any] = {} if data is None else {"data": data, "samples": settings.samples, "checkpoint": notes}
    options |= {"inputs": example_inputs(settings.images, dense), "progress": told_as("compressing", progress)}
    result = compress(dense, plan=plan, effort=settings.effort, **options)
    if settings.rank is not None:
        return result
    decided = WEIGHTS_ALONE if settings.plan is None else FITTED_ALONE
    if data is not None:
        decided = f"calibrated on {_count(data):,} training images"
    return replace(result, report=replace(result.report, settings={"calibration": decided}))


def calibration_data(settings: Settings, dense: nn.Module, progress: Progress) -> list[Tensor] | None:
    """Batches of training images, where a budget or a plan is to be calibrated and there are images; else None.

    Raises:
        GMError: there are no training images apart from those for validation.
    """
    if settings.rank is not None or not (settings.calibrate and settings.has_images):
        return None
    what, samples = "reading training images", settings.samples
    progress(what, 0, 1, "")
    try:
        loader = make_calibration_loader(settings.images, dense, samples=samples, seed=settings.seed)
    except GMError as problem:
        raise GMError(f"{problem}; calibration needs training images, --no-calibrate goes without them") from None
    found: Any = take(loader, samples=samples)
    progress(what, 1, 1, f"{_count(found):,} to calibrate on")
    return found


def _count(data: Sequence[Tensor]) -> int:
    return sum(len(each) for each in data)


def planned(
    settings: Settings, dense: nn.Module, *, notes: Path | None = None, progress: Progress = silent
) -> tuple[Plan, list[Tensor] | None]:
    """The plan in the file given, else the one for a budget or a rank; and the images to calibrate on.

    Raises:
        GMError: the file is missing or holds no plan of this network; else as `compress`.
    """
    plan = None if settings.plan is None else _plan_in(settings.plan, dense)
    data = calibration_data(settings, dense, progress)
    if plan is not None:
        return plan, data
    options: dict[str, Any] = {"data": data, "samples": settings.samples, "effort": settings.effort}
    options = options | {"checkpoint": notes} if settings.rank is None else {}
    options |= {"inputs": example_inputs(settings.images, dense), "progress": told_as("planning", progress)}
    return make_plan(dense, **options, **settings.compression()), data


def _plan_in(file: str, dense: nn.Module) -> Plan:
    try:
        plan = Plan.from_json(usable(file).read_text(encoding="utf-8"))
        check_plan(plan, dense)
    except (OSError, UnicodeDecodeError) as problem:
        said = problem.strerror if isinstance(problem, OSError) else problem
        raise GMError(f"cannot read the plan {file}: {said}") from None
    except GMError as problem:
        raise GMError(f"{file}: {problem}") from None
    return plan


def told_as(what: str, progress: Progress) -> Callable[[str, int, int], None]:
    """The progress of a work on the layers, under its name."""
    return lambda layer, done, of: progress(what, done + 1, of, layer)


def _as_it_stands(settings: Settings, dense: nn.Module) -> Result:
    """The network in a folder, with a report on its present weights."""
    assert settings.compressed is not None
    folder, inputs = compressed_folder(settings.compressed), example_inputs(settings.images, dense)
    plan = describe_folder(folder)["plan"]
    if plan is None:
        raise GMError(f"{folder} was saved without its plan: save the Result of compress, not only its model")
    small = load(folder, dense)
    layers = structured(small)
    rows = [_row(name, layers[name], dense) for name in plan.layers]
    before, after = measure_together([dense, small], inputs)
    report = Report(model_name(dense), plan, before, after, tuple(rows))
    return Result(small, plan, report, teacher=dense, inputs=inputs)


def _row(name: str, layer: GMLayer, old_model: nn.Module) -> dict[str, Any]:
    """The row of the report on a layer whose weight is no fit; `loss` is then the squared relative error."""
    weight, dense = layer.weight.detach(), read_weight(old_model, name)
    assert dense is not None, "the folder was rebuilt on this network"
    stored, error = layer.structure.parameters(dense.shape), relative_error(weight, dense)
    grouped = layer.structure.group is not None
    away = [distance(each, layer.structure, relative=True) if grouped else None for each in (dense, weight)]
    return {
        "layer": name,
        "structure": str(layer.structure),
        "dense": dense.numel(),
        "stored": stored,
        "relative_error": error,
        "loss": error**2,
        "svd_error": svd_error(dense, stored, conv_groups=conv_groups_of(old_model, name)),
        "distance_before": away[0],
        "distance_compressed": away[1],
        "distance_tuned": None,
    }


def both_accuracies(result: Result, loader: DataLoader, progress: Progress) -> dict[str, float]:
    """Top-1 accuracy of the dense and of the compressed network, before any training."""
    assert result.teacher is not None
    models = {"dense": result.teacher, "compressed": result.model}
    return {
        name: accuracy(model, loader, progress=progress, what=f"validating the {name} network").top1
        for name, model in models.items()
    }


def shown_settings(command: str, settings: Settings) -> dict[str, Any]:
    """What a report says about its making: the command, the settings that are not the defaults, the versions."""
    defaults = setting_defaults()
    chosen = {name: value for name, value in settings.flat().items() if value != defaults[name]}
    versions = {name: version(name) for name in ("gmcompress", "torch", "timm")}
    return {"command": command, "seed": settings.seed, **chosen, **versions}


def write_model(result: Result, folder: Path, settings: Settings) -> None:
    """The model, from whose folder `load` rebuilds it."""
    named = settings.model and ":" not in settings.model  # other sources than timm's registry have to be built again
    source = f"timm:{settings.model}" if named else None
    save(result, folder / MODEL, source=source, source_options=model_options(settings) if named else None)


def write_reports(report: Report, folder: Path) -> None:
    """The report as JSON and, last of all that a run writes, as HTML."""
    for name in REPORTS:
        report.save(folder / name)


def read_report(folder: str | Path) -> Report:
    """The report in the output of a run, or of a report.json itself.

    Raises:
        GMError: there is none, or it is no report.
    """
    place = usable(folder)
    candidates = [place, place / "report.json", place.parent / "report.json"]
    path = next((each for each in candidates if each.is_file() and each.suffix == ".json"), None)
    if path is None:
        raise GMError(f"{folder} holds no report: there is no {place / 'report.json'}")
    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except (GMError, UnicodeDecodeError) as problem:
        raise GMError(f"{path}: {problem}") from None
