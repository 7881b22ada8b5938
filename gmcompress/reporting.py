"""What was saved and what it cost: Result and Report; renders numbers, and never touches a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from torch import nn

from .errors import GMError, shown
from .files import parse_json, usable, write_text
from .forward import Inputs
from .metrics import Metrics
from .pages import render_html
from .planning import Plan
from .tables import WIDTH, percent, table_text

LAYER: dict[str, Any] = {"layer": str, "structure": str, "dense": int, "stored": int}  # kinds of what every row holds
LAYER |= {"relative_error": float, "svd_error": float}
BLOCK: dict[str, Any] = {"block": str, "before": float, "after": float, "rate": float}
LAYER |= dict.fromkeys(("distance_before", "distance_compressed", "distance_tuned"), float | None)


def _check_kinds(given: Any, kinds: Mapping[str, Any], what: str) -> None:
    """Refuse what is no object with these fields of these kinds; a float may be written as an integer.

    Raises:
        GMError: it is not, with the field.
    """
    if not isinstance(given, dict):
        raise GMError(f"in a report, {what} must be an object, not {type(given).__name__}")
    for name, kind in kinds.items():
        value = given.get(name)
        fitting = isinstance(value, kind | int if kind in (float, float | None) else kind)
        if name not in given or not fitting or isinstance(value, bool):
            words = getattr(kind, "__name__", str(kind))
            raise GMError(f"in a report, {name} of {what} must be of type {words}, not {shown(value)}")


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _layer_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What has become of a layer, and how near to it."""
    return (
        row["layer"] or "(root)",
        row["structure"],
        f"{row['dense']:,}",
        f"{row['stored']:,}",
        f"{row['relative_error']:.3f}",
        f"{row['svd_error']:.3f}",
        _decimal(row["distance_before"]),
        _decimal(row["distance_compressed" if row["distance_tuned"] is None else "distance_tuned"]),
    )


