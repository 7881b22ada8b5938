"""The page itself: its big numbers, its tables, and the template that all is put into."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..tables import percent
from .figures import COLOURS, draw
from .words import NOT_MEASURED, Row, drawable, layer_name, shown

LABELS = {  # fields of Metrics whose names do not speak for themselves
    "macs": "multiply-adds, by formula over the layers",
    "counted_macs": "multiply-adds, as torch counts them",
    "latency_ms": "latency in ms, median",
    "latency_spread_ms": "latency in ms, distance between quartiles",
    "inputs": "example inputs",
}
COLUMNS = {  # numbers of one layer, and what is written above them
    "dense": "dense numbers",
    "stored": "stored numbers",
    "kept": "kept",
    "relative_error": "relative error",
    "svd_error": "plain SVD error",
    "distance_before": "distance before",
    "distance_compressed": "distance compressed",
    "distance_tuned": "distance fine-tuned",
    "displacement_rank": "displacement rank",
    "generator_displacement_rank": "generator displacement rank",
    "dense_ms": "dense product, ms",
    "structured_ms": "fast product, ms",
}


class Tile(NamedTuple):
    """One big number, what it is, a line below it, and whether it is worse than in the dense model."""

    label: str
    value: str
    note: str = ""
    worse: bool = False


def render_html(report: Mapping[str, Any]) -> str:
    """The page for the data of a Report: its fields as plain data, with its "summary" and "savings".

    The page needs no other file, no network and no script; the same data give the same page, letter by letter.
    """
    layers = report["layers"]
    columns = _layer_columns(layers)
    environment = Environment(
        loader=PackageLoader("gmcompress"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"shown": shown, "layer_name": layer_name}
    return environment.get_template("report.html.j2").render(
        report=report,
        colours=COLOURS,
        tiles=_tiles(report),
        figures=draw(layers, report["history"]),
        metrics=_metric_rows(report["before"], report["after"]),
        columns=columns,
        cells=[_layer_cells(number, row, columns) for number, row in enumerate(layers, 1)],
        skipped=_skipped_rows(report["plan"]),
        settings={key: _setting(value) for key, value in report["settings"].items()},
    )


def _setting(value: Any) -> str:
    """A setting as a configuration file would have it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _tiles(report: Mapping[str, Any]) -> list[Tile]:
    before, after = report["before"], report["after"]
    whats = (("parameters", "parameters kept"), ("bytes", "bytes kept"), ("macs", "multiply-adds vs dense"))
    tiles = [_share_tile(label, before[what], after[what]) for what, label in whats]
    return [*tiles, _latency_tile(before, after), _accuracy_tile(report["accuracy"])]


def _share_tile(label: str, old: int | None, new: int | None) -> Tile:
    if old is None or new is None:
        return Tile(label, NOT_MEASURED)
    words = "more than the dense model: " if new > old else ""
    return Tile(label, percent(new, old), f"{words}{old:,} → {new:,}", worse=new > old)


def _latency_tile(before: Row, after: Row) -> Tile:
    """The ratio of the latencies; one within the spread of the runs is called no clear difference."""
    old, new = before["latency_ms"], after["latency_ms"]
    if not old or new is None:
        return Tile("latency vs dense", NOT_MEASURED)
    noise = max(before["latency_spread_ms"] or 0.0, after["latency_spread_ms"] or 0.0)
    if abs(new - old) <= noise:
        words = "no clear difference from the dense model"
    else:
        words = "slower than the dense model" if new > old else "faster than the dense model"
    return Tile("latency vs dense", f"×{new / old:.2f}", f"{words}: {old:.2f} → {new:.2f} ms", worse=new - old > noise)


def _accuracy_tile(accuracy: Mapping[str, float]) -> Tile:
    dense, compressed, tuned = (accuracy.get(key) for key in ("dense", "compressed", "tuned"))
    last, what = (compressed, "compressed") if tuned is None else (tuned, "fine-tuned")
    if dense is None and last is None:
        return Tile("accuracy in %", NOT_MEASURED)
    if dense is None or last is None:
        only, value = ("dense", dense) if last is None else (what, last)
        return Tile("accuracy in %", f"{value:.2f}", f"{only} only")
    note = f"dense → {what}: {last - dense:+.2f} points"
    if tuned is not None and compressed is not None:
        note += f"; {compressed:.2f} before fine-tuning"
    return Tile("accuracy in %", f"{dense:.2f} → {last:.2f}", note, worse=last < dense)


def _metric_rows(before: Row, after: Row) -> list[tuple[str, str, str]]:
    return [(LABELS.get(name, name.replace("_", " ")), shown(before[name]), shown(after[name])) for name in before]


def _layer_columns(layers: Sequence[Row]) -> dict[str, str]:
    """The headings of the numeric columns of the table of layers; one that no layer has is left out."""
    return {
        key: heading
        for key, heading in COLUMNS.items()
        if key == "kept" or any(row.get(key) is not None for row in layers)
    }


def _layer_cells(number: int, row: Row, columns: Iterable[str]) -> dict[str, Any]:
    cells = {key: shown(row.get(key)) for key in columns} | {"kept": percent(row["stored"], row["dense"])}
    if row.get("distance_before", 0) is None:  # this layer has no group part
        cells |= {key: "–" for key in columns if key.startswith("distance_") or key.endswith("displacement_rank")}
    elif "displacement_rank" in columns and row.get("displacement_rank", 0) is None:
        cells["displacement_rank"] = "not defined"  # the rows of this layer are not the group itself
    ours, control = drawable(row.get("relative_error")), drawable(row.get("svd_error"))
    nearer = "relative_error" if ours < control else "svd_error" if control < ours else ""
    return {"number": number, "layer": row["layer"], "structure": row["structure"], "cells": cells, "nearer": nearer}


def _skipped_rows(plan: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(layer, shape, numbers, reason) of every layer left dense."""
    shapes = {site["name"]: site["shape"] for site in plan["sites"]}
    rows = []
    for name, reason in plan["skipped"].items():
        shape = shapes.get(name)
        size = ("–", "–") if shape is None else ("×".join(map(str, shape)), f"{math.prod(shape):,}")
        rows.append((name, *size, reason))
    return rows
