"""Every recipe on equal footing, on the tabular modsum and on the packaged language model: what it keeps, what it costs.

    python -m benchmarks.comparison modsum          # five seeds a recipe, minutes to an hour
    python -m benchmarks.comparison tiny            # three seeds a recipe
    python -m benchmarks.comparison tiny --only grpo,siren --seeds 0

Finished runs are kept below `runs/comparison`, so that the same command continues. What has run is written to
`benchmarks/comparison.json`, from which the page is generated; with `--only` these rows alone are new there, and the page
tells which commit measured which.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import record

HERE = Path(__file__).parent
RECORD = HERE / "comparison.json"
WORK = Path("runs/comparison")
SAMPLES = 8
"""Completions per prompt, for every recipe: equal footing is as many rows per step, whatever a paper used."""

SEEDS = {"modsum": (0, 1, 2, 3, 4), "tiny": (0, 1, 2)}
STEPS = {"modsum": 150, "tiny": 40}
COLUMNS = {
    "entropy": "entropy (nats)",
    "reward": "reward",
    "pass@8": "pass@8",
    "distinct": "distinct right",
    "tokens": "tokens per useful answer",
    "cost": "CPU time over grpo",
}
"""What is shown of each recipe; not every field has all of them."""

ABOUT = {
    "modsum": (
        "Tables of logits on *modsum* (six tokens out of sixteen whose sum must equal a target; reward 1 is possible at "
        "2.31 nats), 16 prompts x 8 answers a step, four optimiser steps per rollout, 150 steps. Entropy and reward are exact; "
        "*distinct right* are different right answers among 32."
    ),
    "tiny": (
        "The packaged language model on the task *modsum* (five digits whose sum ends in a given digit), with the settings of "
        "`uncollapse demo`: 16 prompts x 8 completions, two optimiser steps, 40 rollouts. Entropy and reward are those of the "
        "last rollouts; pass@8 and *distinct right* are of 8 samples for each of 32 held-out prompts. *Tokens per useful answer* are all "
        "tokens generated, over the answers that had an advantage other than zero."
    ),
}


def contestants(field: str) -> dict[str, Any]:
    """Every registered recipe that the field's engine can run, then those of `comparison.yaml` at this scale's numbers."""
    from uncollapse.integrations import offers
    from uncollapse.policy.config import load_recipes
    from uncollapse.policy.registry import recipes
    from uncollapse.studies.testbeds import engine

    offered = {"modsum": engine.OFFERS, "tiny": offers.TRL}[field]
    known = recipes() | load_recipes(HERE / "comparison.yaml")
    return {
        name: replace(copy.deepcopy(made), sampler=replace(made.sampler, samples=SAMPLES))
        for name, made in known.items()
        if not made.refusals(offered)
    }


def on_modsum(recipe: Any, seed: int) -> dict[str, float]:
    """The end of one run on the table."""
    from uncollapse.studies.testbeds.training import train_modsum

    start = time.process_time()
    curves = train_modsum(recipe, seed, STEPS["modsum"])
    return {
        "entropy": curves["entropy"][-1],
        "reward": curves["reward"][-1],
        "distinct": sum(curves["distinct"]) / len(curves["distinct"]),
        "seconds": (time.process_time() - start) / STEPS["modsum"],
    }


def on_tiny(recipe: Any, seed: int) -> dict[str, float]:
    """The end of one run of the language model."""
    from uncollapse.cli.demo import SETTINGS
    from uncollapse.integrations.launch import train
    from uncollapse.integrations.settings import settings
    from uncollapse.report.series import arm_of_run

    output = WORK / "tiny" / "runs" / f"{recipe.name}-{seed}"
    chosen = settings(
        model="tiny",
        task="modsum",
        steps=STEPS["tiny"],
        output=str(output),
        seed=seed,
        recipe=recipe,
        **SETTINGS,
    )
    start = time.process_time()
    arm = arm_of_run(train(chosen, resume=(output / "config.yaml").exists()))
    seconds = (time.process_time() - start) / STEPS["tiny"]
    names = {
        "entropy": "entropy/token/mean", "reward": "reward/mean", "pass@8": "eval/pass@8", "distinct": "eval/distinct",
    }  # fmt: skip
    found = {key: arm.last(name) for key, name in names.items()}
    tokens = {"tokens": arm.mean("sampler/tokens/per_useful")}
    kept = {key: value.mean for key, value in (found | tokens).items() if value is not None}
    return kept | {"seconds": seconds}


RUN = {"modsum": on_modsum, "tiny": on_tiny}


def measure(field: str, names: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Run what has not run yet; estimates per recipe and quantity, with intervals over seeds."""
    from uncollapse.errors import UncollapseError
    from uncollapse.studies.provenance import provenance
    from uncollapse.studies.study import Trials

    known = contestants(field)
    chosen = {name: known[name] for name in names or known}
    trials = Trials(WORK / field, len(chosen) * len(seeds), progress=_told)
    rows: dict[str, list[Mapping[str, float]]] = {}
    refused: dict[str, str] = {}
    for seed in seeds:  # the outer loop: what is interrupted has all recipes on equal footing
        for name, recipe in chosen.items():
            try:
                found = trials.trial(f"{field} {name} seed {seed}", partial(RUN[field], recipe, seed))
            except UncollapseError as error:
                refused[name] = " ".join(str(error).split())
                continue
            rows.setdefault(name, []).append(found)
    origin = provenance(f"python -m benchmarks.comparison {field}")
    return {
        "origin": origin,
        "seeds": list(seeds),
        "recipes": {name: _estimates(found, seeds, rows.get("grpo")) for name, found in rows.items()},
        "refused": refused,
        "commits": dict.fromkeys(rows, origin["commit"]),
    }


