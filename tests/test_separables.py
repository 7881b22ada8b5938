"""Whole models with separable kernels: the nearest ones, what is left and why; and compression beside GroupConv."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from conftest import assert_close, must_fail
from torch import Tensor, nn

import gmcompress as gm
from gmcompress.separables import like_told
from gmcompress.structure import KINDS, Separable

TRAINED: dict[str, Any] = {
    "channels": (8, 16),
    "radius": 2,
    "strides": ("C4xC4", None),
    "pool": "max",
    "head": "flatten",
}


def network(**options: Any) -> gm.GMCNN:
    """On C8xC8 and then C4xC4, with a linear layer on top."""
    torch.manual_seed(0)
    return gm.GMCNN("C8xC8", 4, 32, **(TRAINED | options)).eval()


def images() -> Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_every_layer_has_the_nearest_kernel(kind: str) -> None:
    model = network(rank=int(kind != "gseparable"))  # with whose taps the filters of a residual would outgrow it
    before = copy.deepcopy(model.state_dict())
    small, rows = gm.separate_layers(model, kind)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    changed = [row for row in rows if row["kind"]]
    assert changed
    for row in rows:
        old, new = model.get_submodule(row["layer"]), small.get_submodule(row["layer"])
        wanted = old.separated(kind) if row["kind"] else old
        for name, each in wanted.state_dict().items():
            assert_close(new.state_dict()[name], each)
        assert (row["kind"] == kind and row["stored"] < row["dense"]) or row["reason"]
        wrong = (new.double().weight - old.double().weight).norm() / old.full_kernel().norm() / _places(old)
        assert_close(row["relative_error"], float(wrong.detach()), slack=1e3)
        old.float(), new.float()
    kept = sum(each.numel() for each in model.parameters()) - sum(row["dense"] - row["stored"] for row in rows)
    assert sum(each.numel() for each in small.parameters()) == kept
    assert small(images()).shape == (3, 32)
    must_fail(assert_close, small(images()), model(images()))


def _places(layer: gm.GroupConv) -> float:
    """How often every entry of the kernel is in the weight, the root of it."""
    return len(layer.stencil.members) ** 0.5


def test_separable_kernels_stay_what_they_are() -> None:
    model = network(radius=None).double()
    small, rows = gm.separate_layers(model, "gseparable", include="features.4")
    assert rows[0]["reason"] == "not included"
    assert 0 < rows[1]["relative_error"] < 0.9
    for layer in (model.features[0], model.features[4]):
        exact = gm.separate(
            layer.full_kernel().detach().unflatten(2, (-1, 8 if layer is model.features[0] else 4)), "gseparable"
        )
        with torch.no_grad():
            layer.kernel.copy_(torch.einsum("koix,koih->oixh", exact["outer"], exact["inner"]).flatten(2))
    small, rows = gm.separate_layers(model, "gseparable")
    assert [row["kind"] for row in rows] == ["gseparable"] * 2
    assert all(row["relative_error"] < 1e-7 for row in rows)
    assert_close(small(images().double()), model(images().double()), slack=10)


def test_what_is_left_says_why() -> None:
    model = network()
    for each in model.features[0].parameters():
        each.requires_grad_(False)
    small, rows = gm.separate_layers(model, "separable", exclude="features.4")
    assert [row["reason"] for row in rows] == ["", "excluded"]
    assert not any(each.requires_grad for each in small.features[0].parameters())
    again, rows = gm.separate_layers(small, "separable", include=gm.GroupConv)
    assert [row["reason"] for row in rows] == ["it is separable already", ""]
    with pytest.raises(gm.GMError, match=r"features\.0: it is separable already; features\.4: it is separable already"):
        gm.separate_layers(again, "separable")
    hooked = network()
    hooked.features[0].register_forward_hook(lambda *_: None)
    assert "hooks of its own" in gm.separate_layers(hooked, "separable")[1][0]["reason"]
    tied = nn.Sequential(gm.GroupConv("D4", 8, 8), gm.GroupConv("D4", 8, 8), gm.GroupConv("D4", 8, 8))
    tied[1].kernel = tied[0].kernel
    reasons = [row["reason"] for row in gm.separate_layers(tied, "separable")[1]]
    assert reasons == ["another module holds its parameters too"] * 2 + [""]
    with pytest.raises(gm.GMError, match=r"separable with 9 terms would store [\d,]+ numbers"):
        gm.separate_layers(model, "separable", terms=9)
    with pytest.raises(gm.GMError, match="names no two factors"):
        gm.separate_layers(gm.GroupConv("C5", 8, 8), "separable")
    with pytest.raises(gm.GMError, match="has no GroupConv"):
        gm.separate_layers(nn.Linear(2, 2), "separable")
    with pytest.raises(gm.GMError, match="matches no layer"):
        gm.separate_layers(model, "separable", include="features.7")


def test_saved_loaded_and_tuned(tmp_path) -> None:
    """On the model as it was before, and on one that is separable already."""
    frozen = network()
    frozen.features[0].requires_grad_(False)
    small, _ = gm.separate_layers(frozen, "separable", terms=2, exclude="features.4")
    gm.save(small, tmp_path / "small", inputs=images())
    other_kind, _ = gm.separate_layers(network(), "dseparable", exclude="features.4")
    for ready in (frozen, network(), other_kind, small):
        loaded = gm.load(tmp_path / "small", ready)
        assert repr(loaded.features) == repr(small.features) != repr(frozen.features)
        assert_close(loaded(images()), small(images()))
        asked = [each.requires_grad for each in loaded.features[0].parameters()]
        assert asked == [ready not in (frozen, small)] * len(asked)
    for other in (network(radius=1), network(channels=(8, 8)), nn.Linear(2, 2)):
        with pytest.raises(gm.GMError, match="was saved from another model"):
            gm.load(tmp_path / "small", other)
    loader = [(images(), torch.zeros(3, dtype=torch.int64))]
    tuned = gm.tune(small, loader, teacher=network(), epochs=1, lr=0.01)
    assert not torch.equal(tuned.features[4].kernel, small.features[4].kernel)
    assert torch.equal(tuned.features[0].outer, small.features[0].outer), "frozen"


def test_factors_and_compressed_layers_beside_them_come_back(tmp_path) -> None:
    """Given as subgroups, by name or by what generates them, in a model that is compressed too."""
    model = nn.Sequential(gm.GroupConv("D4", 2, 8), gm.GroupConv("C2xC4", 8, 8), nn.Flatten(), nn.Linear(64, 64)).eval()
    for kind, factors in (("separable", ([2], [1])), ("gseparable", ("C2xC1", "C1xC4"))):
        small, _ = gm.separate_layers(model, kind, factors=factors, include="0" if kind == "separable" else "1")
        small = gm.compress(small, "C4", rank=1, include="3").model
        x = torch.randn(2, 2, 8)
        gm.save(small, tmp_path / "small", inputs=x)
        loaded = gm.load(tmp_path / "small", model)
        assert_close(loaded(x), small(x))
        assert repr(loaded[3]) == repr(small[3])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("C4", "not readable as JSON"),
        ("[]", "with the fields kind, terms and factors"),
        ('{"kind": "separable", "terms": 1}', "with the fields"),
        ('{"kind": "separable", "terms": 1, "factors": [1, 2]}', "each a text or elements"),
        ('{"kind": "separable", "terms": 1, "factors": ["C4"]}', "factors are two subgroups"),
        ('{"kind": "separable", "terms": 0, "factors": null}', "terms is an integer"),
        ('{"kind": "separabel", "terms": 1, "factors": null}', "no kind of separable kernel"),
        ('{"kind": [], "terms": 1, "factors": null}', "no kind of separable kernel"),
    ],
)
def test_what_a_file_says_of_a_kernel_is_checked(text: str, said: str) -> None:
    with pytest.raises(gm.GMError, match=said):
        like_told(gm.GroupConv("D4", 8, 8), text)


@pytest.mark.parametrize("separated", [False, True])
@pytest.mark.parametrize("how", [{"group": "C4", "rank": 0}, {"budget": "60%"}], ids=str)
def test_a_model_of_group_convolutions_is_compressed(how: dict[str, Any], separated: bool, tmp_path) -> None:
    """Their kernels are matrices as others are; what is separable already is left, and says so."""
    model = network(channels=(8, 16))
    if separated:
        model, _ = gm.separate_layers(model, "separable")
    result = gm.compress(model, inputs=images(), **how, include="last")
    names = ["last"] if separated else ["features.0.kernel", "features.4.kernel", "last"]
    assert {*result.plan.layers} <= {*names}
    assert result.plan.layers
    assert not separated or all("has a structure already" in each for each in result.plan.skipped.values())
    if "group" in how:
        assert [*result.plan.layers] == names
    assert result.report.after.parameters == sum(each.numel() for each in result.model.parameters())
    dense = gm.densify(result.model)
    assert type(dense.features[0]) is gm.GroupConv
    assert_close(dense(images()), result.model(images()), slack=10)
    signals = images().flatten(2)
    moved = gm.equivariance_error(result.model.features, "C8xC8", signals, stride="C4xC4")
    assert moved["error"] < 1e-5, "whatever the kernels are"
    gm.save(result, tmp_path / "small")
    assert_close(gm.load(tmp_path / "small", model)(images()), result.model(images()))


@pytest.mark.parametrize("options", [{"radius": None}, {"radius": 2}, {"radius": None, "group": "C5"}], ids=str)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_plan_finds_separable_kernels(kind: str, options: dict[str, Any], tmp_path) -> None:
    """Such a kernel costs its tensors alone, whether its taps fill their grid or not, or the group has factors."""
    options = {"group": "C4xC4"} | options
    torch.manual_seed(0)
    model = nn.Sequential(gm.GroupConv(in_channels=6, out_channels=8, **options), nn.ReLU()).double()
    terms = 1 if kind != "dgseparable" else 2
    planted = Separable(kind, terms).on(model[0].tap_grid)
    with torch.no_grad():
        tensors = {name: torch.randn(each).double() for name, each in planted.shapes(model[0].kernel.shape).items()}
        model[0].kernel.copy_(planted.weight(tensors, model[0].kernel.shape))
    dense, stored = model[0].kernel.numel(), sum(each.numel() for each in tensors.values())
    if stored >= dense:
        return  # as where one of two factors is trivial
    budget = {"params": stored + 8}  # and the bias
    signal = torch.randn(3, 6, model[0].group.order, dtype=torch.float64)
    result = gm.compress(model, budget=budget, inputs=signal)
    (row,) = result.report.layers
    found = Separable.parse(row["structure"])
    assert found is not None
    assert row["stored"] <= stored
    assert row["relative_error"] < (1e-6 if planted.grid is None or planted.grid.places is None else 0.05)
    assert result.plan.kinds() == {found.kind: 1}
    gm.save(result, tmp_path / "small", inputs=signal)
    assert_close(gm.load(tmp_path / "small", model)(signal), result.model(signal))


def test_a_structure_is_written_without_the_grid() -> None:
    """The layer knows it; a plan writes it down, so that it stands for itself."""
    model = network(radius=None)
    plan = gm.plan(model, rank=0, group="C4", overrides={"features.*": "separable:1", "last": None}, inputs=images())
    assert plan.layers == {"features.0.kernel": "separable:1:8x8", "features.4.kernel": "separable:1:4x4"}
    assert gm.Plan.from_json(plan.to_json()) == plan
    known = plan.to_dict()
    for site in known["sites"]:
        del site["taps"]
    again = gm.Plan.from_dict(known)
    assert again.layers == plan.layers, "plans of before, when sites did not say how taps lie"
    assert plan.edit({"features.4.kernel": "dgseparable:3"}).layers["features.4.kernel"] == "dgseparable:3:4x4"
    ball = gm.plan(network(), rank=0, group="C4", overrides={"last": None, "*": "gseparable:1"}, inputs=images())
    assert ball.layers["features.4.kernel"] == "gseparable:1:4x4<0-5,7-8,12-13,15>"

    result = gm.compress(model, plan=plan, inputs=images())
    like, _ = gm.separate_layers(model, "separable")
    assert_close(result.model(images()), like(images()), slack=10)
    loader = [(images(), torch.zeros(3, dtype=torch.int64))]
    tuned = gm.tune(result, loader, epochs=1, lr=0.01, weight_decay=0.1)
    names = [name for name, _ in tuned.model.named_parameters() if name.startswith("features.4.structured_kernel")]
    assert [each.rpartition(".")[2] for each in names] == ["outer", "inner"]
    for name in names:
        assert not torch.equal(tuned.model.get_parameter(name), result.model.get_parameter(name))
    calibrated = gm.compress(model, data=loader, overrides={"features.*": "dseparable:2"}, budget="50%")
    assert calibrated.plan.layers["features.4.kernel"] == "dseparable:2"
    gm.freeze(calibrated, "auto", inputs=images())


def test_kernels_of_images_are_separable_too(tmp_path) -> None:
    """On request: the two subgroups are the shifts down and across."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.Conv2d(16, 8, (3, 5))).eval()
    x = torch.randn(2, 3, 9, 9)
    overrides = {"0": "separable:1", "2": "dgseparable:2", "3": "dseparable:3"}
    result = gm.compress(model, rank=0, group="C2", overrides=overrides, include="0", inputs=x)
    assert result.plan.layers == overrides
    assert [row["relative_error"] < 0.95 for row in result.report.layers] == [True] * 3
    assert_close(gm.densify(result.model)(x), result.model(x), slack=10)
    gm.save(result, tmp_path / "small")
    assert_close(gm.load(tmp_path / "small", model)(x), result.model(x))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("separable:2", "is for kernels"),
        ("separable:0", "terms are an integer from 1"),
        ("separable:2+lowrank:1", "take no residual beside them"),
        ("separable:2:3", "is no grid of taps"),
        ("separable:2:3x0", "is no grid of taps"),
        ("separable:2:9999999x9999999", "is no grid of taps"),
        ("separable:2:3x3<>", "is no grid of taps"),
        ("separable:2:3x3<1,1>", "names a place twice"),
        ("separable:2:3x3<0-8,0-8>", "names a place twice"),
        ("separable:2:3x3<3-1>", "no place or range of places"),
        ("separable:2:3x3<1--3>", "no place or range of places"),
        ("separable:2:3x3<9>", "no place or range of places below 9"),
        ("nonseparable:2", "unknown group|is no group|no group"),
    ],
)
def test_malformed_separable_structures(text: str, said: str) -> None:
    with pytest.raises(gm.GMError, match=said):
        gm.Structure.parse(text).shapes((4, 4))


def test_separable_structures_fit_their_taps_alone() -> None:
    assert str(gm.Structure.parse("separable:2:3x3<0-2,3-8>")) == "separable:2:3x3"
    for text, shape in (
        ("separable:2", (4, 4, 9)),
        ("separable:2:3x3", (4, 4, 8)),
        ("separable:1:3x3<1,2>", (4, 4, 3)),
    ):
        with pytest.raises(gm.GMError, match=r"needs two axes of taps|\d taps, but the weight"):
            gm.Structure.parse(text).shapes(shape)
    with pytest.raises(gm.GMError, match="takes no residual beside it"):
        gm.Structure.parse("separable:2", rank=1)
    with pytest.raises(gm.GMError, match="takes no group"):
        dataclasses.replace(gm.Structure.parse("C4"), separable=Separable("separable", 1))
