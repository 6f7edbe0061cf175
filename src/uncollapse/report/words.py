"""Numbers and what they say, in plain words."""

from __future__ import annotations

import math
from typing import TypeAlias

from uncollapse.report.series import Arm, Estimate, pass_keys

Number: TypeAlias = float | int

THIN = "\u202f"
_SUPERSCRIPT = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)
MINUS = "\u2212"


def number(value: Number, digits: int = 3) -> str:
    """A number for people: `digits` significant digits, no exponent between 0.0001 and a million."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if -5 < size < 6:
        text = f"{value:.{max(0, digits - 1 - size)}f}"
    else:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{mantissa}\u00b710{str(int(exponent)).translate(_SUPERSCRIPT)}"
    return text.replace("-", MINUS)


def level(value: Number) -> str:
    """A reward, rate or entropy: two decimals, or more if it is small."""
    return number(value, 2) if 0 < abs(value) < 0.095 else f"{value:.2f}".replace("-", MINUS)


def percent(share: Number) -> str:
    """A share as a whole percentage, with one digit more below one percent."""
    value = 100 * share
    text = f"{value:.2g}" if 0 < abs(value) < 0.95 else f"{value:.0f}"
    return text.replace("-", MINUS) + THIN + "%"


def estimate(value: Estimate | None, unit: str = "") -> str:
    """Mean and, where there are seeds for it, the half width of its 95 % interval."""
    if value is None:
        return "\u2013"
    middle = level(value.mean)
    spread = "" if value.half is None else f"{THIN}\u00b1{THIN}{_like(value.half, middle)}"
    return f"{middle}{spread}{THIN + unit if unit else ''}"


def _like(half: float, middle: str) -> str:
    """A half width with as many decimals as the number it belongs to."""
    decimals = len(middle.partition(".")[2])
    least = 10.0**-decimals
    return f"{half:.{decimals}f}" if half == 0 or half >= least / 2 else f"<{THIN}{least:.{decimals}f}"


def seconds(value: Number) -> str:
    """A duration with a fitting unit."""
    if value < 1:
        return f"{number(1000 * value)}{THIN}ms"
    return f"{number(value)}{THIN}s" if value < 120 else f"{number(value / 60)}{THIN}min"


def moved(
    before: Number, after: Number, *, rose: str = "rose", fell: str = "fell", still: str = "stayed at"
) -> str:
    """`fell from 2.10 to 0.31`, or `stayed at 0.97` if the two read the same."""
    if level(before) == level(after):
        return f"{still} {level(after)}"
    return f"{rose if after > before else fell} from {level(before)} to {level(after)}"


def lost(before: Number, after: Number) -> float | None:
    """Share of an entropy that is gone (negative: gained), or None where a share means nothing."""
    return 1 - after / before if before > 0 else None


def _ends(arm: Arm, key: str) -> tuple[float, float] | None:
    first, last = arm.first(key), arm.last(key)
    return (first.mean, last.mean) if first and last else None


def run_title(arm: Arm) -> str:
    """The one thing to know about a run."""
    entropy, reward = _ends(arm, "entropy/token/mean"), _ends(arm, "reward/mean")
    if entropy is None and reward is None:
        return "Nothing was logged yet" if not arm.metrics() else "Neither entropy nor reward was logged"
    parts = []
    share = lost(*entropy) if entropy else None
    if entropy and share is not None:
        verb = "lost" if share >= 0 else "gained"
        parts.append(
            "entropy hardly moved" if abs(share) < 0.02 else f"{percent(abs(share))} of the entropy {verb}"
        )
    if reward:
        same = level(reward[0]) == level(reward[1])
        way = "unchanged at" if same else "up to" if reward[1] > reward[0] else "down to"
        parts.append(f"reward {way} {level(reward[1])}")
    text = ", ".join(parts)
    return text[:1].upper() + text[1:]


def run_lead(arm: Arm) -> list[str]:
    """What happened in a run, sentence by sentence, from its numbers alone."""
    sentences = []
    entropy, reward = _ends(arm, "entropy/token/mean"), _ends(arm, "reward/mean")
    if entropy:
        share = lost(*entropy)
        gone = "" if share is None else f" ({percent(abs(share))} {'lost' if share >= 0 else 'gained'})"
        together = f" while reward {moved(*reward)}" if reward else ""
        sentences.append(f"Entropy {moved(*entropy)} nats per token{gone}{together}.")
    elif reward:
        sentences.append(f"Reward {moved(*reward)}; entropy was not logged.")
    keys = pass_keys([arm])
    if keys:
        key = keys[-1]
        ends = _ends(arm, key)
        if ends:
            sentences.append(f"{key.removeprefix('eval/').capitalize()} {moved(*ends)}{_variety(arm)}.")
    dead = arm.mean("reward/zero_variance_groups")
    if dead and dead.mean > 0.999:
        sentences.append("No step could teach anything: all answers to a prompt always got the same reward.")
    return sentences or ["Once the first step is written, this page fills."]


def _variety(arm: Arm) -> str:
    ends = _ends(arm, "eval/distinct")
    return f", and the number of distinct correct answers per prompt {moved(*ends)}" if ends else ""


def comparison_title(arms: list[Arm]) -> str:
    """Which recipe kept its entropy, and what that did to the reward."""
    kept = [(arm, ends) for arm in arms if (ends := _ends(arm, "entropy/token/mean")) and ends[0] > 0]
    if len(kept) < 2:
        return f"{len(arms)} recipes side by side" if len(arms) != 1 else run_title(arms[0])
    base, base_ends = kept[0]
    best, best_ends = max(kept[1:], key=lambda pair: pair[1][1] / pair[1][0])
    base_share, best_share = base_ends[1] / base_ends[0], best_ends[1] / best_ends[0]
    if base_share >= best_share:
        return f"{_name(base)} kept the most entropy: {percent(base_share)} of what it started with"
    return f"{_name(base)} kept {percent(base_share)} of its entropy, {_name(best)} {percent(best_share)}"


def comparison_lead(arms: list[Arm]) -> list[str]:
    """What each recipe ended with, and how sure that is."""
    sentences = []
    for arm in arms:
        entropy, reward = _ends(arm, "entropy/token/mean"), _ends(arm, "reward/mean")
        parts = []
        if entropy:
            parts.append(f"entropy {moved(*entropy)} nats")
        if reward:
            parts.append(f"reward {moved(*reward)}")
        if parts:
            sentences.append(f"With {_name(arm)}, {' and '.join(parts)}.")
    sentences.append(_certainty(arms))
    return sentences


def _name(arm: Arm) -> str:
    """The recipe's name with hyphens that do not break a line."""
    return arm.name.replace("-", "\u2011")


def _certainty(arms: list[Arm]) -> str:
    counts = {len(arm.logs) for arm in arms}
    if not counts:
        return "No run has been written yet."
    if counts == {1}:
        return "There is one seed per recipe: differences may be chance, and no interval can be given."
    if 1 in counts:
        return f"Intervals are 95{THIN}% over seeds; recipes with a single seed have none."
    return f"Numbers are means over {_range(counts)} seeds; intervals are 95{THIN}%."


def _range(counts: set[int]) -> str:
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
