"""TRL as the engine of a recipe's sampler: it generates, continues, scores and measures rows of one process.

What TRL has generated for a rollout stays in a pool, and the rows of a `Batch` know their places in it (column
`generated`). A sampler may thus drop, repeat and join rows as it likes; `rows` gives TRL's tensors for what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from uncollapse.integrations import offers
from uncollapse.integrations.rounds import fresh_rows, ordered, stacked
from uncollapse.policy.batch import Batch, Clock, Stat

Generate: TypeAlias = Callable[
    [list[dict[str, Any]], float, Sequence[Sequence[int]] | None],
    tuple[dict[str, Any], Float[Tensor, " row"]],
]
"""One round: data set rows, temperature and prefixes in; TRL's generation batch and the rewards of its rows out."""


class SamplingEngine:
    """The engine of one rollout.

    Args:
        generate: draws rows and has them scored; a row's prefix becomes part of its prompt.
        describe: turns a generation batch of TRL and its rewards into a `Batch`.
        measure: statistics of such a generation batch at the tokens of a mask.
        dataset: where fresh prompts come from.
        pad_id: fills rows that are shorter than others.
    """

    def __init__(
        self,
        *,
        generate: Generate,
        describe: Callable[[Mapping[str, Any], Tensor, Clock], Batch],
        measure: Callable[[Mapping[str, Any], Tensor, frozenset[Stat]], Mapping[Stat, Tensor]],
        dataset: Any,
        pad_id: int,
    ) -> None:
        self._generate, self._describe, self._measure = generate, describe, measure
        self._dataset, self._pad_id = dataset, pad_id
        self._outputs: list[dict[str, Any]] = []
        self._rewards: list[Tensor] = []

    @property
    def offers(self) -> frozenset[str | type[Stat]]:
        """What TRL provides."""
        return offers.TRL

    @property
    def generated(self) -> int:
        """Rows generated so far."""
        return sum(map(len, self._rewards))

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        temperature: float,
        clock: Clock,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> Batch:
        """One row per prompt (rows of the data set); a prefix stands with the prompt, not in `ids`."""
        output, reward = self._generate([dict(row) for row in prompts], temperature, prefixes)
        place = self.generated + torch.arange(len(reward), device=reward.device)
        self._outputs.append(output)
        self._rewards.append(reward)
        batch = self._describe(output, reward, clock)
        kept = {name: value for name, value in batch.columns.items() if name not in ("reward", "group")}
        return Batch(
            uid=batch.uid,
            mask=batch.mask,
            columns={**kept, "prompt": list(prompts), "generated": place},
            clock=clock,
        )

    def fresh_prompts(self, count: int, clock: Clock, turn: int) -> Sequence[Any]:
        """Rows of the data set, by a hash of clock and turn."""
        return fresh_rows(self._dataset, range(count), clock, turn)

    def score(self, batch: Batch) -> Batch:
        """The rewards that the rows were given when they were generated."""
        return batch.with_columns(reward=torch.cat(self._rewards)[batch.columns["generated"]])

    def measure(self, batch: Batch, stats: frozenset[Stat], *, grad: bool = False) -> Batch:
        """Statistics of the policy that samples, without gradient."""
        output, width = self.rows(batch), batch.mask.shape[1]
        mask = torch.nn.functional.pad(batch.mask, (0, output["completion_ids"].shape[1] - width))
        with torch.no_grad():
            found = self._measure(output, mask, stats)
        return batch.with_stats({stat: value[:, :width] for stat, value in found.items()})

    def rows(self, batch: Batch) -> dict[str, Any]:
        """TRL's generation batch of these rows."""
        return ordered(stacked(self._outputs, self._pad_id), batch.columns["generated"])
