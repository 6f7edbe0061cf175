"""Registered recipes by name: the baselines and those of every paper that is there."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping

from uncollapse.catalogue import papers
from uncollapse.errors import UnknownName
from uncollapse.policy.recipe import REGISTERED, Recipe


def recipe(name: str) -> Recipe:
    """A fresh copy of a registered recipe, its memory empty. Raises `UnknownName` with the nearest names."""
    known = recipes()
    if name not in known:
        raise UnknownName("recipe", name, known)
    return copy.deepcopy(known[name])


def recipes() -> Mapping[str, Recipe]:
    """All registered recipes by name."""
    importlib.import_module("uncollapse.policy.baselines")
    for entry in papers().values():
        if entry.room == "policy" and entry.implemented:
            importlib.import_module(entry.module)
    return dict(sorted(REGISTERED.items()))
