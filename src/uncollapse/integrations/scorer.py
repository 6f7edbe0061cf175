"""Statistics of completions under causal language models of transformers: packed where they can be, padded elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from uncollapse.integrations.fused_forward import add_completion_stats, packed_stats, padded_stats
from uncollapse.integrations.shared_generation import share_generation
from uncollapse.integrations.shared_prefix import enable_packing, supports_packing, takes_position_ids
from uncollapse.policy.batch import Stat
from uncollapse.policy.stats import Measured

INPUTS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


class Scorer:
    """Prepares models of one architecture for measurement, and measures with them.

    Args:
        model: the policy, without wrappers. Its forward, attention and generation are taught what this needs.
        temperature: of all statistics.
        share_prompts: whether neighbouring completions of one prompt may share it.
    """

    def __init__(self, model: nn.Module, *, temperature: float, share_prompts: bool) -> None:
        self.temperature = temperature
        self.shares_prompts = share_prompts and supports_packing(model)
        """Whether prompts are computed once for all completions of their group."""
        self._stats = (
            packed_stats
            if self.shares_prompts
            else partial(padded_stats, positions=takes_position_ids(model))
        )
        if self.shares_prompts:
            share_generation(model)
        self.admit(model)

    def admit(self, model: nn.Module) -> None:
        """Let another model of the same architecture, such as a reference policy, be measured as well."""
        if self.shares_prompts:
            enable_packing(model)
        add_completion_stats(model, self.temperature)

    def __call__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        counted: Bool[Tensor, "row time"],
        stats: Sequence[Measured],
        *,
        rows: int | None = None,
    ) -> dict[Stat, Tensor]:
        """Values (row, time) of the statistics at the tokens that are `counted`, 0 elsewhere.

        `model` may be wrapped (data parallelism, adapters). `inputs` holds the tensors named in `INPUTS`. With `rows`,
        at most so many are in one forward pass, which bounds memory where no gradient is kept.
        """
        if not stats:
            return {}
        statistics = list(dict.fromkeys(stat.statistic for stat in stats))
        pieces = []
        for start in range(0, len(counted), rows or len(counted)):
            part = slice(start, None if rows is None else start + rows)
            arguments = {name: inputs[name][part] for name in INPUTS}
            pieces.append(self._stats(model, statistics, **arguments, counted=counted[part]))
        whole = {s: torch.cat([piece[s] for piece in pieces]) for s in statistics}
        return {stat: whole[stat.statistic] for stat in stats}
