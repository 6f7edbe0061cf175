"""The papers of the field that this package covers: one slug each, the name of its module, test, study and page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from importlib.util import find_spec

from uncollapse.errors import UnknownName


@dataclass(frozen=True)
class Paper:
    """One paper; `slug` is the name it goes by everywhere, `room` the subpackage its module lives in."""

    slug: str
    title: str
    arxiv: str
    date: str
    room: str
    code: str | None
    authors: int | None

    @property
    def module(self) -> str:
        """Dotted name of the module that implements the paper (it may not exist yet, see `implemented`)."""
        return f"uncollapse.{self.room}.{self.slug.replace('-', '_')}"

    @property
    def study(self) -> str:
        """Dotted name of the module that reproduces the paper's claims."""
        return f"uncollapse.studies.{self.slug.replace('-', '_')}"

    @property
    def implemented(self) -> bool:
        """Whether the module is there; looks for the file, imports nothing of it."""
        return _exists(self.module)

    @property
    def studied(self) -> bool:
        """Whether the study is there; looks for the file, imports nothing of it."""
        return _exists(self.study)


@cache
def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@lru_cache(maxsize=1)
def papers() -> dict[str, Paper]:
    """All papers by slug, in alphabetical order."""
    text = resources.files("uncollapse").joinpath("papers.json").read_text(encoding="utf-8")
    return {entry["slug"]: Paper(**entry) for entry in json.loads(text)}


def paper(slug: str) -> Paper:
    """One paper. Raises `UnknownName` with the nearest slugs."""
    known = papers()
    if slug not in known:
        raise UnknownName("paper", slug, known)
    return known[slug]
