"""Learning rates of the DHKD study: one for each loss and head, chosen on seeds and rows that the study does not use.

`python -m uncollapse.studies.dhkd.calibration` repeats the choice and prints `SCORES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from uncollapse.studies.dhkd.students import NAMES, Size, train
from uncollapse.studies.testbeds.distillation import Task, taught_task, train_teacher

LADDER = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Learning rates that may be chosen."""

START = (0.01, 0.03)
"""Every arm tries these; the ladder is climbed from here in the direction that is better."""

SEEDS = (1000, 1001)
"""Teachers, rows and students of the calibration; the study has seeds of its own."""

SAME_AS: Mapping[str, str] = {
    "detached": "ce",
    "kd": "binary",
    "single-mse": "single-norm",
    "dual-mse": "dual-norm",
    "dual-mlp": "dual-norm",
    "aligned-shared": "dual-norm",
    "aligned-all": "dual-norm",
}
"""Arms with the rate of another, not calibrated themselves; no claim speaks of them.

The control is cross-entropy to the last digit. Plain distillation trained well at 0.05 in the first run; no other rate was
tried. The squared error has half the curvature of BinaryKL-Norm at small
differences, but no bound on its gradient. The others are variants of two heads with BinaryKL-Norm.
"""

CALIBRATED = tuple(name for name in NAMES if name not in SAME_AS)
"""Arms with a calibration of their own: all that the claims compare, and both losses alone."""

SCORES: Mapping[str, Mapping[float, float]] = {
    "ce": {0.01: 0.7373, 0.03: 0.7735, 0.1: 0.7844, 0.3: 0.7876},
    "binary": {0.01: 0.7918, 0.03: 0.7939, 0.1: 0.7844},
    "norm": {0.001: 0.7836, 0.003: 0.7893, 0.01: 0.7843, 0.03: 0.7222},
    "single-binary": {0.01: 0.7972, 0.03: 0.7991, 0.1: 0.7928},
    "single-norm": {0.003: 0.7924, 0.01: 0.7941, 0.03: 0.6754},
    "dual-binary": {0.01: 0.7999, 0.03: 0.8047, 0.1: 0.7960},
    "dual-norm": {0.003: 0.7827, 0.01: 0.7953, 0.03: 0.7482},
}
"""Validation accuracy, mean over `SEEDS`, of every arm at every learning rate that was tried."""

RATES: Mapping[str, float] = {
    name: max(scores, key=scores.__getitem__)
    for name in NAMES
    for scores in (SCORES[SAME_AS.get(name, name)],)
}
"""What each arm is trained with: the learning rate with the best score."""


def climb(score: Callable[[float], float]) -> dict[float, float]:
    """Scores along the ladder from `START` outwards, until the best is not at an end of what was tried."""
    found = {rate: score(rate) for rate in START}
    while True:
        best = LADDER.index(max(found, key=found.__getitem__))
        near = [rate for rate in LADDER[max(best - 1, 0) : best + 2] if rate not in found]
        if not near:
            return dict(sorted(found.items()))
        found |= {rate: score(rate) for rate in near}


def calibrate(
    names: Iterable[str] = CALIBRATED, size: Size | None = None
) -> Iterable[tuple[str, dict[float, float]]]:
    """Scores of arms, one arm at a time, as `SCORES` has them."""
    setting = (size or Size()).setting
    tasks: dict[int, Task] = {
        seed: taught_task(setting, seed, train_teacher(setting, seed)) for seed in SEEDS
    }
    for name in names:

        def score(rate: float, name: str = name) -> float:
            runs = [train(name, tasks[seed], replace(setting, lr=rate), seed) for seed in SEEDS]
            return sum(run["validation"] for run in runs) / len(runs)

        yield name, climb(score)


if __name__ == "__main__":
    for arm, scores in calibrate():
        print(
            f"    {arm!r}: {{{', '.join(f'{rate}: {score:.4f}' for rate, score in scores.items())}}},",
            flush=True,
        )
