"""Logs that are meant to mislead `diagnose`: resets, gaps, constants, NaN columns, oscillation, sums, spikes, three steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from uncollapse.diagnose.log import Log, Note

Vector = Float[np.ndarray, " step"]


@dataclass(frozen=True)
class Trap:
    """A log made to mislead; `states` are the answers that are not wrong."""

    name: str
    log: Log
    states: frozenset[str]
    findings: frozenset[str] = frozenset()
    forbidden: frozenset[str] = frozenset()


def traps(seed: int = 0) -> tuple[Trap, ...]:
    """All of them; `seed` draws their noise."""
    rng = np.random.default_rng([seed, 77])
    t = np.linspace(0, 1, 200)
    noise = 1 + 0.03 * rng.standard_normal(200)
    reward = 0.2 + 0.5 * t + 0.02 * rng.standard_normal(200)
    unknown, steady = frozenset({"unknown"}), frozenset({"healthy", "plateau"})
    collapse = frozenset({"entropy-collapse"})

    def log(name: str, entropy: Vector, rewards: Vector = reward, notes: tuple[Note, ...] = ()) -> Log:
        step = np.arange(1, entropy.size + 1)
        return Log(
            name, "made up", step, {"entropy/token/mean": entropy, "reward/mean": rewards}, notes=notes
        )

    spiked = 0.8 * noise
    spiked[[30, 90, 150]] = (9.0, 0.001, 12.0)
    gapped = log("gap", 0.8 * noise)
    gapped = replace(
        gapped,
        step=gapped.step + 5000 * (gapped.step > 100),
        notes=(Note("gap", "5000 steps are missing.", (100,)),),
    )
    return (
        Trap("constant entropy", log("constant", np.full(200, 0.7)), steady, forbidden=collapse),
        Trap("all NaN", log("nan", np.full(200, np.nan)), unknown, frozenset({"no-entropy"})),
        Trap("all zero", log("zero", np.zeros(200)), frozenset({"collapsed", "unknown"})),
        Trap("oscillating", log("oscillating", 0.8 * noise * (1 + 0.35 * np.sin(40 * t))), steady, forbidden=collapse),
        Trap("sum instead of mean", log("sum", 400 * noise), steady, frozenset({"entropy-impossible"})),
        Trap("negative", log("negative", 0.8 * noise - 1.5), frozenset({"unknown", *steady}), frozenset({"entropy-impossible"})),
        Trap("rises, then falls", log("hill", noise * (0.5 + 2.2 * t * (1 - t))), steady, forbidden=collapse),
        Trap("single spikes", log("spikes", spiked), steady, forbidden=collapse | {"entropy-explosion"}),
        Trap("three steps", log("three", 0.8 * noise[:3], reward[:3]), unknown, frozenset({"log-short"})),
        Trap("one step", log("one", 0.8 * noise[:1], reward[:1]), unknown, frozenset({"log-short"})),
        Trap("no step", log("none", noise[:0], reward[:0]), unknown),
        Trap("gap", gapped, steady, frozenset({"log-gap"}), collapse),
        Trap("reset", log("reset", 0.8 * noise, notes=(Note("reset", "The step counter went back.", (90,)),)), steady,
             frozenset({"log-reset"}), collapse),
        Trap("constant reward", log("flat", 0.8 * noise, np.full(200, 0.3)), steady, forbidden=collapse),
        Trap("huge reward", log("huge", 0.8 * noise, 1e12 * reward), steady, forbidden=collapse),
        Trap("warm-up dip", log("dip", 0.8 * noise * (1 - 0.5 * np.exp(-(((t - 0.1) / 0.03) ** 2)))), steady, forbidden=collapse),
    )  # fmt: skip
