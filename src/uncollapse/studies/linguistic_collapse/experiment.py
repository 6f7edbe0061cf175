"""The experiments of the linguistic-collapse study: a real model, a ladder of small ones, and balanced digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from uncollapse.studies.linguistic_collapse.balanced import collapse_of_digits
from uncollapse.studies.linguistic_collapse.ladder import COMPARED, CONTROLLED, Ladder, rung
from uncollapse.studies.linguistic_collapse.real_model import real_model
from uncollapse.studies.statistics import LEVEL, Estimate, exact, mean_over_seeds, paired_difference
from uncollapse.studies.study import Measurements, Trials

Runs = Sequence[Mapping[str, float]]

DIGITS = (
    "nc1/cdnv/mean",
    "nc2/cosine/mean",
    "nc2/cosine/std",
    "nc2/norm/cov",
    "nc3/cosine/mean",
    "nc4",
    "accuracy",
)
REAL = (
    "nc1/cdnv/mean",
    "twice/cdnv",
    "nc1/ratio",
    "nc1/ratio/unbiased",
    "nc2/etf_error",
    "gnc2/log_kernel/mean",
    "gnc2/log_kernel/cov",
    "above_uniform",
    "nc3/cosine/mean",
    "unc3/cosine/cov",
    "permuted/cosine",
    "nc4/full",
    "nc4/seen",
    "permuted/nc4",
    "accuracy",
    "accuracy/centres",
    "classes",
    "singletons",
)
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Size:
    """How much of everything: the full study or a smoke run."""

    ladder: Ladder = field(default_factory=Ladder)
    seeds: int = 5
    epochs: int = 200
    parts: int = 5
    windows: int = 128
    held_out: int = 32


QUICK = Size(
    Ladder((16,), (1, 2), (2, 3), rows=4, time=64, train_bytes=60_000, held_out_bytes=20_000, held_out_windows=8, siblings=3),
    seeds=2,
    epochs=2,
    parts=2,
    windows=2,
    held_out=1,
)  # fmt: skip


def rank_correlation(
    x: Sequence[float], y: Sequence[float], *, within: Sequence[int] | None = None
) -> Estimate:
    """Spearman's correlation with the percentile bootstrap interval over runs.

    With `within`, both are ranked among the runs of the same group, and those ranks are correlated: what is left when
    the group decides nothing.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if within is not None:
        a, b = _ranked_within(a, within), _ranked_within(b, within)
    return _bootstrapped(float(_spearman(a, b)), _resampled(a, b))


def stronger(x: Sequence[float], y: Sequence[float], other: Sequence[float]) -> Estimate:
    """|Spearman(x, y)| - |Spearman(x, other)|, both on the same resampled runs."""
    a, b, c = (np.asarray(values, dtype=np.float64) for values in (x, y, other))
    value = abs(float(_spearman(a, b))) - abs(float(_spearman(a, c)))
    return _bootstrapped(value, np.abs(_resampled(a, b)) - np.abs(_resampled(a, c)))


def _bootstrapped(value: float, drawn: np.ndarray) -> Estimate:
    kept = drawn[np.isfinite(drawn)]
    low, high = np.quantile(kept, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2]) if len(kept) else (np.nan, np.nan)
    return Estimate(value, float(low), float(high), "bootstrap over runs")


