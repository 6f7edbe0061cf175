"""Findings about entropy: collapse, explosion, a start with nothing left, values that cannot be entropies, the ceiling."""

from __future__ import annotations

import numpy as np

from uncollapse.diagnose.finding import (
    DEAD,
    ENTROPY,
    Evidence,
    Facts,
    Finding,
    Number,
    Severity,
    percent,
    short,
)
from uncollapse.diagnose.phases import SIGNIFICANT

NARROW = 0.05
"""Nats per token below which a run may have begun collapsed: exp(0.05) = 1.05 choices. A run's own start cannot tell
that, so this one level is absolute; alone it decides nothing, equal rewards or answers have to confirm it."""

LARGEST = 12.5
"""Nats: ln of the largest vocabularies in use (262,144 tokens). No mean entropy per token can be above."""

NEARLY = 0.9
"""Share of the way to the law's ceiling from which little is left to gain."""


def collapse(facts: Facts) -> Finding | None:
    """The entropy is spent, or on its way there."""
    course, entropy = facts.course, facts.series(ENTROPY)
    if entropy is None or course.state not in ("collapsed", "collapsing") or begins_collapsed(facts):
        return None
    fall = [phase for phase in course.phases if phase.state in ("collapsing", "collapsed")]
    since = fall[0].first
    left = entropy.end / course.start if course.start > 0 else 0.0
    numbers = [
        Number("start", course.start, "nats"),
        Number("now", entropy.end, "nats"),
        Number("left", 100 * left, "%"),
    ]
    learning = _still_more_able(facts)
    if course.state == "collapsed":
        severity: Severity = "severe"
        text = f"Entropy fell from {short(course.start)} to {short(entropy.end)} nats per token; {percent(left)} of the start is left."
    else:
        severity, ahead = _pace(facts)
        text = f"Entropy has fallen from {short(course.start)} to {short(entropy.end)} nats per token and {ahead}."
        numbers.append(Number("halves every", fall[-1].halving, "steps"))
    if learning:
        severity = "info" if course.state == "collapsing" else "warning"
        text += f" {learning} still rises, so part of this is learning."
    return Finding(
        "entropy-collapse",
        "Entropy collapse" if course.state == "collapsed" else "Entropy is collapsing",
        severity,
        text,
        Evidence((ENTROPY, DEAD) if facts.series(DEAD) else (ENTROPY,), (since,), tuple(numbers)),
        since,
        "medium" if learning or len(entropy) < 20 else "high",
        ("adaptive-entropy", "siren", "clip-cov", "aepo-arbitrary", "kl-cov", "clip-higher", "entropy-bonus")
        if not facts.inert
        else ("adaptive-entropy", "siren", "clip-cov", "aepo-arbitrary", "entropy-bonus", "more-updates"),
    )  # fmt: skip


def _pace(facts: Facts) -> tuple[Severity, str]:
    found = facts.forecast
    if found is None or found.step is None:
        return "warning", "still falls, at a pace that does not spend it within three times the run so far"
    now = int(facts.log.step[-1])
    until = f" (95 %: {found.low:,} to {f'{found.high:,}' if found.high else 'unknown'})" if found.low else ""
    text = f"is spent at step {found.step:,}{until} if it keeps its pace"
    # As long again as the run so far: near enough that letting it run on is a decision.
    return ("severe" if found.step - now <= max(facts.span, 1) else "warning"), text


def _still_more_able(facts: Facts) -> str:
    """Name of the pass@k of the largest k if it rises beyond doubt."""
    known = [one for one in facts.pass_at() if one[0] > 1]
    if not known:
        return ""
    k, name = known[-1]
    found = facts.series(name, 5)
    return f"Held-out pass@{k}" if found is not None and found.score > SIGNIFICANT else ""


