"""The figures of the page, drawn by matplotlib, as SVG in the colours of the page."""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup

from ..tables import percent
from .words import NOT_MEASURED, Row, drawable, drawable_column, short_name, shown

if TYPE_CHECKING:  # imported where it draws: it takes as long to import as half of torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, LEGEND, AXIS = 520.0, 30.0, 44.0  # of a figure, the strip above its axes and the one below; in SVG units
ROWS_HEIGHT, ROW = 640.0, 20.0  # of all rows of a figure together, and of one row, at most
LETTER = 6.1  # width of a letter of a layer's name in a figure
MARKERS = {"o": 1.1, "s": 0.95, "D": 0.75}  # and their sizes, so that one shows behind another
COLOURS = {  # of page and figures: by day, by night
    "page": ("#f6f7f9", "#101216"),
    "card": ("#ffffff", "#181b21"),
    "ink": ("#1b1f27", "#e7e9ee"),
    "quiet": ("#5d6675", "#9aa3b2"),
    "line": ("#dfe3e9", "#2d323c"),
    "dense": ("#bcc4d0", "#4d5666"),
    "ours": ("#1f66e5", "#6ea8ff"),
    "other": ("#d9730d", "#f2a14f"),
    "worse": ("#b45309", "#f0b057"),
}


class Drawing(NamedTuple):
    """A figure of the page with the words around it."""

    title: str
    svg: Markup
    words: Sequence[str]


def draw(layers: Sequence[Row], history: Sequence[Row]) -> list[Drawing]:
    """The figures for which there are numbers, in the colours of the day, each of which becomes a variable of CSS."""
    with _matplotlib():
        drawn = [_sizes(layers), _errors(layers), _distances(layers)] if layers else []
        drawings = [each for each in drawn if each is not None]
        curves = _curves(history) if history else None
    return [*drawings, curves] if curves else drawings


@contextmanager
def _matplotlib() -> Iterator[None]:
    """matplotlib with our settings in place of the user's; text stays text, and names of parts are reproducible."""
    import matplotlib.style

    ink, quiet, line = (COLOURS[name][0] for name in ("ink", "quiet", "line"))
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "gmcompress",
        "font.size": 11,
        "text.color": ink,
        "axes.edgecolor": line,
        "axes.labelcolor": quiet,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": quiet,
        "ytick.labelcolor": ink,
        "grid.color": line,
        "axes.grid.axis": "x",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    with matplotlib.style.context(["default", settings]), warnings.catch_warnings():
        # The browser chooses the fonts, so a letter that matplotlib's own font lacks is no loss.
        warnings.filterwarnings("ignore", "Glyph|Matplotlib currently does not support", UserWarning)
        yield


def _row_axes(layers: Sequence[Row]) -> tuple[Figure, Axes, float]:
    """A figure with one row per layer, in the order of the model, and the height of a row; many layers share names."""
    from matplotlib.figure import Figure

    names = [short_name(row["layer"]) for row in layers]
    row = min(ROW, ROWS_HEIGHT / len(names))
    step = math.ceil(13 / row)  # a name needs 13 units
    height = LEGEND + row * len(names) + AXIS
    left = 16 + LETTER * max(map(len, names))
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    axes = figure.add_axes((left / WIDTH, AXIS / height, (WIDTH - left - 14) / WIDTH, 1 - (AXIS + LEGEND) / height))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(0, len(names), step), names[::step], family="monospace", size=10, parse_math=False)
    axes.tick_params(axis="y", length=0 if step == 1 else 3)
    return figure, axes, row


def _legend(figure: Figure) -> None:
    lines, names = figure.axes[0].get_lines(), figure.axes[0].get_legend_handles_labels()[1]
    scale = 6.0 / lines[0].get_markersize() if lines else 1.0
    style = {"columnspacing": 1.4, "handletextpad": 0.5, "borderpad": 0.2, "markerscale": scale}
    figure.legend(loc="upper left", ncols=len(names), **style)


