"""Tables: as wide as the terminal, else of one width, whatever prints itself."""

import io
import sys
from collections import OrderedDict

import pytest
from conftest import must_fail
from torch import nn

import gmcompress as gm
from gmcompress.tables import WIDTH, page_width


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    """A function that makes standard output a terminal of so many columns."""

    def make(columns):
        monkeypatch.setattr(sys, "stdout", Terminal())
        monkeypatch.setenv("COLUMNS", str(columns))

    return make


def longest(text):
    return max(len(line) for line in text.splitlines())


def assert_within(text, width):
    """As a table too wide for its page is: cells are folded, and the page is filled."""
    assert width - 8 < longest(text) <= width


def subjects():
    names = ("a_name_of_many_characters_" * 6, "head")
    model = nn.Sequential(OrderedDict(zip(names, (nn.Linear(16, 16), nn.Linear(16, 4)), strict=True)))
    return gm.plan(model, "C4", rank=1, include="*"), gm.compress(model, "C4", rank=1, include="*").report


@pytest.mark.parametrize("width", [60, 100, 180])
def test_what_prints_itself_is_as_wide_as_the_terminal(width, screen, monkeypatch):
    plan, report = subjects()
    report_table = "\n".join(str(report).splitlines()[1:])  # below the line that matters, which is never broken
    for text in (str(plan).rpartition("\n")[0], report_table):
        assert_within(text, WIDTH)
    screen(width)
    assert page_width() == width
    report_table = "\n".join(str(report).splitlines()[1:])
    for text in (str(plan).rpartition("\n")[0], report_table):
        assert_within(text, width)
        must_fail(assert_within, text, WIDTH)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert page_width() == WIDTH


def test_a_saved_report_is_as_wide_whoever_saves_it(screen, tmp_path):
    report = subjects()[1]
    report.save(tmp_path / "elsewhere.txt")
    screen(50)
    report.save(tmp_path / "here.txt")
    assert (tmp_path / "here.txt").read_text() == (tmp_path / "elsewhere.txt").read_text()
    assert str(report) != report.to_text(width=WIDTH)


def test_a_report_without_compressed_layers_has_no_table_of_them():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    title = "Compressed layers"
    assert title not in str(gm.compress(model, "C4", budget="100%").report)
    assert title in str(gm.compress(model, "C4", rank=0).report)
