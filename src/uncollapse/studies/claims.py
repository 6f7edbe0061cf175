"""Claims of a paper and their verdicts: criteria are values fixed in code before the run, verdicts are computed.

A criterion has three outcomes. A `Bound` compares one estimate with a threshold:

- judged by its `interval`: met if the whole confidence interval satisfies the comparison, failed if none of it does,
  open if the interval straddles the threshold;
- judged by its `value`: met if the point estimate satisfies the comparison, failed if no point of the interval
  does, open in between.

`AllOf` is met if every part is, failed if one fails, open otherwise; `AnyOf` the other way round. An estimate that is
missing or NaN leaves its bound open. Met means `reproduced`, failed `not reproduced`, open `inconclusive`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypeAlias

from uncollapse.studies.statistics import Estimate

Estimates: TypeAlias = Mapping[str, Estimate]
Op: TypeAlias = Literal[">=", ">", "<=", "<"]

_OPS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}


class Verdict(str, Enum):
    """What the measurement says about a claim at this scale."""

    reproduced = "reproduced"
    not_reproduced = "not reproduced"
    inconclusive = "inconclusive"


class State(Enum):
    """Outcome of one criterion."""

    met = "met"
    failed = "failed"
    open = "open"


@dataclass(frozen=True)
class Bound:
    """`statistic` `op` `threshold`, judged by the point estimate (`value`) or the whole `interval`."""

    statistic: str
    op: Op
    threshold: float
    by: Literal["value", "interval"] = "interval"

    def state(self, estimates: Estimates) -> State:
        """Met, failed or open on these estimates."""
        estimate = estimates.get(self.statistic)
        if estimate is None or math.isnan(estimate.value):
            return State.open
        holds = [_OPS[self.op](x, self.threshold) for x in (estimate.low, estimate.high)]
        value_holds = _OPS[self.op](estimate.value, self.threshold)
        if all(holds) or (self.by == "value" and value_holds):
            return State.met
        return State.open if any(holds) or value_holds else State.failed

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """This bound alone."""
        return (self,)

    def __str__(self) -> str:
        judged = "95% interval of " if self.by == "interval" else ""
        return f"{judged}{self.statistic} {self.op} {self.threshold:g}"


@dataclass(frozen=True)
class AllOf:
    """Every part has to be met."""

    parts: tuple[Criterion, ...]

    def state(self, estimates: Estimates) -> State:
        """Met if all parts are, failed if one is, else open."""
        states = {part.state(estimates) for part in self.parts}
        if State.failed in states:
            return State.failed
        return State.open if State.open in states else State.met

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """Every bound inside."""
        return tuple(bound for part in self.parts for bound in part.bounds)

    def __str__(self) -> str:
        return " and ".join(f"({part})" if isinstance(part, AnyOf) else str(part) for part in self.parts)


@dataclass(frozen=True)
class AnyOf:
    """One part has to be met."""

    parts: tuple[Criterion, ...]

    def state(self, estimates: Estimates) -> State:
        """Met if one part is, failed if all are, else open."""
        states = {part.state(estimates) for part in self.parts}
        if State.met in states:
            return State.met
        return State.open if State.open in states else State.failed

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """Every bound inside."""
        return tuple(bound for part in self.parts for bound in part.bounds)

    def __str__(self) -> str:
        return " or ".join(f"({part})" if isinstance(part, AllOf) else str(part) for part in self.parts)


Criterion: TypeAlias = Bound | AllOf | AnyOf


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper, what we measure for it, and the criterion, fixed before the run.

    `effect` names the estimate that is the claim's effect size. `contradicted_if` replaces "the criterion failed" as the
    condition of `not reproduced`, for claims where missing the criterion is no evidence against them.
    """

    id: str
    paper_says: str
    measured: str
    criterion: Criterion
    effect: str
    contradicted_if: Criterion | None = None

    @property
    def criterion_text(self) -> str:
        """The criterion in words, derived from the predicate so that the two cannot differ."""
        text = f"reproduced if {self.criterion}"
        if self.contradicted_if is not None:
            return f"{text}; not reproduced if {self.contradicted_if}; else inconclusive"
        return text

    def judge(self, estimates: Estimates) -> Verdict:
        """The verdict on these estimates."""
        state = self.criterion.state(estimates)
        if state is State.met:
            return Verdict.reproduced
        if self.contradicted_if is not None:
            state = State.failed if self.contradicted_if.state(estimates) is State.met else State.open
        return Verdict.not_reproduced if state is State.failed else Verdict.inconclusive
