"""The experiments of the SAR study: streams of shifted digits met by Tent, SAR and each part of SAR, gradients, a toy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from uncollapse.measure.entropy import shannon_entropy_from_logits
from uncollapse.measure.prediction_collapse import CollapseDetector
from uncollapse.representation.sar import SAR, Adaptation, NoAdaptation, Tent, collect_norm_params
from uncollapse.studies.sar.toy import biases
from uncollapse.studies.statistics import Estimate, exact, mean_over_seeds, paired_difference
from uncollapse.studies.study import Measurements, Trials
from uncollapse.studies.testbeds.shifted_digits import Kind, Order, ShiftedDigits, trained

SEVERITY: dict[Kind, dict[str, float]] = {
    "conv": {"noise": 0.35, "blur": 2.0, "background": 0.6},
    "mlp": {"noise": 0.55, "blur": 1.75, "background": 0.25},
}
"""Such that about half of the images are still right without adaptation, on seeds 100 to 102."""
ORDERS: tuple[Order, ...] = ("mixed", "by class")
RATES = (0.01, 0.03, 0.1)
"""Learning rates at batches of 32, from harmless to harmful for Tent on seeds 100 to 102."""
LARGE = RATES[1:]
"""The two at which the claims are judged."""
LAST = 400
"""Predictions at the end of a stream in which the most frequent class is counted."""
COLLAPSED = 0.6
"""Share of one class among them from which a run has collapsed ..."""
LOST = 0.1
"""... or so much less accuracy than without adaptation."""
NEVER = -math.inf
EVERY = math.inf

ARMS: dict[str, Callable[..., Tent]] = {
    "tent": Tent,
    "sar": SAR,
    "filter": partial(SAR, rho=0.0, reset_threshold=NEVER),
    "sam": partial(SAR, margin=EVERY, reset_threshold=NEVER),
    "reset": partial(SAR, rho=0.0, margin=EVERY),
    "no-reset": partial(SAR, reset_threshold=NEVER),
    "official": partial(SAR, compat="official", reset_threshold=0.029 * math.log(10)),
    "0.2-nats": partial(SAR, reset_threshold=0.2),
    "low-margin": partial(SAR, rho=0.0, margin=0.1, reset_threshold=NEVER),
}
"""`official` keeps m and momentum over a reset and steps without reliable samples; its threshold is that of `sar`. `low-margin` is
`filter` at 0.1 nats, below the entropy where gradients are largest."""
REPORTED: dict[str, tuple[str, ...]] = {
    "none": ("accuracy", "share"),
    "tent": ("accuracy", "share", "collapsed"),
    "sar": ("accuracy", "share", "collapsed", "resets"),
    "filter": ("accuracy", "share"),
    "sam": ("accuracy", "share"),
    "reset": ("accuracy", "share"),
    "no-reset": ("accuracy", "share", "collapsed"),
    "official": ("accuracy", "resets"),
    "0.2-nats": ("accuracy", "resets"),
    "low-margin": ("accuracy", "share"),
}
"""What is estimated of each arm, over all single corruptions, orders and the large learning rates."""
PAIRS = (
    ("sar", "tent"),
    ("sar", "no-reset"),
    ("sar", "reset"),
    ("no-reset", "tent"),
    ("official", "sar"),
    ("0.2-nats", "sar"),
    ("low-margin", "filter"),
)
"""Arms whose accuracies are compared, paired by seed."""
MAIN = ("tent", "sar")
"""Run at every learning rate, on a mixture of shifts and one image at a time; the others at the large rates only."""


@dataclass(frozen=True)
class Size:
    """How much of everything: the full study or a smoke run."""

    kinds: tuple[Kind, ...] = ("conv", "mlp")
    seeds: int = 5
    test: int = 900
    epochs: int = 20
    passes: int = 3
    batch: int = 32
    single: int = 450
    gradients: int = 300
    toy_steps: int = 300


QUICK = Size(seeds=2, test=100, epochs=1, passes=1, batch=50, single=3, gradients=20, toy_steps=30)

Run = dict[str, float]


@lru_cache(maxsize=1)
def source(kind: Kind, seed: int, test: int, epochs: int) -> tuple[ShiftedDigits, nn.Sequential]:
    """Clean data and a classifier of them."""
    data = ShiftedDigits.make(seed, test=test)
    return data, trained(kind, data, seed, epochs=epochs)


def follow(adapted: Adaptation, images: Float[Tensor, "image 1 16 16"], classes: Int[Tensor, " image"],
           batch: int) -> Run:  # fmt: skip
    """Send a stream through a model: `accuracy` of all predictions, each made before the update that it causes.

    `share`: the most frequent class among the last `LAST` predictions; `flagged`: whether the detector calls them
    collapsed; `resets`; `kept`: mean share of samples that pass the filter; `late`: accuracy of the last ones.
    """
    logits, kept = [], []
    for rows in images.split(batch):
        logits.append(adapted(rows))
        kept.append(adapted.stats.kept)
    scores = torch.cat(logits)
    right, last = scores.argmax(-1) == classes, scores[-LAST:]
    detector = CollapseDetector(window=len(last))
    detector.update(last)
    seen = detector.spread()
    return {
        "accuracy": float(right.double().mean()),
        "late": float(right[-LAST:].double().mean()),
        "share": seen.largest_share,
        "flagged": float(seen.collapsed),
        "resets": float(adapted.stats.resets),
        "kept": float(np.mean(kept)),
    }


def adapt(kind: Kind, corruption: str, seed: int, size: Size) -> dict[str, Run]:
    """Every arm on one corruption ("mixture": all of them), by `order/arm/learning rate`; arms share source and stream."""
    data, net = source(kind, seed, size.test, size.epochs)
    amounts = SEVERITY[kind]
    mixture = corruption == "mixture"
    severity = amounts if mixture else {corruption: amounts[corruption]}
    found = {}
    for order in ORDERS[:1] if mixture else ORDERS:
        images, classes = data.stream(severity, order, seed, passes=size.passes)
        found[f"{order}/none/0"] = follow(NoAdaptation(copy.deepcopy(net)), images, classes, size.batch)
        for arm, make in ARMS.items():
            if mixture and arm not in MAIN:
                continue
            for rate in RATES if arm in MAIN else LARGE:
                made = make(copy.deepcopy(net), lr=rate, skip_last=0.0)
                found[f"{order}/{arm}/{rate:g}"] = follow(made, images, classes, size.batch)
    return found


def one_at_a_time(kind: Kind, corruption: str, seed: int, size: Size) -> dict[str, Run]:
    """Batches of one image, in random order, at the largest rate divided by the batch size, by arm."""
    data, net = source(kind, seed, size.test, size.epochs)
    images, classes = data.stream({corruption: SEVERITY[kind][corruption]}, "mixed", seed)
    images, classes = images[: size.single], classes[: size.single]
    found = {"none": follow(NoAdaptation(copy.deepcopy(net)), images, classes, size.batch)}
    for arm in MAIN:
        made = ARMS[arm](copy.deepcopy(net), lr=RATES[-1] / size.batch, skip_last=0.0)
        found[arm] = follow(made, images, classes, 1)
    return found


def sample_gradients(
    net: nn.Module, images: Float[Tensor, "image 1 16 16"]
) -> tuple[Float[Tensor, " image"], Float[Tensor, " image"]]:
    """Entropy of each sample, and the norm of its gradient over all weights of norm layers."""
    params = {name: p.detach() for name, p in collect_norm_params(net, skip_last=0.0).items()}

    def entropy(params: dict[str, Tensor], image: Tensor) -> Tensor:
        return shannon_entropy_from_logits(functional_call(net, params, (image[None],)))[0]

    with torch.no_grad():
        entropies = shannon_entropy_from_logits(net(images))
    each = vmap(grad(entropy), in_dims=(None, 0))(params, images)
    squares = torch.stack([g.reshape(len(images), -1).square().sum(-1) for g in each.values()])
    return entropies, squares.sum(0).sqrt().detach()


def gradients(kind: Kind, seed: int, size: Size) -> dict[str, Any]:
    """Gradient norms by entropy, means over corruptions.

    `ratio`: samples above the margin over those below; `middle`: the half of the range below the margin that is next to it,
    0.2 to 0.4 ln C, over those above; `rank`: rank correlation; `by_entropy`: mean norm in tenths of ln C.
    """
    data, net = source(kind, seed, size.test, size.epochs)
    ratios, middles, ranks, pairs = [], [], [], []
    for corruption, amount in SEVERITY[kind].items():
        images, _ = data.stream({corruption: amount}, "mixed", seed)
        entropy, norm = sample_gradients(net, images[: size.gradients])
        share = entropy / math.log(10)
        high, middle = share >= 0.4, (share >= 0.2) & (share < 0.4)
        ratios.append(float(norm[high].mean() / norm[~high].mean()))
        middles.append(float(norm[middle].mean() / norm[high].mean()))
        ranks.append(float(stats.spearmanr(entropy.numpy(), norm.numpy()).statistic))
        pairs.append(torch.stack([entropy, norm]))
    entropy, norm = torch.cat(pairs, 1)
    bins = (entropy / math.log(10) * 10).long().clamp(max=9)
    return {
        "ratio": float(np.mean(ratios)),
        "middle": float(np.mean(middles)),
        "rank": float(np.mean(ranks)),
        "by_entropy": [float(norm[bins == k].mean()) if (bins == k).any() else None for k in range(10)],
    }


# ---- estimates ---------------------------------------------------------------------------------------------------

Cells = Mapping[str, Mapping[str, Run]]
"""Runs of one seed by corruption, and then by `order/arm/learning rate`."""


def _mean(runs: Iterable[Run], name: str) -> float:
    return float(np.mean([run[name] for run in runs]))


def _runs(cells: Cells, arm: str, rates: Sequence[float]) -> list[Run]:
    """Runs of an arm over corruptions, orders and learning rates, each with whether it `collapsed`."""
    found = []
    for runs in cells.values():
        for order in ORDERS:
            none = runs[f"{order}/none/0"]
            for rate in rates:
                run = runs[f"{order}/{arm}/{rate:g}"]
                bad = run["share"] >= COLLAPSED or run["accuracy"] < none["accuracy"] - LOST
                found.append(run | {"collapsed": float(bad)})
    return found


def _measure_kind(kind: Kind, by_seed: Sequence[Cells], seeds: Sequence[int]) -> dict[str, Estimate]:
    """Estimates of one kind of model from its single corruptions, per seed the mean over all cells."""
    estimates: dict[str, Estimate] = {}

    def per_seed(arm: str, rates: Sequence[float], name: str) -> list[float]:
        return [_mean(_runs(cells, arm, rates), name) for cells in by_seed]

    table: dict[str, dict[str, list[float]]] = {}
    for arm, names in REPORTED.items():
        rates: Sequence[float] = (0.0,) if arm == "none" else LARGE
        table[arm] = {name: per_seed(arm, rates, name) for name in names}
        for name, values in table[arm].items():
            estimates[f"{kind}/{arm}/{name}"] = mean_over_seeds(values, seeds)
    for more, less in PAIRS:
        estimates[f"{kind}/{more}-minus-{less}/accuracy"] = paired_difference(
            table[more]["accuracy"], table[less]["accuracy"], seeds
        )
    estimates[f"{kind}/tent-minus-sar/share"] = paired_difference(
        table["tent"]["share"], table["sar"]["share"], seeds
    )
    for rate in (RATES[0], RATES[-1]):
        for arm in MAIN:
            estimates[f"{kind}/{arm}-minus-none/accuracy-{rate:g}"] = paired_difference(
                per_seed(arm, (rate,), "accuracy"), table["none"]["accuracy"], seeds
            )
    for corruption in by_seed[0]:
        low, none = (
            [_mean(_runs({corruption: cells[corruption]}, arm, rates), "accuracy") for cells in by_seed]
            for arm, rates in (("sar", RATES[:1]), ("none", (0.0,)))
        )
        estimates[f"{kind}/sar-minus-none/{corruption}-{RATES[0]:g}"] = paired_difference(low, none, seeds)
    return estimates | _measure_detector(kind, by_seed, seeds)


def _measure_detector(kind: Kind, by_seed: Sequence[Cells], seeds: Sequence[int]) -> dict[str, Estimate]:
    """How often the detector flags runs that have collapsed by their share, over seeds that have any, and others."""
    estimates = {}
    for name, of in (("collapsed", True), ("others", False)):
        found = {}
        for seed, cells in zip(seeds, by_seed, strict=True):
            runs = [run for arm in MAIN for run in _runs(cells, arm, RATES)] + _runs(cells, "none", (0.0,))
            flags = [run["flagged"] for run in runs if (run["share"] >= COLLAPSED) == of]
            if flags:
                found[seed] = float(np.mean(flags))
        if found:
            estimates[f"{kind}/detector/{name}"] = mean_over_seeds([*found.values()], [*found])
    return estimates


def _measure_others(
    kind: Kind,
    mixtures: Sequence[Mapping[str, Run]],
    singles: Sequence[Mapping[str, Mapping[str, Run]]],
    seeds: Sequence[int],
) -> dict[str, Estimate]:
    """A mixture of shifts at the large rates, and batches of one."""
    estimates = {}
    for arm in ("none", *MAIN):
        rates = (0.0,) if arm == "none" else LARGE
        for name in ("accuracy",) if arm == "none" else ("accuracy", "share"):
            mixed = [_mean((runs[f"mixed/{arm}/{rate:g}"] for rate in rates), name) for runs in mixtures]
            estimates[f"{kind}/mixture/{arm}/{name}"] = mean_over_seeds(mixed, seeds)
            alone = [_mean((runs[arm] for runs in cells.values()), name) for cells in singles]
            estimates[f"{kind}/single/{arm}/{name}"] = mean_over_seeds(alone, seeds)
    resets = [_mean((runs["sar"] for runs in cells.values()), "resets") for cells in singles]
    estimates[f"{kind}/single/sar/resets"] = mean_over_seeds(resets, seeds)
    return estimates


def _curves(by_seed: Sequence[Cells]) -> dict[str, dict[str, list[float]]]:
    """Accuracy and share by learning rate, means over seeds and cells, for the figure."""
    found: dict[str, dict[str, list[float]]] = {}
    for arm in ("none", *ARMS):
        rates: Sequence[float] = (0.0,) if arm == "none" else RATES if arm in MAIN else LARGE
        found[arm] = {"rate": [*rates]}
        for name in ("accuracy", "share"):
            found[arm][name] = [
                round(float(np.mean([_mean(_runs(cells, arm, (rate,)), name) for cells in by_seed])), 4)
                for rate in rates
            ]
    return found


def toy(steps: int) -> dict[str, list[float]]:
    """The bias over time, with and without outliers, every tenth step."""
    return {
        f"{arm}-{'with' if outliers else 'without'}": biases(arm, outliers=outliers, steps=steps)[::10]
        for arm in MAIN
        for outliers in (True, False)
    }


def measure(quick: bool, trials: Trials) -> Measurements:
    """All arms on all streams, gradients of samples, and the toy."""
    size = QUICK if quick else Size()
    seeds = tuple(range(size.seeds))
    trials.plan(len(size.kinds) * size.seeds * 8 + 1)
    estimates: dict[str, Estimate] = {}
    details: dict[str, Any] = {"curves": {}, "gradients": {}}
    for kind in size.kinds:
        alone, mixtures, singles, norms = [], [], [], []
        for seed in seeds:

            def run(name: str, of: Callable[[], Mapping[str, Any]], at: str = f"{kind} seed {seed}") -> Any:
                return trials.trial(f"{at} {name}", of)

            names = tuple(SEVERITY[kind])
            alone.append({name: run(name, partial(adapt, kind, name, seed, size)) for name in names})
            mixtures.append(run("mixture", partial(adapt, kind, "mixture", seed, size)))
            singles.append(
                {
                    name: run(f"{name} single", partial(one_at_a_time, kind, name, seed, size))
                    for name in names
                }
            )
            norms.append(run("gradients", partial(gradients, kind, seed, size)))
        estimates |= _measure_kind(kind, alone, seeds)
        estimates |= _measure_others(kind, mixtures, singles, seeds)
        for name in ("ratio", "middle", "rank"):
            estimates[f"{kind}/gradient/{name}"] = mean_over_seeds([found[name] for found in norms], seeds)
        details["curves"][kind] = _curves(alone)
        details["gradients"][kind] = [found["by_entropy"] for found in norms]
    details["toy"] = trials.trial("toy", partial(toy, size.toy_steps))
    for name, seen in details["toy"].items():
        estimates[f"toy/{name}/bias"] = exact(abs(seen[-1]))
    return Measurements(estimates, details, seeds)
