"""The recipe's loss on verl's workers: what `set_loss_fn` hands to them.

verl 0.9.1 calls it per micro-batch as `loss(model_output=..., data=..., dp_group=...)`. Log-probabilities and other
outputs are jagged over prompt and response; `no_padding_2_padding` cuts the responses out, shifted by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.padding import no_padding_2_padding

from uncollapse.errors import ConfigError
from uncollapse.integrations.verl.batches import received
from uncollapse.integrations.verl.names import SUM, WEIGHT, output_name
from uncollapse.measure.statistics import Statistic
from uncollapse.policy.batch import Batch, Stat
from uncollapse.policy.recipe import LossReport, Recipe
from uncollapse.policy.stats import Logp, Measured


def statistics(stats: frozenset[Stat]) -> list[Statistic]:
    """The instruments of these statistics, each once, in an order that all processes share."""
    measured = [stat for stat in stats if isinstance(stat, Measured)]
    return sorted({stat.statistic for stat in measured}, key=repr)


def padded(outputs: Mapping[str, Any], wanted: list[Statistic], data: Any) -> dict[Statistic, Tensor]:
    """The outputs of verl's engine for the response tokens, (row, time). Raises `ConfigError` if one is missing."""
    missing = [name for name in map(output_name, wanted) if outputs.get(name) is None]
    if missing:
        raise ConfigError(
            f"verl's engine gave no {', '.join(missing)}; run with uncollapse.level=engine, which measures it"
        )
    return {s: no_padding_2_padding(outputs[output_name(s)], data) for s in wanted}


@dataclass(frozen=True)
class RecipeLoss:
    """Stateless and picklable: everything decided beforehand arrives in `data`, nothing is configured here."""

    recipe: Recipe

    @property
    def stats(self) -> frozenset[Stat]:
        """What it reads of the current policy, with gradient."""
        return self.recipe.stats("loss") | {Logp("now")}

    def __call__(
        self, model_output: Mapping[str, Any], data: Any, dp_group: Any = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss of one micro-batch, times the number of data-parallel ranks, whose gradients verl averages."""
        micro = received(data, self.recipe)
        values = padded(model_output, statistics(self.stats), data)
        report = self.recipe.loss(micro.with_stats(_now(self.stats, values, micro)))
        ranks = int(data["dp_size"])
        return report.loss * ranks, _metrics(report, ranks)


def _now(stats: frozenset[Stat], values: Mapping[Statistic, Tensor], micro: Batch) -> dict[Stat, Tensor]:
    measured = [stat for stat in stats if isinstance(stat, Measured)]
    return {stat: torch.where(micro.mask, values[stat.statistic], 0.0) for stat in measured}


def _metrics(report: LossReport, ranks: int) -> dict[str, Any]:
    """verl adds these over micro-batches and averages them over ranks; a ratio of two does not mind the average."""

    def summed(value: Tensor) -> Any:
        return Metric(value=value, aggregation=AggregationType.SUM)

    found = {f"loss/{name}": summed(value * ranks) for name, value in report.terms.items()}
    for name, (total, weight) in report.metrics.items():
        found[name + SUM], found[name + WEIGHT] = summed(total), summed(weight)
    return found
