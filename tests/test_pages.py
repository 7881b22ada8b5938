"""The page of a report: every number is a field of it, every name is harmless, and the page needs nothing else."""

import json
import re
import statistics
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from conftest import must_fail
from matplotlib._pylab_helpers import Gcf
from torch import nn

import gmcompress as gm
from gmcompress.pages import render_html, shown
from gmcompress.reporting import Report

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "$x_{$",
    "{{ 7 * 7 }}",
    "层",
    "a\nb",
    "]]>",
    "",
]


@pytest.fixture(scope="module")
def measured():
    """The data of a report on which everything was measured."""
    model = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 4)
    )
    inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    result = gm.tune(gm.compress(model, "C8xC8", inputs=inputs, rank=1), [inputs] * 2, epochs=2, lr=3e-4)
    data = data_of(result.report)
    for row, ranks in zip(data["layers"], gm.equivariance(result), strict=True):
        row |= {key: ranks[key] for key in ("displacement_rank", "generator_displacement_rank")}
    for row in data["history"]:
        row["top1"] = 61.25 + row["epoch"]
    data["accuracy"] = {"dense": 91.73, "compressed": 42.17, "tuned": 89.96}
    data["settings"] = {"lr": 0.0625, "nested": {"epochs": [3, 5]}, "note": "by hand"}
    return read_back(data)


@pytest.fixture(scope="module")
def bare():
    """The data of a report made without inputs, fine-tuning or settings."""
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    return data_of(gm.compress(model, "C8xC8", rank=1).report)


def data_of(report):
    return json.loads(report.to_json()) | {"summary": report.summary, "savings": report.savings()}


def read_back(data):
    fields = {key: value for key, value in data.items() if key not in ("summary", "savings")}
    return data_of(Report.from_json(json.dumps(fields)))


def many_layers(data, names):
    """The data with one layer per name, their errors and sizes all different."""
    first, count = data["layers"][0], len(names)
    layers = [
        first | {"layer": name, "dense": 4096 + at, "stored": 100 + at, "relative_error": 0.5, "svd_error": at / count}
        for at, name in enumerate(names)
    ]
    return data | {"layers": layers}


class Reader(HTMLParser):
    """Rows of tables, text outside of style sheets, attributes and ids of a page."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.text, self.attributes, self.tags, self.inside = [], [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = tag if tag in ("style", "td", "th") else self.inside
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data):
        if self.inside != "style":
            self.text.append(data)
        if self.inside in ("td", "th"):
            self.rows[-1][-1] += data


def text_of(page):
    return " ".join(" ".join(Reader(page).text).split())


def figures_of(page):
    """The figures, each of which has to be well-formed XML for this."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]


