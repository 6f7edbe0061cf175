"""Fill the generated blocks of the README and the docs from the code and from measured results.

A block is what stands between `<!-- generated: NAME ARGUMENT -->` and `<!-- end -->`. `python docs/generate.py`
writes them all; `--check` writes nothing and fails, naming the files, when one is stale. A source that does not
exist yet gives a line that says so, never made-up content.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS, RESULTS = ROOT / "docs", ROOT / "results"
BENCHMARKS = ROOT / "benchmarks" / "results.json"
BLOCK = re.compile(
    r"(<!-- generated: (?P<name>[a-z]+)(?: (?P<argument>[\w./-]+))? -->\n).*?(<!-- end -->)", re.DOTALL
)
SCHEMA_FIELDS = ("needs", "gives")
"""What the protocol asks of every stage; a reader of the recipes' settings need not see it."""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += [
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
        for row in rows
    ]
    return "\n".join(lines)


def figure(value: object) -> str:
    """A number to four digits, a missing one as a dash, a set in order, anything else as it is."""
    if value is None:
        return "-"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(str, value))) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- results of studies ------------------------------------------------------------------------------------


def records(slug: str | None = None) -> list[dict[str, Any]]:
    """The stored results, or the one of a paper; quick runs have no verdict and are left out."""
    files = sorted(RESULTS.glob("*.json")) if slug is None else [RESULTS / f"{slug}.json"]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    return [record for record in found if not record["quick"]]


def effect(record: Mapping[str, Any], name: str) -> str:
    """An estimate as `value [low, high]`, with what it is."""
    estimate = record["estimates"].get(name)
    if estimate is None:
        return "-"
    low, high = estimate.get("low"), estimate.get("high")
    interval = "" if low is None or high is None or low == high else f" [{figure(low)}, {figure(high)}]"
    return f"{figure(estimate.get('value'))}{interval} ({name})"


def results_table(argument: str | None) -> str:
    """What became of the claims of every paper that was measured, for the README."""
    from uncollapse.catalogue import papers

    rows = []
    for record in records(argument):
        page = f"docs/papers/{record['slug']}.md"
        name = record["slug"] if record["slug"] in papers() else f"{record['slug']} (not in the catalogue)"
        link = f"[{name}]({page})" if (ROOT / page).is_file() else name
        by_verdict = [
            ", ".join(claim["id"] for claim in record["claims"] if claim["verdict"] == verdict) or "-"
            for verdict in ("reproduced", "not reproduced", "inconclusive")
        ]
        rows.append((link, *by_verdict))
    if not rows:
        return "No study has been run to the end yet."
    return table(("paper", "claims reproduced here", "not reproduced", "inconclusive"), rows)


def result_of(argument: str | None) -> str:
    """The claims of one paper with criterion, effect and provenance, for its page."""
    found = records(argument)
    if not found:
        return f"Not measured yet. `uncollapse reproduce {argument}` measures it."
    (record,) = found
    rows = [
        (c["id"], c["paper_says"], c["criterion"], effect(record, c["effect"]), f"**{c['verdict']}**")
        for c in record["claims"]
    ]
    text = [table(("claim", "the paper says", "criterion, fixed before the run", "effect", "verdict"), rows)]
    if record.get("limits"):
        text.append(f"Limits: {record['limits']}")
    origin = record["provenance"]
    shown = {k: v for k, v in origin.items() if isinstance(v, (str, int, float)) and v != ""} | origin[
        "packages"
    ]
    text.append("Measured with: " + ", ".join(f"{key} {figure(value)}" for key, value in shown.items()) + ".")
    if origin.get("seeds"):
        text.append("Seeds: " + ", ".join(map(str, origin["seeds"])) + ".")
    return "\n\n".join(text)


# ---- the catalogue -----------------------------------------------------------------------------------------


