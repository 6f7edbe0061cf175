"""Real text on every machine: the sources of Python's own standard library, read as bytes.

Which Python runs decides the text a little; results name it in their provenance.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from uncollapse.errors import DataError

_PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "unittest",
    "xml",
)
"""Packages that every CPython ships, beside the modules at the top of the library."""


def source_files() -> list[Path]:
    """Modules of the standard library, in an order that depends on their names only.

    Raises:
        DataError: this Python comes without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [*root.glob("*.py"), *(path for name in _PACKAGES for path in (root / name).rglob("*.py"))]
    if not files:
        raise DataError(f"no Python sources in {root}; use a Python that ships its standard library")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def source_bytes(train: int, held_out: int) -> tuple[Int[Tensor, " train"], Int[Tensor, " held_out"]]:
    """Bytes (0 to 255) of whole modules: every eighth module is held out, the others train.

    Raises:
        DataError: fewer bytes than asked for.
    """
    files = source_files()
    return (
        _joined([path for i, path in enumerate(files) if i % 8], train),
        _joined(files[::8], held_out),
    )


def _joined(files: list[Path], count: int) -> Tensor:
    data = bytearray()
    for path in files:
        if len(data) >= count:
            break
        data += path.read_bytes() + b"\n"
    if len(data) < count:
        raise DataError(f"the standard library has {len(data)} bytes of such text, {count} were asked for")
    return torch.frombuffer(data[:count], dtype=torch.uint8).long()
