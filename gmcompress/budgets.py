"""What the user may say about size: "25%", or a limit on parameters, bytes or multiply-adds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import floor
from numbers import Integral, Real

from .errors import GMError, nearest_names, shown

KINDS = {"params": "parameters", "bytes": "bytes", "macs": "multiply-adds"}  # as written, and as shown

MAX_LIMIT = (1 << 63) - 1  # of anything: what an integer of a table holds

_PERCENT = re.compile(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*%\s*")


@dataclass(frozen=True)
class Budget:
    """One upper limit on the size of a whole model: a share of the dense model if relative, else a whole number.

    Raises:
        GMError: an unknown kind of cost, a share outside (0, 1], or an absolute limit that is no whole number >= 1.

    >>> Budget("bytes", 100_000, relative=False)
    Budget(what='bytes', limit=100000, relative=False)
    >>> print(Budget("params", 0.25, relative=True))
    25 % of the parameters
    """

    what: str
    limit: float
    relative: bool

    def __post_init__(self) -> None:
        check_kind(self.what)
        if isinstance(self.limit, bool) or not isinstance(self.limit, Real):
            raise GMError(f"the limit of a budget is a number, not {shown(self.limit)}")
        if self.relative and not 0 < self.limit <= 1:
            raise GMError(f"a relative budget is more than 0 and at most 1 (100 %), not {shown(self.limit)}")
        if not self.relative and not (1 <= self.limit <= MAX_LIMIT and self.limit % 1 == 0):
            raise GMError(f"an absolute budget is a whole number from 1 to {MAX_LIMIT}, not {shown(self.limit)}")
        object.__setattr__(self, "limit", float(self.limit) if self.relative else int(self.limit))  # no numpy scalars

    def absolute(self, dense_total: int) -> int:
        """The limit as a count, where the dense model costs `dense_total`: ⌊share · total⌋, or the limit itself.

        The share is taken as the decimal number it prints as, so that 29 % of 100 is 29.

        >>> Budget("params", 0.29, relative=True).absolute(100)
        29
        """
        return floor(Fraction(repr(self.limit)) * dense_total) if self.relative else int(self.limit)

    def __str__(self) -> str:
        if self.relative:
            return f"{(100 * Decimal(repr(self.limit))).normalize():f} % of the {KINDS[self.what]}"
        return f"at most {int(self.limit):,} {KINDS[self.what]}"


def check_kind(what: object) -> str:
    """The kind of cost, if there is one of this name.

    Raises:
        GMError: there is none.

    >>> check_kind("parms")
    Traceback (most recent call last):
    gmcompress.errors.GMError: no cost is called 'parms'; the nearest are 'params', 'macs', 'bytes'
    """
    if not isinstance(what, str) or what not in KINDS:
        raise GMError(f"no cost is called {shown(what)}; the nearest are {nearest_names(str(what), KINDS)}")
    return what


Given = str | float | Mapping[str, str | float] | Budget | tuple[Budget, ...]  # how a budget may be written


def parse_budget(
    given: Given,
) -> tuple[Budget, ...]:
    """The limits that hold at once. A share alone is one of the parameters.

    Under "params", "bytes" or "macs" stands a share ("25%", or a float in (0, 1]) or a whole number >= 1: the integer 1
    is one parameter, the float 1.0 all of them. Budgets, and what this function returned, are taken as they are.

    Raises:
        GMError: nothing that can be read as a budget, an unknown kind of cost, or a limit out of range.

    >>> [str(each) for each in parse_budget("25%")]
    ['25 % of the parameters']
    >>> [str(each) for each in parse_budget({"bytes": 100_000, "macs": 0.5})]
    ['at most 100,000 bytes', '50 % of the multiply-adds']
    """
    if isinstance(given, Budget):
        return (given,)
    if isinstance(given, tuple) and given and all(isinstance(each, Budget) for each in given):
        kinds = [each.what for each in given]
        if len(set(kinds)) < len(kinds):
            raise GMError(f"several budgets limit the same thing: {', '.join(map(str, given))}")
        return given
    if isinstance(given, Mapping):
        if not given:
            raise GMError(f"a budget names at least one of {', '.join(KINDS)}")
        return tuple(_limit(what, value) for what, value in given.items())
    if isinstance(given, Integral) and not isinstance(given, bool):
        number = shown(given)
        raise GMError(f'{number} of what? write {{"params": {number}}}, or "25%" for a share of the parameters')
    if isinstance(given, str | Real) and not isinstance(given, bool):
        return (_limit("params", given, share=True),)
    raise GMError(f'a budget is a share such as "25%" or a mapping such as {{"bytes": 100000}}, not {shown(given)}')


def _limit(what: object, value: object, *, share: bool = False) -> Budget:
    """One limit; `share` if only a share makes sense."""
    kind = check_kind(what)
    if isinstance(value, str):
        found = _PERCENT.fullmatch(value) if len(value) <= 100 else None
        part = float(Decimal(found[1]) / 100) if found else 0.0  # one rounding only: 33.3 / 100 is not 0.333
        if not 0 < part <= 1:
            raise GMError(f'a budget in words is a percentage above 0 % and up to 100 %, as "25%", not {shown(value)}')
        return Budget(kind, part, relative=True)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise GMError(f'a budget of {KINDS[kind]} is a number or a share such as "25%", not {shown(value)}')
    number = int(value) if isinstance(value, Integral) else float(value)
    whole = isinstance(number, int) or (not share and number > 1 and number % 1 == 0)
    if not (number >= 1 if whole else 0 < number <= 1):
        wanted = "a share of more than 0 and at most 1" + ("" if share else ", or a whole number of at least 1")
        raise GMError(f"a budget of {KINDS[kind]} is {wanted}, not {shown(value)}")
    return Budget(kind, number, relative=not whole)