def merged(before: Mapping[str, Any] | None, new: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of a field with the new ones in place; only the new ones if they have other seeds."""
    if before is None or before["seeds"] != new["seeds"]:
        return dict(new)
    commits = before.get("commits") or dict.fromkeys(before["recipes"], before["origin"]["commit"])
    return {
        **new,
        "recipes": before["recipes"] | new["recipes"],
        "refused": {name: why for name, why in before["refused"].items() if name not in new["recipes"]}
        | new["refused"],
        "commits": commits | new["commits"],
    }


def _told(done: int, total: int, what: str) -> None:
    print(f"{done}/{total} {what}", file=sys.stderr, flush=True)


def _estimates(
    found: Sequence[Mapping[str, float]], seeds: Sequence[int], grpo: Sequence[Mapping[str, float]] | None
) -> dict[str, Any]:
    from uncollapse.studies.statistics import mean_over_seeds

    values = {key: [row[key] for row in found] for key in found[0]}
    if grpo is not None:
        values["cost"] = [row["seconds"] / base["seconds"] for row, base in zip(found, grpo, strict=True)]
    return {key: asdict(mean_over_seeds(numbers, list(seeds))) for key, numbers in values.items()}


def table(result: Mapping[str, Any], field: str) -> str:
    """Markdown of one field, sorted by the entropy that is left."""
    recipes = result["recipes"]
    shown = [key for key in COLUMNS if any(key in row for row in recipes.values())]
    order = sorted(recipes, key=lambda name: -recipes[name]["entropy"]["value"])
    lines = [
        ABOUT[field], "",
        "| recipe | " + " | ".join(COLUMNS[key] for key in shown) + " |", "|" + " --- |" * (len(shown) + 1),
        *(f"| {name} | " + " | ".join(_cell(recipes[name].get(key)) for key in shown) + " |" for name in order),
    ]  # fmt: skip
    lines += [f"\n`{name}` does not run here: {reason}." for name, reason in result["refused"].items()]
    origin = result["origin"]
    seeds = ", ".join(map(str, result["seeds"]))
    last = origin["commit"]
    lines += ["", f"Seeds {seeds}; {origin['date'][:10]}, commit {str(last)[:10]}, {origin['cpu']}, "
              f"{origin['threads']} thread."]  # fmt: skip
    older: dict[str, list[str]] = {}
    for name, commit in result.get("commits", {}).items():
        if commit != last:
            older.setdefault(str(commit)[:10], []).append(f"`{name}`")
    lines += [
        f"Measured before, at commit {commit}: {', '.join(sorted(names))}." for commit, names in older.items()
    ]
    return "\n".join(lines)


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "-"
    half = estimate["high"] - estimate["value"]
    spread = f" ± {half:.2f}" if half < float("inf") else ""
    return f"{estimate['value']:.3f}{spread}"


def kept() -> dict[str, Any]:
    """What has been measured so far, by field."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}


def main() -> None:
    """Measure one field, write the record, print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.comparison",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("field", choices=sorted(RUN))
    parser.add_argument("--only", default="", help="recipes, with commas between them (default: all)")
    parser.add_argument("--seeds", default="", help="seeds, with commas between them")
    parser.add_argument("--dry-run", action="store_true", help="print the table, write nothing")
    options = parser.parse_args()
    names = [name for name in options.only.split(",") if name]
    known = contestants(options.field)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"no recipe {', '.join(unknown)} here; there are {', '.join(known)}")
    seeds = [int(seed) for seed in options.seeds.split(",") if seed] or SEEDS[options.field]
    result = measure(options.field, names, seeds)
    if not options.dry_run:
        before = kept()
        result = merged(before.get(options.field), result) if names else result
        record.write(RECORD, json.dumps(before | {options.field: result}, indent=1) + "\n")
    print(table(result, options.field))


if __name__ == "__main__":
    main()
