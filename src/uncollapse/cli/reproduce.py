"""`uncollapse reproduce`: run the study of a paper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from uncollapse.cli.bar import Bar
from uncollapse.cli.catalogue import AsJson, interval
from uncollapse.cli.output import as_json, note, say, table


def reproduce(
    slug: str,
    /,
    *,
    quick: Annotated[bool, Parameter(negative="")] = False,
    output: Path = Path("results"),
    fail_on: Annotated[Literal["not-reproduced", "inconclusive"] | None, Parameter()] = None,
    json_: AsJson = False,
) -> int:
    """Run the study of a paper: a verdict per claim, with effect size, 95% interval and seeds.

    Can be interrupted: finished trials are kept, and the same command continues.

    Example: `uncollapse reproduce entropy-mechanism --quick`

    Parameters
    ----------
    slug
        Name of the paper, as `uncollapse list papers` gives it.
    quick
        A smoke run: minutes become seconds, and there is no verdict.
    output
        Where the result file and the figure go.
    fail_on
        Exit with 1 if a claim is `not-reproduced`, or if one is not `reproduced` at all (`inconclusive`).
    """
    from uncollapse.studies.study import reproduce as run

    with Bar(slug) as progress:
        outcome = run(slug, quick=quick, output=output, progress=progress)
    if json_:
        as_json(outcome.record)
    else:
        _print(outcome.record)
        say(f"result: {outcome.path}")
        if outcome.figure is not None:
            say(f"figure: {outcome.figure}")
    return _exit_code(outcome.record, fail_on)


def _print(record: Mapping[str, Any]) -> None:
    estimates = record["estimates"]
    rows = []
    for claim in record["claims"]:
        effect = estimates.get(claim["effect"])
        seeds = len((effect or {}).get("seeds") or ())
        rows.append(
            [
                claim["id"],
                claim["verdict"] or "no verdict (quick)",
                interval(effect),
                str(seeds or "-"),
                claim["measured"],
            ]
        )
    table(["claim", "verdict", "effect (95% CI)", "seeds", "measured"], rows)
    if record.get("limits"):
        note(record["limits"])


def _exit_code(record: Mapping[str, Any], fail_on: str | None) -> int:
    failing = {"not-reproduced": {"not reproduced"}, "inconclusive": {"not reproduced", "inconclusive"}}
    return int(any(claim["verdict"] in failing.get(fail_on or "", ()) for claim in record["claims"]))