def _dots(axes: Axes, values: Sequence[float], label: str, marker: str, colour: str, row: float) -> None:
    axes.plot(
        values,
        range(len(values)),
        marker,
        label=label,
        color=COLOURS[colour][0],
        markersize=MARKERS[marker] * max(3.2, min(7.0, 0.6 * row)),
        markeredgewidth=0,
    )


def _sizes(layers: Sequence[Row]) -> Drawing:
    from matplotlib.ticker import EngFormatter

    dense, stored = ([max(each, 1.0) for each in drawable_column(layers, key)] for key in ("dense", "stored"))
    figure, axes, _ = _row_axes(layers)
    axes.barh(range(len(layers)), dense, 0.72, label="dense", color=COLOURS["dense"][0])
    axes.barh(range(len(layers)), stored, 0.36, label="stored now", color=COLOURS["ours"][0])
    axes.set_xscale("log")
    axes.set_xlim(10 ** math.floor(math.log10(0.9 * min(*stored, *dense))), 1.15 * max(*stored, *dense))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.minorticks_off()
    axes.set_xlabel("numbers in the weight (logarithmic)")
    _legend(figure)
    old, new = sum(row["dense"] for row in layers), sum(row["stored"] for row in layers)
    words = [
        f"Together the compressed layers held {old:,} numbers and now hold {new:,} ({percent(new, old)}).",
        *_naming(layers),
    ]
    return Drawing("Size of each layer", _embed(figure, "sizes", "Numbers per layer, dense and stored"), words)


def _naming(layers: Sequence[Row]) -> list[str]:
    step = math.ceil(13 / min(ROW, ROWS_HEIGHT / len(layers)))
    return [] if step == 1 else [f"One layer in {step} is named; the table below lists all, in the same order."]


def _errors(layers: Sequence[Row]) -> Drawing:
    ours, control = drawable_column(layers, "relative_error"), drawable_column(layers, "svd_error")
    figure, axes, row = _row_axes(layers)
    axes.hlines(range(len(layers)), ours, control, color=COLOURS["dense"][0], linewidth=min(2.0, 0.4 * row))
    _dots(axes, control, "plain SVD", "D", "other", row)
    _dots(axes, ours, "our structure", "o", "ours", row)
    _span(axes, [*ours, *control])
    axes.set_xlabel("relative error" + (" (the axis does not begin at 0)" if axes.get_xlim()[0] > 0 else ""))
    _legend(figure)
    return Drawing(
        "Error of each layer, before fine-tuning",
        _embed(figure, "errors", "Relative error per layer, of our structure and of plain SVD"),
        [_comparison(ours, control), "Further left is better. Plain SVD is the control: it stores no more numbers."],
    )


def _comparison(ours: Sequence[float], control: Sequence[float]) -> str:
    """Which one is nearer to the trained weights, in a sentence.

    >>> _comparison([0.5, 0.7], [0.6, 0.6])
    'Our structure is nearer to the trained weight on 1 of 2 layers, plain SVD of the same size on 1.'
    """
    pairs = [(a, b) for a, b in zip(ours, control, strict=True) if not (math.isnan(a) or math.isnan(b))]
    wins, losses = sum(a < b for a, b in pairs), sum(b < a for a, b in pairs)
    level = len(pairs) - wins - losses
    words = f"Our structure is nearer to the trained weight on {wins} of {len(pairs)} layers"
    words += f", plain SVD of the same size on {losses}" + (f"; on {level} they are level." if level else ".")
    missing = len(ours) - len(pairs)
    return words + (f" {missing} could not be compared." if missing else "")


