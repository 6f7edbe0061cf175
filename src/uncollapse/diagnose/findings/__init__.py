"""Everything that `diagnose` can find: each a pure function of the facts, registered in `ALL`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from uncollapse.diagnose.finding import SEVERITIES, Facts, Finding
from uncollapse.diagnose.findings import answers, entropy, reading, rewards, updates

Finder = Callable[[Facts], Finding | Iterable[Finding] | None]

ALL: tuple[Finder, ...] = (
    entropy.collapse,
    entropy.explosion,
    entropy.low_start,
    entropy.impossible,
    entropy.near_ceiling,
    rewards.dead_groups,
    rewards.plateau,
    rewards.fall,
    rewards.hacking,
    rewards.pass_at_k,
    answers.length_collapse,
    answers.length_explosion,
    answers.truncation,
    updates.heavy_clipping,
    updates.upper_clip_only,
    updates.inert_updates,
    updates.mismatch,
    updates.kl_blow_up,
    updates.gradient_spikes,
    updates.not_finite,
    reading.no_entropy,
    reading.too_short,
    reading.notes,
)
"""In the order in which findings of one severity are listed."""


def find(facts: Facts) -> tuple[Finding, ...]:
    """All findings, the severest first."""
    found: list[Finding] = []
    for finder in ALL:
        result = finder(facts)
        if isinstance(result, Finding):
            found.append(result)
        elif result is not None:
            found.extend(result)
    return tuple(sorted(found, key=lambda one: -SEVERITIES.index(one.severity)))
