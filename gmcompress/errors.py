"""The one exception a user can cause, and the phrasing that all messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GMError(ValueError):
    """What came in cannot be used; the message says what came, what was wanted and what to do.

    >>> raise GMError("unknown group family 'Y'")
    Traceback (most recent call last):
    gmcompress.errors.GMError: unknown group family 'Y'
    """


def nearest_names(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """The `count` known names most like `name`, as one phrase for an error message.

    >>> nearest_names("layer1.conv", ["layer1.conv1", "fc", "layer1.conv2"])
    "'layer1.conv2', 'layer1.conv1', 'fc'"
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.0)
    return ", ".join(repr(each) for each in close) or "(there are none)"
