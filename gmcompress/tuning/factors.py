"""Weights that are products: their factors balanced, decayed as one weight, and joined by what they leave out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attaching import structured
from ..errors import GMError
from ..layers import GMConv2d, GMLayer, GMLinear, GMWeight
from ..surgery import read_weight

DECAY_EVERY = 4  # steps; the dense weights are computed once more for it
FACTORS = ("left", "right", "scales")
KERNELS = ("mixing", "outer", "inner")
PRODUCTS = (("kernel",), ("gates", "filters"), FACTORS, KERNELS)  # the parts whose products add up to a weight
COUPLED = re.compile(r"(sgd|nesterov|momentum)$")  # optimizers that take weight decay as part of the gradient


@torch.no_grad()
def balance_(model: nn.Module) -> None:
    """Scale left, right and scales of every structured layer so that no factor is larger than another.

    For every component k: ‖left_k‖ = ‖right_k‖, and the root mean square of scales_k is 1, the product left as it was;
    gradient descent then moves both factors at the same pace. A component that is zero stays as it is, and so does a
    layer of which a factor is frozen.

    >>> from ..layers import GMLinear
    >>> layer = GMLinear(4, 4, "C4+lowrank:1")
    >>> _ = layer.left.data.fill_(8.0), layer.right.data.fill_(0.5)
    >>> balance_(layer)
    >>> layer.left.flatten().tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    for layer in structured(model).values():
        parts = layer.parts()
        factors = {key: each for key, each in parts.items() if key in FACTORS}
        if "left" in factors and all(each.requires_grad for each in factors.values()):
            balance_parts_(factors)


@torch.no_grad()
def balance_parts_(
    factors: Mapping[str, Tensor],  # left (..., r), right (r, ...), and scales (..., r) or none
) -> None:
    """Balance the factors of one weight.

    >>> parts = {"left": torch.ones(4, 1), "right": torch.ones(1, 4), "scales": torch.full((2, 2, 1), 9.0)}
    >>> balance_parts_(parts)
    >>> [parts[key].unique().tolist() for key in ("left", "right", "scales")]
    [[3.0], [3.0], [1.0]]
    """
    place = "cpu" if factors["left"].device.type == "mps" else factors["left"].device  # which has no float64
    left, right = (factors[key].to(place, torch.float64) for key in ("left", "right"))
    norms = {"left": left.flatten(0, -2).norm(dim=0), "right": right.flatten(1).norm(dim=1)}
    product = norms["left"] * norms["right"]
    wanted = {}
    if "scales" in factors:
        norms["scales"] = factors["scales"].to(place, torch.float64).flatten(0, -2).square().mean(0).sqrt()
        product, wanted["scales"] = product * norms["scales"], torch.ones_like(product)
    wanted |= {"left": product.sqrt(), "right": product.sqrt()}
    usable = (product > 0) & product.isfinite()
    for key, tensor in factors.items():
        factor = torch.where(usable, wanted[key] / norms[key], 1.0).to(tensor.device, tensor.dtype)
        tensor.mul_(factor.reshape(-1, *(1,) * (tensor.dim() - 1)) if key == "right" else factor)


