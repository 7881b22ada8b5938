"""What models draw at random: the same in the dense and the compressed one, and never from the caller's streams."""

import random

import numpy as np
import torch
from conftest import assert_close, must_fail
from torch import nn

import gmcompress as gm
from gmcompress.calibration import outputs
from gmcompress.moments import collect


class Samples(nn.Module):
    """Draws what it decodes near the code of its inputs, as variational autoencoders do."""

    def __init__(self):
        super().__init__()
        self.code, self.body, self.head = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        mean, spread = self.code(x).chunk(2, -1)
        drawn = mean + spread.exp() * torch.randn_like(mean) * (0.5 + random.random()) * (0.5 + np.random.rand())
        return self.head(torch.tanh(self.body(drawn)))


def model_and_data():
    torch.manual_seed(0)
    return Samples().eval(), [torch.randn(20, 8)] * 2


def test_two_models_draw_the_same_and_two_batches_do_not():
    model, batches = model_and_data()
    first, second = outputs(model, batches), outputs(model, batches)
    for one, other in zip(first, second, strict=True):
        assert_close(one, other)
    must_fail(assert_close, *first)
    moments = collect(model, gm.densify(model), ["body"], batches, crossed=["body"])["body"]
    assert_close(moments.cross, moments.inputs)
    assert_close(moments.mean, moments.dense_mean)


def test_all_is_done_without_the_streams_of_the_caller():
    model, batches = model_and_data()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    result = gm.compress(model, "C4", budget="75%", data=batches, effort=0.1)
    assert {"code", "body"} & set(result.plan.layers)
    assert gm.doctor(model, batches[0], "C4").works
    gm.freeze(result)
    gm.measure(model, batches[0])
    gm.tune(result, batches, epochs=1, lr=1e-3, ema=0.9)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
