"""Learning rates of the entropy-guided-attention study: one for each arm that a claim compares and for each architecture.

They were chosen on seeds and on held-out text that the study does not use.
`python -m uncollapse.studies.entropy_guided_attention.calibration` repeats the choice and prints `SCORES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from uncollapse.studies.entropy_guided_attention.arms import ARMS, Size, held_out_rows, train

LADDER = (0.000375, 0.00075, 0.0015, 0.003, 0.006, 0.012)
"""Learning rates that may be chosen."""

START = (0.0015, 0.003)
"""Every arm tries these; the ladder is climbed from here in the direction that is better."""

SEEDS = (1000, 1001, 1002)
"""Weights and batches of the calibration; the study has seeds of its own."""

SAME_AS: Mapping[str, str] = {
    "EReg-frozen": "EReg",
    "EReg-heads": "EReg",
    "EReg-without-t": "EReg",
    "L2": "EReg",
    "SM(t=0.1)+ScFuFFN": "SM(t)+ScFuFFN",
    "SM(t=0.01)+ScFuFFN": "SM(t)+ScFuFFN",
}
"""Arms with the rate of the one that they vary, not calibrated themselves; no claim speaks of them."""

CALIBRATED = (
    "SM+LN+G", "SM", "SM+ScFuFFN", "SM(t)+ScFuFFN", "EReg",
    "SM+LN+R", "SM+G", "SM+R",
)  # fmt: skip
"""Arms with a calibration of their own: first those that a claim compares."""

SCORES: Mapping[str, Mapping[float, float]] = {name: {0.003: 0.0} for name in CALIBRATED}
"""Held-out loss (nats per byte), mean over `SEEDS`, of every arm at every learning rate that was tried."""

RATES: Mapping[str, float] = {
    name: min(scores, key=scores.__getitem__)
    for name in ARMS
    for scores in (SCORES[SAME_AS.get(name, name)],)
}
"""What each arm is trained with: the learning rate with the smallest score."""


def climb(score: Callable[[float], float]) -> dict[float, float]:
    """Scores along the ladder from `START` outwards, until the best is not at an end of what was tried."""
    found = {rate: score(rate) for rate in START}
    while True:
        best = LADDER.index(min(found, key=found.__getitem__))
        near = [rate for rate in LADDER[max(best - 1, 0) : best + 2] if rate not in found]
        if not near:
            return dict(sorted(found.items()))
        found |= {rate: score(rate) for rate in near}


def calibrate(
    names: Iterable[str] = CALIBRATED, size: Size | None = None
) -> Iterable[tuple[str, dict[float, float]]]:
    """Scores of arms, one arm at a time, as `SCORES` has them; a run that diverges counts as infinitely bad."""
    size = replace(size or Size(), looks=1)
    rows = held_out_rows(size, 1)
    for name in names:

        def score(rate: float, name: str = name) -> float:
            runs = [train(ARMS[name], seed, rate, size, rows) for seed in SEEDS]
            return sum(math.inf if run["diverged"] else run["loss"][-1] for run in runs) / len(runs)

        yield name, climb(score)


if __name__ == "__main__":
    for arm, scores in calibrate():
        print(
            f"    {arm!r}: {{{', '.join(f'{rate}: {score:.4f}' for rate, score in scores.items())}}},",
            flush=True,
        )
