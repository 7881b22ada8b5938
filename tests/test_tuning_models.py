"""Fine-tuning of all kinds of models: what they take, what they return, and what a copy of them leaves out."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import assert_close, must_fail
from torch import nn
from torch.nn.utils import prune

import gmcompress as gm
from gmcompress.tuning import Recipe, distillation_loss, fine_tune

RECIPE = Recipe(epochs=1)


class Body(nn.Module):
    """Two layers and a head of so many outputs."""

    def __init__(self, outputs=3):
        super().__init__()
        self.body, self.more, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, outputs)

    def forward(self, x):
        return self.head(torch.tanh(self.more(torch.tanh(self.body(x)))))


class Two(Body):
    def forward(self, x, y):
        return super().forward(x + y)


class Named(Body):
    def forward(self, x):
        return {"aux": None, "out": super().forward(x)}


class Shifts(Body):
    """Has a loss of its own, of every place against the label of the next one, and knows no other labels."""

    def forward(self, x, labels=None):
        logits = super().forward(x)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


class Closing(Body):
    """A function of its own holds a part of it."""

    def __init__(self):
        super().__init__()
        self.part = lambda x, more=self.more: more(x)

    def forward(self, x):
        return self.head(self.part(torch.tanh(self.body(x))))


class Pruned(Body):
    def __init__(self):
        super().__init__()
        prune.random_unstructured(self.more, "weight", 0.5)


class Scripted(Body):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scripts are deprecated
            self.more = torch.jit.script(self.more)


def compressed(model):
    return gm.compress(model.eval(), "C4", rank=1)


def batches(count=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 8, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("cls", [Closing, Pruned, Scripted])
def test_what_is_tuned_is_a_copy(cls, ema):
    torch.manual_seed(0)
    model = cls()
    result = gm.compress(model, "C4", rank=1, data=batches(1))
    before = {key: each.clone() for key, each in result.model.state_dict().items()}
    tuned = gm.tune(result, batches(), epochs=1, lr=0.1, ema=ema).model
    for each in (model, result.model):
        assert all(part.grad is None for part in each.parameters())
    for key, each in result.model.state_dict().items():
        assert torch.equal(each, before[key]), key
        if not key.endswith("mask"):
            assert not torch.equal(tuned.state_dict()[key], before[key]), key
    assert all(part.is_leaf and part.requires_grad for part in tuned.parameters())


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("labelled", [False, True])
def test_networks_without_classes_come_nearer_to_their_teachers(outputs, labelled):
    torch.manual_seed(0)
    model = nn.Sequential(Body(outputs), nn.Unflatten(1, (1, outputs, 1)))  # no classifier runs last
    small = compressed(model[0]).model
    data = batches(8)
    with torch.no_grad():
        loader = [(x, model(x)) for x in data] if labelled else data
        error = [float((small(x) - model[0](x)).square().mean()) for x in data]
    student = nn.Sequential(small, model[1])
    tuned = gm.tune(student, loader, teacher=None if labelled else model, epochs=6, lr=0.01, features=None)
    with torch.no_grad():
        assert sum(float((tuned(x) - model(x)).square().mean()) for x in data) < 0.5 * sum(error)


def test_batches_are_those_that_compress_takes():
    torch.manual_seed(0)
    labels = torch.zeros(16, dtype=torch.int64)
    pair = [((x, 2 * x), labels) for x in batches()]
    assert gm.tune(gm.compress(Two().eval(), "C4", rank=1, data=pair), pair, epochs=1).report.history
    named = [({"x": x, "y": x}, labels) for x in batches()]
    fine_tune(Two(), named, RECIPE)
    fine_tune(Named(), batches(), RECIPE, teacher=Named())
    with pytest.raises(
        gm.GMError, match=r"Two does not run in evaluation mode on a batch of shape \(16, 8\): TypeError"
    ):
        fine_tune(Two(), batches(), RECIPE, teacher=Two())
    with pytest.raises(gm.GMError, match="a batch is"):
        fine_tune(Body(), [(batches()[0], labels, labels)], RECIPE)


def test_a_loss_that_a_model_has_itself_is_its_task():
    torch.manual_seed(0)
    model, x = Shifts(), torch.randn(2, 5, 8)
    labels = torch.randint(0, 3, (2, 5))
    alone = fine_tune(model, [{"x": x, "labels": labels}], Recipe(epochs=1, lr=1e-6))[1][0]["loss"]
    assert_close(torch.tensor(alone), model(x, labels).loss.detach())
    taught = fine_tune(model, [{"x": x, "labels": labels}], Recipe(epochs=1, lr=1e-6), teacher=model)[1][0]["loss"]
    assert_close(torch.tensor(taught), torch.tensor(0.1 * alone))


def test_the_loss_of_single_and_other_outputs(generator):
    found, wanted = torch.randn(6, 1, generator=generator), torch.randn(6, 1, generator=generator)
    square = (found - wanted).square().mean() / wanted.var(correction=0)
    assert_close(distillation_loss(found, None, wanted[:, 0], RECIPE), square)
    assert_close(distillation_loss(found, wanted, None, RECIPE), 0.9 * square)
    assert_close(distillation_loss(found.flatten(), wanted.flatten(), None, RECIPE), 0.9 * square)
    yes = torch.tensor([0, 1, 1, 0, 1, 0])
    binary = F.binary_cross_entropy_with_logits(found[:, 0], yes.float())
    assert_close(distillation_loss(found, None, yes, RECIPE), binary)
    logits, mixed = torch.randn(2, 5, 3, generator=generator).unbind()
    shares = mixed.softmax(-1)
    expected = -(shares * logits.log_softmax(-1)).sum(-1).mean()
    assert_close(distillation_loss(logits, None, shares, RECIPE), expected)
    images = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    shifted = images[0] + 1  # which changes the probability of no class
    must_fail(
        assert_close,
        *(distillation_loss(each, images[1], None, RECIPE, logits=False) for each in (*images[:1], shifted)),
    )
    assert distillation_loss(images[0], shifted, None, RECIPE, logits=False) > 0.1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3, 0]), "do not fit outputs of 3 classes"),
        (torch.ones(3, 3).long(), "labels of one number for each output are of floating point"),
        (torch.rand(3), r"labels of shape \(3,\) do not fit outputs of shape \(3, 3\)"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, message):
    with pytest.raises(gm.GMError, match=message):
        fine_tune(Body(), [(torch.randn(3, 8), labels)], RECIPE)
    with pytest.raises(gm.GMError, match="are 0 and 1, or of floating point"):
        fine_tune(Body(1), [(torch.randn(3, 8), torch.tensor([0, 3, 0]))], RECIPE)


def test_classes_that_are_ruled_out_are_no_trouble():
    class Masked(Body):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.tensor([True, False, False]), float("-inf"))

    torch.manual_seed(0)
    result = compressed(Masked())
    tuned = gm.tune(result, batches(), epochs=1, lr=1e-3)
    assert all(each.isfinite().all() for each in tuned.model.parameters())


def test_blocks_of_equal_outputs_and_weights_that_are_lost():
    torch.manual_seed(0)
    dead = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    for each in dead[1].parameters():
        nn.init.zeros_(each)
    tuned = gm.tune(compressed(dead), batches(), epochs=1, lr=1e-4)
    assert all(each.isfinite().all() for each in tuned.model.parameters())

    class Steep(Body):
        def forward(self, x):
            return super().forward(x) + (self.head.weight - self.head.weight.detach()).square().sum().sqrt()

    with pytest.raises(gm.GMError, match=r"'body.weight' is not finite after epoch 0"):
        fine_tune(Steep(), batches(1), Recipe(epochs=1, lr=1e-3), teacher=Body())


def test_sparse_gradients_are_trained_as_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 8, sparse=True), nn.Linear(8, 8), nn.Linear(8, 3))
    result = gm.compress(model, "C4", rank=1)
    tuned = gm.tune(result, [torch.arange(16).view(4, 4)], epochs=1, lr=1e-2).model
    assert not torch.equal(tuned[0].weight, model[0].weight)


def test_a_batch_that_is_too_small_for_training_is_told_so():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    result = gm.compress(model, "C4", rank=1, inputs=torch.randn(4, 8))
    with pytest.raises(gm.GMError, match=r"does not run in training mode on a batch of shape \(1, 8\)"):
        gm.tune(result, [torch.randn(1, 8)], epochs=1, lr=1e-3)
