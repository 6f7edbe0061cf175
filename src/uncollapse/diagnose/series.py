"""A column of a log as a series that questions can be asked of: where it began, where it is, and whether that is a change.

Logs are noisy and neighbouring steps repeat each other. So levels are medians over several steps, noise is measured
against a running median, and every difference is judged in units of its own standard error with the autocorrelation
counted in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import numpy as np
from jaxtyping import Bool, Float
from scipy.ndimage import median_filter

from uncollapse.diagnose.log import Log

Vector = Float[np.ndarray, " _"]

BINS = 400
"""Bins that the later part of a long log is averaged into: change points cost the square of it."""

HEAD = 100
"""Points at the start that are kept as they are, since runs collapse in their first steps."""

LARGEST = 1e100
"""Beyond this a number is taken for not finite: sums of its squares are not."""

FIRST = (0.05, 3, 20)
"""The run's own first steps: this share of the logged points, at least and at most so many of them. A longer stretch
would already hold the collapse of a run that collapses early."""

LAST = (0.1, 3, 50)
"""The same at the end; longer, since nothing is in a hurry there."""


@dataclass(frozen=True)
class Series:
    """The finite values of one column, in the order of steps."""

    name: str
    step: Vector
    value: Vector

    def __len__(self) -> int:
        return len(self.value)

    @cached_property
    def start(self) -> float:
        """Level of the run's own first steps: their median."""
        return float(np.median(self.value[: _count(len(self), FIRST)]))

    @cached_property
    def end(self) -> float:
        """Level of the last steps: their median."""
        return float(np.median(self.value[-_count(len(self), LAST) :]))

    @cached_property
    def smooth(self) -> Vector:
        """Running median over a twentieth of the points (at least 5): single spikes are gone, steps stay steep."""
        return running_median(self.value, max(5, len(self) // 20))

    @cached_property
    def _rest(self) -> Vector:
        """What is left without the course of the series."""
        # A window as wide as the course allows: a narrow one follows autocorrelated noise and takes it for the course.
        return self.value - running_median(self.value, max(7, len(self) // 6))

    @cached_property
    def noise(self) -> float:
        """Standard deviation of the noise, from median absolute deviations.

        That about the course, or that of each value about its two neighbours where it is larger: the course follows some
        of any noise, neighbours follow each other where it is autocorrelated.
        """
        bends = self.value[1:-1] - (self.value[:-2] + self.value[2:]) / 2
        return max(_spread(self._rest), _spread(bends) / sqrt(1.5) if bends.size else 0.0)

    @cached_property
    def repeats(self) -> float:
        """How many steps count as one observation: (1 + rho) / (1 - rho) of their lag-one autocorrelation."""
        rest = np.clip(self._rest, -4 * self.noise, 4 * self.noise)
        power = float(rest @ rest)
        rho = float(rest[1:] @ rest[:-1]) / power if power > 0 else 0.0
        rho = min(max(rho, 0.0), 0.9)
        return (1 + rho) / (1 - rho)

    @cached_property
    def start_error(self) -> float:
        """Standard error of `start`."""
        return self.noise * sqrt(1.57 * self.repeats / _count(len(self), FIRST))

    @cached_property
    def score(self) -> float:
        """`end` - `start` in its own standard errors; 0 if nothing changed, infinite if there is no noise at all."""
        counts = _count(len(self), FIRST), _count(len(self), LAST)
        # 1.57: the variance of a median over that of a mean, for normal noise.
        error = self.noise * sqrt(1.57 * self.repeats * sum(1 / count for count in counts))
        change = self.end - self.start
        if error > 0:
            return change / error
        return float(np.sign(change)) * np.inf if change else 0.0

    def since(self, where: Bool[np.ndarray, " _"]) -> int:
        """First step from which `where` (one flag per value) holds to the end, a tenth of exceptions granted."""
        share = np.cumsum(where[::-1]) / np.arange(1, len(where) + 1)
        held = np.flatnonzero((share >= 0.9)[::-1] & where)
        return int(self.step[held[0]]) if held.size else int(self.step[-1])

    def binned(self) -> Series:
        """At most `HEAD` + `BINS` points: the first as they are, the rest as medians of equally many steps."""
        if len(self) <= HEAD + BINS:
            return self
        parts = np.array_split(np.arange(HEAD, len(self)), BINS)
        step = [float(self.step[part].mean()) for part in parts]
        value = [float(np.median(self.value[part])) for part in parts]
        return Series(self.name, np.r_[self.step[:HEAD], step], np.r_[self.value[:HEAD], value])

    def at(self, step: Vector) -> Vector:
        """Values at other steps, straight between its own."""
        return np.interp(step, self.step, self.value)


def series(log: Log, name: str, *, at_least: int = 1) -> Series | None:
    """A column without its gaps, or None if fewer than `at_least` finite values were logged."""
    values = np.asarray(log[name], dtype=np.float64)
    known = np.abs(values) < LARGEST
    if known.sum() < at_least:
        return None
    return Series(name, np.asarray(log.step, dtype=np.float64)[known], values[known])


def _count(n: int, rule: tuple[float, int, int]) -> int:
    share, least, most = rule
    return min(max(round(share * n), least), most, n)


def running_median(values: Vector, width: int) -> Vector:
    """Median of `width` values around each, the ends repeated; over 5000 values, and for wide windows, an approximation."""
    width = min(width | 1, len(values) - (len(values) + 1) % 2)
    if width < 3:
        return values
    if len(values) <= 5000 or width <= 9:
        return np.asarray(median_filter(values, size=width, mode="nearest"))
    # A long log: medians of blocks, straight lines between them, at a cost that does not grow with the width.
    half = max(width // 4, 1)
    edges = np.arange(0, len(values), half)
    middle = [float(np.median(values[max(0, i - half) : i + 2 * half])) for i in edges]
    return np.interp(np.arange(len(values)), edges + (half - 1) / 2, middle)


def _spread(values: Vector) -> float:
    return float(1.4826 * np.median(np.abs(values - np.median(values))))
