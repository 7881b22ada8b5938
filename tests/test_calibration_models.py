"""Calibration on models of unusual habits: changes in place, lists of images, vmap, and gradients refused."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close, must_fail
from torch import Generator, Tensor, nn

import gmcompress as gm
from gmcompress.calibration import output_gradients
from gmcompress.moments import collect
from gmcompress.sensitivity import sensitivities


@pytest.mark.parametrize("shared", [False, True])
def test_inputs_that_are_changed_in_place_later(shared: bool, generator: Generator) -> None:
    class Adds(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last, self.in_place = nn.Linear(8, 8), nn.Linear(8, 3), in_place

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(x)
            more = self.first(x)
            x = x.add_(more) if self.in_place else x + more
            return self.last(x)

    x = torch.randn(40, 8, generator=generator)
    dense, twin = (Adds(in_place).eval() for in_place in (True, False))
    small, other = (dense, twin) if shared else (Adds(True).eval(), Adds(False).eval())
    found, wanted = collect(dense, small, ["first", "last"], [x]), collect(twin, other, ["first", "last"], [x])
    assert all(torch.equal(found[name].cross, wanted[name].cross) for name in ("first", "last"))
    must_fail(assert_close, found["first"].inputs, found["last"].inputs)


def test_a_list_of_images_calibrates(generator: Generator) -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

        def forward(self, images: list[Tensor]) -> list[Tensor]:
            return [self.head(self.body(self.stem(each)).mean((1, 2))) for each in images]

    data = [([torch.randn(3, 9, size, generator=generator) for size in (8, 6)], [{}, {}]) for _ in range(3)]
    result = gm.compress(Detector(), "C4", data=data, budget="80%")
    assert len(result.model(data[0][0])) == 2
    assert gm.freeze(result, repeats=1).report.after.inputs == "[[(3, 9, 8), (3, 9, 6)]]"


def test_layers_inside_of_vmap(generator: Generator) -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            parameters, buffers = torch.func.stack_module_state(list(self.nets))

            def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
                return torch.func.functional_call(self.nets[0], (parameters, buffers), (x,))

            return self.head(torch.vmap(one)(parameters, buffers).mean(0))

    x = torch.randn(40, 8, generator=generator)
    result = gm.compress(Ensemble(), "C4", data=[x], rank=1)
    assert torch.isfinite(result.model(x)).all()


def test_layers_that_run_on_single_vectors(generator: Generator) -> None:
    class Hyper(nn.Module):
        """The weights of two layers follow from a code for each."""

        def __init__(self) -> None:
            super().__init__()
            self.codes, self.made, self.head = nn.Parameter(torch.randn(2, 8)), nn.Linear(8, 64), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            for code in self.codes:
                x = torch.tanh(x @ self.made(code).view(8, 8))
            return self.head(x)

    model, x = Hyper().eval(), torch.randn(40, 8, generator=generator)
    found = output_gradients(model, [x], ["made", "head"], logits=True)
    assert {name: each.moment.shape[0] for name, each in found.items()} == {"made": 64, "head": 4}
    assert "made" in gm.compress(model, "C4", data=[x], budget="75%", effort=0.1).plan.layers


def test_a_part_that_runs_without_gradients_hides_nothing_of_the_others(generator: Generator) -> None:
    class Transfer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.still, self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = torch.tanh(self.still(x))
            return self.head(torch.tanh(self.body(x)))

    model, x = Transfer().eval(), torch.randn(40, 8, generator=generator)
    assert set(output_gradients(model, [x], ["still", "body", "head"], logits=True)) == {"body", "head"}
    assert set(sensitivities(model, [x], ["still", "body"], logits=True)) == {"body"}


def test_a_model_that_lets_no_gradients_through(generator: Generator) -> None:
    class Closed(nn.Sequential):
        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    x = torch.randn(40, 8, generator=generator)
    assert gm.compress(Closed(nn.Linear(8, 8), nn.Linear(8, 3)), "C4", data=[x], budget="75%").plan.layers


@pytest.mark.parametrize("problem", [AssertionError, TypeError, NotImplementedError])
def test_a_model_that_refuses_gradients_in_evaluation(problem: type[Exception], generator: Generator) -> None:
    class Refuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            for each in self.blocks:
                x = torch.tanh(each(x))
                if x.requires_grad:
                    x.register_hook(self.fail)
            return self.head(x)

        def fail(self, _gradient: Tensor) -> None:
            raise problem("train it in training mode")

    x = torch.randn(400, 8, generator=generator)
    result = gm.compress(Refuses(), "C4", data=[x], budget="75%")
    assert result.plan.layers