def papers_table(argument: str | None) -> str:
    """Every paper of the catalogue (of one room, if one is named) with what exists of it."""
    from uncollapse.catalogue import papers

    verdicts = {
        r["slug"]: ", ".join(f"{c['id']} {c['verdict']}" for c in r["claims"] if c["verdict"])
        for r in records()
    }
    rows = []
    for slug, entry in papers().items():
        if argument not in (None, entry.room):
            continue
        name = f"[{slug}]({slug}.md)" if (DOCS / "papers" / f"{slug}.md").is_file() else slug
        code = f"[{entry.code}](https://github.com/{entry.code})" if entry.code else "-"
        rows.append(
            (
                name,
                f"[{entry.title}](https://arxiv.org/abs/{entry.arxiv})",
                entry.room,
                "yes" if entry.implemented else "-",
                "yes" if entry.studied else "-",
                verdicts.get(slug) or "-",
                code,
            )
        )
    head = ("slug", "paper", "room", "implemented", "studied", "verdict", "official code")
    done = sum(row[3] == "yes" for row in rows)
    rows.sort(key=lambda row: row[3] != "yes")
    return f"Implemented: {done} of {len(rows)}.\n\n{table(head, rows)}"


# ---- recipes -----------------------------------------------------------------------------------------------


def stage_text(stage: object) -> str:
    """A stage with the settings that it really has."""
    if stage is None:
        return ""
    if not dataclasses.is_dataclass(stage):
        return type(stage).__name__
    options = []
    for field in dataclasses.fields(stage):
        value = getattr(stage, field.name)
        if field.repr and field.init and field.name not in SCHEMA_FIELDS:
            text = stage_text(value) if dataclasses.is_dataclass(value) else figure(value)
            options.append(f"{field.name}={text}")
    return f"{type(stage).__name__}({', '.join(options)})"


def arxiv(paper: str) -> str:
    """A link, if this is an arXiv id."""
    return (
        f"[{paper}](https://arxiv.org/abs/{paper})"
        if re.fullmatch(r"\d{4}\.\d{4,5}", paper)
        else paper or "-"
    )


def recipes_table(argument: str | None) -> str:
    """The registered recipes, then the stages and settings of each."""
    from uncollapse.policy.config.names import SLOTS
    from uncollapse.policy.registry import recipes

    slots = [slot for slot in SLOTS if slot != "schedule"]
    slots.insert(slots.index("surrogate") + 1, "mean")
    known = recipes()
    rows = ((f"[`{n}`](#{n})", r.summary, arxiv(r.paper)) for n, r in known.items())
    parts = [table(("recipe", "what it does", "from"), rows)]
    for name, recipe in known.items():
        rows = []
        for slot in slots:
            value = getattr(recipe, slot)
            stages = value if isinstance(value, tuple) else (value,)
            rows += [(slot, f"`{stage_text(stage)}`") for stage in stages if stage is not None]
        parts += [f"### {name}", recipe.summary, table(("slot", "stage and its settings"), rows)]
    return "\n\n".join(parts)


def engines_table(argument: str | None) -> str:
    """Every registered recipe on every engine: runs, or why not; for verl the level, and what stands against lower ones."""
    from uncollapse.cli.engines import verl_level, where
    from uncollapse.integrations.verl_levels import LEVELS
    from uncollapse.policy.registry import recipes

    rows = []
    for name, made in recipes().items():
        level, reasons = verl_level(made)
        lower = LEVELS[: LEVELS.index(level)] if level else LEVELS[:1]
        against = ". ".join(f"{one}: {'; '.join(reasons[one])}" for one in lower)
        rows.append((f"`{name}`", *where(made).values(), against or "-"))
    return table(("recipe", "testbed", "TRL", "verl", "why no lower level of verl"), rows)


# ---- everything else ---------------------------------------------------------------------------------------


def glossary(argument: str | None) -> str:
    """What a report says about each metric."""
    if find_spec("uncollapse.report.glossary") is None:
        return "The glossary of the report does not exist yet."
    from uncollapse.report.glossary import TERMS

    rows = ((f"`{term.key}`", term.name, term.unit or "-", term.reading) for term in TERMS)
    return table(("metric", "name", "unit", "how to read it"), rows)


def command_line(argument: str | None) -> str:
    """The help of every command, as the program itself gives it."""
    os.environ.update(NO_COLOR="1", COLUMNS="100")
    try:
        app = importlib.import_module("uncollapse.cli").build()
        text = app.generate_docs(output_format="markdown", heading_level=2, include_hidden=False)
    except ImportError as error:  # a verb whose module is not written yet
        if "uncollapse.cli" not in str(error):
            raise
        return f"The command line is not complete yet: {error}."
    return str(text).strip()


