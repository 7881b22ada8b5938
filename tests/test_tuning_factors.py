"""Factors in fine-tuning: balanced, decayed as the weight that they make, and annealed from the dense one."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import assert_close, must_fail
from torch import nn

import gmcompress as gm
from gmcompress.layers import GMLayer
from gmcompress.tuning import Recipe, fine_tune
from gmcompress.tuning.factors import DECAY_EVERY, Annealing, Decay, balance_, balance_parts_
from gmcompress.tuning.recipe import learning_rate

# ---------------------------------------------------------------------------------------------------------------------
# Decay


FACTORED = ["C4", "C1", "C4+displacement:2", "C4+lowrank:3", "C4+adapted:2:2x4", "adapted:3:4x2"]


def decayed(structure, kind=torch.optim.SGD, name="sgd"):
    """A layer with its optimizer and decay, the gradients zero."""
    torch.manual_seed(0)
    layer = gm.GMLinear(8, 8, structure)
    for part in layer.parts().values():
        nn.init.normal_(part)
        part.grad = torch.zeros_like(part)
    optimizer = kind(layer.parameters(), lr=0.1, weight_decay=0.01)
    return layer, optimizer, Decay(layer, optimizer, name=name, strength=0.01)


@pytest.mark.parametrize("structure", FACTORED)
def test_decay_is_that_of_the_dense_weight(structure):
    layer, optimizer, decay = decayed(structure)
    twin = copy.deepcopy(layer)
    (DECAY_EVERY * 0.01 / 2 * (twin.weight**2).sum()).backward()
    decay.apply_(DECAY_EVERY - 1, rate=0.1)
    assert not any(part.grad.any() for part in layer.parts().values())
    decay.apply_(DECAY_EVERY, rate=0.1)
    for key, part in layer.parts().items():
        assert_close(part.grad, twin.parts()[key].grad)
    if structure == "C4":  # every entry of the kernel stands in 4 places
        assert_close(layer.kernel.grad, DECAY_EVERY * 0.01 * 4 * layer.kernel)
    held = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    assert {held[id(part)] for part in layer.parts().values()} == {0.0}
    assert held[id(layer.bias)] == 0.01  # what timm leaves out, it leaves out before


@pytest.mark.parametrize("structure", FACTORED)
def test_decoupled_decay_shrinks_the_weight(structure):
    layer, _, decay = decayed(structure, kind=torch.optim.AdamW, name="adamw")
    before, norms = layer.weight.detach(), {key: part.norm() for key, part in layer.parts().items()}
    decay.apply_(1, rate=0.5)
    assert_close(layer.weight, (1 - 0.5 * 0.01) * before)
    assert all(part.norm() < norms[key] and not part.grad.any() for key, part in layer.parts().items())


def shrunk(recipe):
    """How far the structured weight shrinks where no gradient but that of the decay reaches it."""
    small = gm.compress(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), "C4", rank=1, residual="lowrank"
    ).model
    batches = [(torch.zeros(16, 8), torch.zeros(16, dtype=torch.int64))] * 16
    weight = fine_tune(small, batches, recipe)[0][0].weight.detach()
    return float(weight.norm() / small[0].weight.detach().norm())


def test_decay_in_a_training():
    """Beside the slow twin: the weight of a dense layer, step by step."""
    recipe = Recipe(epochs=2, lr=0.01, weight_decay=0.5, clip=None)
    expected = math.prod(1 - 0.5 * learning_rate(at, steps=32, peak=0.01, warmup=0.1) for at in range(32))
    assert expected < 0.95
    assert shrunk(replace(recipe, optimizer="adamw")) == pytest.approx(expected, rel=1e-4)
    coupled = replace(recipe, optimizer="momentum", momentum=0.0)
    assert shrunk(coupled) < expected  # an entry of the kernel stands in four places
    assert shrunk(replace(coupled, weight_decay=0.0)) == pytest.approx(1, abs=1e-6)


def test_decay_of_factors_is_another():
    dense = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    batches = [torch.ones(4, 8)] * 8
    for model, differ in ((dense, False), (gm.compress(dense, "C4", rank=1).model, True)):
        recipes = [Recipe(epochs=1, lr=0.01, weight_decay=0.1, decay=each) for each in ("weight", "factors")]
        one, two = (fine_tune(model, batches, each, teacher=dense)[0] for each in recipes)
        same = all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        assert same is not differ


# ---------------------------------------------------------------------------------------------------------------------
# Balance


def scaled(layer, left, right):
    for part in layer.parts().values():
        nn.init.normal_(part)
    layer.left.data *= left
    layer.right.data *= right
    return layer


BALANCED = [
    (lambda: gm.GMLinear(8, 12, "C4+lowrank:3"), (2, 8)),
    (lambda: gm.GMConv2d(8, 4, 3, "C4+displacement:1+lowrank:2", padding=1), (2, 8, 5, 5)),
    (lambda: gm.GMConv2d(8, 4, 3, "C4+lowrank:2:split", padding=1), (2, 8, 5, 5)),
    (lambda: gm.GMLinear(8, 12, "adapted:3:3x2"), (2, 8)),
    (lambda: gm.GMConv2d(8, 4, 3, "adapted:5:2x2:split", padding=1), (2, 8, 5, 5)),
]


def assert_balanced(layer):
    left, right = layer.left.detach().flatten(0, -2), layer.right.detach().flatten(1)
    for k in range(left.shape[1]):
        assert_close(left[:, k].norm(), right[k].norm())
        if layer.structure.grid is not None:
            assert_close(layer.scales.detach()[..., k].square().mean(), torch.tensor(1.0))


@pytest.mark.parametrize(("build", "shape"), BALANCED, ids=["linear", "convolution", "split", "adapted", "both"])
def test_balancing_changes_factors_and_no_function(build, shape, generator):
    layer, inputs = scaled(build(), 100.0, 0.01), torch.randn(shape, generator=generator)
    before = layer(inputs)
    must_fail(assert_balanced, layer)
    kept = copy.deepcopy(layer)
    balance_(nn.Sequential(layer))
    assert_balanced(layer)
    assert (layer(inputs) - before).abs().max() < 1e-6 * before.abs().max()
    if layer.structure.group is not None:
        assert torch.equal(layer.kernel, kept.kernel)
    kept.right.requires_grad_(False)
    frozen = copy.deepcopy(kept)
    balance_(frozen)
    assert torch.equal(frozen.left, kept.left)


def test_balancing_with_scales(generator):
    left, right, scales = (torch.randn(shape, generator=generator) for shape in [(6, 3), (3, 4), (2, 2, 3)])
    left[:, 2] = 0  # a component without a product stays as it is

    def product():
        return torch.einsum("pxk,pqk,kqy->pxqy", left.view(2, 3, 3), scales, right.view(3, 2, 2))

    before, kept = product(), right[2].clone()
    balance_parts_({"left": left, "right": right, "scales": scales})
    assert_close(product(), before)
    assert_close(scales[..., :2].square().mean((0, 1)), torch.ones(2))
    assert_close(left[:, :2].norm(dim=0), right[:2].norm(dim=1))
    assert torch.equal(right[2], kept)


# ---------------------------------------------------------------------------------------------------------------------
# Annealing


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="circular"),
        nn.Conv2d(8, 8, 3, padding="same", groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(72, 4),
    )


def test_annealing_goes_from_the_teacher_to_the_structured_layer(generator):
    teacher, inputs = convolutional(), torch.randn(2, 2, 7, 7, generator=generator)
    small = gm.compress(teacher, "C4", rank=0).model
    dense, structured = teacher(inputs), small(inputs)
    names = set(small.state_dict())
    annealing = Annealing(small, teacher, share=0.5)
    assert list(annealing.rests) == ["1", "2"]
    annealing.attach(small)
    for done, expected in [(0.0, dense), (0.5, structured), (1.0, structured)]:
        annealing.set(done)
        assert_close(small(inputs), expected)
    annealing.set(0.25)
    assert annealing.factor == pytest.approx(0.5)
    must_fail(assert_close, small(inputs), structured)
    assert set(small.state_dict()) == names
    annealing.remove()
    assert not any(each._forward_hooks for each in small.modules())
    assert torch.equal(small(inputs), structured)


@pytest.mark.parametrize("ema", [None, 0.5])
def test_annealing_in_a_training(ema, generator):
    teacher = nn.Linear(8, 8)
    small = gm.compress(teacher, "C4", rank=0).model
    inputs = torch.randn(16, 8, generator=generator)

    def gap(model):
        with torch.no_grad():
            return {"gap": float((model(inputs) - teacher(inputs)).norm())}

    recipe = Recipe(epochs=4, lr=1e-30, anneal=1.0, ema=ema)
    tuned, history = fine_tune(small, [inputs] * 3, recipe, teacher=teacher, evaluate=gap)
    whole = gap(small)["gap"]
    expected = [whole * (1 - math.cos(math.pi * done)) / 2 for done in (0.25, 0.5, 0.75, 1)]
    assert [row["gap"] for row in history] == pytest.approx(expected, rel=1e-4)
    assert isinstance(tuned, GMLayer)
    assert not tuned._forward_hooks
    assert set(tuned.state_dict()) == set(small.state_dict())
    assert gap(tuned)["gap"] == pytest.approx(whole, rel=1e-5)
