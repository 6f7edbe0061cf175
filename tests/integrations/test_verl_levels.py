"""Which level of verl a recipe needs, told without verl."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest

from uncollapse.cli.engines import where
from uncollapse.errors import ConfigError, UnknownName
from uncollapse.integrations.verl_levels import LEVELS, level_for, refusals
from uncollapse.measure import statistics
from uncollapse.policy.protocols import Needs
from uncollapse.policy.recipe import Weighted
from uncollapse.policy.reduction import Mean
from uncollapse.policy.registry import recipe, recipes
from uncollapse.policy.schedules import Linear
from uncollapse.policy.stages.regularizers import KLPenalty
from uncollapse.policy.stages.samplers import PlainSampler
from uncollapse.policy.stats import Measured


@dataclass(frozen=True)
class Largest(Measured):
    @property
    def statistic(self):
        return statistics.MaxLogp()


@dataclass(frozen=True)
class Peaked:
    needs: Needs = field(default=frozenset({Largest("now")}))
    scope: None = None

    def decide(self, batch):
        return {}

    def __call__(self, batch, own):
        return batch.stats[Largest("now")]


def made(**changes):
    return replace(recipe("grpo"), name="made", **changes)


@pytest.mark.parametrize(
    ("method", "level"),
    [
        (recipe("grpo"), "registry"),
        (recipe("dr-grpo"), "registry"),
        (recipe("clip-cov"), "trainer"),
        (recipe("adaptive-entropy"), "trainer"),
        (replace(recipe("dapo"), sampler=PlainSampler(16)), "trainer"),
        (made(regularizers=(Weighted(KLPenalty("ref", "k3")),)), "trainer"),
        (made(regularizers=(Weighted(Peaked()),)), "engine"),
        (made(mean=Mean(("trajectory", "turn"))), None),
        (made(regularizers=(Weighted(KLPenalty("ref", "exact")),)), None),
    ],
)
def test_the_lowest_level_that_expresses_the_recipe_is_taken(method, level):
    if level is None:
        with pytest.raises(ConfigError, match="'made' cannot run on verl: it "):
            level_for(method)
        return
    assert level_for(method) == level
    for lower in LEVELS[: LEVELS.index(level)]:
        with pytest.raises(ConfigError, match=f"at level '{lower}': it|its|a registered"):
            level_for(method, lower)
    for higher in LEVELS[LEVELS.index(level) :]:
        assert level_for(method, higher) == higher


def test_the_registries_know_no_step():
    scheduled = replace(recipe("grpo").surrogate)
    object.__setattr__(scheduled, "high", Linear(0.2, 0.4, 10))
    assert "it knows no step, which PPOClip reads" in refusals(made(surrogate=scheduled))["registry"]


def test_unknown_levels_are_named():
    with pytest.raises(UnknownName, match="unknown level of verl 'registr'; did you mean registry"):
        level_for(recipe("grpo"), "registr")


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_has_a_verdict_on_every_engine(name):
    found = where(recipe(name))
    assert set(found) == {"testbed", "TRL", "verl"}
    assert all(
        line == "runs" or line.startswith(("runs (level ", "does not run: ")) for line in found.values()
    )


def test_without_verl_the_import_says_what_to_install():
    """In a process of its own that finds no verl, wherever it is installed."""
    code = "import sys; sys.modules['verl'] = None; import uncollapse.integrations.verl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert (
        last == "uncollapse.errors.MissingExtra: verl is not installed; run: pip install 'uncollapse[verl]'"
    )
