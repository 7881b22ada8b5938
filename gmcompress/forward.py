"""One forward pass of a model, which leaves model, inputs and the caller's random numbers as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .copies import WRITTEN, asking_for_gradients, duplicate, evaluating, parameters_of
from .errors import GMError, said
from .nesting import arguments_of, describe, drawn, own_copy, why_one_argument
from .sharing import SharingModule
from .streams import seeded

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


def shell(model: nn.Module, *, private: bool = False) -> nn.Module:
    """A copy in evaluation mode on the same memory, so that running it leaves the caller's modules alone.

    Parameters that a run is known to write into are copied, of a `private` one all but those that a structured layer
    stores, which no code of a model's own reads. None takes a gradient, with which torch's FlopCounterMode would fail.

    Raises:
        GMError: the model cannot be copied.
    """
    held = parameters_of(model).values()
    tables = (each for each in model.modules() if isinstance(each, nn.Embedding | nn.EmbeddingBag))
    own = {id(each) for table in tables if table.max_norm is not None for each in parameters_of(table).values()}
    own |= {id(each) for each in held if WRITTEN in vars(each)}
    if private:
        layers = (each for each in model.modules() if isinstance(each, SharingModule))
        own |= {id(each) for each in held} - {id(part) for layer in layers for part in layer.parameters(recurse=False)}
    memo = {id(each): nn.Parameter(each.detach().clone() if id(each) in own else each.detach(), False) for each in held}
    return evaluating(duplicate(model, memo))


def call(model: nn.Module, inputs: Inputs) -> Any:
    """One forward pass on a copy of the inputs."""
    given, named = own_copy(arguments_of(model.forward, inputs))
    return drawn(model(*given, **named))


def ungraded(model: nn.Module, inputs: Inputs) -> Any:
    """One forward pass without gradients, but for those that the model's own code takes, as of an energy.

    These may be in its parameters too, as where it learns from some of its inputs.
    """
    for graded, learning in ((False, False), (True, False), (True, True)):
        try:
            with torch.set_grad_enabled(graded), asking_for_gradients(model) if learning else nullcontext():
                found = call(model, inputs)
            break
        except RuntimeError as problem:
            if learning or "does not require grad" not in str(problem):
                raise
    return tree_map(lambda each: each.detach() if isinstance(each, Tensor) else each, found) if graded else found


def run(model: nn.Module, inputs: Inputs) -> Any:
    """One forward pass without gradients, its failure told as an error about the inputs.

    Raises:
        GMError: the model does not accept the inputs.
    """
    try:
        with torch.compiler.set_stance("force_eager"):  # each copy would be compiled anew
            return ungraded(model, inputs)
    except Exception as problem:
        how = why_one_argument(model.forward, inputs)
        what = f"{type(model).__name__} does not run on inputs of shape {describe(inputs)}{how}"
        raise GMError(f"{what}: {said(problem)}") from problem


def run_seeded(model: nn.Module, inputs: Inputs, *, seed: int = 0) -> Any:
    """One run in which random numbers are the same each time, and which leaves the caller's stream of them alone."""
    with seeded(model, seed):
        return run(model, inputs)
