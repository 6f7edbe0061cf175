"""Findings about the length of answers."""

from __future__ import annotations

from uncollapse.diagnose.finding import REWARD, Evidence, Facts, Finding, Number, ends, percent, short, sure
from uncollapse.diagnose.phases import SIGNIFICANT

SHORT, LONG = 0.5, 2.0
"""Multiples of the run's own first length at which answers have become short or long."""

CUT, MOSTLY_CUT = 0.2, 0.5
"""Shares of answers that run into the length limit at which a fifth, and half, of the rewards are about the limit."""


def length_collapse(facts: Facts) -> Finding | None:
    """Answers shrink."""
    found = facts.series("length/mean")
    if found is None or found.start <= 0 or found.end > SHORT * found.start or found.score > -SIGNIFICANT:
        return None
    reward = facts.series(REWARD)
    paid = reward is not None and reward.score > SIGNIFICANT
    gone = found.end / found.start
    since = found.since(found.smooth <= SHORT * found.start)
    return Finding(
        "length-collapse", "Answers shrink", "severe" if gone <= 0.2 and not paid else "warning",
        f"Answers have shrunk from {short(found.start)} to {short(found.end)} tokens"
        + (" while the reward rose: fine if they still reason, hacking if they only guess." if paid else "."),
        Evidence(("length/mean",), (since,), ends(found, "tokens")), since, sure(found.score), ("read-answers", "no-length-bias"),
    )  # fmt: skip


def length_explosion(facts: Facts) -> Finding | None:
    """Answers grow."""
    found = facts.series("length/mean")
    if found is None or found.start <= 0 or found.end < LONG * found.start or found.score < SIGNIFICANT:
        return None
    since = found.since(found.smooth >= LONG * found.start)
    reward = facts.series(REWARD)
    paid = reward is not None and reward.score > SIGNIFICANT
    return Finding(
        "length-explosion", "Answers grow", "info" if paid else "warning",
        f"Answers have grown from {short(found.start)} to {short(found.end)} tokens" + (" along with the reward." if paid else " without reward for it."),
        Evidence(("length/mean",), (since,), ends(found, "tokens")), since, sure(found.score), ("overlong", "no-length-bias"),
    )  # fmt: skip


def truncation(facts: Facts) -> Finding | None:
    """Answers run into the length limit."""
    found = facts.series("length/truncated")
    if found is None or found.end < CUT:
        return None
    since = found.since(found.smooth >= CUT)
    return Finding(
        "truncation", "Answers are cut off", "severe" if found.end >= MOSTLY_CUT else "warning",
        f"{percent(found.end)} of the answers run into the length limit ({percent(found.start)} at the start): their reward is about "
        "the limit, not the answer, and cut answers are a known trigger of entropy explosions.",
        Evidence(("length/truncated", "length/mean") if facts.series("length/mean") else ("length/truncated",), (since,),
                 (*ends(found, "of answers"), Number("limit from", CUT))), since, "high", ("overlong",),
    )  # fmt: skip
