"""Names under which data of a recipe travels through verl, beside verl's own."""

from __future__ import annotations

from uncollapse.measure.statistics import Entropy, Logp, Statistic
from uncollapse.policy.batch import Stat

PREFIX = "uncollapse/"

ROW = PREFIX + "row"
"""Number of each row in the rollout batch: prompt times group size plus sample, before any balancing."""

OLD = PREFIX + "old/"
REF = PREFIX + "ref/"
UID, MASK = PREFIX + "uid", PREFIX + "mask"
COLUMN, SCALAR, STAT = PREFIX + "column/", PREFIX + "scalar/", PREFIX + "stat/"
CLOCK = PREFIX + "clock"
STATISTICS = PREFIX + "statistics"
LAST_UPDATE = PREFIX + "last_update"

SUM, WEIGHT = "|sum", "|weight"
"""Endings of the two halves of a metric that adds up over micro-batches and processes."""


def output_name(statistic: Statistic) -> str:
    """The key of a statistic among the outputs of verl's engines."""
    own = {Logp(): "log_probs", Entropy(): "entropy"}
    return own.get(statistic, f"{PREFIX}{statistic!r}")


def stat_name(stat: Stat) -> str:
    """The key of a recorded statistic in the data of a micro-batch."""
    return f"{STAT}{stat!r}"
