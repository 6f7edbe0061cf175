"""Learning rates of the entropy-guided-attention study: one for each arm that a claim compares and for each architecture.

They were chosen on seeds and on held-out text that the study does not use.
`python -m uncollapse.studies.entropy_guided_attention.calibration` repeats the choice and prints `SCORES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from uncollapse.studies.calibration import climb
from uncollapse.studies.entropy_guided_attention.arms import ARMS, Size, held_out_rows, train

LADDER = (0.000375, 0.00075, 0.0015, 0.003, 0.006, 0.012, 0.024, 0.048)
"""Learning rates that may be chosen."""

START = (0.003, 0.006)
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

SCORES: Mapping[str, Mapping[float, float]] = {
    "SM+LN+G": {0.00075: 2.4867, 0.0015: 2.4041, 0.003: 2.5625, 0.006: 2.7078},
    "SM": {0.0015: 2.8347, 0.003: 2.6401, 0.006: 2.5587, 0.012: 2.5073, 0.024: math.inf},
    "SM+ScFuFFN": {0.003: 2.6167, 0.006: 2.4951, 0.012: 2.4057, 0.024: math.inf},
    "SM(t)+ScFuFFN": {0.003: 2.6162, 0.006: 2.4950, 0.012: 2.4066, 0.024: math.inf},
    "EReg": {0.003: 2.6416, 0.006: 2.4874, 0.012: 2.3727, 0.024: 2.4217},
    "SM+LN+R": {0.00075: 2.4378, 0.0015: 2.3438, 0.003: 2.3838, 0.006: 2.4109},
    "SM+G": {0.0015: 2.8200, 0.003: 2.6862, 0.006: math.inf},
    "SM+R": {0.003: 2.6459, 0.006: 2.5071, 0.012: 2.3684, 0.024: math.inf},
}
"""Held-out loss (nats per byte), mean over `SEEDS`, of every arm at every learning rate that was tried; infinite where a seed diverged.

At 0.024 all three seeds of SM and SM+R diverged, one of SM+ScFuFFN and two of SM(t)+ScFuFFN; at 0.006 one of SM+G. SM was also
tried at 0.0015, the best rate of SM+LN+G.
"""

RATES: Mapping[str, float] = {
    name: min(scores, key=scores.__getitem__)
    for name in ARMS
    for scores in (SCORES[SAME_AS.get(name, name)],)
}
"""What each arm is trained with: the learning rate with the smallest score."""


def calibrate(
    names: Iterable[str] = CALIBRATED, size: Size | None = None
) -> Iterable[tuple[str, dict[float, float]]]:
    """Scores of arms, one arm at a time, as `SCORES` has them; a run that diverges counts as infinitely bad."""
    size = replace(size or Size(), looks=1)
    rows = held_out_rows(size, 1)
    for name in names:

        def score(rate: float, name: str = name) -> float:
            runs = [train(ARMS[name], seed, rate, size, rows) for seed in SEEDS]
            return -sum(math.inf if run["diverged"] else run["loss"][-1] for run in runs) / len(runs)

        yield name, {rate: -value for rate, value in climb(LADDER, START, score, reach=1).items()}


if __name__ == "__main__":
    for arm, scores in calibrate():
        print(
            f"    {arm!r}: {{{', '.join(f'{rate}: {score:.4f}' for rate, score in scores.items())}}},",
            flush=True,
        )
