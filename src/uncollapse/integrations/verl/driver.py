"""Level `trainer`: the life cycle of a rollout batch on verl's driver.

Everything that looks across rows happens here, over all rows of all ranks. Each optimiser step is one `update_actor`
call with its rows planned, so that the weight maps span the step; a recipe that decides per optimiser step costs one
`compute_log_prob` before each step but the first, whose statistics are those of the old policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.py_functional import rename_dict
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions
from verl.workers.utils.padding import left_right_2_no_padding

from uncollapse.errors import ConfigError
from uncollapse.integrations.verl.batches import rollout_batch, sent
from uncollapse.integrations.verl.loss import padded, statistics
from uncollapse.integrations.verl.names import (
    LAST_UPDATE,
    OLD,
    REF,
    ROW,
    STATISTICS,
    SUM,
    WEIGHT,
    output_name,
)
from uncollapse.measure.statistics import Entropy as EntropyOf
from uncollapse.measure.statistics import Logp as LogpOf
from uncollapse.measure.statistics import Statistic
from uncollapse.policy.batch import Batch, Clock, Stat
from uncollapse.policy.metrics import rollout_metrics, rollout_stats
from uncollapse.policy.recipe import Recipe
from uncollapse.policy.stats import Logp, Measured

INPUTS = ("prompts", "responses", "input_ids", "attention_mask", "position_ids", "response_mask")
"""What a forward pass on the workers needs of verl's batch."""


