"""The record: `results.json`, merged by benchmark name, and the table generated from it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

SCHEMA = 1
HERE = Path(__file__).parent


def load(path: Path) -> dict[str, Any]:
    """The record on disk, or an empty one; another schema is not overwritten."""
    if not path.exists():
        return {"schema": SCHEMA, "benchmarks": {}}
    record: dict[str, Any] = json.loads(path.read_text())
    if record.get("schema") != SCHEMA:
        raise SystemExit(f"{path}: schema {record.get('schema')!r}, expected {SCHEMA}; move the file away")
    return record


def write(path: Path, text: str) -> None:
    """Replace a file in one step."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def save(results: dict[str, Any], directory: Path = HERE) -> None:
    """Merge results by benchmark name and write both files."""
    record = load(directory / "results.json")
    record["benchmarks"] |= results
    write(directory / "results.json", json.dumps(record, indent=2) + "\n")
    write(directory / "README.md", table(record))


def table(record: dict[str, Any]) -> str:
    """Markdown, from the record alone."""
    lines = [
        "# Benchmarks",
        "",
        "Generated from `results.json` by `python -m benchmarks` (`make bench`); do not edit. All contestants run",
        "alternating in one process on the same input, after their values and gradients were found equal to ours.",
        "*Over ours* is the median over rounds of a contestant's time divided by ours: above 1, we are faster;",
        "*cpu over ours* is the same of processor time, which other load on the machine disturbs less.",
        "*Extra peak* is the rise of resident memory during one call, in a process of its own.",
    ]
    for name, result in sorted(record["benchmarks"].items()):
        host = result["machine"]
        stack = ", ".join(f"{package} {version}" for package, version in sorted(result["versions"].items()))
        lines += [
            "",
            f"## {name}",
            "",
            result["summary"],
            "",
            f"{result['size']}; {host['cpu']}, {host['threads']} of {host['cores']} cores; {stack}; "
            f"{result['date'][:10]}, {result['rounds']} rounds, load {host['load_1min_before']} before and "
            f"{host['load_1min_after']} after (the contestants' own threads included).",
            "",
            "| | median s | 20 to 80 % | fastest s | over ours | cpu over ours | extra peak MB | largest difference |",
            "|---|---|---|---|---|---|---|---|",
            *(_row(contestant, row) for contestant, row in result["rows"].items()),
            *(f"| {peer} | absent: {reason} | | | | | | |" for peer, reason in result["absent"].items()),
            "",
            *(_goal(goal) for goal in result["goals"]),
        ]
    return "\n".join(lines).rstrip() + "\n"


def _row(name: str, row: dict[str, Any]) -> str:
    seconds, difference = row["seconds"], row["largest_difference"]
    return (
        f"| {name} | {seconds['median']:.2f} | {seconds['p20']:.2f} to {seconds['p80']:.2f} | {seconds['min']:.2f} "
        f"| {row['time_over_ours']:.2f} | {row['cpu_over_ours']:.2f} | {_megabytes(row)} "
        f"| {'' if difference is None else f'{difference:.0e}'} |"
    )


def _goal(goal: dict[str, Any]) -> str:
    verdict = {True: "reached", False: "**missed**", None: "not measured"}[goal["met"]]
    value = "none" if goal["value"] is None else f"{goal['value']:.3g}"
    return f"- {goal['goal']}: {value} ({'at least' if goal['at_least'] else 'at most'} {goal['limit']}): {verdict}."


def _megabytes(row: dict[str, Any]) -> str:
    return f"{row['extra_peak_mb']:.0f}" if "extra_peak_mb" in row else "-"
