"""The experiments of the steer study put together: sizes, seeds, and what is measured in which order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from uncollapse.studies.steer import bandits, training
from uncollapse.studies.study import Measurements, Trials

EXTREME: dict[str, Any] = {"minibatches": 8, "lr": 0.2}
"""E3: eight optimiser steps per rollout and four times the learning rate of E2."""
MICROBATCHES = {"micro-strong": 8}
"""Pieces of an optimiser step, 8 rows each, for the arm whose weights are relative to the micro-batch."""


@dataclass(frozen=True)
class Size:
    """How much of everything: the full study or a smoke run."""

    bandit_seeds: int = 10
    states: int = 20_000
    seeds: int = 12
    steps: int = 150
    extreme_seeds: int = 6
    extreme_steps: int = 100


QUICK = Size(bandit_seeds=2, states=300, seeds=2, steps=12, extreme_seeds=2, extreme_steps=10)


def measure(quick: bool, trials: Trials) -> Measurements:
    """Run E1, E2 and E3."""
    size = QUICK if quick else Size()
    arms, extreme = training.arms(), training.extreme_arms()
    seeds = range(size.seeds)
    worlds = len(bandits.SETTINGS) * len(bandits.WORLDS)
    trials.plan(worlds * size.bandit_seeds + (len(arms) + 1) * size.seeds + len(extreme) * size.extreme_seeds)
    tracked = {
        setting: {
            vocab: [
                trials.trial(
                    f"E1 {setting} V={vocab} seed {seed}",
                    partial(bandits.track, seed, vocab, setting, size.states),
                )
                for seed in range(size.bandit_seeds)
            ]
            for vocab in bandits.WORLDS
        }
        for setting in bandits.SETTINGS
    }
    estimates = bandits.summarise(tracked, range(size.bandit_seeds))
    twins = [
        trials.trial(f"E2 one step, seed {seed}", partial(training.twins, seed, size.steps)) for seed in seeds
    ]
    estimates |= training.summarise_twins(twins, seeds)
    runs = {
        name: [
            trials.trial(
                f"E2 {name} seed {seed}",
                partial(training.train, one, seed, size.steps, microbatches=MICROBATCHES.get(name, 1)),
            )
            for seed in seeds
        ]
        for name, one in arms.items()
    }
    estimates |= training.summarise(runs, seeds)
    hard = {
        name: [
            trials.trial(
                f"E3 {name} seed {seed}", partial(training.train, one, seed, size.extreme_steps, **EXTREME)
            )
            for seed in range(size.extreme_seeds)
        ]
        for name, one in extreme.items()
    }
    estimates |= training.summarise(hard, range(size.extreme_seeds), base="extreme-ppo")
    details = {
        "curves": {
            name: [{key: run[key] for key in ("entropy", "reward")} for run in several]
            for name, several in (runs | hard).items()
        }
    }
    return Measurements(estimates, details, tuple(seeds))
