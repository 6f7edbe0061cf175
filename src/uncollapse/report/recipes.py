"""The section that only a comparison has: recipes side by side, with intervals over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from uncollapse.report import figures
from uncollapse.report.blocks import Block, Section, TableBlock, TextBlock, figure
from uncollapse.report.palette import SERIES
from uncollapse.report.sections import ENTROPY, REWARD, VALIDATION, swatches
from uncollapse.report.series import Arm, Estimate, Vector, pass_keys
from uncollapse.report.words import estimate, level, percent, seconds


def section(arms: Sequence[Arm]) -> Section:
    """Table of end values, the entropy-reward plane and the cost of a step."""
    if not arms:
        return Section(
            "recipes", "Recipes", "Recipes side by side", missing="No run of this comparison was found."
        )
    keys = [key for key in (REWARD, VALIDATION, *pass_keys(arms)[-1:], "eval/distinct") if _any(arms, key)]
    blocks: list[Block] = [_table(arms, keys)]
    if paths := _paths(arms):
        chosen = [arm.colour or SERIES[0] for arm in arms if arm.name in {name for name, _, _ in paths}]
        alt = "Entropy against reward: " + "; ".join(
            f"{name} from {level(float(h[0]))} nats and reward {level(float(r[0]))} to {level(float(h[-1]))} and {level(float(r[-1]))}"
            for name, h, r in paths
        )
        blocks.append(figure("plane", lambda axes: figures.plane(paths, axes[0], colours=chosen), height=360, alt=alt + ".",
                             caption="From dot to arrow: the way of each recipe"
                                     f"{', mean over seeds' if any(len(arm.logs) > 1 for arm in arms) else ''}. Up is better; up without going left is what a remedy is for."))  # fmt: skip
    costs = [(arm.name, cost) for arm in arms if (cost := arm.mean("time/step"))]
    if costs:
        colours = [arm.colour or SERIES[0] for arm in arms if arm.mean("time/step")]
        alt = "Time per step: " + ", ".join(f"{name} {seconds(value.mean)}" for name, value in costs) + "."
        blocks.append(figure("cost", lambda axes: figures.bars(
            costs, axes[0], title="Cost of a step", unit="wall time", colours=colours, text=seconds),
            height=36 * len(costs) + 60, alt=alt))  # fmt: skip
    blocks += [TextBlock(note) for note in _uneven(arms)]
    return Section(
        "recipes", "Recipes", "Recipes side by side", _lead(arms), "", tuple(blocks), ("time/step",)
    )


def _lead(arms: Sequence[Arm]) -> str:
    if all(len(arm.logs) == 1 for arm in arms):
        return "A single seed per recipe: the numbers are what these runs gave, without an interval, and may differ by chance."
    return "End values as mean \u00b1 half the width of the 95\u202f% interval over seeds."


def _table(arms: Sequence[Arm], keys: Sequence[str]) -> TableBlock:
    names = {
        REWARD: "reward",
        VALIDATION: "validation reward",
        "eval/distinct": "distinct answers",
    }
    columns = ["recipe", "seeds", "entropy (nats)", "entropy kept"]
    columns += [names.get(key, key.removeprefix("eval/")) for key in keys]
    rows = []
    for arm in arms:
        cells = [arm.name, str(len(arm.logs)), estimate(arm.last(ENTROPY)), _kept(arm)]
        cells += [estimate(arm.last(key)) for key in keys]
        rows.append(tuple(cells))
    return TableBlock(tuple(columns), tuple(rows), swatches=swatches(arms))


def _kept(arm: Arm) -> str:
    first, last = arm.first(ENTROPY), arm.last(ENTROPY)
    if first is None or last is None or len(first.values) != len(last.values) or min(first.values) <= 0:
        return "\u2013"
    share = Estimate(tuple(b / a for a, b in zip(first.values, last.values, strict=True)))
    return percent(share.mean) + ("" if share.half is None else f"\u202f\u00b1\u202f{percent(share.half)}")


def _paths(arms: Sequence[Arm]) -> list[tuple[str, Vector, Vector]]:
    paths = []
    for arm in arms:
        entropy, reward = arm.curve(ENTROPY), arm.curve(REWARD)
        if entropy is None or reward is None:
            continue
        common, mine, theirs = np.intersect1d(entropy.steps, reward.steps, return_indices=True)
        if common.size:
            paths.append((arm.name, entropy.values[mine], reward.values[theirs]))
    return paths


def _uneven(arms: Sequence[Arm]) -> list[str]:
    ends = {
        (arm.name, str(log.seed)): int(log.rows[-1]["step"]) + 1 if log.rows else 0
        for arm in arms
        for log in arm.logs
    }
    longest = max(ends.values(), default=0)
    short = [f"{name} seed {seed} ({steps})" for (name, seed), steps in ends.items() if steps < longest]
    return (
        [
            f"Not all runs reached {longest} steps: {', '.join(short)}. Curves over seeds show the steps that all reached."
        ]
        if short
        else []
    )


def _any(arms: Sequence[Arm], key: str) -> bool:
    return any(key in arm.metrics() for arm in arms)
