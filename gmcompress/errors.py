"""The one exception a user can cause, and the phrasing that all messages share."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class GMError(ValueError):
    """What came in cannot be used; the message says what came, what was wanted and what to do.

    >>> raise GMError("unknown group family 'Y'")
    Traceback (most recent call last):
    gmcompress.errors.GMError: unknown group family 'Y'
    """


def shown(value: object, limit: int = 80) -> str:
    """A value as Python writes it, cut in the middle where it is long or holds much, for an error message.

    >>> shown("C4"), shown("x" * 1000, 12)
    ("'C4'", "'xxx...xxxx'")
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = limit
    try:
        return short.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"a {type(value).__name__} that holds an integer of very many digits"


def nearest_names(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """The `count` known names most like `name`, as one phrase for an error message.

    >>> nearest_names("layer1.conv", ["layer1.conv1", "fc", "layer1.conv2"])
    "'layer1.conv2', 'layer1.conv1', 'fc'"
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name[:200], names, n=count, cutoff=0.0)  # whose time grows with the length
    return ", ".join(repr(each) for each in close) or "(there are none)"


def said(problem: BaseException) -> str:
    """What an exception says, in a line.

    >>> said(ValueError("no\\nand no again")), said(AssertionError())
    ('ValueError: no', 'AssertionError')
    """
    first = str(problem).strip().split("\n")[0]
    return f"{type(problem).__name__}: {first}" if first else type(problem).__name__
