"""Learning rates of the DHKD study: one for each arm, chosen on seeds and rows that the study does not use.

An arm begins where an earlier, coarser ladder had its best rate and tries the neighbours of the best so far until that has two
worse ones on either side: a single one may be worse by noise. `python -m uncollapse.studies.dhkd.calibration` repeats the choice and prints `SCORES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from uncollapse.studies.calibration import climb
from uncollapse.studies.dhkd.students import NAMES, Size, train
from uncollapse.studies.testbeds.distillation import Task, taught_task, train_teacher

LADDER = (
    0.001, 0.0015, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0,
    1.5, 2.0, 3.0,
)  # fmt: skip
"""Learning rates that may be chosen."""

START: Mapping[str, float] = {
    "ce": 0.3,
    "kd": 0.03,
    "binary": 0.03,
    "norm": 0.003,
    "single-binary": 0.03,
    "single-norm": 0.01,
    "single-mse": 0.01,
    "dual-binary": 0.03,
    "dual-norm": 0.01,
    "dual-mse": 0.01,
    "dual-mlp": 0.01,
    "aligned-shared": 0.01,
    "aligned-all": 0.01,
}
"""Where each arm begins; those that the coarser ladder left out begin where their nearest relative does."""

SEEDS = tuple(range(1000, 1008))
"""Teachers, rows and students of the calibration; the study has seeds of its own."""

SAME_AS: Mapping[str, str] = {"detached": "ce"}
"""The control is cross-entropy to the last digit, so it has its rate."""


class Score(NamedTuple):
    """How an arm does at one learning rate.

    Attributes:
        mean: validation accuracy, mean over `SEEDS`.
        error: standard error of the difference to the best rate of that arm, paired by seed; 0 for the best itself.
    """

    mean: float
    error: float


SCORES: Mapping[str, Mapping[float, Score]] = {
    "ce": {
        0.15: Score(0.78506, 0.00120),
        0.2: Score(0.78582, 0.00163),
        0.3: Score(0.78588, 0.00123),
        0.5: Score(0.78779, 0.00122),
        0.7: Score(0.78789, 0.00101),
        1.0: Score(0.78858, 0.00000),
        1.5: Score(0.76080, 0.00222),
        2.0: Score(0.69819, 0.00429),
    },
    "kd": {
        0.015: Score(0.80418, 0.00095),
        0.02: Score(0.80522, 0.00072),
        0.03: Score(0.80653, 0.00060),
        0.05: Score(0.80661, 0.00069),
        0.07: Score(0.80673, 0.00084),
        0.1: Score(0.80747, 0.00088),
        0.15: Score(0.80812, 0.00045),
        0.2: Score(0.80840, 0.00000),
        0.3: Score(0.80623, 0.00042),
        0.5: Score(0.80642, 0.00082),
    },
    "binary": {
        0.015: Score(0.78687, 0.00148),
        0.02: Score(0.78935, 0.00169),
        0.03: Score(0.79038, 0.00144),
        0.05: Score(0.79150, 0.00000),
        0.07: Score(0.78892, 0.00186),
        0.1: Score(0.78289, 0.00297),
    },
    "norm": {
        0.0015: Score(0.78350, 0.00116),
        0.002: Score(0.78448, 0.00112),
        0.003: Score(0.78676, 0.00000),
        0.005: Score(0.78577, 0.00168),
        0.007: Score(0.78558, 0.00117),
    },
    "single-binary": {
        0.015: Score(0.79471, 0.00064),
        0.02: Score(0.79600, 0.00036),
        0.03: Score(0.79693, 0.00058),
        0.05: Score(0.79784, 0.00000),
        0.07: Score(0.79379, 0.00125),
        0.1: Score(0.79217, 0.00191),
    },
    "single-norm": {
        0.002: Score(0.78817, 0.00096),
        0.003: Score(0.78907, 0.00073),
        0.005: Score(0.79015, 0.00000),
        0.007: Score(0.78791, 0.00106),
        0.01: Score(0.78390, 0.00174),
        0.015: Score(0.77209, 0.00289),
        0.02: Score(0.73081, 0.00791),
    },
    "single-mse": {
        0.001: Score(0.77381, 0.00116),
        0.0015: Score(0.78208, 0.00083),
        0.002: Score(0.78388, 0.00000),
        0.003: Score(0.78144, 0.00233),
        0.005: Score(0.77600, 0.00216),
        0.007: Score(0.77136, 0.00353),
        0.01: Score(0.76366, 0.00482),
        0.015: Score(0.71172, 0.00972),
        0.02: Score(0.68545, 0.01232),
    },
    "dual-binary": {
        0.015: Score(0.80049, 0.00072),
        0.02: Score(0.80157, 0.00084),
        0.03: Score(0.80279, 0.00000),
        0.05: Score(0.80259, 0.00109),
        0.07: Score(0.79983, 0.00146),
    },
    "dual-norm": {
        0.005: Score(0.78764, 0.00160),
        0.007: Score(0.78802, 0.00243),
        0.01: Score(0.79063, 0.00000),
        0.015: Score(0.77333, 0.00531),
        0.02: Score(0.74187, 0.00822),
    },
    "dual-mse": {
        0.003: Score(0.76803, 0.00288),
        0.005: Score(0.77281, 0.00219),
        0.007: Score(0.77283, 0.00000),
        0.01: Score(0.75154, 0.00590),
        0.015: Score(0.68813, 0.01193),
        0.02: Score(0.68994, 0.00782),
    },
    "dual-mlp": {
        0.003: Score(0.71661, 0.00261),
        0.005: Score(0.75450, 0.00138),
        0.007: Score(0.76434, 0.00000),
        0.01: Score(0.75905, 0.00323),
        0.015: Score(0.70383, 0.01022),
        0.02: Score(0.67299, 0.01205),
    },
    "aligned-shared": {
        0.002: Score(0.76311, 0.00083),
        0.003: Score(0.77964, 0.00094),
        0.005: Score(0.78825, 0.00000),
        0.007: Score(0.78499, 0.00149),
        0.01: Score(0.78580, 0.00111),
        0.015: Score(0.77384, 0.00415),
        0.02: Score(0.74304, 0.00826),
    },
    "aligned-all": {
        0.005: Score(0.78702, 0.00258),
        0.007: Score(0.78614, 0.00279),
        0.01: Score(0.78821, 0.00000),
        0.015: Score(0.76711, 0.00552),
        0.02: Score(0.74453, 0.00445),
    },
}
"""Every arm at every learning rate that was tried."""

RATES: Mapping[str, float] = {
    name: max(scores, key=lambda rate: scores[rate].mean)
    for name in NAMES
    for scores in (SCORES[SAME_AS.get(name, name)],)
}
"""What each arm is trained with: the learning rate with the best mean."""


def calibrate(
    names: Iterable[str] = tuple(START), size: Size | None = None
) -> Iterable[tuple[str, dict[float, Score]]]:
    """Scores of arms, one arm at a time, as `SCORES` has them."""
    setting = (size or Size()).setting
    tasks: dict[int, Task] = {
        seed: taught_task(setting, seed, train_teacher(setting, seed)) for seed in SEEDS
    }
    for name in names:
        runs: dict[float, np.ndarray] = {}

        def mean(rate: float, name: str = name, runs: dict[float, np.ndarray] = runs) -> float:
            found = [train(name, tasks[seed], replace(setting, lr=rate), seed) for seed in SEEDS]
            runs[rate] = np.array([run["validation"] for run in found])
            return float(runs[rate].mean())

        means = climb(LADDER, (START[name],), mean, reach=2)
        best = runs[max(means, key=means.__getitem__)]
        errors = {rate: float((runs[rate] - best).std(ddof=1)) / len(SEEDS) ** 0.5 for rate in means}
        yield name, {rate: Score(means[rate], errors[rate]) for rate in means}


if __name__ == "__main__":
    for arm, scores in calibrate():
        tried = (f"{rate}: Score({score.mean:.5f}, {score.error:.5f})" for rate, score in scores.items())
        print(f"    {arm!r}: {{{', '.join(tried)}}},", flush=True)
