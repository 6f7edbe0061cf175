"""Phases of a run: change points of entropy and reward, and what each stretch between them is.

Change points are those of a piecewise straight line in log-entropy and reward together (an exponential decay of the
entropy is one straight piece), found by PELT of the library `ruptures` with a line-fit cost of our own. Both series are
measured in units of their own noise; the penalty per change point grows with their autocorrelation.

Every level is relative to the run's own first steps, since entropies per token differ by more than tenfold between
models and tasks; no threshold below is in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, log, nan, sqrt
from typing import Literal

import numpy as np
import ruptures
from jaxtyping import Float

from uncollapse.diagnose.series import Series, running_median

State = Literal["healthy", "collapsing", "collapsed", "exploding", "plateau", "unknown"]

SPENT = 0.15
"""Share of the starting entropy below which a run has collapsed. Published runs that collapse keep 2 to 6 percent
(arXiv 2505.22617 reports 94 percent gone); runs under a remedy settle at a quarter or more. 15 percent lies between."""

LOST = 2 / 3
"""Share of the starting entropy above which a decline is learning, not collapse: rewarded answers have to become more
likely, so some entropy is always spent."""

DOUBLED = 2.0
"""Multiple of the starting entropy from which a rise is an explosion: doubling it squares the number of choices
exp(H) per token. Smaller rises come with clip-higher and entropy bonuses that do their work."""

SIGNIFICANT = 4.0
"""Standard errors from which a slope or difference counts. Four, not two: the noise is not normal, its autocorrelation
is estimated, and dozens of series are looked at."""

FEWEST = 8
"""Logged steps with entropy below which no phase is named."""

UNMOVED = 2.5
"""Standard errors within which the reward counts as standing still: to say that nothing moves takes more than not being
able to show that it does."""

LANDING = 0.08
"""Share of the run below which a pause in a fall is part of the fall."""

STILL = 0.25
"""Share of the run that entropy and reward have to stand still for to be called a plateau."""


@dataclass(frozen=True)
class Phase:
    """A stretch of the run from `first` to `last` step.

    `start` and `end` are the fitted entropy at its two ends as shares of the run's first level; `halving` is the number
    of steps in which the entropy halves, infinite where it does not fall.
    """

    state: State
    first: int
    last: int
    start: float
    end: float
    halving: float = float("inf")


@dataclass(frozen=True)
class Course:
    """What the entropy did: its starting level (nats, all shares are of it) and the phases."""

    start: float
    phases: tuple[Phase, ...]

    @property
    def state(self) -> State:
        """The state that the run is in, that of its last phase; `unknown` without phases."""
        return self.phases[-1].state if self.phases else "unknown"


@dataclass(frozen=True)
class _Stretch:
    """Points [begin, stop) with the ends of the fitted lines of log-entropy (relative to the start).

    `way` is the direction of the entropy, `still` whether the reward does not move beyond its noise.
    """

    begin: int
    stop: int
    first: float
    last: float
    way: int
    still: bool
    state: State = "healthy"


class _LineCost(ruptures.base.BaseCost):
    """Residual sum of squares about a straight line in time, summed over the columns; O(1) by prefix sums."""

    model = "straight line"
    min_size = 3

    def fit(self, signal: Float[np.ndarray, "row feature"]) -> _LineCost:
        """Prepare the prefix sums."""
        self.signal = signal
        t = np.arange(len(signal), dtype=np.float64)[:, None]
        columns = np.hstack([signal, signal**2, t * signal])
        self._sums = np.vstack([np.zeros(columns.shape[1]), np.cumsum(columns, axis=0)])
        return self

    def error(self, start: int, end: int) -> float:
        """Cost of one line over [start, end)."""
        n = end - start
        total = self._sums[end] - self._sums[start]
        d = total.size // 3
        y, squares, moments = total[:d], total[d : 2 * d], total[2 * d :]
        centre = (start + end - 1) / 2
        spread = n * (n * n - 1) / 12
        along = moments - centre * y
        return float(np.maximum(squares - y * y / n - along * along / spread, 0.0).sum())


def course(entropy: Series, reward: Series | None) -> Course:
    """The run's phases in the order of time; none if fewer than `FEWEST` steps have entropy.

    `entropy` in nats (as logged, not binned); `reward` in any unit, or None.
    """
    if len(entropy) < FEWEST:
        return Course(entropy.start if len(entropy) else nan, ())
    binned, start = entropy.binned(), entropy.start
    relative = _relative(binned, start)
    steps = binned.step
    rewards = None if reward is None or len(reward) < FEWEST else reward.binned().at(steps)
    cuts = _cut(relative, rewards)
    pieces = [_stretch(relative, rewards, begin, stop) for begin, stop in cuts]
    if pieces[0].way < 0 and pieces[0].first > 0:
        # A run that falls at once has lost something before its first steps are over: its start is where the line starts.
        start *= exp(pieces[0].first)
        pieces = [_stretch(relative - pieces[0].first, rewards, begin, stop) for begin, stop in cuts]
    labelled = [part for stretch in _joined(pieces, len(steps)) for part in _labelled(stretch)]
    named = _without_blips(labelled, len(steps))
    if rewards is not None:
        named = _with_plateau(named, pieces, len(steps))
    return Course(start, tuple(_phase(stretch, steps) for stretch in named))


def _relative(entropy: Series, start: float) -> Float[np.ndarray, " row"]:
    """Log of entropy over its starting level, spikes of single steps removed; zero and below become the floor."""
    level = max(start, 1e-9)
    # A step or two that leave their four neighbours by far say nothing about a phase. (The median of five follows any
    # slope, also at the ends.)
    middle = running_median(entropy.value, 5)
    away = np.abs(entropy.value - middle) > 6 * max(entropy.noise, 1e-12 * level)
    values = np.where(away, middle, entropy.value)
    return np.log(np.maximum(values / level, 1e-3))


def _cut(entropy: np.ndarray, reward: np.ndarray | None) -> list[tuple[int, int]]:
    columns = [entropy] if reward is None else [entropy, reward]
    scaled, inflation = [], 1.0
    for column in columns:
        line = Series("", np.arange(len(column), dtype=np.float64), column)
        # No noise at all (a constant, a noiseless file) would make every wiggle a change point.
        unit = max(line.noise, 0.01 * float(np.ptp(column)), 1e-9 * float(np.abs(column).max()), 1e-12)
        scaled.append((column - column.mean()) / unit)
        inflation = max(inflation, line.repeats)
    signal = np.stack(scaled, axis=1)
    n, d = signal.shape
    # Three parameters a column and cut: level, slope and place; BIC, with as many observations as are independent.
    penalty = 3 * d * log(n) * inflation
    search = ruptures.Pelt(custom_cost=_LineCost(), min_size=3, jump=max(1, n // 125)).fit(signal)
    stops = [int(stop) for stop in search.predict(pen=penalty)]
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _stretch(entropy: np.ndarray, reward: np.ndarray | None, begin: int, stop: int) -> _Stretch:
    first, last, way = _line(entropy[begin:stop])
    # A tenth, since a significant slope over a long stretch can still be next to nothing.
    way = way if abs(last - first) > 0.1 else 0
    still = reward is not None and _line(reward[begin:stop], UNMOVED)[2] == 0
    return _Stretch(begin, stop, first, last, way, still)


def _line(values: np.ndarray, threshold: float = SIGNIFICANT) -> tuple[float, float, int]:
    """Ends of the fitted line, and its direction: -1, 0 or 1, 0 if its slope is within the noise."""
    n = len(values)
    t = np.arange(n) - (n - 1) / 2
    spread = float(t @ t)
    slope, middle = float(t @ values) / spread, float(values.mean())
    rest = values - middle - slope * t
    power = float(rest @ rest)
    rho = min(max(float(rest[1:] @ rest[:-1]) / power, 0.0), 0.9) if power > 0 else 0.0
    error = sqrt(power / max(n - 2, 1) * (1 + rho) / (1 - rho) / spread)
    way = (
        0
        if abs(slope) <= threshold * error or abs(slope) * n <= 1e-9 * (abs(middle) + 1e-12)
        else int(np.sign(slope))
    )
    return middle + slope * t[0], middle + slope * t[-1], way


def _joined(pieces: Sequence[_Stretch], total: int) -> list[_Stretch]:
    """Neighbours of one direction as one. A landing on a staircase is part of the stairs: a short piece without a
    significant direction of its own takes that of the piece before it, if the level goes on that way."""
    out: list[_Stretch] = []
    for piece in pieces:
        way = piece.way
        if out and not way and out[-1].way:
            onward = out[-1].way * (piece.last - piece.first)
            short = piece.stop - piece.begin < LANDING * total
            way = out[-1].way if onward > 0.1 or (short and onward > -0.05) else 0
        if out and out[-1].way == way:
            out[-1] = _merged(out[-1], piece)
        else:
            out.append(replace(piece, way=way))
    return out


def _merged(left: _Stretch, right: _Stretch) -> _Stretch:
    return replace(left, stop=right.stop, last=right.last, still=left.still and right.still)


def _labelled(stretch: _Stretch) -> list[_Stretch]:
    """The stretch with its state; a fall through `SPENT` is two, one on either side."""
    spent, first, last = log(SPENT), stretch.first, stretch.last
    if stretch.way < 0 and first > spent > last:
        share = (first - spent) / (first - last)
        at = stretch.begin + round(share * (stretch.stop - stretch.begin))
        if stretch.begin < at < stretch.stop:
            above = replace(stretch, stop=at, last=spent, state="collapsing")
            return [above, replace(stretch, begin=at, first=spent, state="collapsed")]
    return [replace(stretch, state=_state(stretch))]


def _state(stretch: _Stretch) -> State:
    middle = (stretch.first + stretch.last) / 2
    if middle <= log(SPENT):
        return "collapsed"
    if stretch.way < 0:
        return "collapsing" if stretch.last < log(LOST) else "healthy"
    reached = stretch.last if stretch.way > 0 else middle
    return "exploding" if reached >= log(DOUBLED) else "healthy"


def _without_blips(stretches: Sequence[_Stretch], total: int) -> list[_Stretch]:
    """Neighbours of one state as one; what is too short to be a phase takes the state before it, unless it is the fall."""
    out: list[_Stretch] = []
    for index, one in enumerate(stretches):
        blip = one.stop - one.begin < max(3, 0.03 * total) and one.state != "collapsing"
        if out and (out[-1].state == one.state or (blip and index + 1 < len(stretches))):
            out[-1] = _merged(out[-1], one)
        else:
            out.append(one)
    return out


def _with_plateau(named: list[_Stretch], pieces: Sequence[_Stretch], total: int) -> list[_Stretch]:
    """Split off the end of a healthy last phase in which neither entropy nor reward moves any more."""
    last = named[-1]
    begin = last.stop
    for piece in reversed(pieces):
        if piece.begin < last.begin or piece.way != 0 or not piece.still:
            break
        begin = piece.begin
    if last.state != "healthy" or last.stop - begin < STILL * total:
        return named
    first = next(piece.first for piece in pieces if piece.begin == begin)
    tail = replace(last, begin=begin, first=first, state="plateau")
    return [*named[:-1], *([replace(last, stop=begin, last=first)] if begin > last.begin else []), tail]


def _phase(stretch: _Stretch, steps: np.ndarray) -> Phase:
    span, fall = float(steps[stretch.stop - 1] - steps[stretch.begin]), stretch.first - stretch.last
    halving = span * log(2) / fall if stretch.way < 0 and span > 0 and fall > 0 else float("inf")
    ends = exp(stretch.first), exp(stretch.last)
    return Phase(stretch.state, int(steps[stretch.begin]), int(steps[stretch.stop - 1]), *ends, halving)
