"""Findings about the reward: dead groups, standstill, fall, signs of hacking, breadth of the answers."""

from __future__ import annotations

import numpy as np

from uncollapse.diagnose.finding import (
    DEAD,
    ENTROPY,
    REWARD,
    VALIDATION,
    Evidence,
    Facts,
    Finding,
    Number,
    ends,
    percent,
    short,
    sure,
)
from uncollapse.diagnose.phases import SIGNIFICANT
from uncollapse.diagnose.series import Series

HALF, NEARLY_ALL = 0.5, 0.9
"""Shares of groups without any difference in reward at which half, and nearly all, of a batch teaches nothing."""

GIVEN_BACK = 0.3
"""Share of its gain that a reward has to lose to be called falling."""


FEWEST_FALL = 40
"""Logged steps from which a falling reward is named: the swings of a young run look like one."""


def dead_groups(facts: Facts) -> Finding | None:
    """Groups whose answers all got the same reward: no advantage, no gradient."""
    found = facts.series(DEAD)
    if found is None or found.end < HALF:
        return None
    grew = found.score > SIGNIFICANT and found.end - found.start > 0.1
    since = found.since(found.smooth >= HALF)
    solved = facts.series(REWARD)
    why = (
        " The reward rose meanwhile: the prompts have become too easy."
        if grew and solved is not None and solved.score > SIGNIFICANT
        else ""
    )
    return Finding(
        "dead-groups", "Groups without any difference in reward", "severe" if found.end >= NEARLY_ALL else "warning",
        f"In {percent(found.end)} of the groups every answer gets the same reward ({percent(found.start)} at the start); they "
        f"teach nothing.{why}",
        Evidence((DEAD,), (since,), ends(found, "of groups")), since, "high", ("dynamic-sampling", "harder-prompts"),
    )  # fmt: skip


def plateau(facts: Facts) -> Finding | None:
    """Neither entropy nor reward moves any more."""
    found = facts.series(REWARD)
    if found is None or facts.course.state != "plateau":
        return None
    phase = facts.course.phases[-1]
    return Finding(
        "reward-plateau", "Nothing moves any more", "info",
        f"Reward has stood at {short(found.end)} and entropy at {short(phase.end * facts.course.start)} nats since step {phase.first:,}.",
        Evidence((REWARD, ENTROPY), (phase.first,), ends(found, "reward")),
        phase.first, "medium", ("harder-prompts", "dynamic-sampling"),
    )  # fmt: skip


def fall(facts: Facts) -> Finding | None:
    """The reward gives back what it had gained."""
    found = facts.series(REWARD, FEWEST_FALL)
    lost = _given_back(found) if found is not None else None
    if found is None or lost is None:
        return None
    best, gain, since = lost
    left = (found.end - found.start) / gain
    return Finding(
        "reward-fall", "The reward falls", "severe" if left < 0.2 else "warning",
        f"Reward has fallen from {short(best)} to {short(found.end)} and keeps {percent(max(left, 0.0))} of what it had gained.",
        Evidence((REWARD,), (since,), (Number("best", best, "reward"), Number("now", found.end, "reward"))), since, "high",
        ("roll-back", "smaller-steps", "gspo"),
    )  # fmt: skip


def _given_back(found: Series) -> tuple[float, float, int] | None:
    """Best level, gain up to it and its step, if a significant gain was lost by `GIVEN_BACK` or more."""
    smooth = found.smooth
    top = int(smooth.argmax())
    best, gain = float(smooth[top]), float(smooth[top]) - found.start
    window = max(5, len(found) // 20)
    error = found.noise * np.sqrt(1.57 * found.repeats * 2 / window)
    # Twice as much for the gain: the best of many windows is lucky.
    if gain <= 2 * SIGNIFICANT * error or best - found.end <= max(SIGNIFICANT * error, GIVEN_BACK * gain):
        return None
    return best, gain, int(found.step[top])


def hacking(facts: Facts) -> Finding | None:
    """The reward rises while something that should rise with it falls. A sign, not a proof."""
    reward = facts.series(REWARD)
    if reward is None or reward.score <= SIGNIFICANT:
        return None
    signs, columns, marks = [], [REWARD], []
    held_out = facts.series(VALIDATION, 5)
    falls = held_out is not None and (_given_back(held_out) or held_out.score < -SIGNIFICANT)
    if held_out is not None and falls:
        signs.append(f"held-out reward falls to {short(held_out.end)}")
        columns.append(VALIDATION)
        marks.append(int(held_out.step[int(held_out.smooth.argmax())]))
    for name, what, least, most in (
        ("length/mean", "answers go", 0.5, 2.0), ("diversity/distinct", "distinct answers go", 0.7, np.inf), ("eval/distinct", "distinct answers go", 0.7, np.inf),
    ):  # fmt: skip
        found = facts.series(name, 5)
        if (
            found is None
            or found.start <= 0
            or abs(found.score) <= SIGNIFICANT
            or least < found.end / found.start < most
        ):
            continue
        signs.append(
            f"{what} from {short(found.start)} to {short(found.end)}{' tokens' if 'length' in name else ''}"
        )
        columns.append(name)
        edge = (
            found.smooth <= least * found.start
            if found.end < found.start
            else found.smooth >= most * found.start
        )
        marks.append(found.since(edge))
    if not signs:
        return None
    return Finding(
        "reward-hacking", "Signs of reward hacking", "severe" if falls else "warning",
        f"Training reward rises from {short(reward.start)} to {short(reward.end)} while {' and '.join(signs)}.",
        Evidence(tuple(columns), tuple(marks), ends(reward, "reward")), min(marks), "high" if falls else ("medium" if len(signs) > 1 else "low"),
        ("held-out", "read-answers", "roll-back") if falls else ("read-answers", "held-out"),
    )  # fmt: skip


def pass_at_k(facts: Facts) -> Finding | None:
    """pass@1 rises while pass@k falls: surer, not more able."""
    known = facts.pass_at()
    if len(known) < 2:
        return None
    (_, low), (k, high) = known[0], known[-1]
    one, many = facts.series(low, 5), facts.series(high, 5)
    if one is None or many is None or one.score < 3 or many.score > -3 or many.start - many.end < 0.03:
        return None
    since = many.since(many.smooth < many.start - 0.03)
    return Finding(
        "pass-at-k", f"pass@{k} falls while pass@{known[0][0]} rises", "warning",
        f"Held-out {low.removeprefix('eval/')} rises from {short(one.start)} to {short(one.end)} and {high.removeprefix('eval/')} falls from "
        f"{short(many.start)} to {short(many.end)}: the model grows surer, not more able.",
        Evidence((low, high), (since,), ends(many, "of prompts")), since, sure(one.score, many.score),
        ("clip-cov", "adaptive-entropy", "clip-higher"),
    )  # fmt: skip