def explosion(facts: Facts) -> Finding | None:
    """The entropy has left its start upwards."""
    course, entropy = facts.course, facts.series(ENTROPY)
    if entropy is None or course.state != "exploding":
        return None
    phase = course.phases[-1]
    times = entropy.end / course.start
    reward = facts.series("reward/mean")
    falling = reward is not None and reward.end < reward.smooth.max() - SIGNIFICANT * reward.noise
    return Finding(
        "entropy-explosion",
        "Entropy explosion",
        "severe" if falling or times >= 4 else "warning",
        f"Entropy rose to {short(times)} times its start ({short(course.start)} to {short(entropy.end)} nats per token)"
        + (", and the reward falls with it." if falling else "."),
        Evidence((ENTROPY, "reward/mean"), (phase.first,), (Number("start", course.start, "nats"),
                 Number("now", entropy.end, "nats"), Number("times the start", times))),
        phase.first,
        "high",
        ("drop-bonus", "overlong", "smaller-steps", "correct-mismatch"),
    )  # fmt: skip


def begins_collapsed(facts: Facts) -> bool:
    """Whether the first steps hold next to no entropy and the rewards or answers confirm it."""
    entropy = facts.series(ENTROPY)
    if entropy is None or not 0 <= facts.course.start < NARROW:
        return False
    dead, distinct = facts.series(DEAD), facts.series("diversity/distinct")
    return (dead is not None and dead.start >= 0.5) or (distinct is not None and distinct.start <= 0.25)


def low_start(facts: Facts) -> Finding | None:
    """The run began with next to no entropy."""
    entropy = facts.series(ENTROPY)
    if entropy is None or not 0 <= facts.course.start < NARROW:
        return None
    sure = begins_collapsed(facts)
    why = (
        "and its answers to a prompt are all alike" if sure else "which the log neither explains nor confirms"
    )
    return Finding(
        "low-entropy-start",
        "Next to no entropy from the first step",
        "severe" if sure else "info",
        f"The run starts at {short(facts.course.start)} nats per token, {why}: look at the sampling temperature, at what the "
        "model was trained on before, and at whether the entropy is that of the sampled tokens.",
        Evidence((ENTROPY, DEAD) if facts.series(DEAD) else (ENTROPY,), (), (Number("start", facts.course.start, "nats"),)),
        int(entropy.step[0]),
        "medium" if sure else "low",
        ("hotter-sampling", "dynamic-sampling"),
    )  # fmt: skip


def impossible(facts: Facts) -> Finding | None:
    """Values that no mean entropy per token can have."""
    entropy = facts.series(ENTROPY, 1)
    if entropy is None:
        return None
    level, least = float(np.median(entropy.value)), float(entropy.value.min())
    if level <= LARGEST and least >= -1e-6:
        return None
    if least < -1e-6:
        text = (
            f"Entropy is negative (lowest {short(least)}), which no distribution over tokens can be: padding may leak into "
            "the mean, or the column is a loss term with its sign turned."
        )
    else:
        text = f"Entropy is {short(level)}, above ln of any vocabulary: a sum over tokens, not their mean, or another quantity."
    return Finding("entropy-impossible", "This is no entropy per token", "warning", text,
                   Evidence((ENTROPY,), (), (Number("median", level, "nats"), Number("lowest", least, "nats"))),
                   int(entropy.step[0]), "high")  # fmt: skip


def near_ceiling(facts: Facts) -> Finding | None:
    """The reward that entropy can still buy is nearly used up."""
    found = facts.ceiling
    if found is None or not found.holds or found.used < NEARLY:
        return None
    return Finding(
        "ceiling-near",
        "The entropy law leaves little to gain",
        "info",
        f"Reward has gone {percent(found.used)} of the way to the {short(found.value)} that the entropy law predicts at zero "
        f"entropy (95 %: {short(found.low)} to {short(found.high)}).",
        Evidence((found.reward_column, ENTROPY), (), (Number("ceiling", found.value, "reward"), Number("used", 100 * found.used, "%"))),
        None,
        "medium" if found.laws.verdict.value != "indistinguishable" else "low",
        ("adaptive-entropy", "harder-prompts"),
    )  # fmt: skip
