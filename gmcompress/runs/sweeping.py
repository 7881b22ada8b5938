"""Sweep: what several budgets would leave of a network, and, measured, what its accuracy is beside SVD of that size."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..candidates import plain_svd
from ..data import make_loader
from ..errors import GMError
from ..factors import Metric
from ..files import usable, write_text
from ..forward import Inputs
from ..metrics import count_macs, replaced_positions, stored_bytes
from ..pipeline import compress, sweep
from ..planning import Plan, eligible
from ..structure import Structure
from ..subjects import Subject, multiply_adds, rank_within
from ..surgery import Site, read_weight
from .compressing import calibration_data, told_as
from .folders import NOTES, begun, check_new
from .networks import Progress, accuracy, build, example_inputs, find_device, silent
from .settings import Settings, read_budget

BUDGETS = ("75%", "50%", "25%")
HALVINGS = 40  # of the interval in which the share of a control is sought


@dataclass(frozen=True)
class _Case:
    """The dense network, the images it is calibrated on, if any, and what was asked for."""

    settings: Settings
    dense: nn.Module
    inputs: Inputs
    data: list[Tensor] | None
    notes: Path | None
    progress: Progress

    def plans(self, budgets: Sequence[str]) -> list[Plan]:
        """One plan for each budget, from one table."""
        options: dict[str, Any] = {"data": self.data, "samples": self.settings.samples, "inputs": self.inputs}
        options |= {"effort": self.settings.effort, "checkpoint": self.notes}
        options |= {"progress": told_as("planning", self.progress)}
        limits: list[Any] = [read_budget(each.split(",")) for each in budgets]
        return sweep(self.dense, budgets=limits, **options, **self.settings.rules())

    def carry_out(self, plan: Plan, what: str, *, calibrated: bool) -> nn.Module:
        """The network with the structures of a plan, fitted to the outputs of the dense one or to its weights."""
        options: dict[str, Any] = {"data": self.data, "samples": self.settings.samples, "checkpoint": self.notes}
        options = (options if calibrated else {}) | {"effort": self.settings.effort, "inputs": self.inputs}
        told = told_as(f"compressing, {what}", self.progress)
        return compress(self.dense, plan=plan, progress=told, **options).model


def sweep_run(
    settings: Mapping[str, Any],
    budgets: Sequence[str] = BUDGETS,
    folder: str | Path | None = None,
    *,
    measure: bool = False,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """What each of several budgets would leave of a trained network; each is as "25%" or "params=100000,macs=50%".

    One row for the dense network and one for each budget: `budget`, `parameters`, `bytes`, `macs` (of the stored
    factors, for one image; a layer as it runs today needs more), the predicted `loss` with the `measure` of it and the
    `gap` to a proven lower bound, relative. With `measure` also `top1`, the accuracy in percent on the validation
    images before any training, and, for each budget, that of two controls with at most as many parameters, `svd` and
    `svd_whitened`: truncated SVD with the same share of every layer that the rules do not exclude, each in its better
    view, fitted to the weights, or with the training images as the plan itself is; None where a control does not
    exist. In a folder each plan is kept as `file`, and until then what is done: the same call goes on from it. Of the
    settings `budget`, `rank`, `residual`, `plan` and `compressed` are of no account.

    Raises:
        GMError: a budget that cannot be reached, images missing that are to be measured on, a folder that holds
            something else; else as `compress_run`.
    """
    ways: dict[str, Any] = {"budget": (), "rank": None, "residual": None, "plan": None, "compressed": None}
    chosen = Settings.read({name: value for name, value in settings.items() if name not in ways})
    if not budgets or not all(read_budget(each.split(",")) for each in budgets):
        raise GMError("name at least one budget, such as 50%")
    if measure and not chosen.has_images:
        raise GMError("accuracies are measured on images: give data_dir or dataset")
    place = None if folder is None else usable(folder)
    if place is not None:
        check_new(place, besides=NOTES)
    dense = build(chosen).to(find_device(chosen.device))
    loader = make_loader(chosen.images, dense) if measure else None
    data = calibration_data(chosen, dense, progress)
    notes = None if place is None else place / NOTES
    case = _Case(chosen, dense, example_inputs(chosen.images, dense), data, notes, progress)
    if place is None:
        return _swept(case, budgets, loader)
    resume = place.exists() and any(place.iterdir())
    with begun(place, None, resume=resume):
        rows = _swept(case, budgets, loader, place)
    shutil.rmtree(place / NOTES, ignore_errors=True)
    return rows


def _swept(case: _Case, budgets: Sequence[str], loader: Any, place: Path | None = None) -> list[dict[str, Any]]:
    """The rows, and in a folder the files of the plans."""
    plans = case.plans(budgets)
    costs = _Costs.of(case.dense, case.inputs, plans[0].sites)
    rows: list[dict[str, Any]] = [{"budget": "dense", **costs.dense}]
    for budget, plan in zip(budgets, plans, strict=True):
        assert plan.optimum is not None
        known = {name: plan.optimum[name] for name in ("loss", "gap", "measure")}
        rows.append({"budget": budget, **costs.after(plan), **known})
    if loader is not None:
        rows[0]["top1"] = accuracy(case.dense, loader, progress=case.progress, what="validating the dense network").top1
        for row, plan in zip(rows[1:], plans, strict=True):
            row |= _measured(case, plan, loader, row["budget"])
    if place is not None:
        for row, plan in zip(rows[1:], plans, strict=True):
            row["file"] = str(place / f"plan_{row['budget']}.json")
            write_text(Path(row["file"]), plan.to_json() + "\n")
    return rows


@dataclass(frozen=True)
class _Costs:
    """What the dense network costs, and what of it each layer's weight does."""

    dense: Mapping[str, int]  # parameters, bytes, macs
    itemsizes: Mapping[str, int]  # bytes of a number of each layer
    positions: Mapping[str, int]  # how often each layer that would be replaced applies its weight for one image

    @classmethod
    def of(cls, dense: nn.Module, inputs: Inputs, sites: Sequence[Site]) -> _Costs:
        parameters = list(dense.parameters())
        macs = count_macs(dense, inputs)[0]
        counts = {"parameters": sum(each.numel() for each in parameters), "bytes": stored_bytes(dense), "macs": macs}
        weights = {site.name: read_weight(dense, site.name) for site in sites}
        itemsizes = {name: each.element_size() for name, each in weights.items() if each is not None}
        return cls(counts, itemsizes, replaced_positions(dense, inputs, list(weights)))

    def after(self, plan: Plan) -> dict[str, int]:
        """The same for the network that a plan makes."""
        spared = freed = saved = 0
        for name in plan.layers:
            site, structure = plan.site(name), Structure.parse(plan.layers[name])
            shape, conv_groups = site.shape, site.conv_groups
            fewer = prod(shape) - structure.parameters(shape)
            spared, freed = spared + fewer, freed + self.itemsizes[name] * fewer
            saved += self.positions[name] * (prod(shape) - multiply_adds(structure, shape, conv_groups=conv_groups))
        parameters, held, macs = (self.dense[name] for name in ("parameters", "bytes", "macs"))
        return {"parameters": parameters - spared, "bytes": held - freed, "macs": macs - saved}