def benchmarks_table(argument: str | None) -> str:
    """What `make bench` measured last, as the harness itself tells it."""
    if not BENCHMARKS.is_file():
        return "Not measured yet. `make bench` measures and writes `benchmarks/results.json`."
    from benchmarks import record

    _, _, body = record.table(record.load(BENCHMARKS)).partition("\n")
    return body.strip()


def scored(name: str) -> dict[str, Any]:
    """What a benchmark recorded besides its times; empty if it has not run yet."""
    found = json.loads(BENCHMARKS.read_text(encoding="utf-8"))["benchmarks"] if BENCHMARKS.is_file() else {}
    return dict(found.get(name, {}).get("score", {}))


def profile_table(argument: str | None) -> str:
    """Where the time of two optimiser steps goes, in our trainer and in TRL's."""
    profiles = scored("step: P100 T24").get("profile", {})
    if not profiles:
        return 'Not measured yet. `python -m benchmarks --only "step: P100 T24"` measures it.'
    kinds = ("matrix products", "attention", "memory traffic", "random numbers", "Python")
    rows = [
        (name, part, f"{seconds['seconds']:.2f}", *(f"{seconds.get(kind, 0.0):.2f}" for kind in kinds))
        for name, parts in profiles.items()
        for part, seconds in parts.items()
    ]
    return table(("trainer", "part", "seconds", *kinds), rows)


def confusion_table(argument: str | None) -> str:
    """What `diagnose` said about made-up runs of known truth."""
    score = scored("diagnose")
    if not score:
        return "Not measured yet. `python -m benchmarks --only diagnose` measures it."
    from benchmarks.diagnose import told

    parts = told(score)
    return "\n\n".join(part if isinstance(part, str) else table(part[0], part[1:]) for part in parts)


