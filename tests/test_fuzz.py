"""Strings at the doors: a GMError is all that comes out, in bounded time; nothing is written or imported."""

import warnings

import pytest
import torch
import zoo
from doors import door, fuzz
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import gmcompress as gm
from gmcompress.budgets import parse_budget
from gmcompress.cli import main
from gmcompress.files import usable
from gmcompress.rules import matching
from gmcompress.runs.settings import Settings, read_budget, read_yaml, write_yaml
from gmcompress.structure import Structure

# ---------------------------------------------------------------------------------------------------------------------
# Strings

NASTY = ["", "\x00", "\ud800", "é×²", "９", "C" + "9" * 5000, "x" * 2000, "1 2", "-1", "nan", "[/x]", "%s{}", "\n"]
PIECES = ["C2", "C4", "D4", "S3", "A4", "Q8", "C1", "C4096", "x", "^", "^12", ":", "(", ")", "[", "]", "[1]", "[G,G]"]
PIECES += [
    "[G/<1>,G]",
    "G",
    ",",
    "<(0 1),(0 1 2)>",
    "<",
    ">",
    "(0 1)",
    "0",
    "7",
    " ",
    "/",
    "grid3x3",
    "fixed2",
    "+",
    ":",
]
PIECES += [
    "displacement:1",
    "lowrank:2",
    "adapted:2:2x2",
    "separable:2",
    "dgseparable:1:3x3",
    "<0-3,6>",
    ":split",
    "999999",
    "%",
    "=",
    "params",
    "25",
    ".",
    "1e9",
    *NASTY,
]
texts = st.one_of(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.text(max_size=20))


@fuzz
@example("(((((C1^12)^12)^12)^12)^12)^12")  # 12^6 factors
@example("(" * 31 + "C1" + ")^12" * 31)
@example("C1" + "xC1" * 5000)
@example("C4096:C4096[1]")  # 16 million entries of an action
@example("<" + ",".join(["(4095)"] * 9000) + ">")
@example("<" + ",".join(f"({2 * i} {2 * i + 1})(4095)" for i in range(13)) + ">")
@example("<(" + " ".join(map(str, range(4096))) + "),(0 1)>")
@example("C32xC32xC32xC32")
@example("C999999999")
@example("S20")
@example("(" * 60_000)
@example("C2^12")
@given(texts)
def test_group_strings(text):
    with door():
        found = gm.group(text)
        assert len(found.factors) <= 12
        assert gm.group(found.name) == found


@fuzz
@example("C4[G/<1 2>,G]")
@example("C4[G/<" + "9" * 5000 + ">,G]")
@example("C4096[fixed4096,fixed4096,fixed4096]")  # 512 GiB of labels
@example("C4096[G,G,fixed4096]")
@example("C2^12[G/<1,2,4,8>,G]")
@example("C4096[fixed4096,G]")  # orbits of 16 million pairs
@example("[" * 100_000)
@example("C4" + "[G,G]" * 10_000)
@example("+" * 131_072)
@example("C4" + "+lowrank:1" * 10_000)
@given(texts)
def test_structure_strings(text):
    for shape in ((8, 8), (4, 8, 3, 3), (4096, 4096)):
        with door():
            found = Structure.parse(text)
            found.shapes(shape)
            assert Structure.parse(str(found)) == found


numbers = st.one_of(
    st.integers(),
    st.floats(allow_subnormal=False),
    st.sampled_from([10**400, -(10**4000), 1 << 63, 5e-324, True, None]),
)
limits = st.one_of(numbers, texts, st.lists(texts, max_size=2), st.dictionaries(texts, numbers, max_size=2))


@fuzz
@given(st.one_of(limits, st.dictionaries(st.sampled_from(["params", "bytes", "macs"]), limits)))
def test_budgets(given):
    with door():
        for each in parse_budget(given):
            assert str(each)
            assert each.absolute(1000) >= 0
    with door():
        read_budget([given] if isinstance(given, str) else ["25%"])


def test_budgets_that_python_cannot_write():
    for budget in (10**5000, -(10**5000), {"bytes": 10**5000}, [10**5000], "9" * 10**7 + "%", {"x" * 10**6: 1}):
        with pytest.raises(gm.GMError):
            parse_budget(budget)


