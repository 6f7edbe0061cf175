"""Samplers: from prompts to scored rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.policy.batch import Batch, Clock, join
from uncollapse.policy.protocols import Engine, Needs
from uncollapse.policy.stages.segments import equal_groups, group_index


@dataclass(frozen=True)
class PlainSampler:
    """`samples` completions per prompt at `temperature`."""

    samples: int = 8
    temperature: float = 1.0
    needs: Needs = field(default=frozenset(), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.samples < 1 or self.temperature <= 0:
            raise ConfigError(f"sampler: needs samples >= 1 and temperature > 0; got {self}")

    def __call__(self, engine: Engine, prompts: Sequence[Any], clock: Clock) -> Batch:
        """Scored rows, `samples` for each prompt in order, numbered as the engine does."""
        repeated = [prompt for prompt in prompts for _ in range(self.samples)]
        batch = engine.generate(repeated, temperature=self.temperature, clock=clock)
        row = torch.arange(len(batch), device=batch.mask.device)
        return engine.score(batch.with_columns(group=row // self.samples))


@dataclass(frozen=True)
class DynamicSampler:
    """Fresh prompts in place of groups whose rewards are all equal (DAPO, arXiv 2503.14476).

    At most `rounds` rounds of sampling. What is still dead after the last stays in the batch, where a dead-group
    filter takes it out of the loss; DAPO samples without a limit, which never ends on data that is too hard.
    """

    samples: int = 16
    temperature: float = 1.0
    rounds: int = 3
    needs: Needs = field(default=frozenset({"fresh_prompts"}), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.samples < 2 or self.temperature <= 0 or self.rounds < 1:
            raise ConfigError(
                f"dynamic-sampler: needs samples >= 2, temperature > 0 and rounds >= 1; got {self}"
            )

    def __call__(self, engine: Engine, prompts: Sequence[Any], clock: Clock) -> Batch:
        """Scored rows, as many as `PlainSampler` gives, live groups first."""
        plain = PlainSampler(self.samples, self.temperature)

        def draw(rows: Sequence[Any], turn: int) -> Batch:
            return plain(engine, rows, replace(clock, update=clock.update + turn))

        return refilled(draw, engine, prompts, clock, samples=self.samples, rounds=self.rounds)


def refilled(
    draw: Callable[[Sequence[Any], int], Batch],
    engine: Engine,
    prompts: Sequence[Any],
    clock: Clock,
    *,
    samples: int,
    rounds: int,
) -> Batch:
    """What `draw(prompts, 0)` gives, then up to `rounds - 1` times `draw(fresh prompts, turn)` in place of dead groups.

    `draw` gives `samples` scored rows per prompt. Live groups stand first; `uid` and `group` number the rows anew.
    """
    batch = draw(prompts, 0)
    for turn in range(1, rounds):
        dead = dead_groups(batch)
        missing = int(dead.sum()) // samples
        if not missing:
            break
        batch = join([batch[~dead], draw(engine.fresh_prompts(missing, clock, turn), turn)])
        uid = torch.arange(len(batch), device=batch.mask.device)
        batch = replace(batch, uid=uid).with_columns(group=uid // samples)
    return batch


def dead_groups(batch: Batch) -> Bool[Tensor, " row"]:
    """Rows whose group has no two different scorable rewards."""
    index, groups = group_index(batch.group)
    return equal_groups(batch.reward, index, groups)[index]
