"""What `uncollapse reproduce` measured: the result files that ship with the package or lie in a checkout."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from uncollapse.errors import DataError


def record(slug: str) -> tuple[Path, dict[str, Any]] | None:
    """The result file of a paper and its content, or None if its study has not been run.

    Looked for in `results/` of the working directory, then of the checkout that the package is imported from, then
    in the package itself. Raises `DataError` for a file that cannot be read.
    """
    for folder in _folders():
        path = folder / f"{slug}.json"
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{path} cannot be read ({error}); run: uncollapse reproduce {slug}"
                ) from error
            return path, dict(content)
    return None


def _folders() -> tuple[Path, ...]:
    package = Path(str(resources.files("uncollapse")))
    checkout = package.parent.parent
    inside = (checkout / "results",) if (checkout / "pyproject.toml").is_file() else ()
    return (Path("results"), *inside, package / "_results")
