"""Planning: the largest quotient that fits, rules in their order, a reason for everything left dense."""

import itertools
import json
from math import prod

import pytest
import timm
import torch
import zoo
from torch import nn

import gmcompress as gm
from gmcompress.rules import matching
from gmcompress.surgery import trace


def net(*widths):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)), nn.Linear(widths[-1], 3))


@pytest.mark.parametrize(
    ("bound", "columns", "rows", "expected"),
    [
        ("C32xC32", 1024, 1024, "C32xC32"),
        ("C32xC32", 256, 512, "C16xC16"),
        ("C32xC32", 64, 64, "C8xC8"),
        ("C32xC32", 768, 192, "C8xC8"),
        ("C2^3", 4, 12, "C2xC2"),
        ("D4", 16, 8, "D4"),
        ("S4", 12, 12, "D3"),
        ("C7:C3[2]", 9, 6, "C3"),
    ],
)
def test_the_group_acts_through_its_largest_fitting_quotient(bound, columns, rows, expected):
    assert gm.plan(net(columns, rows), bound, rank=0).layers["0"] == expected


@pytest.mark.parametrize("name", zoo.MODELS)
def test_the_zoo_is_planned_and_nothing_is_silent(name):
    exhibit = zoo.MODELS[name]
    model = exhibit.build()
    for inputs in (None, exhibit.inputs()):
        made = gm.plan(model, "C4", inputs=inputs, rank=1)
        assert set(made.layers) == set(exhibit.compressed)
        assert {*made.layers, *made.skipped} == {site.name for site in made.sites}
        assert all(made.skipped.values())


def test_reasons():
    reasons = gm.plan(zoo.Convolutions(), "C4", rank=1).skipped
    assert "the stem" in reasons["stem"]
    assert "the classifier" in reasons["head"]
    assert "1 rows and 1 columns in each convolution group" in reasons["depthwise"]
    assert "7 rows and 16 columns admit no quotient of C4" in reasons["odd"]
    model = zoo.PassesParameter()
    model.places = nn.Parameter(torch.zeros(1, 5, 8))
    reasons = gm.plan(model, "C4", rank=1).skipped
    assert reasons["places"] == "places of PassesParameter is not known to be a matrix; gmcompress.register can say so"
    assert "token" not in reasons, "a vector, as a bias is"
    written = gm.plan(net(8, 16, 16), "C4", rank=2, overrides={"0": "C4+displacement:2"}).skipped["0"]
    assert written == "C4+displacement:2 would store 128 numbers, the dense layer 128"


@pytest.mark.parametrize("residual", ["displacement", "lowrank"])
def test_a_rank_too_large_for_a_layer_is_lowered_there(residual):
    """To the largest one with which the layer gets smaller, down to no residual at all."""
    linear = [nn.Linear(6, 6), nn.Linear(6, 24), nn.Linear(24, 24)]
    model = nn.Sequential(*linear, nn.Conv2d(24, 24, 3), nn.Conv2d(24, 6, 1))
    for rank in (1, 2, 5, 30):
        made = gm.plan(model, "C2xC4", rank=rank, residual=residual, include="*")
        assert not made.skipped
        for name, text in made.layers.items():
            shape, found = made.site(name).shape, gm.Structure.parse(text)
            split = residual == "lowrank" and shape[2:] == (3, 3)
            more = [found.with_rank(each, residual=residual, split=split) for each in range(1, rank + 1)]
            smaller = [each for each, of_rank in enumerate(more, 1) if of_rank.parameters(shape) < prod(shape)]
            assert getattr(found, residual) == max(smaller, default=0)
    of_each = {"displacement": ["C2", "C2", "C2xC4+displacement:5"]}
    of_each["lowrank"] = ["C2+lowrank:1", "C2+lowrank:2", "C2xC4+lowrank:10"]
    assert [made.layers[name] for name in "012"] == of_each[residual]


