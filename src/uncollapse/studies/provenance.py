"""Where a result comes from: versions, commit, machine, time."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import uncollapse

_PACKAGES = ("torch", "numpy", "scipy")


def provenance(command: str) -> dict[str, Any]:
    """Everything needed to ask "would I get this again?": a JSON object without host names or paths.

    `commit` and `dirty` are None unless the package runs from a git checkout that tracks it.
    """
    import torch

    commit, dirty = _checkout(Path(uncollapse.__file__).resolve())
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "packages": {
            "uncollapse": uncollapse.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "commit": commit,
        "dirty": dirty,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _checkout(file: Path) -> tuple[str | None, bool | None]:
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None, None  # installed, perhaps inside somebody else's checkout
    changes = _git(file.parent, "status", "--porcelain", "--", ".")
    return _git(file.parent, "rev-parse", "HEAD"), None if changes is None else bool(changes)


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
