"""`uncollapse list` and `uncollapse show`: what there is."""

from __future__ import annotations

import ast
import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from uncollapse.catalogue import Paper, paper, papers
from uncollapse.cli.output import as_json, say, table
from uncollapse.cli.records import record

AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON for programs.")]


def list_(
    what: Literal["papers", "recipes", "tasks", "models"] = "papers", /, *, json_: AsJson = False
) -> None:
    """List papers with their status, recipes, tasks or models.

    Examples: `uncollapse list`; `uncollapse list recipes`

    Parameters
    ----------
    what
        Which list. [papers]
    """
    rows = {"papers": _papers, "recipes": _recipes, "tasks": _tasks, "models": _models}[what]()
    if json_:
        as_json(rows)
    else:
        columns = list(rows[0]) if rows else []
        table(columns, [[str(row[column]) for column in columns] for row in rows])


def _papers() -> list[dict[str, str]]:
    return [
        {"paper": slug, "arXiv": entry.arxiv, "status": _status(entry), "title": entry.title}
        for slug, entry in papers().items()
    ]


def _status(entry: Paper) -> str:
    """How far we are: planned, module, study (can be reproduced), or measured (there is a result)."""
    if entry.studied:
        return "study, measured" if record(entry.slug) else "study"
    return "module" if entry.implemented else "planned"


def _recipes() -> list[dict[str, str]]:
    from uncollapse.policy.registry import recipes

    return [
        {"recipe": name, "paper": made.paper, "summary": made.summary} for name, made in recipes().items()
    ]


def _tasks() -> list[dict[str, str]]:
    from uncollapse.tasks import task, task_names

    return [
        {"task": name, "summary": "generator of reasoning-gym" if ":" in name else task(name).summary}
        for name in task_names()
    ]


def _models() -> list[dict[str, str]]:
    from uncollapse.models.zoo import NAMES

    return [{"model": name, "summary": summary} for name, summary in NAMES.items()]


def show(slug: str, /, *, json_: AsJson = False) -> None:
    """Show a paper: what it is, three lines of use, and what its reproduction measured.

    Example: `uncollapse show entropy-mechanism`

    Parameters
    ----------
    slug
        Name of the paper, as `uncollapse list papers` gives it.
    """
    entry = paper(slug)
    found = record(slug)
    if json_:
        as_json({**asdict(entry), "status": _status(entry), "result": found[1] if found else None})
        return
    say(entry.title)
    say(f"arXiv {entry.arxiv} ({entry.date})   https://arxiv.org/abs/{entry.arxiv}")
    if entry.code:
        say(f"official code: {entry.code}")
    say(f"status: {_status(entry)}")
    if entry.implemented:
        say("")
        say(_first_paragraph(entry.module))
    say("")
    for line in _use(entry):
        say(f"  {line}")
    if found:
        say("")
        _verdicts(*found)


def _first_paragraph(module: str) -> str:
    """What the module says about itself; read, not imported."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def _use(entry: Paper) -> list[str]:
    if not entry.implemented:
        return ["not built yet; see the list of papers for those that are: uncollapse list papers"]
    lines = [f"python: from {entry.module.rpartition('.')[0]} import {entry.module.rpartition('.')[2]}"]
    if entry.room == "policy":
        from uncollapse.policy.registry import recipes

        names = [name for name, made in recipes().items() if made.paper == entry.arxiv]
        if names:
            lines.append(
                f"train:  uncollapse train --recipe {names[0]} --model tiny --task modsum --output runs/{names[0]}"
            )
            lines.append(f"look:   uncollapse recipe show {names[-1]}")
    if entry.studied:
        lines.append(f"check:  uncollapse reproduce {entry.slug}")
    return lines


def _verdicts(path: Path, result: dict[str, Any]) -> None:
    provenance = result.get("provenance", {})
    say(f"measured ({path}, seeds {json.dumps(provenance.get('seeds', []))}):")
    estimates = result.get("estimates", {})
    rows = [
        [
            claim["id"],
            claim.get("verdict") or "no verdict",
            interval(estimates.get(claim.get("effect"))),
            claim["paper_says"],
        ]
        for claim in result.get("claims", [])
    ]
    table(["claim", "verdict", "effect (95% CI)", "the paper says"], rows)


def interval(estimate: dict[str, Any] | None) -> str:
    """An estimate of a result file with its interval."""
    if not estimate or estimate.get("value") is None:
        return "-"
    low, high = estimate.get("low"), estimate.get("high")
    if low is None or high is None:
        return f"{estimate['value']:.4g}"
    return f"{estimate['value']:.4g} ({low:.4g} to {high:.4g})"