def thresholds_table(argument: str | None) -> str:
    """Every constant that `diagnose` decides by, with the reason that stands below it in the code."""
    room = ROOT / "src" / "uncollapse" / "diagnose"
    files = [room / f"{name}.py" for name in ("series", "phases", "forecast", "advice")]
    rows = []
    for file in [*files, *sorted((room / "findings").glob("*.py"))]:
        body = ast.parse(file.read_text(encoding="utf-8")).body
        for one, after in itertools.pairwise(body):
            if not (
                isinstance(one, ast.Assign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                continue
            name = ast.unparse(one.targets[0]).strip("()")
            if name.isupper() or "," in name:
                reason = " ".join(str(after.value.value).split())
                rows.append((f"`{name}`", ast.unparse(one.value).strip("()"), file.stem, reason))
    return table(("name", "value", "where", "what and why"), rows)


def real_runs_table(argument: str | None) -> str:
    """What `diagnose` says about the real logs that the tests keep."""
    from uncollapse.diagnose import diagnose, read

    rows = []
    for path in ("collapse/checkpoint-60", "collapse/verl_console.log", "remedy/checkpoint-60", "own"):
        for log in read(ROOT / "tests" / "data" / path):
            found = diagnose(log)
            phases = ", ".join(f"{one.state} {one.first} to {one.last}" for one in found.course.phases)
            said = ", ".join(f"{one.id} ({one.severity})" for one in found.findings) or "-"
            rows.append((f"`tests/data/{path}`", log.format, f"**{found.state}**", phases, said))
    return table(("log", "format", "state", "phases", "findings"), rows)


def advice_table(argument: str | None) -> str:
    """Everything that `diagnose` may advise, with the names in the trainers; numbers that come from a run are examples."""
    import numpy as np

    from uncollapse.diagnose.advice import ADVICE
    from uncollapse.diagnose.finding import Facts
    from uncollapse.diagnose.log import Log
    from uncollapse.diagnose.phases import Course

    example = Facts(Log("", "", np.arange(1), {}), Course(0.8, ()), None, None)
    rows = []
    for one in (make(example) for make in ADVICE.values()):
        settings = [f"`{line.strip(', ')}`" for line in one.trl_lines().splitlines()]
        settings += [f"`{line.rstrip(' ' + chr(92))}`" for line in one.verl_lines().splitlines()]
        rows.append(
            (
                one.title,
                f"[`{one.recipe}`](recipes.md#{one.recipe})" if one.recipe else "-",
                "<br>".join(settings) or "-",
                ", ".join(map(arxiv, one.arxiv)) or "-",
                one.caution or "-",
            )
        )
    return table(("what", "recipe", "TRL, verl", "from", "careful"), rows)


def comparison_table(argument: str | None) -> str:
    """Every recipe on one of the small worlds."""
    from benchmarks import comparison

    found = comparison.kept().get(argument or "")
    if found is None:
        return f"Not measured yet. `python -m benchmarks.comparison {argument}` measures it."
    return comparison.table(found, argument or "")


def processes_table(argument: str | None) -> str:
    """A step in one and two processes, and the cost model beyond."""
    command = "`python -m benchmarks.processes`"
    kept = json.loads(BENCHMARKS.read_text(encoding="utf-8")) if BENCHMARKS.is_file() else {}
    if "processes" not in kept:
        return f"Not measured yet. {command} measures and writes `benchmarks/results.json`."
    from benchmarks import processes

    return processes.table(kept["processes"])


def api_reference(argument: str | None) -> str:
    """One reference entry per public module of a room."""
    base = ROOT / "src" / "uncollapse" / (argument or "")
    files = [base.with_suffix(".py")] if not base.is_dir() else sorted(base.rglob("*.py"))
    parts = []
    for file in files:
        names = file.relative_to(ROOT / "src").with_suffix("").parts
        if not any(name.startswith("_") for name in names):
            parts.append(f"## `{'.'.join(names[1:])}`\n\n::: {'.'.join(names)}")
    return "\n\n".join(parts) or f"`{argument}` holds no public module yet."


def aliases_table(argument: str | None) -> str:
    """What each framework calls the columns that `diagnose` knows."""
    from uncollapse.diagnose.names import unit
    from uncollapse.diagnose.readers.aliases import ALIASES

    rows = (
        (
            f"`{a.known}`",
            unit(a.known.replace("<k>", "1")) or "-",
            a.framework,
            f"`{a.name}`",
            a.remark or "-",
        )
        for a in ALIASES
    )
    return table(("column", "unit", "framework", "its name", "remark"), rows)


def short_names(argument: str | None) -> str:
    """The short names of columns in a mapping given by hand."""
    from uncollapse.diagnose.readers.aliases import SHORT

    return table(("short", "column"), ((f"`{short}`", f"`{name}`") for short, name in SHORT.items()))


def token_dump_table(argument: str | None) -> str:
    """The columns of the token dump."""
    from uncollapse.token_dump import COLUMNS

    rows = ((f"`{c.name}`", c.type, "yes" if c.required else "-", c.unit or "-", c.meaning) for c in COLUMNS)
    return table(("column", "type", "needed", "unit", "what it is"), rows)


SOURCES: Mapping[str, Callable[[str | None], str]] = {
    "advice": advice_table,
    "aliases": aliases_table,
    "api": api_reference,
    "benchmarks": benchmarks_table,
    "cli": command_line,
    "comparison": comparison_table,
    "confusion": confusion_table,
    "engines": engines_table,
    "glossary": glossary,
    "papers": papers_table,
    "processes": processes_table,
    "profile": profile_table,
    "realruns": real_runs_table,
    "recipes": recipes_table,
    "result": result_of,
    "results": results_table,
    "shortnames": short_names,
    "thresholds": thresholds_table,
    "tokendump": token_dump_table,
}


def filled(text: str) -> str:
    """The text with every block made anew. Raises `KeyError` for a block that no source makes."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}{SOURCES[match['name']](match['argument'])}\n{match[4]}"

    return BLOCK.sub(block, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the blocks, or say which files are stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is stale")
    check = parser.parse_args(arguments).check
    stale = []
    for file in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]:
        old = file.read_text(encoding="utf-8")
        new = filled(old)
        if new != old:
            stale.append(str(file.relative_to(ROOT)))
            if not check:
                file.write_text(new, encoding="utf-8")
    if stale:
        print(
            f"stale: {', '.join(stale)}; run: python docs/generate.py"
            if check
            else f"written: {', '.join(stale)}"
        )
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    raise SystemExit(main())