def _measured(case: _Case, plan: Plan, loader: Any, budget: str) -> dict[str, float | None]:
    """The accuracies of a plan and of its controls, before any training."""

    def top1(plan: Plan | None, what: str, *, calibrated: bool) -> float | None:
        if plan is None or (calibrated and case.data is None):
            return None
        model = case.carry_out(plan, what, calibrated=calibrated)
        return accuracy(model, loader, progress=case.progress, what=f"validating {what}").top1

    control = even_svd(plan, case.dense, case.settings)
    return {
        "top1": top1(plan, budget, calibrated=case.data is not None),
        "svd_whitened": top1(control, f"whitened SVD for {budget}", calibrated=True),
        "svd": top1(control, f"plain SVD for {budget}", calibrated=False),
    }


def even_svd(plan: Plan, dense: nn.Module, settings: Settings) -> Plan | None:
    """The control: low ranks in place of what a plan chose, together of at most its size, the same share of each layer.

    Each layer has the better one of its views. None where the share leaves some layer not even rank 1.
    """
    rules = {name: rule for name, rule in settings.rules().items() if name != "group"}
    free = eligible(plan.sites, **rules).free
    weights = {site.name: read_weight(dense, site.name) for site in free}
    room = sum(plan.stored(site.name) if site.name in plan.layers else prod(site.shape) for site in free)
    share = room / sum(prod(site.shape) for site in free)
    try:
        splits = {name: _better_view(each, share) for name, each in weights.items() if each is not None}
    except GMError:  # not even rank 1
        return None

    def at(share: float) -> dict[str, Structure | None]:
        found: dict[str, Structure | None] = {}
        for site in free:
            split = splits[site.name]
            rank = rank_within(site.shape, int(share * prod(site.shape)), grid=None, split=split)
            structure = Structure.factors(rank, split=split)
            found[site.name] = structure if structure.parameters(site.shape) < prod(site.shape) else None
        return found

    low, high = share, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        stored = plan.edit(at(middle)).parameters
        low, high = (middle, high) if stored <= plan.parameters else (low, middle)
    return plan.edit(at(low))


def _better_view(weight: Tensor, share: float) -> bool:
    """Whether a low rank of this share of a weight is nearer as rows·ky × columns·kx.

    Raises:
        GMError: not even rank 1 fits.
    """
    subject = Subject(weight.detach().double(), Metric())
    return plain_svd(subject, int(share * weight.numel()))[0].split
