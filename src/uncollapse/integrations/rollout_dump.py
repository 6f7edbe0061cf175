"""Writes each rollout of a trainer as a token dump: what was sampled, how likely it was and became, what it was worth."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from uncollapse.policy.batch import PARTS, Batch
from uncollapse.policy.stats import Entropy, Logp
from uncollapse.token_dump import TokenDump


class RolloutDump:
    """Collects a rollout's log-probabilities and weights from its micro-batches, then writes it on the main process.

    Args:
        dump: where to.
        tokenizer: gives the texts.
        accelerator: of the trainer; adds up what the processes know of their own rows.
    """

    def __init__(self, dump: TokenDump, tokenizer: Any, accelerator: Accelerator) -> None:
        self.dump, self.tokenizer, self.accelerator = dump, tokenizer, accelerator
        self._texts: dict[int, str] = {}
        self._logp: Tensor | None = None
        self._weight: Tensor | None = None

    def note(
        self, rollout: Batch, rows: Int[Tensor, " row"], micro: Batch, logp: Float[Tensor, "row time"]
    ) -> None:
        """Keep what the last update of these rows, by their number in the rollout, has seen."""
        if self._logp is None or self._weight is None:
            self._logp = torch.zeros_like(rollout.mask, dtype=torch.float32)
            self._weight = torch.zeros_like(rollout.mask, dtype=torch.float32)
        self._logp[rows] = logp.detach().to(self._logp.dtype)
        self._weight[rows] = micro.columns.get("weight", micro.mask).to(self._weight.dtype) * micro.mask

    def write(self, rollout: Batch) -> None:
        """Write the rollout after its updates, without idle rows; it is complete when all processes have called this."""
        if self._logp is None or self._weight is None:
            return
        reduce = self.accelerator.reduce
        logp, weight = reduce(self._logp, reduction="sum"), reduce(self._weight, reduction="sum")
        self._logp = self._weight = None
        if not self.accelerator.is_main_process:
            return
        taken = rollout.of_parts(*PARTS.keys() - {"idle"})
        ids = taken.columns["ids"]
        self.dump.write(
            taken.clock.step,
            uid=taken.uid,
            group=taken.group,
            token=ids,
            text=[[self._text(token) for token in row] for row in ids.tolist()],
            # Tokens that the loss left out were not measured again.
            logp=logp[taken.uid].masked_fill(~taken.mask, torch.nan),
            old_logp=taken.stats[Logp("old")],
            entropy=taken.stats[Entropy("old")],
            advantage=taken.advantage,
            weight=weight[taken.uid],
            mask=taken.mask,
            reward=taken.reward,
            length=taken.columns["length"],
        )

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = str(self.tokenizer.decode([token]))
        return self._texts[token]
