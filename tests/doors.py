"""What the tests of the doors share: the law of a door, inputs of all kinds, and mutations of an object."""

import copy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from hypothesis import HealthCheck, settings

from gmcompress.errors import GMError

LIMIT = 10.0  # seconds for one input: many times what a slow machine needs, and far below what a blow-up takes
fuzz = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


# what timm, matplotlib and hypothesis bring along when they are first used, whatever the input
IMPORTED = {"IPython", "PIL", "contourpy", "cycler", "dateutil", "jinja2", "kiwisolver", "markupsafe", "matplotlib"}
IMPORTED |= {"mpl_toolkits", "pyparsing", "six", "yaml"}


@contextmanager
def door() -> Iterator[None]:
    """Nothing but a GMError may come out, soon, and no module may be imported by a name in the input."""
    modules, start = {name.split(".")[0] for name in sys.modules}, time.monotonic()
    with suppress(GMError):
        yield
    assert time.monotonic() - start < LIMIT
    assert {name.split(".")[0] for name in sys.modules} - modules <= IMPORTED


VALUES = [
    None,
    True,
    -1,
    0,
    1.5,
    float("nan"),
    float("inf"),
    10**30,
    1 << 62,
    "",
    "x" * 3000,
    "C4096",
    "lowrank:999999",
]
VALUES += [[], {}, [[]], ["a"], {"a": None}, {"x" * 300: "C4"}, [1 << 39] * 3, {"0": {}}, "os.system"]


def places(content: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in an object, itself first."""
    yield before
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inside:
        yield from places(value, (*before, key))


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a place, or without it where the value is `...`."""
    if not place:
        return value
    found = copy.deepcopy(content)
    inside = found
    for key in place[:-1]:
        inside = inside[key]
    if value is ...:
        del inside[place[-1]]
    else:
        inside[place[-1]] = value
    return found


def mutations(content: Any, *, skip: Any = ()) -> Iterator[Any]:
    """Every place of an object with a value that differs from place to place, so that all values have their turn."""
    every = [place for place in places(content) if place[:1] not in skip]
    for number, place in enumerate(every):
        for step in range(5):
            yield changed(content, place, VALUES[(5 * number + step) % len(VALUES)])
        if place:
            yield changed(content, place, ...)
