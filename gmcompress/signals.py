"""Signals on a group: one axis for all elements, or an axis for each factor of a product."""

from __future__ import annotations

from torch import Tensor

from .errors import GMError
from .groups import Group, axes_of


def flat_signal(
    signal: Tensor,  # (batch, channels, n) or (batch, channels, *axes)
    group: Group,
    channels: int | None = None,
) -> Tensor:  # (batch, channels, n)
    """The signal with the axes of a product group made one.

    Raises:
        GMError: the shape is neither, or the number of channels is another.
    """
    axes = axes_of(group)
    fits = signal.dim() > 2 and tuple(signal.shape[2:]) in ((group.order,), axes)
    if not fits or channels not in (None, signal.shape[1]):
        wanted = f"(batch, {'channels' if channels is None else channels}, {group.order})"
        more = f" or (batch, channels, {', '.join(map(str, axes))})" if len(axes) > 1 else ""
        raise GMError(f"a signal on {group} has shape {wanted}{more}, but this one has {tuple(signal.shape)}")
    return signal.flatten(2)


def shaped_signal(flat: Tensor, group: Group, like: Tensor) -> Tensor:
    """The signal with the axes of its group, where the one it was made from had axes."""
    return flat if like.dim() == 3 else flat.reshape(*flat.shape[:2], *axes_of(group))
