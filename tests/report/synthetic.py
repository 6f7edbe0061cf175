"""Seeded synthetic runs with the shape of real ones, for tests of reports: reward follows the entropy law."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from uncollapse.runs import Comparison, Run

HOSTILE = '<img src=x onerror="window.pwned=1"></span></div><script>window.pwned=2</script>'
KEPT = {"grpo": 0.12, "clip-cov": 0.55, "kl-cov": 0.72, "dapo": 0.3}
"""Share of its entropy that a recipe keeps."""

FRACTIONS = {"0.0002": 5.6, "0.002": 3.1, "0.02": 1.4, "0.2": 0.35, "0.5": 0.15, "1": 0.004}
TEXT = ["We", "need", "17", "+", "25", ".", "First", ",", "17", "+", "20", "=", "37", ",", "then", "37", "+", "5", "=", "42", ".", "So", "the", "answer", "is", "42", "."]  # fmt: skip


def metrics(recipe: str = "grpo", seed: int = 0, steps: int = 120) -> list[dict[str, Any]]:
    rng = np.random.default_rng([seed, *recipe.encode()])
    start, kept = 1.35 + 0.05 * rng.standard_normal(), KEPT[recipe] + 0.02 * rng.standard_normal()
    rows = []
    for step in range(steps):
        mean = start * (kept + (1 - kept) * math.exp(-4 * step / steps))
        entropy = mean * (1 + 0.03 * rng.standard_normal())
        progress = 1 - math.exp(-5 * step / steps)
        reward = 0.30 + 0.58 * progress + 0.03 * (kept - 0.12) + 0.025 * rng.standard_normal()
        row: dict[str, Any] = {
            "step": step,
            "time/step": 2.1 + 0.4 * (recipe != "grpo") + 0.1 * rng.random(),
            "reward/mean": reward,
            "reward/std": math.sqrt(max(reward * (1 - reward), 0.0)),
            "reward/zero_variance_groups": 0.1 + 0.6 * progress * (1 - kept),
            "entropy/token/mean": entropy,
            "entropy/token/p10": 0.12 * entropy,
            "entropy/token/p90": 2.2 * entropy,
            "covariance/token/mean": 0.004 * math.exp(-3 * step / steps) + 0.0008 * rng.standard_normal(),
            "clip/low/frac": 0.002 + 0.002 * rng.random(),
            "clip/high/frac": 0.004 + 0.003 * rng.random(),
            "kl/old/k3": 0.001 + 0.0005 * rng.random(),
            "length/mean": 24 + 6 * progress + rng.standard_normal(),
            "length/truncated": 0.03 * (1 - progress) + 0.005 * rng.random(),
            "grad/norm": 0.8 + 0.3 * rng.random(),
            "lr": 1e-5,
            "loss/policy": 0.05 * rng.standard_normal(),
        }
        row.update(
            {f"covariance/top/{k}": v * (1 + 0.1 * rng.standard_normal()) for k, v in FRACTIONS.items()}
        )
        row.update({f"entropy/position/{i}": entropy * (1.6 * math.exp(-i / 5) + 0.5) for i in range(24)})
        if step % 10 == 0 or step == steps - 1:
            one = reward - 0.03
            row["eval/reward"] = one
            row.update({f"eval/pass@{k}": 1 - (1 - one) ** (1 + 0.45 * kept * (k - 1)) for k in (1, 2, 4, 8)})
            row["eval/maj@8"] = min(one + 0.05, 1.0)
            row["eval/distinct"] = 1.2 + 2.6 * kept ** (0.5 * progress) * 0.8
        rows.append(row)
    return rows


def token_records(
    recipe: str = "grpo", seed: int = 0, steps: int = 120, hostile: bool = True
) -> list[dict[str, Any]]:
    rng = np.random.default_rng([seed, 1, *recipe.encode()])
    records = []
    for sample in range(3):
        tokens = [("" if i == 0 or t in ".," else " ") + t for i, t in enumerate(TEXT)]
        tokens.insert(12, "\n")
        if hostile and sample == 0:
            tokens += [" " + HOSTILE, "</span>", "<script>alert(1)</script>"]
        start = rng.gamma(1.2, 1.0, len(tokens))
        end = start * np.where(rng.random(len(tokens)) < 0.85, KEPT[recipe], 1.25)
        for step in (0, steps // 4, steps // 2, steps - 1):
            share = 1 - math.exp(-4 * step / steps)
            entropy = start + (end - start) * share
            records.append(
                {
                    "step": step,
                    "sample": f"probe-{sample}",
                    "prompt": f"What is 17 + 25? {HOSTILE if hostile and sample == 1 else ''}",
                    "tokens": tokens,
                    "entropy": entropy.tolist(),
                    "logp": (-0.8 * entropy).tolist(),
                    "reward": 1.0,
                }
            )
    return records


def run(
    path: Path,
    recipe: str = "grpo",
    seed: int = 0,
    steps: int = 120,
    hostile: bool = True,
    only: tuple[str, ...] = ("",),
) -> Run:
    """`only` names the beginnings of the metrics to log; fewer metrics make a report that is quicker to draw."""
    made = Run.create(
        path,
        {
            "recipe": recipe,
            "model": "tiny",
            "task": "modsum",
            "seed": seed,
            "steps": steps,
            "optimizer": {"name": "adamw", "lr": 1e-5},
            "note": HOSTILE if hostile else "synthetic",
            "versions": {"uncollapse": "0.1.0", "torch": "2.13.0"},
        },
    )
    for row in metrics(recipe, seed, steps):
        made.append({key: value for key, value in row.items() if key == "step" or key.startswith(only)})
    for record in token_records(recipe, seed, steps, hostile):
        made.append_tokens(record)
    return made


def comparison(
    path: Path,
    seeds: int = 3,
    steps: int = 60,
    recipes: tuple[str, ...] = ("grpo", "clip-cov", "kl-cov"),
    only: tuple[str, ...] = ("",),
) -> Comparison:
    made = Comparison.create(
        path, {"model": "tiny", "task": "modsum", "recipes": list(recipes), "seeds": list(range(seeds))}
    )
    for recipe in recipes:
        for seed in range(seeds):
            run(made.run_path(recipe, seed), recipe, seed, steps, only=only)
    return made
