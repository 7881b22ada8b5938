"""Rules: globs, regular expressions and module types by which a user names layers, and what they match."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
from collections.abc import Sequence

from torch import nn

from .errors import GMError, nearest_names, shown
from .kinds import kind_of
from .surgery import Site

Rule = str | type[nn.Module]
Rules = Rule | Sequence[Rule]

MAX_RULE = 1000  # characters
SECONDS = 2.0  # for one regular expression over all names of a network
# Repeated groups, back-references or several repetitions may take exponential time, and re cannot be interrupted.
_SLOW = re.compile(r"\)[*+?{]|\\[1-9]|\(\?P=|(?:[*+?{].*){3}", re.DOTALL)
_APART = """
import json, re, sys
rule, names = json.load(sys.stdin)
json.dump([each for each in names if re.fullmatch(rule, each)], sys.stdout)
"""


def listed(rules: Rules) -> list[Rule]:
    """One or several rules as a list.

    Raises:
        GMError: one of them is no rule.

    >>> listed("layer1.*")
    ['layer1.*']
    """
    found = list(rules) if isinstance(rules, Sequence) and not isinstance(rules, str) else [rules]
    for rule in found:
        if not (isinstance(rule, str) or (isinstance(rule, type) and issubclass(rule, nn.Module))):
            raise GMError(f'a rule is a glob, a "re:" pattern or a module type, not {shown(rule)}')
    return found


def told(rule: Rule) -> str:
    """A rule as messages write it."""
    return shown(rule) if isinstance(rule, str) else rule.__name__


def matching(rule: Rule, sites: Sequence[Site]) -> frozenset[str]:
    """The names of the sites that a rule names: by any of their names, or by their exact type.

    Raises:
        GMError: none is; the rule is too long; a regular expression is malformed, or takes too long.
    """
    if isinstance(rule, str) and len(rule) > MAX_RULE:
        raise GMError(f"the rule {shown(rule)} has {len(rule):,} characters; at most {MAX_RULE:,} can be matched")
    if not isinstance(rule, str):
        found = {site.name for site in sites if site.kind == kind_of(rule)}
        known = {site.kind for site in sites}
    else:
        names = {name: site.name for site in sites for name in (site.name, *site.aliases)}
        hits = _expressed(rule, list(names)) if rule.startswith("re:") else _globbed(rule, list(names))
        found, known = {names[each] for each in hits}, {site.name for site in sites}
    if not found:
        name = rule if isinstance(rule, str) else rule.__name__
        raise GMError(f"the rule {shown(name)} matches no layer; the nearest are {nearest_names(name, known)}")
    return frozenset(found)


def _globbed(rule: str, names: Sequence[str]) -> list[str]:
    return [each for each in names if fnmatch.fnmatchcase(each, rule)]


def _expressed(rule: str, names: Sequence[str]) -> list[str]:
    """The names that a regular expression matches as a whole."""
    try:
        pattern = re.compile(rule[3:])
    except (re.error, RecursionError, OverflowError) as problem:
        raise GMError(f"the rule {shown(rule)} is no regular expression: {problem}") from None
    if not _SLOW.search(pattern.pattern):
        return [each for each in names if pattern.fullmatch(each)]
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _APART]
    given = json.dumps([pattern.pattern, names])
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        said = f"takes more than {SECONDS:g} seconds to match; write it without repetitions inside repetitions"
        raise GMError(f"the rule {shown(rule)} {said}") from None
    return json.loads(done.stdout)