def assert_self_contained(page):
    reader = Reader(page)
    for name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert value.startswith("#"), f"{name}={value}"
        assert not name.startswith("on"), name
    assert not {"script", "link", "iframe", "img", "base"} & set(reader.tags)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    addresses = set(re.findall(r"https?://[^\"' <)]*", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def assert_ids_are_unique_and_found(page):
    ids = [value for name, value in Reader(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', page)) <= set(ids)


def test_every_layer_has_its_numbers(measured):
    rows = {row[1]: row for row in Reader(render_html(measured)).rows if len(row) == 13}
    head = rows.pop("layer")
    assert head[-2:] == ["displacement rank", "generator displacement rank"]
    assert len(rows) == len(measured["layers"]) == 3
    for row in measured["layers"]:
        errors = [f"{row[key]:.3f}" for key in ("relative_error", "svd_error", "distance_before")]
        distances = [f"{row[key]:.3f}" for key in ("distance_compressed", "distance_tuned")]
        sizes = [f"{row['dense']:,}", f"{row['stored']:,}", f"{100 * row['stored'] / row['dense']:.1f} %"]
        ranks = [str(row[key]) for key in ("displacement_rank", "generator_displacement_rank")]
        assert rows[row["layer"]][2:] == [row["structure"], *sizes, *errors, *distances, *ranks]


def test_big_numbers_tables_and_settings_are_fields(measured):
    page = render_html(measured)
    text, before, after = text_of(page), measured["before"], measured["after"]
    assert measured["summary"] in text
    for what in ("parameters", "bytes", "macs"):
        assert f"{before[what]:,} → {after[what]:,}" in text
    assert f"×{after['latency_ms'] / before['latency_ms']:.2f}" in text
    assert "91.73 → 89.96" in text
    assert "dense → fine-tuned: -1.77 points; 42.17 before fine-tuning" in text
    rows = Reader(page).rows
    for saving in measured["savings"]:
        assert list(saving) in rows
    assert ["threads", str(before["threads"]), str(after["threads"])] in rows
    assert ["example inputs", before["inputs"], after["inputs"]] in rows
    for pair in (["lr", "0.0625"], ["nested", '{"epochs": [3, 5]}'], ["note", "by hand"]):
        assert pair in rows
    for row in measured["history"]:
        assert [str(row["epoch"]), shown(row["loss"])] in [each[:2] for each in rows]


def test_every_layer_left_dense_has_its_reason(measured):
    rows = Reader(render_html(measured)).rows
    assert measured["plan"]["skipped"]
    for name, reason in measured["plan"]["skipped"].items():
        shape = next(site["shape"] for site in measured["plan"]["sites"] if site["name"] == name)
        assert [name, "×".join(map(str, shape)), f"{shape[0] * shape[1]:,}", reason] in rows


def test_every_number_follows_the_data(measured):
    """A number typed into the template would stay when the data change."""
    other = json.loads(json.dumps(measured))
    other["layers"][0] |= {"relative_error": 4321.0, "stored": 3210}
    other["after"]["parameters"] = 7654
    other["accuracy"]["tuned"] = 12.34
    page, old = text_of(render_html(other)), text_of(render_html(measured))
    for number in ("4,321.000", "3,210", "7,654", "12.34"):
        assert number in page
        assert number not in old


@pytest.mark.parametrize(
    ("new", "spread", "words"), [(9.0, 0.5, "slower"), (1.0, 0.5, "faster"), (5.2, 0.5, "no clear")]
)
def test_latency_is_worded_honestly(measured, new, spread, words):
    before = measured["before"] | {"latency_ms": 5.0, "latency_spread_ms": 0.1}
    after = measured["after"] | {"latency_ms": new, "latency_spread_ms": spread}
    text = text_of(render_html(measured | {"before": before, "after": after}))
    assert f"×{new / 5:.2f}" in text
    assert [each in text for each in ("slower than", "faster than", "no clear difference from")].count(True) == 1
    assert f"{words} " in text


def test_the_nearer_one_is_counted(measured):
    data = many_layers(measured, [f"layer{at}" for at in range(10)])
    wins = sum(row["relative_error"] < row["svd_error"] for row in data["layers"])
    losses = sum(row["relative_error"] > row["svd_error"] for row in data["layers"])
    assert (wins, losses) == (4, 5)
    data["layers"].append(data["layers"][0] | {"svd_error": None})
    text = text_of(render_html(data))
    assert "on 4 of 10 layers, plain SVD of the same size on 5; on 1 they are level. 1 could not be compared." in text


def test_figures_are_well_formed_and_name_the_layers(measured):
    figures = figures_of(render_html(measured))
    assert len(figures) == 4
    for figure in figures[:3]:
        words = [each.text for each in figure.iter(f"{SVG}text")]
        assert [each for each in words if each in ("0", "2", "4")][:3] == [row["layer"] for row in measured["layers"]]
    words = [each.text for each in figures[3].iter(f"{SVG}text")]
    assert {"loss", "top1", "epoch"} <= set(words)
    assert not {"lr", "seconds"} & set(words)


def test_distances_are_summed_up_by_their_median(measured):
    medians = {
        what: statistics.median(row[f"distance_{key}"] for row in measured["layers"])
        for what, key in (("dense", "before"), ("compressed", "compressed"), ("fine-tuned", "tuned"))
    }
    words = ", ".join(f"{value:.3f} {what}" for what, value in medians.items())
    assert f"Median over the layers: {words}." in text_of(render_html(measured))


def test_what_was_not_measured_says_so(bare):
    page = render_html(bare)
    text, rows = text_of(page), Reader(page).rows
    assert "multiply-adds vs dense not measured latency vs dense not measured accuracy in % not measured" in text
    assert ["latency in ms, median", "not measured", "not measured"] in rows
    assert len(figures_of(page)) == 3
    for absent in ("distance fine-tuned", "Fine-tuning", "Settings", "Generator displacement rank", "None", "nan"):
        assert absent not in text


def test_a_rank_that_is_not_defined_says_so(measured):
    first, *others = measured["layers"]
    page = render_html(measured | {"layers": [first | {"displacement_rank": None, "distance_tuned": None}, *others]})
    row = next(each for each in Reader(page).rows if len(each) == 13 and each[1] == first["layer"])
    assert row[-3:-1] == ["not measured", "not defined"]


def test_a_layer_without_a_group_has_no_distances(measured):
    first, *others = measured["layers"]
    group = [key for key in first if key.startswith("distance_") or key.endswith("displacement_rank")]
    alone = first | {"structure": "adapted:4:4x4"} | dict.fromkeys(group)
    page = render_html(measured | {"layers": [alone, *others]})
    rows = {each[1]: each for each in Reader(page).rows if len(each) == 13}
    assert rows[first["layer"]][-len(group) :] == ["–"] * len(group)
    assert all("–" not in rows[each["layer"]] for each in others), "the control"
    medians = statistics.median(row["distance_before"] for row in others)
    assert f"Median over the layers: {medians:.3f} dense" in text_of(page)
    page = render_html(measured | {"layers": [row | dict.fromkeys(group) for row in measured["layers"]]})
    assert len(figures_of(page)) == len(figures_of(render_html(measured))) - 1
    assert "distance before" not in text_of(page)


@pytest.mark.parametrize("accuracy", [{"dense": 50.0}, {"tuned": 50.0}, {"dense": 40.0, "compressed": 50.0}])
def test_any_accuracies_can_be_missing(bare, accuracy):
    assert "50.00" in text_of(render_html(bare | {"accuracy": accuracy}))


def test_numbers_that_are_not_finite_do_no_harm(measured):
    layers = [row | {"relative_error": float("nan"), "svd_error": float("inf")} for row in measured["layers"]]
    history = [{"epoch": 0, "loss": float("nan"), "lr": 0.1, "seconds": None}]
    page = render_html(measured | {"layers": layers, "history": history})
    assert len(figures_of(page)) == 3
    assert "3 could not be compared" in text_of(page)


def test_no_layers_at_all(bare):
    page = render_html(bare | {"layers": [], "plan": bare["plan"] | {"skipped": {}}})
    assert not figures_of(page)
    assert "No layer was compressed." in page


@pytest.mark.parametrize("count", [1, 5, 60, 200, 600])
def test_any_number_of_layers_fits(measured, count):
    names = [f"stages.{at // 10}.blocks.{at % 10}.mlp.token_mixer.fc{at}" for at in range(count)]
    page = render_html(many_layers(measured, names) | {"history": []})
    for figure in figures_of(page):
        _, _, width, height = map(float, figure.get("viewBox").split())
        assert width == 520
        assert height < 800
        labels = [each for each in figure.iter(f"{SVG}text") if each.text.startswith("stages")]
        places = sorted(float(each.get("y")) for each in labels)
        assert labels
        assert all(b - a > 10 for a, b in pairwise(places))  # the letters are 10 units high
        assert max(len(each.text) for each in labels) <= 32
    assert sum(row[1] in names for row in Reader(page).rows if len(row) == 13) == count


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_harmless_everywhere(measured, name):
    data = json.loads(json.dumps(measured))
    data["layers"][0] |= {"layer": name, "structure": name}
    data["plan"] |= {"group": name, "skipped": {name: name}}
    data |= {"model": name, "summary": name, "savings": [(name,) * 4], "settings": {name: name, "nested": [name]}}
    data["history"] = [{"epoch": 0, "loss": 0.5, name: 1.5}]
    page = render_html(data)
    assert_self_contained(page)
    assert len(figures_of(page)) == 4
    assert Reader(page).tags.count("h1") == 1
    seen = {"": "(root)", "a\nb": "a\\nb"}.get(name, name)
    assert [row[1] for row in Reader(page).rows if len(row) == 13][1] == seen
    assert seen in [unescape(each.text or "") for figure in figures_of(page)[:1] for each in figure.iter(f"{SVG}text")]


def test_the_page_needs_nothing_else(measured, bare):
    for data in (measured, bare):
        assert_self_contained(render_html(data))
        assert_ids_are_unique_and_found(render_html(data))


@pytest.mark.parametrize(
    "foreign",
    [
        '<img src="http://example.org/x.png">',
        '<link href="//example.org/x.css">',
        "<style>@import 'x.css';</style>",
        '<p style="background: url(x.png)">',
        "<script>1</script>",
        '<p onclick="x">',
    ],
)
def test_a_page_that_needs_something_else_is_seen(bare, foreign):
    must_fail(assert_self_contained, render_html(bare).replace("</main>", foreign + "</main>"))


def test_the_same_data_give_the_same_page(measured):
    """Whatever the user's settings of matplotlib; and those stay as they are."""
    page = render_html(measured)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert render_html(measured) == page
        assert matplotlib.rcParams["font.size"] == 30
    assert not Gcf.figs  # pyplot knows of no figure


def test_every_colour_of_a_figure_is_one_of_the_page(measured):
    page = render_html(measured)
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", svg)
        assert set(re.findall(r"var\((--\w+)\)", svg)) <= set(re.findall(r"^ +(--\w+):", page, flags=re.MULTILINE))


def test_a_report_saves_its_page(tmp_path):
    report = gm.compress(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)), "C8", include="*", rank=1
    ).report
    report.save(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