@pytest.mark.parametrize(
    "rule",
    [
        *("re:(a+)+b", "re:" + "a?" * 100 + "a" * 100 + "b", "re:(.*a){25}b", r"re:(a|aa)+\Zb"),  # exponential in time
        *("re:a{99999999999999999999}", "re:" + "(" * 999, "re:" + "(" * 10_000, "re:[", "re:\ud800", "re:x(?i)"),
        *("x" * 10**6, "*a" * 400 + "b", "[" * 900),
    ],
)
def test_rules(rule):
    model = nn.Sequential()
    model.add_module("a" * 100, nn.Linear(4, 4))
    sites = gm.trace(model)
    with door(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the syntax of expressions
        matching(rule, sites)


@fuzz
@given(st.one_of(texts, texts.map("re:{}".format)))
def test_rules_of_any_kind(rule):
    with door(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gm.plan(zoo.mlp(), "C4", rank=1, include=rule)


@pytest.mark.parametrize("rules", [{"include": 3}, {"exclude": [None]}, {"overrides": 3}, {"overrides": {3: "C4"}}])
def test_rules_of_other_types(rules):
    with pytest.raises(gm.GMError):
        gm.plan(zoo.mlp(), "C4", rank=1, **rules)
    with pytest.raises(gm.GMError, match="ties is a sequence"):
        gm.plan(zoo.mlp(), "C4", budget="50%", ties=3)


@pytest.mark.parametrize("given", ["a\0b", "\ud800", "x" * 5000, "/" + "y" * 300, None, 3])
def test_paths(given):
    for opens in (usable, gm.load, lambda path: gm.save(zoo.mlp(), path, inputs=torch.zeros(1, 8))):
        with pytest.raises(gm.GMError, match="path"):
            opens(given)


# ---------------------------------------------------------------------------------------------------------------------
# Settings and the command line

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = [
    "lr: " + "9" * 5000,
    "epochs: 0x" + "f" * 5000,
    'model: "\\U00110000"',
    "model: !!bool x",
    "model: !!timestamp x",
]
YAML += ["lr: !!int ''", "include: &a [x, *a]", "lr: &a [*a]", BOMB + "model: *i", BOMB + "include: *i", "[" * 3000]
YAML += ["model: !!python/object/apply:os.system ['true']", "model: !!python/name:os.system", "? [a]\n: c", "<<: 1"]
YAML += ["seed: 99999999999999999999", "lr: .nan", "minutes: .inf", "epochs: 1" + ":59" * 2000, "a: 1\n" * 10**6]
YAML += ["seed: -1", "model: " + "x" * 10**6, "model: *x", "---\na: 1\n---\nb: 2", "{a: " * 3000, "1: 2", "\x00"]


@fuzz
@given(st.dictionaries(st.sampled_from(list(Settings().flat())), st.one_of(limits, st.booleans()), max_size=3))
def test_settings(given):
    with door():
        chosen = Settings.read(given)
        assert Settings.read(chosen.flat()) == chosen
        chosen.recipe()
        chosen.compression()


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_yaml(text, tmp_path):
    (tmp_path / "given.yaml").write_text(text)
    with door():
        chosen = Settings.read(read_yaml(tmp_path / "given.yaml"))
        chosen.recipe()
        chosen.rules()
        write_yaml(tmp_path / "again.yaml", chosen)
        assert Settings.read(read_yaml(tmp_path / "again.yaml")) == chosen


@pytest.mark.parametrize("text", ["", "\udcff", "x" * 5000, "a\0b", "9" * 5000, "nan", "-1", "--", "%s", "[/x]"])
def test_the_command_line(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plan = ["plan", "--model", "test_vit", "--rank", "1"]
    for arguments in (
        *([text], ["groups", text], ["report", text], ["export", text, "--output", text], ["doctor", text + ":f"]),
        *(["plan", "-c", text], ["plan", "--model", text], [*plan, "--group", text], [*plan, "--exclude", text]),
        *([*plan, "--override", text], [*plan, "--model-kwargs", f"x={text}"], ["plan", "--rank", text]),
        *(["sweep", "--budgets", text], ["compress", "--plan", text, *plan[1:3]], ["train", "--resume", text]),
        *(["compress", "--output", text, *plan[1:3]], ["validate", "--compressed", text, "--device", text]),
    ):
        assert main(arguments) in (0, 1, 2)
        capsys.readouterr()
    assert not list(tmp_path.iterdir())