def test_stem_and_classifier_only_by_name():
    model = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(16, 8))
    assert list(gm.plan(model, "C4", rank=1).layers) == ["1"]
    assert list(gm.plan(model, "C4", include=["0", "3"], rank=1).layers) == ["0", "1", "3"]
    assert list(gm.plan(model, "C4", include=nn.Linear, rank=1).layers) == ["1", "3"]
    assert list(gm.plan(model, "C4", overrides={"0": "C8"}, rank=1).layers) == ["0", "1"]


def test_rules_in_their_order():
    model = net(16, 16, 16, 16)
    made = gm.plan(
        model,
        "C8",
        exclude="0",
        overrides={"re:[01]": "C4", "[12]": "C2+displacement:0", nn.Linear: None},
        rank=2,
    )
    assert made.layers == {"1": "C4+displacement:2", "2": "C2"}
    assert "excluded by '0'" in made.skipped["0"]
    assert made.skipped["3"] == "left dense by the override Linear"


def test_an_override_may_be_a_whole_structure():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 3))
    made = gm.plan(model, "C4", overrides={"1": "C4[G,G,grid3x3]+displacement:1", "0": "C4+lowrank:2"}, rank=1)
    assert made.layers == {"0": "C4+lowrank:2", "1": "C4[G,G,grid3x3]+displacement:1"}
    wrong = gm.plan(model, "C4", overrides={"1": "C4[G,G,grid5x5]", "0": "C4"}, rank=1)
    assert "acts on 25 taps" in wrong.skipped["1"]


