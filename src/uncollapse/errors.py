"""Errors that a user can mend. The command line prints them in one line and exits with code 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UncollapseError(Exception):
    """What was wrong, where, and what to do: one line that a person can act on."""


class UnknownName(UncollapseError):
    """A name that no registry knows; carries the nearest names that exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        near = get_close_matches(name, list(known), n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(sorted(known))}"
        super().__init__(f"unknown {kind} {name!r}{hint}")
        self.name, self.near = name, near


class MissingExtra(UncollapseError):
    """An optional dependency that is not installed, with the command that brings it."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed; run: pip install 'uncollapse[{extra}]'")


class ConfigError(UncollapseError):
    """A configuration, YAML file or option that cannot be honoured."""


class DataError(UncollapseError):
    """Input data (data set, log, reward, checkpoint) that is not what it has to be."""