def _frozen_cells(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """What a frozen layer does, both times, and why."""
    return row["path"], _decimal(row["dense_ms"]), _decimal(row["structured_ms"]), row["reason"]


@dataclass(frozen=True)
class Report:
    """The facts about one compression, as data; `print` it, or `save` it as .html, .json or .txt.

    `layers` has one row per compressed layer: `layer`, `structure`, `dense` and `stored` numbers, `relative_error` of
    the weight, `loss` in the metric of the fit, `svd_error` of plain truncated SVD with at most as many numbers (the
    control), and the relative distance to the group matrices, None where the structure has no group,
    `distance_before`, `distance_compressed` and `distance_tuned`; after `gm.equivariance` also
    `displacement_rank` and `generator_displacement_rank`; after `gm.freeze` the `path` taken, `dense_ms` and
    `structured_ms` where they were measured, and the `reason`.
    `blocks` has one row per block whose layers were refitted together: `block`, its relative squared error on held-out
    data `before` and `after`, and the `rate` of Adam, 0 where it was left as it was. `accuracy` maps "dense",
    "compressed", "tuned" and "frozen" to top-1 accuracies in percent where they were measured; `history` has one row
    per epoch of fine-tuning.
    """

    model: str
    plan: Plan
    before: Metrics
    after: Metrics
    layers: tuple[Mapping[str, Any], ...]
    blocks: tuple[Mapping[str, Any], ...] = ()
    accuracy: Mapping[str, float] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The one line that matters."""
        kept = percent(self.after.parameters, self.before.parameters)
        parts = [
            f"{self.model}: {self.before.parameters:,} → {self.after.parameters:,} parameters ({kept})",
            self._replaced(),
        ]
        if self.before.latency_ms and self.after.latency_ms:
            parts.append(f"latency ×{self.after.latency_ms / self.before.latency_ms:.2f}")
        if "dense" in self.accuracy:
            last = "tuned" if "tuned" in self.accuracy else "compressed"
            if last in self.accuracy:
                parts.append(f"accuracy {self.accuracy['dense']:.2f} → {self.accuracy[last]:.2f} %")
        elif not self.history and self.plan.layers:
            parts.append("not fine-tuned: expect the outputs to have changed")
        return "; ".join(parts)

    def _replaced(self) -> str:
        """How many layers have got what."""
        if self.plan.optimum is None:
            return f"{len(self.plan.layers)} of {len(self.plan.sites)} layers with {self.plan.group}"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.plan.kinds().items())
        return f"{len(self.plan.layers)} of {len(self.plan.sites)} layers replaced" + (f": {kinds}" if kinds else "")

    def savings(self) -> list[tuple[str, str, str, str]]:
        """Rows (what, before, after, share kept) of everything that was measured."""
        rows = []
        for what, label in (("parameters", "parameters"), ("bytes", "bytes"), ("macs", "multiply-adds")):
            old, new = getattr(self.before, what), getattr(self.after, what)
            if old is not None and new is not None:
                rows.append((label, f"{old:,}", f"{new:,}", percent(new, old)))
        old, new = self.before, self.after
        if old.latency_ms is not None and new.latency_ms is not None:
            shown = [f"{each.latency_ms:.2f} ± {each.latency_spread_ms:.2f}" for each in (old, new)]
            rows.append(("latency, ms", shown[0], shown[1], percent(new.latency_ms, old.latency_ms)))
        for what, value in self.accuracy.items():
            if what != "dense" and "dense" in self.accuracy:
                dense = self.accuracy["dense"]
                rows.append((f"accuracy {what}, %", f"{dense:.2f}", f"{value:.2f}", f"{value - dense:+.2f} points"))
        return rows

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, *, width: int | None = None) -> str:
        """The report as text of so many columns, by default those of the terminal, or 140 where there is none."""
        parts = [self.summary]
        parts += [table_text(*each, width=width) for each in self._tables()]
        return "\n\n".join(parts)

    def _tables(self) -> Iterator[tuple[str, list[str], Sequence[Sequence[str]]]]:
        """Title, columns and rows of everything that there is to show."""
        yield "What was saved", ["", "before#", "after#", "kept#"], self.savings()
        if self.layers:
            columns = ["layer", "structure", "dense#", "stored#", "error#", "SVD#", "d before#", "d after#"]
            title = "Compressed layers (errors and distances relative to the weight)"
            yield title, columns, [_layer_cells(row) for row in self.layers]
        if self.blocks:
            blocks = [(row["block"], f"{row['before']:.4f}", f"{row['after']:.4f}") for row in self.blocks]
            title = "Blocks refitted together (relative squared error on held-out data)"
            yield title, ["block", "before#", "after#"], blocks
        timed = [(row["layer"] or "(root)", *_frozen_cells(row)) for row in self.layers if "path" in row]
        if timed:
            title = "Frozen layers (milliseconds of the dense and of the fast product on these inputs)"
            yield title, ["layer", "path", "dense#", "fast#", "because"], timed
        if self.plan.skipped:
            skipped = [(name or "(root)", reason) for name, reason in self.plan.skipped.items()]
            yield "Left dense", ["layer", "because"], skipped

    def to_json(self) -> str:
        """The report as JSON; `Report.from_json` reads it back."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """A report from its JSON.

        Raises:
            GMError: it is not the JSON of a report.
        """
        found = parse_json(text, "a report")
        names = [each.name for each in fields(cls)]
        if not isinstance(found, dict) or set(found) != set(names):
            raise GMError(f"a report is an object with the fields {', '.join(names)}")
        _check_kinds(
            found,
            {"model": str, "layers": list, "blocks": list, "accuracy": dict, "history": list, "settings": dict},
            "it",
        )
        for row in found["layers"]:
            _check_kinds(row, LAYER, "a layer")
        for row in found["blocks"]:
            _check_kinds(row, BLOCK, "a block")
        for row in found["history"]:
            _check_kinds(row, {}, "an epoch")
        _check_kinds(found["accuracy"], dict.fromkeys(found["accuracy"], float), "accuracy")
        for each in ("before", "after"):
            kinds = get_type_hints(Metrics)
            _check_kinds(found[each], kinds, each)
            if (found[each]["latency_ms"] is None) != (found[each]["latency_spread_ms"] is None):
                raise GMError(f"in a report, {each} has a latency without its spread, or a spread alone")
            found[each] = Metrics(**{name: found[each][name] for name in kinds})
        found |= {
            "layers": tuple(found["layers"]),
            "blocks": tuple(found["blocks"]),
            "history": tuple(found["history"]),
        }
        return cls(**found | {"plan": Plan.from_dict(found["plan"])})

    def to_html(self) -> str:
        """The report as one self-contained page."""
        return render_html(asdict(self) | {"summary": self.summary, "savings": self.savings()})

    def save(self, path: str | Path) -> None:
        """Write the report: one self-contained page for .html, data for .json, text for .txt.

        Raises:
            GMError: another suffix, or the file cannot be written.
        """
        path = usable(path)
        writers: dict[str, Callable[[], str]] = {".html": self.to_html, ".json": self.to_json}
        writers[".txt"] = partial(self.to_text, width=WIDTH)  # whatever the terminal
        if path.suffix not in writers:
            raise GMError(f"a report is saved as {', '.join(writers)}, not as {path.name!r}")
        write_text(path, writers[path.suffix]() + "\n")


@dataclass(frozen=True)
class Result:
    """A compressed model with the plan it was made by and the report on it.

    `teacher` is the dense model, from which `tune` distils; None where it was compressed in place. `inputs` are the
    example inputs that were given.
    """

    model: nn.Module
    plan: Plan
    report: Report
    teacher: nn.Module | None = None
    inputs: Inputs | None = None

    def __str__(self) -> str:
        return self.report.summary

    def __repr__(self) -> str:
        return f"Result({self.report.summary})"
