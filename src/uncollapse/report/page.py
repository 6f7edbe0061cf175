"""The page: headline, sections, glossary, filled into the template. All text is escaped there."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from uncollapse import __version__
from uncollapse.report import law, palette, recipes, sections, words
from uncollapse.report.blocks import Section, Tile
from uncollapse.report.glossary import explain
from uncollapse.report.series import Arm, arm_of_run, arms_of_comparison
from uncollapse.runs import REPORT, Comparison, Run, open_directory


def render_run(run: Run) -> str:
    """The report of one run as HTML. Every section is there; one without data says what was not logged."""
    arm = arm_of_run(run)
    arms = [arm] if arm.logs else []
    parts = _common(arms)
    parts.insert(5, sections.health(arms))
    subject = " on ".join(
        str(run.config[key]) for key in ("model", "task") if isinstance(run.config.get(key), str)
    )
    return fill(
        eyebrow=" \u00b7 ".join(part for part in ("Training run", arm.name, subject) if part),
        title=words.run_title(arm),
        lead=words.run_lead(arm),
        tiles=sections.tiles(arm),
        parts=[*parts, sections.setup(arms)],
    )


def render_comparison(comparison: Comparison) -> str:
    """The report of a comparison as HTML: every recipe in every figure, and the recipes side by side."""
    arms = arms_of_comparison(comparison)
    parts = [recipes.section(arms), *_common(arms)]
    parts.insert(6, sections.health(arms))
    compared = yaml.safe_dump(comparison.config, sort_keys=False, allow_unicode=True)
    subject = " on ".join(
        str(comparison.config[k]) for k in ("model", "task") if isinstance(comparison.config.get(k), str)
    )
    return fill(
        eyebrow=" \u00b7 ".join(part for part in ("Comparison of recipes", subject) if part),
        title=words.comparison_title(arms),
        lead=words.comparison_lead(arms),
        tiles=[],
        parts=[*parts, sections.setup(arms, [("What was compared", compared)])],
    )


def write(path: str | os.PathLike[str]) -> Path:
    """Write `report.html` into the run or comparison directory at `path`; returns where it is.

    Raises `DataError` if `path` is neither, or the file cannot be written.
    """
    found = open_directory(path)
    html = render_comparison(found) if isinstance(found, Comparison) else render_run(found)
    return found.write_text(REPORT, html)


def _common(arms: Sequence[Arm]) -> list[Section]:
    return [
        sections.course(arms),
        sections.answers(arms),
        sections.covariance(arms),
        sections.text(arms),
        law.section(arms),
    ]


def fill(
    *,
    eyebrow: str,
    title: str,
    lead: Sequence[str],
    tiles: Sequence[Tile],
    parts: Sequence[Section],
) -> str:
    """A whole page of these sections, with the glossary entries that they need."""
    script = _asset("report.js")
    light, dark = palette.css()
    metrics = {name for part in parts for name in part.metrics}
    page: str = _template().render(
        eyebrow=eyebrow,
        title=title,
        lead=lead,
        tiles=tiles,
        sections=parts,
        terms=explain(sorted(metrics)),
        version=__version__,
        # Only this very script may run: markup that slipped through could still execute nothing and load nothing.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        script=Markup(script),
        style=Markup(_asset("report.css").replace("/*light*/", light).replace("/*dark*/", dark)),
    )
    return page


@lru_cache(maxsize=1)
def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("uncollapse.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["level"] = words.level
    return environment.get_template("report.html")


def _asset(name: str) -> str:
    return (
        resources.files("uncollapse.report").joinpath("templates").joinpath(name).read_text(encoding="utf-8")
    )
