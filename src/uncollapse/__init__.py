"""Measure, explain, prevent and reproduce collapse in learning and dynamical systems.

Submodules load on first use, so that `import uncollapse` stays light and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from uncollapse.errors import UncollapseError

__version__ = "0.1.0.dev0"

_ROOMS = frozenset(
    {
        "measure",
        "inspection",
        "policy",
        "attention",
        "representation",
        "tasks",
        "models",
        "integrations",
        "studies",
        "report",
        "runs",
        "catalogue",
    }
)

_FUNCTIONS = {"watch": "inspection"}

__all__ = ["UncollapseError", "__version__", *sorted([*_FUNCTIONS, *_ROOMS])]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"uncollapse.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"uncollapse.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module 'uncollapse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
