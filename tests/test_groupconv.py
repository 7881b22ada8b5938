"""Laws of group convolution: its slow twin, equivariance under every subgroup, and the residuals that break it."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_close, must_fail
from market import GROUPS, slow_act, slow_subgroups
from torch import Generator, Tensor
from torch.autograd import gradcheck

from gmcompress import GMLinear, displacement_rank, distance, spectra
from gmcompress.errors import GMError
from gmcompress.groupconv import RESIDUALS, GroupConv
from gmcompress.groups import axes_of, ball, factor_generators, group, is_normal
from gmcompress.structure import KINDS, combine

SMALL = [name for name in GROUPS if group(name).order <= 12]
FACTORED = [name for name in SMALL if "x" in name or name[0] == "D" or (":" in name and "<" not in name)]


def filled(layer: GroupConv, generator: Generator) -> GroupConv:
    """The layer in float64 with every tensor random, the residuals too."""
    with torch.no_grad():
        for tensor in layer.double().parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return layer


def signal_on(layer: GroupConv, generator: Generator, *, batch: int = 2) -> Tensor:
    shape = (batch, layer.in_channels, layer.group.order)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def slow_forward(layer: GroupConv, signal: Tensor) -> Tensor:
    """y[o, h] = b_o + Σ_c Σ_u (k + Σ_k a_k(h) b_k)[o, c, u] x[c, h·u], entry by entry."""
    members, taps, table = layer.stencil.members.tolist(), layer.stencil.taps.tolist(), layer.group.table
    kernel = layer.full_kernel()
    found = signal.new_zeros(len(signal), layer.out_channels, len(members))
    for place, h in enumerate(members):
        rows = kernel
        if layer.rank:
            gates, filters = layer.full_residual()
            rows = kernel + sum(
                gates[:, k, place, None, None] * filters[:, k].reshape(kernel.shape) for k in range(layer.rank)
            )
        for number, u in enumerate(taps):
            found[:, :, place] += signal[:, :, int(table[h, u])] @ rows[:, :, number].T
    return found if layer.bias is None else found + layer.bias[:, None]


def assert_equivariant(layer: GroupConv, signal: Tensor, members: list[int]) -> None:
    """The layer commutes with the elements of a subgroup, which act on the output as a group of their own."""
    own, table = layer.out_group.table, layer.group.table
    expected = layer(signal)
    for number, g in enumerate(members):
        assert_close(layer(slow_act(table, g, signal)), slow_act(own, number, expected), slack=100)


# ------------------------------------------------------------------------------------------------------ what it does


@pytest.mark.parametrize("name", SMALL)
def test_is_its_slow_twin_and_equivariant_for_every_subgroup(name: str, generator: Generator) -> None:
    table = group(name).table
    for members in slow_subgroups(table):
        for radius in (None, 1):
            layer = filled(GroupConv(name, 2, 3, radius=radius, stride=members), generator)
            signal = signal_on(layer, generator)
            assert layer.out_group.order == len(members)
            with torch.no_grad():
                assert_close(layer(signal), slow_forward(layer, signal))
                assert_equivariant(layer, signal, members)


@pytest.mark.parametrize("name", ["C8", "S3", "C4xC2", "Q8", "D4"])
def test_the_wrong_subgroup_and_shuffled_labels_are_noticed(name: str, generator: Generator) -> None:
    table = group(name).table
    normal = [each for each in slow_subgroups(table) if 1 < len(each) < len(table) and is_normal(group(name), each)]
    layer = filled(GroupConv(name, 2, 3, stride=normal[0]), generator)
    signal = signal_on(layer, generator)
    outside = [0, *(g for g in range(len(table)) if g not in normal[0])][: len(normal[0])]
    must_fail(assert_equivariant, layer, signal, outside)
    whole = filled(GroupConv(name, 2, 3), generator)
    assert_equivariant(whole, signal, list(range(len(table))))
    shuffled = torch.randperm(len(table), generator=generator)
    renamed = lambda x: whole(x[..., shuffled])  # noqa: E731
    renamed.out_group, renamed.group = whole.out_group, whole.group  # type: ignore[attr-defined]
    must_fail(assert_equivariant, renamed, signal, list(range(len(table))))


WAYS = [
    ("C8xC8", "C4xC4", 2),
    ("C8xC8", "C1xC8", None),
    ("C8xC8", None, 1),
    ("C12", "C4", None),
    ("C12", None, 2),
    ("C2^3", "C2xC1xC2", 1),
    ("C4xC2^2", None, None),
    ("S4", "A4", 2),
    ("D8", [2], 3),
]


@pytest.mark.parametrize(("name", "stride", "radius"), WAYS, ids=str)
def test_every_way_to_multiply_gives_the_same(name: str, stride: Any, radius: int | None, generator: Generator) -> None:
    layer = filled(GroupConv(name, 2, 3, radius=radius, stride=stride, rank=1), generator)
    signal = signal_on(layer, generator)
    expected = slow_forward(layer, signal)
    methods = layer.stencil.costs(3, 2)
    assert len(methods) >= 2
    for method in methods:
        changed = copy.copy(layer)
        changed._buffers = layer._buffers | {"_main": torch.tensor(layer.stencil.table(method))}
        changed.methods = {"main": method}
        assert_close(changed(signal), expected, slack=10)
        must_fail(assert_close, changed(signal), expected + 1e-6)


@pytest.mark.parametrize("name", ["C4", "S3", "C4xC2", "C2xS3"])
def test_all_of_the_group_is_a_linear_layer_of_group_matrices(name: str, generator: Generator) -> None:
    n = group(name).order
    layer = filled(GroupConv(name, 2, 3, rank=2), generator)
    linear = GMLinear(2 * n, 3 * n, f"{name}+displacement:2", bias=False, dtype=torch.float64)
    linear.assign(layer.parts())
    signal = signal_on(layer, generator)
    layer.bias = None
    assert_close(layer(signal).flatten(1), linear(signal.flatten(1)))
    assert_close(layer.weight, linear.weight)
    assert displacement_rank(layer.weight, name) == 2
    assert layer.distance() == pytest.approx(distance(linear.weight, name))
    assert layer.distance(relative=True) == pytest.approx(distance(linear.weight, name, relative=True))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize(("name", "stride"), [("C4", None), ("D4", [2]), ("C4xC2", None)])
def test_residuals(name: str, stride: Any, residual: str, generator: Generator) -> None:
    layer = GroupConv(name, 2, 3, radius=1, stride=stride, rank=1, residual=residual).double()
    signal = signal_on(layer, generator)
    members = layer.stencil.members.tolist()
    assert_equivariant(layer, signal, members)
    assert layer.distance() == 0, "the residual is zero at the start"
    filled(layer, generator)
    assert_close(layer(signal), slow_forward(layer, signal))
    assert_close(
        layer(signal).flatten(1), signal.flatten(1) @ layer.weight.T + layer.bias.repeat_interleave(len(members))
    )
    must_fail(assert_equivariant, layer, signal, members)
    assert layer.distance(relative=True) > 0.01
    if stride is None:
        assert displacement_rank(layer.weight, name) == 1
        assert layer.distance() == pytest.approx(distance(layer.weight, name))


def test_a_row_is_free_at_one_position_and_a_diagonal_at_all(generator: Generator) -> None:
    row = filled(GroupConv("C6", 1, 1, rank=1, residual="row"), generator)
    pure = copy.deepcopy(row)
    pure.filters.data.zero_()
    apart = (row.weight - pure.weight).detach()
    assert (apart[0] != 0).all()
    assert not apart[1:].any()
    diagonal = filled(GroupConv("C6", 1, 1, rank=1, residual="diagonal"), generator)
    pure = copy.deepcopy(diagonal)
    pure.filters.data.zero_()
    apart = (diagonal.weight - pure.weight).detach()
    assert (apart.diagonal() != 0).all()
    assert_close(apart, torch.diag(apart.diagonal()))


# --------------------------------------------------------------------------------------------------------- separable


@pytest.mark.parametrize("inputs", [2, 40], ids=["by the kernel", "by its factors"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FACTORED)
def test_separable_layers_are_the_twin_of_their_kernel(name: str, kind: str, inputs: int, generator: Generator) -> None:
    radius = None if group(name).order < 8 else 1
    layer = filled(GroupConv(name, inputs, 3, radius=radius, separable=kind, terms=2, rank=1), generator)
    signal = signal_on(layer, generator)
    assert_close(layer(signal), slow_forward(layer, signal), slack=10)
    layer.filters.data.zero_()
    assert_equivariant(layer, signal, layer.stencil.members.tolist())


@pytest.mark.parametrize("kind", KINDS[1:])
def test_separable_layers_stride(kind: str, generator: Generator) -> None:
    for name, stride, radius in (("C8xC4", "C4xC2", 2), ("D4", [4], 2), ("C5:C4[2]", [1], 1)):
        for inputs in (2, 40):
            layer = filled(GroupConv(name, inputs, 3, radius=radius, stride=stride, separable=kind), generator)
            signal = signal_on(layer, generator)
            assert_close(layer(signal), slow_forward(layer, signal), slack=10)
            assert_equivariant(layer, signal, layer.stencil.members.tolist())


@pytest.mark.parametrize("kind", ["separable", "dseparable", "dgseparable"])
def test_separable_layers_multiply_by_their_kernel_where_that_costs_less(kind: str) -> None:
    few, many = (GroupConv("C8xC8", inputs, 32, radius=1, separable=kind).methods for inputs in (1, 256))
    assert set(few) == {"main"}
    assert set(many) == ({"outer"} if kind == "dseparable" else {"inner", "outer"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_separated_layers_are_the_nearest(kind: str, residual: str, generator: Generator) -> None:
    layer = filled(GroupConv("C4xC2", 3, 2, radius=1, rank=1, residual=residual), generator)
    errors = []
    for terms in (1, 2, 16):
        made = layer.separated(kind, terms=terms)
        apart = (made.weight - layer.weight).norm() / layer.full_kernel().norm()
        errors.append(apart.item())
    assert errors[0] >= errors[1] >= errors[2]
    if kind == "nonseparable":
        assert errors[0] < 1e-12
    else:
        assert errors[0] > 0.01
    if kind != "dgseparable":
        assert errors[2] < 1e-12, "many terms are exact"
    own = GroupConv("D4", 2, 2, separable=kind).double()
    again = own.separated(kind)
    assert_close(again.full_kernel(), own.full_kernel(), slack=1e6 if kind == "dgseparable" else 100)
    assert combine(dict(again.parts()), kind).flatten(2).shape == again.full_kernel().shape


def test_given_factors(generator: Generator) -> None:
    layer = filled(GroupConv("S3", 2, 2, separable="separable", factors=("A3", [2])), generator)
    signal = signal_on(layer, generator)
    assert_close(layer(signal), slow_forward(layer, signal))
    with pytest.raises(GMError, match="names no two factors"):
        GroupConv("S3", 2, 2, separable="separable")
    with pytest.raises(GMError, match="do not make up"):
        GroupConv("C4", 2, 2, separable="separable", factors=("C2", "C2"))


# ------------------------------------------------------------------------------------------------------- as a module


@pytest.mark.parametrize(
    "options",
    [
        {"radius": 1},
        {"radius": 1, "rank": 1, "stride": "C4xC2"},
        {"rank": 1, "residual": "row"},
        {"rank": 1, "residual": "diagonal"},
        {"separable": "separable"},
        {"separable": "dgseparable", "radius": 1, "bias": False},
    ],
    ids=str,
)
def test_gradients_shapes_and_copies(options: dict[str, Any], generator: Generator) -> None:
    layer = filled(GroupConv("C4xC2", 2, 2, **options), generator)
    signal = signal_on(layer, generator)
    names, tensors = zip(*layer.named_parameters(), strict=True)

    def function(x: Tensor, *given: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,))

    assert gradcheck(function, (signal.requires_grad_(), *tensors))
    shaped = layer(signal.unflatten(2, (4, 2)))
    assert shaped.shape[2:] == axes_of(layer.out_group)
    assert torch.equal(shaped.flatten(2), layer(signal))
    again = eval(repr(layer)).double()
    assert repr(again) == repr(layer)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(signal), layer(signal))
    assert set(layer.state_dict()) == set(names), "index arrays are not saved"
    assert layer.float()(signal.detach().float()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert not layer(signal.detach().float()).is_complex()


@pytest.mark.parametrize(("name", "radius"), [("C32xC32", 3), ("D32", 2), ("C2^6", 1), ("C64", None)])
def test_autocast_and_second_derivatives_in_every_method(name: str, radius: int | None, generator: Generator) -> None:
    layer = GroupConv(name, 2, 2, radius=radius)
    signal = signal_on(layer, generator).float().requires_grad_()
    exact = layer(signal)
    with torch.autocast("cpu", torch.bfloat16):
        rough = layer(signal)
    assert rough.dtype == torch.bfloat16
    assert ((rough - exact).norm() / exact.norm()).item() < 0.03
    [slope] = torch.autograd.grad(exact.square().sum(), signal, create_graph=True)
    slope.square().sum().backward()
    assert layer.kernel.grad is not None


@pytest.mark.parametrize(
    ("name", "stride", "method"),
    [("S3", [2], "taps"), ("C6", "C3", "fourier"), ("C3xC2", "C1xC2", "fourier"), ("C6", "C2", "circular")],
)
@pytest.mark.parametrize("kept", [0, spectra.KEPT])
def test_differentiable_twice(
    name: str, stride: Any, method: str, kept: int, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spectra, "KEPT", kept)  # whether the transform of the kernel is made again
    layer = filled(GroupConv(name, 1, 2, radius=1, stride=stride, bias=False), generator)
    layer.methods, layer._buffers["_main"] = {"main": method}, torch.tensor(layer.stencil.table(method))
    signal = signal_on(layer, generator, batch=1).requires_grad_()

    def function(x: Tensor, kernel: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"kernel": kernel}, (x,))

    assert gradcheck(function, (signal, layer.kernel))
    assert torch.autograd.gradgradcheck(function, (signal, layer.kernel))


@pytest.mark.parametrize(("name", "options"), [("D32", {"radius": 1}), ("C8xC8", {"rank": 1, "stride": "C4xC4"})])
def test_exports_and_vmaps(name: str, options: dict[str, Any], generator: Generator) -> None:
    layer = filled(GroupConv(name, 2, 3, **{"radius": 1} | options), generator).eval()
    signal = signal_on(layer, generator, batch=4)
    with torch.no_grad():
        program = torch.export.export(layer, (signal,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        assert_close(program.module()(signal[:3]), layer(signal[:3]))
        assert_close(torch.vmap(lambda x: layer(x[None])[0])(signal), layer(signal))
    slope = torch.func.jacrev(lambda x: layer(x[None])[0])(signal[0])
    assert_close(slope.flatten(0, 1).flatten(1), layer.weight)


def test_the_cost_formula_chooses() -> None:
    assert GroupConv("C32xC32", 120, 120, radius=3).methods == {"main": "fourier"}
    assert GroupConv("C32xC32", 3, 16, radius=2).methods == {"main": "circular"}
    assert GroupConv("D4", 4, 4).methods == {"main": "dense"}
    assert GroupConv("D1024", 16, 16, radius=1).methods == {"main": "taps"}


def test_the_ball_is_that_of_the_generators() -> None:
    assert factor_generators(group("C6xC2")) == (2, 1)
    layer = GroupConv("C8xC8", 1, 1, radius=2)
    assert layer.kernel.shape[2] == 13
    assert np.array_equal(layer.stencil.taps, ball(group("C8xC8"), 2))
    assert GroupConv("D4", 1, 1, radius=1, generators=[1]).kernel.shape[2] == 2


BAD: list[tuple[dict[str, Any], str]] = [
    ({"radius": -1}, "radius"),
    ({"radius": 1.5}, "radius"),
    ({"rank": -1}, "rank"),
    ({"rank": 5, "residual": "row"}, "rank at most 4"),
    ({"residual": "gates"}, "residual is one of"),
    ({"stride": "C3"}, "has no subgroup"),
    ({"stride": [7]}, "no element"),
    ({"stride": 2}, "a subgroup is a string"),
    ({"separable": "depthwise"}, "no kind"),
    ({"separable": "separable", "terms": 0}, "terms"),
    ({"generators": [9]}, "no element"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GMError, match=message):
        GroupConv("C4", 2, 2, **options)


def test_signals_of_other_shapes_are_refused() -> None:
    layer = GroupConv("C4xC2", 2, 2)
    for shape in ((2, 2, 4), (2, 3, 8), (2, 8), (2, 2, 2, 4), (2, 2, 8, 1)):
        with pytest.raises(GMError, match="has shape"):
            layer(torch.ones(shape))
    with pytest.raises(GMError, match="no residual"):
        layer.full_residual()
