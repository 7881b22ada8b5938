"""What an error in the output of a block costs, place by place: the diagonal of the Fisher information, averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .calibration import backpropagate, differentiable
from .copies import parameters_of
from .forward import Inputs
from .nesting import floating
from .streams import seeded

DAMPED = 0.1  # of the mean, added everywhere: later blocks use more of a block's output than so few examples show


def sensitivities(
    model: nn.Module,  # in evaluation mode
    batches: Sequence[Inputs],
    names: Sequence[str],
    *,
    logits: bool,
    seed: int = 0,
) -> dict[str, list[Tensor]]:
    """For every module, for each output tensor, the mean squared gradient at each place, damped, of mean 1.

    The gradients are those of a random `projection` of the outputs. The shapes are those of one example; modules whose
    outputs change their shapes from batch to batch, or that no gradient reaches, are left out.

    Source: Li et al. 2021, BRECQ, section 3.3, there for each example by itself.
    """
    sums: dict[str, dict[int, Tensor]] = {name: {} for name in names}
    uneven: set[str] = set()
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack, seeded(model, seed), torch.enable_grad():
        for name in names:
            hook = _hook(name, sums[name], uneven)
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        for batch in batches:
            backpropagate(model, batch, generator, logits=logits)
    for each in parameters_of(model).values():
        each.grad = None
    found = {}
    for name, totals in sums.items():
        values = [totals[index] for index in sorted(totals)]
        means = [float(each.mean()) for each in values]
        if values and name not in uneven and all(0 < mean < float("inf") for mean in means):
            found[name] = [(_by_place(each) + DAMPED) / (1 + DAMPED) for each in values]
    return found


def _by_place(values: Tensor) -> Tensor:
    """The means over channels, of mean 1 and of the shape given.

    Tokens differ by orders of magnitude, where one of them is read out; what channels differ by is mostly the noise of
    so few examples.
    """
    channels = 0 if values.dim() == 3 else -1  # images have them first, tokens last
    places = values.mean(channels, keepdim=True)
    return (places / places.mean()).expand(values.shape)


def _hook(name: str, totals: dict[int, Tensor], uneven: set[str]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        leaves, form = tree_flatten(output)
        for index, each in enumerate(floating(output)):

            def take_in(gradient: Tensor, index: int = index) -> None:
                squares = gradient.float().square().sum(0)
                if index in totals and totals[index].shape != squares.shape:
                    uneven.add(name)
                else:
                    totals[index] = totals.get(index, 0) + squares

            if is_functorch_wrapped_tensor(each) or not torch.is_grad_enabled():
                continue
            begun = differentiable(each)
            leaves = [begun if leaf is each else leaf for leaf in leaves]
            begun.register_hook(take_in)
        return tree_unflatten(leaves, form)

    return hook
