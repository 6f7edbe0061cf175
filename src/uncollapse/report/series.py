"""From logs to curves: what a report plots and quotes, averaged over seeds with honest intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

from uncollapse.report.palette import series_colour
from uncollapse.runs import BrokenLines, Comparison, Run

_LARGEST = 1e150

Vector = Float[np.ndarray, " _"]


@dataclass(frozen=True)
class Log:
    """One run, read: its configuration, metric rows and token records, and what could not be read."""

    config: dict[str, Any]
    rows: list[dict[str, Any]]
    tokens: list[dict[str, Any]]
    broken: dict[str, list[int]] = field(default_factory=dict)

    @property
    def seed(self) -> object:
        """The seed in the configuration, or None."""
        return self.config.get("seed")

    def values(self, key: str) -> tuple[Vector, Vector]:
        """Steps and finite values of a metric."""
        pairs = [(row["step"], row[key]) for row in self.rows if is_number(row.get(key))]
        array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return array[:, 0], array[:, 1]


@dataclass(frozen=True)
class Curve:
    """A metric over rollout steps; `low` and `high` bound the band, whatever `band` says it is.

    `colour` is the light colour of its recipe, empty where the figure is to choose.
    """

    name: str
    steps: Vector
    values: Vector
    low: Vector | None = None
    high: Vector | None = None
    band: str = ""
    colour: str = ""


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds, with the half width of its 95 % Student interval (None for a single seed)."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.values))

    @property
    def half(self) -> float | None:
        """Half width of the 95 % confidence interval of the mean, or None if one seed says nothing about it."""
        return None if len(self.values) < 2 else float(half_width(np.array(self.values)[:, None])[0])


@dataclass(frozen=True)
class Arm:
    """The runs of one recipe, one per seed; `colour` is what it is drawn in, empty if it stands alone."""

    name: str
    logs: tuple[Log, ...]
    colour: str = ""

    def metrics(self) -> list[str]:
        """Names of all metrics with at least one finite value, in the order in which they were logged."""
        seen: dict[str, None] = {}
        for log in self.logs:
            for row in log.rows:
                seen.update(dict.fromkeys(key for key, value in row.items() if is_number(value)))
        seen.pop("step", None)
        return list(seen)

    def curve(self, key: str, *, low: str = "", high: str = "", band: str = "") -> Curve | None:
        """Mean over seeds at the steps that all seeds reached, or None if the metric was not logged.

        The band is the 95 % interval of the mean over seeds; of a single seed, the metrics `low` and `high` if given.
        """
        found = [pair for pair in (log.values(key) for log in self.logs) if pair[0].size]
        if not found:
            return None
        steps = _common(pair[0] for pair in found)
        if not steps.size:
            steps, found = found[0][0], found[:1]
        table = np.stack([_at(pair, steps) for pair in found])
        mean = table.mean(axis=0)
        if len(found) > 1:
            half = half_width(table)
            return Curve(
                self.name,
                steps,
                mean,
                mean - half,
                mean + half,
                f"95\u202f% interval over {len(found)} seeds",
                self.colour,
            )
        bounds = [self.logs[0].values(name) for name in (low, high) if name and len(self.logs) == 1]
        if len(bounds) == 2 and all(np.isin(steps, bound[0]).all() for bound in bounds):
            return Curve(
                self.name, steps, mean, _at(bounds[0], steps), _at(bounds[1], steps), band, self.colour
            )
        return Curve(self.name, steps, mean, colour=self.colour)

    def first(self, key: str) -> Estimate | None:
        """Level at the start: mean of the first twentieth of the logged values (at least one) of each seed."""
        return self._level(key, lambda values, width: values[:width])

    def last(self, key: str) -> Estimate | None:
        """Level at the end: mean of the last twentieth of the logged values (at least one) of each seed."""
        return self._level(key, lambda values, width: values[-width:])

    def mean(self, key: str) -> Estimate | None:
        """Mean over all steps of each seed."""
        return self._level(key, lambda values, _: values)

    def _level(self, key: str, part: Callable[[Vector, int], Vector]) -> Estimate | None:
        found = [log.values(key)[1] for log in self.logs]
        levels = tuple(float(part(v, max(1, v.size // 20)).mean()) for v in found if v.size)
        return Estimate(levels) if levels else None


def arm_of_run(run: Run) -> Arm:
    """A single run as an arm."""
    return Arm(recipe_name(run.config) or run.path.name, (read(run),))


def arms_of_comparison(comparison: Comparison) -> list[Arm]:
    """The recipes of a comparison, in its order."""
    grouped = comparison.runs()
    colours = [series_colour(i) if len(grouped) > 1 else "" for i in range(len(grouped))]
    return [
        Arm(name, tuple(map(read, runs)), colour)
        for (name, runs), colour in zip(grouped.items(), colours, strict=True)
    ]


def read(run: Run) -> Log:
    """Read a run once. Broken lines are counted in the result, and so need no warning as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BrokenLines)
        return Log(run.config, run.metrics(), run.tokens(), run.broken_lines())


def recipe_name(config: dict[str, Any]) -> str:
    """Name of the recipe in a configuration: `recipe: grpo` or `recipe: {name: grpo}`; empty if there is none."""
    recipe = config.get("recipe")
    return str(recipe.get("name", "") if isinstance(recipe, dict) else recipe or "")


def is_number(value: object) -> bool:
    """Whether a logged value can be plotted and averaged: a finite number, no flag, and its square no overflow."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST


def half_width(table: Float[np.ndarray, "row sample"]) -> Vector:
    """Half width of the 95 % Student interval of the mean over rows (seeds); needs at least two rows."""
    n = table.shape[0]
    return np.asarray(stdtrit(n - 1, 0.975) * table.std(axis=0, ddof=1) / math.sqrt(n), dtype=np.float64)


def pass_keys(arms: Sequence[Arm], prefix: str = "eval/pass@") -> list[str]:
    """Metrics `eval/pass@k` that any arm logged, by k."""
    found = {
        key
        for arm in arms
        for key in arm.metrics()
        if key.startswith(prefix) and key[len(prefix) :].isdigit()
    }
    return sorted(found, key=lambda key: int(key[len(prefix) :]))


def _common(all_steps: Iterable[Vector]) -> Vector:
    first, *rest = all_steps
    for steps in rest:
        first = np.intersect1d(first, steps)
    return first


def _at(pair: tuple[Vector, Vector], steps: Vector) -> Vector:
    return pair[1][np.searchsorted(pair[0], steps)]