@dataclass
class Driver:
    """One recipe, one worker group.

    Args:
        workers: verl's group of actor workers (`compute_log_prob`, `update_actor`).
        reference: calls the forward pass of the reference policy on a batch; None if there is none.
        samples: responses per prompt, `rollout.n`.
        temperature: of the policy, `rollout.temperature`; every statistic is taken at it.
        step_rows: rows of one optimiser step; `epochs` passes over the batch.
        ranks: data-parallel ranks, which get equally many rows of each step.
        ends: token ids that end a response.
    """

    recipe: Recipe
    workers: Any
    reference: Any
    samples: int
    temperature: float
    step_rows: int
    ranks: int
    ends: tuple[int, ...]
    epochs: int = 1
    seed: int = 0
    total: int | None = None

    def __post_init__(self) -> None:
        if self.step_rows % self.ranks:
            raise ConfigError(
                f"an optimiser step of {self.step_rows} rows (ppo_mini_batch_size times rollout.n) cannot be shared "
                f"equally by {self.ranks} data-parallel ranks; make it a multiple"
            )

    # ---- measuring -----------------------------------------------------------------------------------------

    def measure(
        self, data: Any, wanted: list[Statistic], *, reference: bool = False
    ) -> dict[Statistic, Tensor]:
        """Statistics of the policy as it is, or of the reference, (row, time); no gradient."""
        inputs, details = self._inputs(data), _asked(wanted)
        tu.assign_non_tensor(inputs, compute_loss=False, **details)
        output = self.reference(inputs) if reference else self.workers.compute_log_prob(inputs)
        return padded({name: tu.get(output, name) for name in map(output_name, wanted)}, wanted, inputs)

    def record(self, data: Any) -> None:
        """Keep the old policy's statistics, and the reference's, in the batch: verl drops what it does not know."""
        if ROW not in data.batch:
            data.batch[ROW] = torch.arange(len(data.batch))
        wanted = rollout_stats(self.recipe)
        for prefix, whose in ((OLD, "old"), (REF, "ref")):
            asked = statistics(frozenset(stat for stat in wanted if stat.whose == whose))
            if asked:
                for statistic, value in self.measure(data, asked, reference=whose == "ref").items():
                    data.batch[f"{prefix}{statistic!r}"] = value

    def _recorded(self, data: Any) -> dict[Stat, Tensor]:
        wanted = rollout_stats(self.recipe)
        prefix = {"old": OLD, "ref": REF}
        return {
            stat: data.batch[f"{prefix[stat.whose]}{stat.statistic!r}"]
            for stat in wanted
            if isinstance(stat, Measured)
        }

    def _inputs(self, data: Any) -> Any:
        extra = [name for name in ("multi_modal_inputs",) if name in data.non_tensor_batch]
        chosen = data.select(batch_keys=list(INPUTS), non_tensor_batch_keys=extra, deepcopy=False)
        inputs = left_right_2_no_padding(chosen.to_tensordict())
        lengths = data.batch["attention_mask"].sum(dim=-1).tolist()
        tu.assign_non_tensor_data(inputs, "temperature", self.temperature)
        tu.assign_non_tensor_data(inputs, "global_token_num", lengths)
        return inputs

    # ---- one rollout batch ---------------------------------------------------------------------------------

    def update(self, data: Any, *, step: int) -> dict[str, list[float]]:
        """All optimiser steps of the rollout batch `data` (verl's, with `record` done); returns verl's kind of metrics.

        The advantages of `data` are overwritten with the recipe's, so that verl logs those.
        """
        clock = Clock(step=step, total=self.total, seed=self.seed)
        raw = rollout_batch(
            data.batch, data.non_tensor_batch["uid"], samples=self.samples, ends=self.ends, clock=clock,
            stats=self._recorded(data),
        )  # fmt: skip
        batch = self.recipe.prepare(raw)
        data.batch["advantages"] = data.batch["returns"] = batch.advantage
        metrics: dict[str, list[float]] = {
            name: [value] for name, value in rollout_metrics(raw, batch).items()
        }
        steps = list(self._steps(batch))
        for update, rows in enumerate(steps):
            mini = replace(batch[rows], clock=replace(clock, update=update))
            found = self._one_update(data[rows], mini, last=update == len(steps) - 1)
            for name, value in found.items():
                metrics.setdefault(name, []).append(value)
        self.recipe.observe(batch)
        return metrics

    def _steps(self, batch: Batch) -> Iterator[Tensor]:
        """Rows of each optimiser step, drawn without replacement by the clock's hash and shared out to the ranks."""
        if len(batch) % self.step_rows:
            raise ConfigError(
                f"a rollout batch of {len(batch)} rows is no multiple of the {self.step_rows} rows of an optimiser step; "
                "change data.train_batch_size or actor.ppo_mini_batch_size"
            )
        pieces = len(batch) // self.step_rows
        for epoch in range(self.epochs):
            clock = replace(batch.clock, update=epoch * pieces)
            for rows in clock.uniform(batch.uid, 1, "minibatches")[:, 0].argsort().chunk(pieces):
                yield self._balanced(rows, batch.columns["length"])

    def _balanced(self, rows: Tensor, length: Tensor) -> Tensor:
        """Ranks get consecutive shares of equal size; put the rows so that the shares are about equally long."""
        if self.ranks == 1:
            return rows
        shares = get_seqlen_balanced_partitions(
            length[rows].tolist(), k_partitions=self.ranks, equal_size=True
        )
        return rows[torch.tensor([place for share in shares for place in share])]

    def _one_update(self, data: Any, mini: Batch, *, last: bool) -> dict[str, float]:
        if self.recipe.has("minibatch"):
            mini = mini.old_as_now() if mini.clock.update == 0 else self._measured_now(data, mini)
        plan = self.recipe.plan(mini)
        inputs = self._inputs(data)
        tensors, plain = sent(plan, self.recipe)
        for name, value in tensors.items():
            inputs[name] = value
        rows = len(plan)
        asked = statistics(self.recipe.stats("loss") | {Logp("now")})
        tu.assign_non_tensor(
            inputs, compute_loss=True, global_batch_size=rows, mini_batch_size=rows, epochs=1, seed=self.seed,
            dataloader_kwargs={"shuffle": False}, distillation_use_topk=False, distillation_only=False,
            **_asked(asked), **plain, **{LAST_UPDATE: last},
        )  # fmt: skip
        return _flat(tu.get(self.workers.update_actor(inputs), "metrics"))

    def _measured_now(self, data: Any, mini: Batch) -> Batch:
        stats = self.recipe.stats("plan")
        values = self.measure(data, statistics(stats))
        measured = [stat for stat in stats if isinstance(stat, Measured)]
        return mini.with_stats(
            {stat: torch.where(mini.mask, values[stat.statistic], 0.0) for stat in measured}
        )


def _asked(wanted: list[Statistic]) -> dict[str, Any]:
    """How verl's engine is told what to measure; `STATISTICS` is read by our engine only."""
    beyond = tuple(s for s in wanted if s not in (LogpOf(), EntropyOf()))
    return {"calculate_entropy": EntropyOf() in wanted, STATISTICS: beyond}


def _flat(reported: Mapping[str, Any]) -> dict[str, float]:
    """One number per metric of an optimiser step; the halves of ours are divided, verl's get its prefix."""
    numbers = {
        name: float(value[0] if isinstance(value, list) else value) for name, value in reported.items()
    }
    pairs = {name[: -len(SUM)] for name in numbers if name.endswith(SUM)}
    found = {name: numbers.pop(name + SUM) / max(numbers.pop(name + WEIGHT), 1e-30) for name in sorted(pairs)}
    found |= {name: numbers.pop(name) for name in sorted(numbers) if name.startswith("loss/")}
    theirs = rename_dict(numbers, "actor/")
    if "actor/mfu" in theirs:
        theirs["perf/mfu/actor"] = theirs.pop("actor/mfu")
    return {**found, **theirs}
