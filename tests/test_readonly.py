"""Computed weights are read like any tensor, and what would be written into them and lost is refused."""

import copy
import io

import pytest
import torch
import zoo
from conftest import assert_close
from torch import nn
from torch.nn.utils import prune

import gmcompress as gm


def layers():
    """A layer that was replaced, one with a weight attached, and both frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    small = gm.compress(model, "C4", rank=1).model.eval()
    return [*small[:2], *gm.freeze(small, "dense")[:2]]


def iadd(weight):
    weight += 1


def data_iadd(weight):
    weight.data += 1  # as PEFT merges


def assign_data(weight):
    weight.data = torch.zeros(2)  # as transformers resizes


def assign_row(weight):
    weight[0] = 0


def zero_first_rows(weight):
    nn.init.zeros_(weight[:2])  # as a fused projection is initialised part by part


def zero_padding(weight):
    weight.data[0].zero_()  # as transformers does for the padding of an embedding


def scale_parts(weight):
    for part in weight.chunk(2):
        part *= 2


WRITES = [
    zero_first_rows,
    zero_padding,
    scale_parts,
    lambda weight: weight.T.mul_(2),
    lambda weight: next(iter(weight)).zero_(),
    lambda weight: weight.view(-1).fill_(0),
    iadd,
    data_iadd,
    assign_data,
    assign_row,
    nn.init.normal_,
    lambda weight: weight.data.copy_(torch.zeros_like(weight)),
    lambda weight: weight.detach().clamp_(-1, 1),
]


@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_what_would_be_lost_is_refused(write):
    for layer in layers():
        before = layer.weight.clone()
        with pytest.raises(gm.GMError, match=r"would be lost; gmcompress.densify\(model, \[its name\]\)"):
            write(layer.weight)
        assert torch.equal(layer.weight, before)
    write(nn.Linear(8, 8).weight)


def test_all_else_is_as_with_any_tensor():
    for layer in layers():
        weight = layer.weight
        for made in (weight.clone(), 2 * weight, nn.Parameter(weight).data, copy.deepcopy(weight.detach())):
            assert type(made) is torch.Tensor
            made.zero_()
        for made in (weight[[0, 1]], weight.T @ weight, weight.T.reshape(-1), weight.unsqueeze(0).sum(0)):
            assert type(made) is torch.Tensor  # memory of its own
            made.zero_()
        assert type(weight.unbind()) is tuple
        parameter = nn.Parameter(weight)
        assert (type(parameter), parameter.is_leaf) == (nn.Parameter, True)
        file = io.BytesIO()
        torch.save(weight.detach(), file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=True), weight)
        assert not isinstance(weight, nn.Parameter)
        assert torch.equal(weight.data, weight)


def test_a_view_of_a_weight_is_another_weight():
    for layer in layers():
        for other in (layer.weight.T, layer.weight[:4], layer.weight.flip(0)):
            with pytest.raises(gm.GMError, match="is computed and cannot be assigned"):
                layer.weight = other


def test_a_compiled_function_takes_one_that_was_handed_out():
    weight, x = layers()[1].weight.detach(), torch.randn(2, 8)
    for function in (nn.functional.linear, lambda x, weight: x @ weight.T + weight[0]):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert_close(compiled(x, weight), function(x, weight))


def test_tying_again_is_harmless_and_another_value_refused():
    model = zoo.MODELS["tied"].build()
    small = gm.compress(model, "C4", rank=1, include="*").model
    before = {name: id(each) for name, each in small.named_parameters(remove_duplicate=False)}
    small.head.weight = small.embedding.weight
    assert {name: id(each) for name, each in small.named_parameters(remove_duplicate=False)} == before
    assert small.head.structured_weight.same_as(small.embedding.structured_weight)
    other = nn.Linear(8, 16)
    for layer in (small.head, small.body):
        for value in (other.weight, other.weight.data, None, small.head.weight.clone()):
            with pytest.raises(gm.GMError, match="computed and cannot be assigned"):
                layer.weight = value
    for layer in (small.head, small.body):
        with pytest.raises(gm.GMError, match="cannot become the parameter 'weight_orig', as pruning needs it"):
            prune.l1_unstructured(layer, "weight", 0.5)
    dense = gm.densify(small, ["embedding"])
    dense.head.weight = dense.embedding.weight = nn.Parameter(torch.zeros(16, 8))
    assert not dense(torch.arange(4)).any()


def test_a_gradient_of_ones_own_is_refused():
    class Product(torch.autograd.Function):
        """Sets the gradient of a weight itself, as fused kernels do."""

        @staticmethod
        def forward(ctx, x, layer):
            ctx.layer = layer
            ctx.save_for_backward(x)
            return x @ layer.weight.T

        @staticmethod
        def backward(ctx, slope):
            weight, (x,) = ctx.layer.weight, ctx.saved_tensors
            weight.grad = slope.T @ x
            return slope @ weight, None

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(torch.relu(Product.apply(self.head.bias.sum() + x, self.body)))

    x = torch.randn(4, 8)
    result = gm.compress(Model().eval(), "C4", rank=1, inputs=x)
    with pytest.raises(gm.GMError, match=r"backward pass of Model fails: .* a gradient set on it would be lost"):
        gm.tune(result, [x], epochs=1, lr=1e-3)
    for layer in layers():
        weight = layer.weight
        weight.grad = None
        with pytest.raises(gm.GMError, match="gradient"):
            weight.grad = torch.ones_like(weight)
        parameter = nn.Parameter(weight)
        parameter.grad = torch.ones_like(parameter)
        assert parameter.grad is not None