def _resampled(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlations of resampled runs; the same runs for every call with as many."""
    draws = np.random.default_rng(0).integers(0, len(a), (_RESAMPLES, len(a)))
    return _spearman(a[draws], b[draws])


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Along the last axis; NaN where one of them is constant."""
    from scipy.stats import rankdata

    u, v = (rankdata(values, axis=-1) for values in (a, b))
    u, v = u - u.mean(-1, keepdims=True), v - v.mean(-1, keepdims=True)
    scale = np.sqrt((u**2).sum(-1) * (v**2).sum(-1))
    with np.errstate(invalid="ignore"):
        return np.asarray((u * v).sum(-1) / scale)


def _ranked_within(values: np.ndarray, group: Sequence[int]) -> np.ndarray:
    from scipy.stats import rankdata

    out, label = np.empty_like(values), np.asarray(group)
    for one in set(group):
        out[label == one] = rankdata(values[label == one])
    return out


def _of_ladder(runs: Runs, siblings: Runs, lengths: Sequence[int]) -> dict[str, Estimate]:
    loss, equal_loss = ([run["loss"] for run in several] for several in (runs, siblings))
    estimates = {}
    for name in COMPARED:
        values = [run[name] for run in runs]
        estimates[f"ladder/{name}"] = rank_correlation(loss, values)
        estimates[f"same-length/{name}"] = rank_correlation(loss, values, within=lengths)
        estimates[f"siblings/{name}"] = rank_correlation(equal_loss, [run[name] for run in siblings])
    for name in CONTROLLED:
        estimates[f"shuffled/{name}"] = rank_correlation(loss, [run[f"shuffled/{name}"] for run in runs])
    cosine, evenness = ([run[name] for run in runs] for name in ("nc3/cosine/mean", "unc3/cosine/cov"))
    estimates["ladder/unc3-over-nc3"] = stronger(loss, evenness, cosine)
    return estimates | {
        "ladder/loss/least": exact(min(loss)),
        "ladder/loss/largest": exact(max(loss)),
        "ladder/classes": exact(min(run["classes"] for run in runs)),
        "siblings/loss/spread": exact(max(equal_loss) - min(equal_loss)),
    }


def _of_real_model(parts: Runs, every: Mapping[str, float]) -> dict[str, Estimate]:
    numbers = tuple(range(len(parts)))

    def column(name: str) -> list[float]:
        return [part[name] for part in parts]

    estimates = {f"smollm2/{name}": exact(every[name]) for name in REAL}
    estimates |= {f"smollm2-parts/{name}": mean_over_seeds(column(name), numbers) for name in REAL}
    for name, control in (("nc3/cosine/mean", "permuted/cosine"), ("nc4/full", "permuted/nc4")):
        estimates[f"smollm2-minus-permuted/{name}"] = paired_difference(
            column(name), column(control), numbers
        )
    return estimates


def measure(quick: bool, trials: Trials) -> Measurements:
    """All three parts."""
    size = QUICK if quick else Size()
    ladder, seeds = size.ladder, tuple(range(size.seeds))
    trials.plan(len(ladder.rungs) + len(ladder.equals) + 2 * size.seeds + 1)

    def climb(places: Sequence[tuple[int, int, int, int]]) -> list[dict[str, float]]:
        return [
            trials.trial(
                f"width {width}, depth {depth}, {length} steps, seed {seed}",
                partial(rung, ladder, width, depth, length, seed),
            )
            for width, depth, length, seed in places
        ]

    runs, siblings = climb(ladder.rungs), climb(ladder.equals)
    estimates = _of_ladder(runs, siblings, [length for _, _, length, _ in ladder.rungs])
    for name, normalized in (("digits", True), ("digits-plain", False)):
        found = [
            trials.trial(
                f"{name} seed {seed}",
                partial(collapse_of_digits, seed, normalized=normalized, epochs=size.epochs),
            )
            for seed in seeds
        ]
        estimates |= {f"{name}/{key}": mean_over_seeds([run[key] for run in found], seeds) for key in DIGITS}
    seen = trials.trial("real model", partial(real_model, size.parts, size.windows, size.held_out))
    if not seen["note"]:
        estimates |= _of_real_model(seen["parts"], seen["all"])
    details = {
        "rungs": ladder.rungs,
        "runs": [{name: run[name] for name in (*COMPARED, "loss")} for run in runs],
        "siblings": [{name: run[name] for name in (*COMPARED, "loss")} for run in siblings],
        "real_model": seen["note"],
    }
    return Measurements(estimates, details, seeds)