class Decay:
    """Weight decay of the computed weights W in place of the stored tensors of the structured layers.

    With SGD and its kin it is the gradient of strength/2 × ‖W‖², strength × W carried to the stored tensors by the
    chain rule, added after clipping, where these optimizers add the decay of a dense weight. An entry of a kernel
    stands in n places, so its gradient is n times its value, as that of any loss is. The gradient needs the dense
    weights, so every 4th step gets 4 times of it. With all others, AdamW first, it is decoupled: at every step W
    shrinks by the factor 1 − rate × strength, as a dense weight does with AdamW, each of the d factors of a product by
    its d-th root; so also with Adam and the like, which would divide the penalty by the size of the gradients. What a
    step's loss does not reach is not decayed in it.

    Source: Khodak, Tenenholtz, Mackey and Fusi 2021, section 3, Frobenius decay, for left · right.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, name: str, strength: float) -> None:
        self.optimizer, self.strength, self.coupled = optimizer, strength, COUPLED.search(name) is not None
        self.layers = list(structured(model).values()) if strength else []
        self._take_over({id(part) for layer in self.layers for part in layer.parts().values()})

    def _take_over(self, own: set[int]) -> None:
        """Move the parts of structured layers into parameter groups without decay."""
        for group in list(self.optimizer.param_groups):
            moved = [each for each in group["params"] if id(each) in own]
            if moved and group.get("weight_decay"):
                group["params"] = [each for each in group["params"] if id(each) not in own]
                self.optimizer.add_param_group(group | {"params": moved, "weight_decay": 0.0})
        self.optimizer.param_groups[:] = [group for group in self.optimizer.param_groups if group["params"]]

    def apply_(self, step: int, *, rate: float) -> None:
        """Add the decay of this step, between clipping and the optimizer's step."""
        for layer in self.layers:
            reached = {key: each for key, each in layer.parts().items() if each.grad is not None}
            if not self.coupled:
                _shrink_(reached, 1 - rate * self.strength)
            elif reached and step % DECAY_EVERY == 0:
                weight, parts = layer.weight, list(reached.values())
                gradients = torch.autograd.grad(weight, parts, DECAY_EVERY * self.strength * weight.detach())
                for part, gradient in zip(parts, gradients, strict=True):
                    assert part.grad is not None
                    part.grad.add_(gradient)


@torch.no_grad()
def _shrink_(parts: Mapping[str, Tensor], factor: float) -> None:
    """Multiply the weight of these parts by a factor between 0 and 1."""
    for names in PRODUCTS:
        factors = [parts[key] for key in names if key in parts]
        for each in factors:
            each.mul_(max(factor, 0.0) ** (1 / len(factors)))


class Annealing:
    """What the structures left out of the teacher's weights, R = W_teacher − Ŵ, added to the layers while it fades.

    A layer then computes with Ŵ(θ) + α R, where R stays as it was at the start and α falls by a cosine from 1 to 0
    over the given share of the run: at the start the layer is the teacher's, in the end it is structured. By forward
    hooks on plain layers that hold R and are part of no model.

    Raises:
        GMError: no layer has a counterpart of the same name and shape in a teacher.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, *, share: float) -> None:
        self.share, self.factor = share, 0.0
        self.rests: dict[str, Callable[..., Tensor]] = {}
        for name, layer in structured(student).items() if share else ():
            wanted = _weight(teacher, name)
            if wanted is not None and wanted.shape == layer.weight_shape:
                self.rests[name] = _rest(layer, wanted)
        if share and not self.rests:
            raise GMError(f"anneal={share!r} needs a teacher with layers of the same names and shapes; it has none")
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self, model: nn.Module) -> None:
        """Add the rests to the layers of this model, the student or a copy of it."""
        layers = structured(model)
        for name, rest in self.rests.items():
            self.handles.append(layers[name].register_forward_hook(self._adder(rest), with_kwargs=True))

    def _adder(self, rest: Callable[..., Tensor]) -> Any:
        def add(_layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
            return output + self.factor * rest(*inputs, **named) if self.factor else output

        return add

    def set(self, done: float) -> None:
        """Set α for a run of which this share is done."""
        self.factor = (1 + math.cos(math.pi * done / self.share)) / 2 if done < self.share else 0.0

    def remove(self) -> None:
        """Leave the layers without hooks."""
        for each in self.handles:
            each.remove()
        self.handles.clear()


def _weight(model: nn.Module | None, name: str) -> Tensor | None:
    """The matrix of this name, dense or structured; None where there is none."""
    if model is None:
        return None
    layer = structured(model).get(name)
    if layer is not None:
        return layer.weight.detach()
    try:
        return read_weight(model, name)
    except GMError:
        return None


@torch.no_grad()
def _rest(layer: GMLayer, wanted: Tensor) -> Callable[..., Tensor]:
    """What is called as the layer is, and gives what its outputs, or the parameter itself, lack."""
    missing = wanted.to(layer.weight) - layer.weight
    if isinstance(layer, GMWeight):
        parameter = layer.view.parameter(missing)
        return lambda: parameter
    assert isinstance(layer, GMLinear | GMConv2d)
    rest = layer.dense()
    rest.register_parameter("weight", nn.Parameter(missing, requires_grad=False))
    rest.register_parameter("bias", None)
    return rest
