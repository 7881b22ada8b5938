"""Plain layers: a Linear or Conv2d of which the settings that it was made with tell all that it computes."""

from __future__ import annotations

from typing import Any

from torch import nn

from .surgery import find_weight


def is_plain(model: nn.Module, name: str) -> bool:
    """Whether a weight W is that of a Linear or Conv2d alone, whose outputs are W x and a bias of its own.

    >>> is_plain(nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4)), "0")
    True
    """
    module, key = find_weight(model, name)
    hooked = module._forward_hooks or module._forward_pre_hooks
    if type(module) not in (nn.Linear, nn.Conv2d) or key != "weight" or hooked:
        return False
    if {*module._parameters} != {"weight", "bias"} or made_anew(module) is None:
        return False
    own = {id(each) for each in module._parameters.values() if each is not None}
    others = (each for each in model.modules() if each is not module)
    return all(own.isdisjoint(map(id, each._parameters.values())) for each in others)


def made_anew(module: Any) -> nn.Module | None:
    """A Linear or Conv2d without memory, made with the settings of this one; None where this one has others by now."""
    old = [each for each in (module._parameters["weight"], module._parameters["bias"]) if each is not None]
    options: dict[str, Any] = {"bias": len(old) == 2, "device": "meta", "dtype": old[0].dtype}
    try:
        if isinstance(module, nn.Linear):
            made: nn.Module = nn.Linear(module.in_features, module.out_features, **options)
        else:
            options |= {"padding_mode": module.padding_mode, "groups": module.groups}
            window = (module.kernel_size, module.stride, module.padding, module.dilation)
            made = nn.Conv2d(module.in_channels, module.out_channels, *window, **options)
    except (TypeError, ValueError, RuntimeError):
        return None
    settings = {key: each for key, each in vars(made).items() if isinstance(each, int | str | tuple | list)}
    same = all(vars(module).get(key) == each for key, each in settings.items() if key != "training")
    fit = all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(made.parameters(), old, strict=True))
    return made if same and fit and old[0].device == old[-1].device else None
