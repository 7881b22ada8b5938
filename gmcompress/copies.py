"""Copies of models, with what their modules keep outside the registry of parameters, buffers and children."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import update_wrapper
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .errors import GMError


def duplicate(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy in which every object in `memo`, by id, stands for what the memo holds."""
    kept = (each for module in model.modules() for each in tree_leaves(vars(module)) if isinstance(each, Tensor))
    # pruning keeps one, computed anew at every call, in place of a parameter; others keep what they last computed
    leaves: dict[int, Any] = {id(each): each.detach().clone() for each in kept if each.grad_fn is not None}
    try:
        found = copy.deepcopy(model, leaves := leaves | memo)
    except Exception as problem:
        raise GMError(
            f"this {type(model).__name__} cannot be copied ({problem}); inplace=True works without"
        ) from problem
    was_training = {name: module.training for name, module in model.named_modules()}
    for name, module in found.named_modules():
        module.training = was_training.get(name, module.training)  # graph modules are all in training once copied
        inside = (each for key, each in vars(module).items() if isinstance(each, dict) and key != "_modules")
        for held in (vars(module), *inside):  # but for its children: what was put in may hold what it stands for
            held.update({key: _followed(each, leaves) for key, each in held.items() if callable(each)})
    return found


def _followed(value: Any, copies: Mapping[int, Any]) -> Any:
    """A hook or other function that reaches parts of a model, as one that reaches their copies.

    A deep copy leaves functions as they are, with what they close over, so that a copied model would go on to call
    parts of the one it was copied from.
    """
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _followed(value.__self__, copies))
    if not isinstance(value, FunctionType):
        return value
    around = {**copies, id(value): value}  # which may close over itself
    cells, defaults = value.__closure__ or (), value.__defaults__ or ()
    new_cells = tuple(_followed_cell(each, around) for each in cells)
    new_defaults = tuple(_followed(each, around) for each in defaults)
    if all(new is old for new, old in zip(new_cells + new_defaults, cells + defaults, strict=True)):
        return value
    made = FunctionType(value.__code__, value.__globals__, value.__name__, new_defaults or None, new_cells or None)
    made.__kwdefaults__ = value.__kwdefaults__
    return update_wrapper(made, value)


def _followed_cell(cell: CellType, copies: Mapping[int, Any]) -> CellType:
    try:
        content = cell.cell_contents
    except ValueError:  # not yet filled
        return cell
    found = _followed(content, copies)
    return cell if found is content else CellType(found)
