"""Optimizers that a model holds itself, as agents do: they go on with what its weights have become."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from .copies import attributes_of, parameters_of

Names = list[list[str | None]]  # of the parameters in every group, None of those that are not the model's
Held = list[tuple[Optimizer, Names]]
REGISTRIES = ("_parameters", "_buffers", "_modules")


def held_optimizers(model: nn.Module) -> list[Optimizer]:
    """The optimizers that modules hold, by themselves, in containers or as an attribute of an object, each once.

    >>> from torch.optim import SGD
    >>> model = nn.Linear(2, 2)
    >>> model.optimizers = [SGD(model.parameters())]
    >>> len(held_optimizers(model))
    1
    """
    found: dict[int, Optimizer] = {}
    for module in model.modules():
        held = tree_leaves([value for key, value in vars(module).items() if key not in REGISTRIES])
        objects = (each for each in held if not isinstance(each, Tensor | nn.Module | Optimizer | type))
        inside = tree_leaves([list((attributes_of(each) or {}).values()) for each in objects])
        found |= {id(each): each for each in (*held, *inside) if isinstance(each, Optimizer)}
    return list(found.values())


def names_held(model: nn.Module) -> Held:
    """The optimizers that a model holds, each with the names of the parameters in its groups."""
    names = {id(each): name for name, each in parameters_of(model).items()}
    return [
        (each, [[names.get(id(parameter)) for parameter in group["params"]] for group in each.param_groups])
        for each in held_optimizers(model)
    ]


def follow_(model: nn.Module, held: Held, became: Callable[[str], list[nn.Parameter]], *, inplace: bool) -> None:
    """Have the optimizers of a changed model train what the parameters of these names, known from before, became.

    What an optimizer knows of a parameter stays where that is still one of this shape. One that a copy of the model has
    in common with the model itself goes on with the model.
    """
    now = held_optimizers(model)
    sizes = [[len(group["params"]) for group in each.param_groups] for each in now]
    if sizes != [[len(group) for group in names] for _, names in held]:
        return  # a class of its own way to be copied, which takes others along
    here = {id(each): name for name, each in parameters_of(model).items()}
    done: dict[int, list[Tensor]] = {}  # by group, which a wrapper of an optimizer has too
    for optimizer, (known_as, before) in zip(now, held, strict=True):
        if optimizer is known_as and not inplace:
            continue
        for group, known in zip(optimizer.param_groups, before, strict=True):
            if id(group) in done:
                continue
            trained: dict[int, Tensor] = {}
            for old, name in zip(group["params"], known, strict=True):
                new = [old] if name is None else became(name)
                if len(new) == 1 and new[0] is not old and new[0].shape == old.shape and old in optimizer.state:
                    optimizer.state[new[0]] = optimizer.state.pop(old)
                trained |= {id(each): each for each in new}
            if "param_names" in group:
                called = {id(each): name for each, name in zip(group["params"], group["param_names"], strict=True)}
                group["param_names"] = [(called | here)[each] for each in trained]
            group["params"][:] = done[id(group)] = list(trained.values())
        left = {id(each) for group in optimizer.param_groups for each in group["params"]}
        for gone in [each for each in optimizer.state if isinstance(each, Tensor) and id(each) not in left]:
            del optimizer.state[gone]


def remember_groups(model: nn.Module) -> Callable[[], None]:
    """What puts the optimizers that a model holds back as they are now."""
    kept = [
        (each, [(group, dict(group), list(group["params"])) for group in each.param_groups], dict(each.state))
        for each in held_optimizers(model)
    ]

    def put_back() -> None:
        for optimizer, groups, state in kept:
            for group, content, parameters in groups:
                group.update(content)
                group["params"][:] = parameters
            optimizer.state.clear()
            optimizer.state.update(state)

    return put_back
