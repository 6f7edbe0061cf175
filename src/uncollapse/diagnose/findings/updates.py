"""Findings about the update: clipping, distance from other policies, gradients, numbers that are not finite."""

from __future__ import annotations

import numpy as np

from uncollapse.diagnose.finding import (
    Evidence,
    Facts,
    Finding,
    Number,
    Severity,
    ends,
    percent,
    sentence,
    short,
)
from uncollapse.diagnose.names import KNOWN
from uncollapse.diagnose.phases import SIGNIFICANT
from uncollapse.diagnose.series import Series

HEAVY = 0.2
"""Share of clipped tokens from which the update is more clip than gradient. Token-level PPO clips a few per mille to a
few percent; sequence-level ratios (GSPO) clip 15 % by design, which is why the line lies above."""

ONE_SIDED = 5.0
"""How many times more often the upper bound has to act than the lower to call it one-sided."""

APART = 0.05
"""Nats per token between the log-probabilities of trainer and sampler from which they are two policies: over an answer of
100 tokens the ratio of the two then drifts by up to e^5. Rounding in bfloat16 alone gives 0.005 to 0.02."""

FAR_APART = 0.2

RUNAWAY = 5.0
"""Growth of a KL from the middle to the end of the run beyond which it runs away. A KL grows with the square of the distance:
twice over that stretch for a random walk of the parameters, four times for a steady drift."""

PPO_RANGE = 0.02
"""Nats per token: the KL of a ratio that is off by PPO's clip range of 0.2 everywhere, 0.2^2 / 2. Below it, growth from next
to nothing to little is no blow-up; a KL to the reference is larger by nature and starts at 0.05."""

SPIKE = 10.0
"""Multiple of its running median from which a gradient norm is a spike."""


def heavy_clipping(facts: Facts) -> Finding | None:
    """Much of the update is cut off."""
    for name in ("clip/ppo/frac", "clip/high/frac", "clip/low/frac"):
        found = facts.series(name)
        if found is not None and found.end >= HEAVY and not facts.uses("gspo", "sequence"):
            return Finding(
                "clip-heavy", "Much of the update is clipped", "warning",
                f"{percent(found.end)} of the tokens are clipped at the end ({percent(found.start)} at the start): the policy leaves "
                "the one that sampled within a single batch.",
                Evidence((name,), (), ends(found, KNOWN[name])), found.since(found.smooth >= HEAVY), "high",
                ("smaller-steps", "fewer-updates", "cispo"),
            )  # fmt: skip
    return None


def upper_clip_only(facts: Facts) -> Finding | None:
    """Only the upper bound acts: unlikely tokens are kept from being learned."""
    high, low = facts.series("clip/high/frac"), facts.series("clip/low/frac")
    if high is None or low is None or facts.course.state not in ("collapsing", "collapsed"):
        return None
    above, below = float(high.value.mean()), float(low.value.mean())
    if above < 1e-3 or above < ONE_SIDED * below:
        return None
    return Finding(
        "clip-upper-only", "Only the upper clip bound acts", "info",
        f"{percent(above)} of the tokens are clipped above and {percent(below)} below while entropy falls: likely tokens may "
        "still grow, unlikely ones are held back.",
        Evidence(("clip/high/frac", "clip/low/frac"), (), (Number("above", above), Number("below", below))),
        int(high.step[0]), "medium", ("clip-higher", "cispo"),
    )  # fmt: skip


def inert_updates(facts: Facts) -> Finding | None:
    """The policy never leaves the one that sampled, so everything that looks at the ratio has no effect."""
    if not facts.inert:
        return None
    columns = tuple(
        name
        for name in ("clip/high/frac", "clip/low/frac", "clip/ppo/frac", "kl/old/k3")
        if facts.series(name)
    )
    kl_cov = facts.uses("kl-cov")
    text = (
        "No token is ever clipped and the policy never leaves the one that sampled: there is one update per rollout, so clip "
        "bounds have no effect, and KL-Cov's penalty is zero as well."
    )
    return Finding(
        "updates-inert", "One update per rollout: the ratio is always 1", "warning" if kl_cov else "info",
        text + (" This run uses KL-Cov, which therefore does nothing." if kl_cov else ""),
        Evidence(columns, (), (Number("largest clipped share", 0.0, "of tokens"),)), int(facts.log.step[0]), "high",
        ("more-updates",),
    )  # fmt: skip