def _span(axes: Axes, values: Iterable[float]) -> None:
    """Limits around the values, at least a tenth wide, so that no small difference is blown up; never below 0."""
    known = [each for each in values if not math.isnan(each)] or [0.0, 1.0]
    low, high = min(known), max(known)
    pad = max(0.08 * (high - low), (0.1 - (high - low)) / 2)
    axes.set_xlim(0.0 if low < 0.25 * high else low - pad, high + pad)


def _distances(layers: Sequence[Row]) -> Drawing | None:
    """Where the weights lie relative to the group matrices; None where no layer has a group part."""
    if all(row["distance_before"] is None for row in layers):
        return None
    figure, axes, row = _row_axes(layers)
    farthest, medians = 1.0, []
    for key, label, marker, colour in (
        ("distance_before", "dense", "s", "quiet"),
        ("distance_compressed", "compressed", "o", "ours"),
        ("distance_tuned", "fine-tuned", "D", "other"),
    ):
        values = drawable_column(layers, key)
        known = [each for each in values if not math.isnan(each)]
        if known:
            _dots(axes, values, label, marker, colour, row)
            farthest = max(farthest, *known)
            medians.append(f"{shown(statistics.median(known))} {label}")
    axes.set_xlim(-0.02, 1.04 * farthest)
    axes.set_xlabel("distance to the group matrices (0: is one)")
    _legend(figure)
    words = [f"Median over the layers: {', '.join(medians) or NOT_MEASURED}.", "Further left is nearer to the group."]
    title = "Distance to the group matrices"
    return Drawing(title, _embed(figure, "distances", f"{title}, per layer"), [*words, *_naming(layers)])


def _curves(history: Sequence[Row]) -> Drawing | None:
    """One panel per column of the history that holds numbers: the loss first, then what was evaluated."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    keys = dict.fromkeys(["loss", *(key for row in history for key in row)])
    names = [key for key in keys if key not in ("epoch", "lr", "seconds")]
    panels = {key: values for key in names if not all(map(math.isnan, values := drawable_column(history, key)))}
    if not panels:
        return None
    epochs = [drawable(row.get("epoch", number)) for number, row in enumerate(history)]
    size, left, height = 150.0, 58.0, 150.0 * len(panels) + AXIS - 10
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    for place, (name, values) in enumerate(panels.items(), 1):
        box = left, height - size * place + 14, WIDTH - left - 18, size - 40
        axes = figure.add_axes((box[0] / WIDTH, box[1] / height, box[2] / WIDTH, box[3] / height))
        colour = COLOURS["ours" if place == 1 else "other"][0]
        axes.plot(epochs, values, "o-" if len(values) <= 40 else "-", color=colour, markersize=4, linewidth=1.6)
        axes.set_title(name, loc="left", size=11, parse_math=False)
        axes.grid(True, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.tick_params(axis="x", labelbottom=place == len(panels))
    axes.set_xlabel("epoch")
    ends = ", ".join(f"{name} {shown(values[0])} → {shown(values[-1])}" for name, values in panels.items())
    svg = _embed(figure, "history", "Fine-tuning over the epochs")
    return Drawing("Fine-tuning, epoch by epoch", svg, [f"From the first epoch to the last: {ends}."])


def _embed(figure: Figure, prefix: str, label: str) -> Markup:
    """The figure as an SVG element: as wide as its place, with ids of its own and the colours of the page."""
    page = io.StringIO()
    figure.savefig(page, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = page.getvalue()
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head) + f' role="img" aria-label="{label}"'
    variables = {light: f"var(--{name})" for name, (light, _) in COLOURS.items()}

    def adapt(tag: re.Match[str]) -> str:  # tags alone: the text between them holds names of layers
        found = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", tag[0])
        found = re.sub(r"#[0-9a-f]{6}\b", lambda colour: variables.get(colour[0], colour[0]), found)
        found = re.sub(r"'DejaVu Sans Mono'[^;\"]*", "var(--mono)", found)
        return re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", found)

    return Markup(head + ">" + re.sub(r"<[^>]+>", adapt, rest))
