"""Rows of TRL's generation batch: fresh prompts in place of groups whose rewards are all equal, and the order of groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.errors import DataError
from uncollapse.policy.batch import PARTS, Batch, Clock, join
from uncollapse.policy.stages.segments import equal_groups

LEFT_PADDED = frozenset({"prompt_ids", "prompt_mask"})


def check_groups(rows: Sequence[Mapping[str, Any]], group: Int[Tensor, " row"]) -> None:
    """Raise `DataError` where a group holds different prompts: its mean reward would be no baseline of any of them."""
    for (before, a), (row, b) in pairwise(zip(rows, group.tolist(), strict=True)):
        if a == b and before["prompt"] != row["prompt"]:
            raise DataError(
                f"group {b} holds different prompts; a sampler of your own has to give each prompt num_generations times "
                "in a row, or leave the sampling to TRL"
            )


def dead_groups(reward: Float[Tensor, " row"], size: int) -> Bool[Tensor, " group"]:
    """Which groups of `size` consecutive rows have no two different scorable rewards (compared exactly)."""
    group = torch.arange(len(reward), device=reward.device) // size
    return equal_groups(reward, group, len(reward) // size)


def fresh_rows(dataset: Any, places: range, clock: Clock, turn: int) -> list[Any]:
    """The rows of the data set at these places of an order that is a hash of clock and turn; it begins again at its end."""
    key = clock.uniform(torch.arange(len(dataset)), 1, f"fresh-prompts/{turn}")[:, 0]
    order = torch.argsort(key, stable=True)
    return [dataset[int(order[place % len(order)])] for place in places]


def replace_rows(
    output: Mapping[str, Any],
    fresh: Mapping[str, Any],
    into: Int[Tensor, " n"],
    source: Int[Tensor, " n"],
    pad_id: int,
) -> dict[str, Any]:
    """The generation batch `output` with rows `into` taken from rows `source` of `fresh`, padded to the longer."""
    merged: dict[str, Any] = {}
    for name, old in output.items():
        new = fresh.get(name)
        if isinstance(old, Tensor) and old.ndim > 0 and isinstance(new, Tensor):
            old, new = _same_width(name, old, new, pad_id)
            old = old.clone()
            old[into] = new[source]
        merged[name] = old
    return merged


def stacked(outputs: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Any]:
    """Generation batches one below the other, padded to the longest; what only some have is left out."""
    whole = dict(outputs[0])
    for more in outputs[1:]:
        for name in [name for name in whole if name not in more]:
            del whole[name]
        for name, value in whole.items():
            if isinstance(value, Tensor) and value.ndim:
                whole[name] = torch.cat(_same_width(name, value, more[name], pad_id))
    return whole


def _same_width(name: str, old: Tensor, new: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Two tensors of a generation batch by their name in it, the shorter one padded."""
    if old.ndim < 2:
        return old, new
    width = max(old.shape[1], new.shape[1])
    fill = pad_id if name.endswith("_ids") else 0

    def widen(value: Tensor) -> Tensor:
        missing = width - value.shape[1]
        sides = (missing, 0) if name in LEFT_PADDED else (0, missing)
        return torch.nn.functional.pad(value, sides, value=fill)

    return widen(old), widen(new)


def fill_dead(
    sample: Callable[[list[Any]], tuple[dict[str, Any], Float[Tensor, " row"]]],
    shared: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    inputs: list[Any],
    dataset: Any,
    *,
    size: int,
    rounds: int,
    clock: Clock,
    rank: int,
    processes: int,
    pad_id: int,
) -> tuple[dict[str, Any], Float[Tensor, " row"], int]:
    """Sample a batch, then up to `rounds - 1` times fresh prompts for its dead groups.

    `sample` generates and scores rows of this process and gives them with the rewards of all; `shared` gathers such
    rows of all processes. Dead groups are numbered over all processes, each has its fresh prompt by its number, and
    every process generates an equal share of them; hence the batch does not depend on the number of processes, save
    for what is drawn in generation. Returns this process's rows, the rewards of all, and the number of rows that all
    have generated, those included that make the shares equal.
    """
    output, reward = sample(inputs)
    generated = len(reward)
    for turn in range(1, rounds):
        dead = dead_groups(reward, size).nonzero()[:, 0]
        if not len(dead):
            break
        share = -(-len(dead) // processes)
        rows = fresh_rows(dataset, range(rank * share, (rank + 1) * share), clock, turn)
        again, scores = sample([dict(row) for row in rows for _ in range(size)])
        generated += len(scores)
        live = (~dead_groups(scores, size)).nonzero()[:, 0]
        live = live[live < len(dead)]
        into, source = _rows(dead[: len(live)], size), _rows(live, size)
        local = into - rank * len(inputs)
        here = (local >= 0) & (local < len(inputs))
        output = replace_rows(output, shared(again), local[here], source[here], pad_id)
        reward = reward.clone()
        reward[into] = scores[source]
    return output, reward, generated


def _rows(group: Int[Tensor, " group"], size: int) -> Int[Tensor, " row"]:
    return (group[:, None] * size + torch.arange(size, device=group.device)).reshape(-1)


def shuffled_groups(rollout: Batch, rows: Int[Tensor, " row"], chunks: int) -> Int[Tensor, " row"]:
    """An order of this process's rows, numbers `rows` in the rollout batch, that is going to be cut into equal `chunks`.

    Whole groups are shuffled by a hash. Rows that are not the policy's (column `part`), a multiple of `chunks`, are shared
    out equally, so that no optimiser step has all of them.
    """
    group = rollout.group[rows]
    key = rollout.clock.uniform(group, 1, "order-of-groups")[:, 0]
    order = torch.argsort(key, stable=True)
    if "part" not in rollout.columns:
        return order
    extra = rollout.columns["part"][rows][order] != PARTS["policy"]
    shares = order[extra].reshape(chunks, -1)
    return torch.cat([torch.cat(both) for both in zip(order[~extra].chunk(chunks), shares, strict=True)])


def with_idle_rows(batch: Batch, count: int) -> Batch:
    """The batch with `count` rows more of part `idle`: no token, no weight, a group of their own each."""
    idle = batch[torch.zeros(count, dtype=torch.long, device=batch.mask.device)]
    fresh = int(batch.group.max()) + 1 + torch.arange(count, device=batch.group.device)
    columns = {
        "group": fresh,
        "reward": torch.zeros_like(idle.reward),
        "scale": torch.zeros_like(idle.columns["scale"]),
        "part": torch.full_like(idle.columns["part"], PARTS["idle"]),
    }
    return join([batch, replace(idle, mask=torch.zeros_like(idle.mask)).with_columns(**columns)])


def ordered(output: Mapping[str, Any], order: Int[Tensor, " row"]) -> dict[str, Any]:
    """The generation batch with its rows in this order."""
    return {
        name: value[order] if isinstance(value, Tensor) and value.ndim else value
        for name, value in output.items()
    }