def mismatch(facts: Facts) -> Finding | None:
    """Trainer and sampler disagree on the same tokens."""
    for name in ("mismatch/logp/mean", "mismatch/kl/mean"):
        found = facts.series(name)
        if found is None:
            continue
        level = abs(found.end)
        if level >= APART or (
            level >= 0.02 and found.end > 5 * abs(found.start) and found.score > SIGNIFICANT
        ):
            return _apart(found, f"differ by {short(level)} nats per token", level >= FAR_APART,
                          found.since(np.abs(found.smooth) >= min(APART, level)))  # fmt: skip
    ratio = facts.series("mismatch/ratio/mean")
    if ratio is not None and abs(ratio.end - 1) >= 0.1:
        away = np.abs(ratio.smooth - 1) >= 0.1
        return _apart(
            ratio,
            f"have a mean ratio of {short(ratio.end)} (1 if they agree)",
            abs(ratio.end - 1) >= 0.3,
            ratio.since(away),
        )
    return None


def _apart(found: Series, how: str, far: bool, since: int) -> Finding:
    return Finding(
        "mismatch", "Trainer and sampler are two policies", "severe" if far else "warning",
        f"Log-probabilities of the same tokens from trainer and sampler {how}: the update is off-policy without knowing it, which "
        "is easily mistaken for collapse.",
        Evidence((found.name,), (since,), ends(found, KNOWN.get(found.name, "nats"))), since, "high", ("correct-mismatch", "smaller-steps"),
    )  # fmt: skip


def kl_blow_up(facts: Facts) -> Finding | None:
    """A KL that grows faster and faster."""
    for name, what, least, most in (
        ("kl/ref/mean", "reference", 0.05, 1.0),
        ("kl/old/k3", "sampling policy", PPO_RANGE, 10 * PPO_RANGE),
    ):
        found = facts.series(name, 20)
        if found is None:
            continue
        third = len(found) // 10
        middle = float(np.median(found.value[len(found) // 2 - third : len(found) // 2 + third + 1]))
        rise = found.end - middle
        if found.end < least or found.end < RUNAWAY * max(middle, 1e-6) or rise < SIGNIFICANT * found.noise:
            continue
        since = found.since(found.smooth >= 2 * middle)
        severity: Severity = "severe" if found.end >= most else "warning"
        return Finding(
            "kl-blow-up", "KL runs away", severity,
            f"The KL to the {what} is {short(found.end)} nats, from {short(middle)} in the middle of the run.",
            Evidence((name,), (since,), (Number("middle", middle, "nats"), Number("now", found.end, "nats"))), since, "high",
            ("smaller-steps", "kl-to-reference", "gspo"),
        )  # fmt: skip
    return None


def gradient_spikes(facts: Facts) -> Finding | None:
    """Single steps with gradients far above their neighbours."""
    found = facts.series("grad/norm", 10)
    if found is None:
        return None
    # Steps of dead groups have no gradient at all; against those every other step would be a spike.
    usual = found.value[found.value > 0]
    middle = np.maximum(found.smooth, 0.25 * float(np.median(usual)) if usual.size else 1.0)
    spikes = np.flatnonzero((found.value > SPIKE * middle) & (found.value > middle + 10 * found.noise))
    if not spikes.size:
        return None
    largest = float((found.value / middle)[spikes].max())
    at = tuple(int(found.step[i]) for i in spikes[:50])
    return Finding(
        "gradient-spikes", "Gradient spikes", "warning" if spikes.size >= 3 else "info",
        f"The gradient norm jumped to {short(largest)} times its surroundings"
        + (f", and {spikes.size} times beyond {SPIKE:g}." if spikes.size > 1 else f" at step {at[0]:,}."),
        Evidence(("grad/norm",), at, (Number("spikes", float(spikes.size)), Number("largest", largest, "times the median"))),
        at[0], "high", ("clip-gradient", "smaller-steps"),
    )  # fmt: skip


def not_finite(facts: Facts) -> Finding | None:
    """The trainer logged NaN or infinity."""
    notes = [note for note in facts.log.notes if note.kind == "nonfinite"]
    if not notes:
        return None
    steps = tuple(sorted({step for note in notes for step in note.steps}))
    dead = next((name for name in _VITAL if _stopped(facts, name)), "")
    return Finding(
        "nan-steps",
        "Numbers that are not finite",
        "severe" if dead else "warning",
        sentence(notes[0].text)
        + (f" {dead} has had no finite value since: the run is lost." if dead else ""),
        Evidence((dead,) if dead else (), steps[:50], (Number("steps", float(len(steps)), "or more"),)),
        steps[0] if steps else None,
        "high",
        ("clip-gradient", "smaller-steps", "roll-back"),
    )


_VITAL = ("loss/total", "grad/norm", "entropy/token/mean", "reward/mean")


def _stopped(facts: Facts, name: str) -> bool:
    """Whether a column that was logged at nearly every step has no finite value at the last three."""
    known = np.isfinite(facts.log[name])
    if known.sum() < 3 or known[-3:].any():
        return False
    last = int(np.flatnonzero(known)[-1])
    return bool(known[: last + 1].mean() > 0.8)
