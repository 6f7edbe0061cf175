"""Read the log of any run and say what happens to it: phases, findings, forecast, advice.

from uncollapse.diagnose import diagnose, read
for log in read("runs/grpo"):
    print(diagnose(log).headline)

Names load on first use, so that importing this package is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Diagnosis": "diagnosis",
    "Finding": "finding",
    "Log": "log",
    "Note": "log",
    "diagnose": "diagnosis",
    "read": "readers",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"uncollapse.diagnose.{_HOME[name]}"), name)
    raise AttributeError(f"module 'uncollapse.diagnose' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
