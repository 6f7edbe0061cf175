"""Where prepared weights are kept, and how a directory gets there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from uncollapse.errors import DataError


def cache_directory() -> Path:
    """`$UNCOLLAPSE_CACHE`, else `$XDG_CACHE_HOME/uncollapse`, else `~/.cache/uncollapse`; not created."""
    own = os.environ.get("UNCOLLAPSE_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "uncollapse"


def cached(key: str, make: Callable[[Path], None]) -> Path:
    """The directory of a key, made by `make` if it is not there yet.

    The content is written to a directory beside it and renamed when complete, so a process that is killed
    leaves nothing that looks finished, and of two processes that make the same one the first wins.

    Args:
        key: name of the directory; says everything that the content depends on.
        make: writes the content into an empty directory.

    Raises:
        DataError: the cache cannot be written (rights, full disk).
    """
    target = cache_directory() / key
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=target.parent))
    except OSError as error:
        raise DataError(_cannot_write(target, error)) from error
    try:
        make(unfinished)
        unfinished.chmod(0o755)
        os.rename(unfinished, target)
    except OSError as error:
        if not target.is_dir():
            raise DataError(_cannot_write(target, error)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _cannot_write(target: Path, error: OSError) -> str:
    return f"cannot write the cache {target}: {error.strerror or error}; free space there or set UNCOLLAPSE_CACHE"