def test_a_structure_without_a_group_is_taken_as_written():
    """No quotient is sought, no residual is added, and the widths need fit no group."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 14), nn.Linear(14, 6), nn.Conv2d(8, 10, 3))
    texts = {"0": "lowrank:2", "1": "adapted:2:2x3", "2": "adapted:1:4x2", "3": "lowrank:3:split"}
    made = gm.plan(model, "C4", rank=1, overrides=texts, include="*")
    assert made.layers == {name: text for name, text in texts.items() if name != "2"}
    assert "rows divisible by 4" in made.skipped["2"]
    assert made.stored("1") == 2 * (12 + 14 + 2 * 3)
    assert gm.Plan.from_json(made.to_json()) == made
    edited = made.edit({"0": "adapted:2:4x4", "2": "lowrank:1"})
    assert (edited.layers["0"], edited.layers["2"]) == ("adapted:2:4x4", "lowrank:1")
    with pytest.raises(gm.GMError, match="columns divisible by 5"):
        made.edit({"0": "adapted:1:2x5"})
    dense = gm.plan(model, "C4", overrides={"0": "adapted:6:2x2", "1": "lowrank:1"}, rank=1)
    assert "would store" in dense.skipped["0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "C4xY2"}, r"position 3: unknown group family 'Y'"),
        ({"group": "C1"}, "trivial group"),
        ({"rank": -1}, "rank must be an integer of at least 0, not -1"),
        ({"rank": 1.5}, "not 1.5"),
        ({"residual": "sparse"}, 'must be "displacement" or "lowrank", not \'sparse\''),
        ({"include": ["hed"]}, "the rule 'hed' matches no layer; the nearest are 'head"),
        ({"exclude": "re:(("}, "no regular expression"),
        ({"overrides": {"layer9.*": None}}, "matches no layer"),
        ({"overrides": {nn.LSTM: None}}, "'LSTM' matches no layer"),
        ({"exclude": [3]}, "a rule is a glob"),
        ({"group": "C5"}, "no layer can be compressed with C5: body: .*"),
    ],
)
def test_bad_arguments_are_named(options, message):
    arguments = {"group": "C4", "rank": 1, **options}
    with pytest.raises(gm.GMError, match=message):
        gm.plan(zoo.Unreachable(), **arguments)


def test_a_model_without_weights():
    with pytest.raises(gm.GMError, match="it holds no weight matrix"):
        gm.plan(nn.ReLU(), "C4", rank=1)


def test_counts_are_those_of_the_compressed_model():
    for name in ("mlp", "convolutions", "timm convnet", "tied"):
        model = zoo.MODELS[name].build()
        result = gm.compress(model, "C4", rank=1)
        assert result.plan.parameters == sum(each.numel() for each in result.model.parameters())
        assert result.plan.model_parameters == sum(each.numel() for each in model.parameters())


def test_json_round_trip_and_edit():
    made = gm.plan(timm.create_model("test_resnet"), "C8xC8", rank=1)
    assert gm.Plan.from_json(made.to_json()) == made
    name = next(iter(made.layers))
    edited = made.edit({name: "C2"})
    assert edited.layers[name] == "C2"
    assert made.layers[name] != "C2"
    assert "edit" in made.edit({name: None}).skipped[name]
    with pytest.raises(gm.GMError, match=r"no layer 'layer1\.0\.conv9'; the nearest are 'layer1\.0\.conv"):
        made.edit({"layer1.0.conv9": None})
    with pytest.raises(gm.GMError, match="needs rows divisible by 5"):
        made.edit({name: "C5"})


def damaged(change):
    found = json.loads(gm.plan(zoo.mlp(), "C4", rank=1).to_json())
    change(found)
    return json.dumps(found)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        damaged(lambda plan: plan.pop("layers")),
        damaged(lambda plan: plan.update(layers={"0": 3})),
        damaged(lambda plan: plan.update(layers={"nowhere": "C4"})),
        damaged(lambda plan: plan["layers"].update({"0": "C5"})),
        damaged(lambda plan: plan["sites"][0].update(shape=[0, 4])),
        damaged(lambda plan: plan["sites"][0].update(shape="8")),
        damaged(lambda plan: plan["sites"][0].update(conv_groups=0)),
        damaged(lambda plan: plan["sites"][0].pop("role")),
        damaged(lambda plan: plan.update(model_parameters=True)),
    ],
    ids=range(13),
)
def test_damaged_plans_are_refused(text):
    with pytest.raises(gm.GMError, match=r"plan|needs rows"):
        gm.Plan.from_json(text)


def test_matching_is_exact_about_types_and_whole_names():
    site = trace(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))[0]
    assert matching("0", [site]) == {site.name}
    with pytest.raises(gm.GMError, match="matches no layer"):
        matching("re:", [site])
    assert matching(nn.Linear, [site]) == {site.name}
    with pytest.raises(gm.GMError, match="'Module' matches no layer"):
        matching(nn.Module, [site])


def test_a_plan_prints_as_a_table():
    text = str(gm.plan(zoo.Convolutions(), "C4", rank=1))
    assert "C4+displacement:1" in text
    assert "16×8×3×3" in text
    assert "left dense unless include names it" in " ".join(text.split())
    assert f"2 of 6 layers compressed: {sum(p.numel() for p in zoo.Convolutions().parameters()):,}" in text


def test_the_dry_run_touches_no_weight():
    model = zoo.mlp()
    model[0].weight.data.fill_(float("nan"))
    assert gm.plan(model, "C4", rank=1).layers  # a NaN would stop a projection
    with pytest.raises(gm.GMError, match=r"layer '0'.*NaN"):
        gm.compress(model, "C4", rank=1)
    assert torch.isnan(model[0].weight).all()


def test_a_low_rank_splits_the_taps_of_spatial_kernels():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, (1, 3)))
    made = gm.plan(model, "C4", residual="lowrank", include="0", overrides={"0": "C4+lowrank:2", "2": "C8"}, rank=1)
    assert made.layers == {
        "0": "C4+lowrank:2",  # written out: taken as it stands
        "1": "C4+lowrank:1:split",
        "2": "C8+lowrank:1",
        "3": "C4+lowrank:1",
    }
    assert made.edit({"0": "C4+lowrank:1:split"}).layers["0"] == "C4+lowrank:1:split"
    with pytest.raises(gm.GMError, match="splits the taps"):
        gm.plan(net(16, 16), "C4", rank=1).edit({"0": "C4+lowrank:1:split"})
    result = gm.compress(model, plan=made, inputs=torch.randn(1, 16, 9, 9))
    assert result.model[1].left.shape == (16, 3, 1)
