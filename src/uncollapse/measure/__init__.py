"""Instruments: pure functions on arrays and tensors; no training, no I/O.

Names load on first use, so that importing this package needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "token_stats": ("token_stats", "token_stats_from_logits"),
    "statistics": (
        "Collision",
        "Entropy",
        "LogKeptMass",
        "Logp",
        "MaxLogp",
        "NucleusEntropy",
        "NucleusMass",
        "Statistic",
        "TemperedLogp",
        "TopKMass",
        "Varentropy",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"uncollapse.measure.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'uncollapse.measure' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
