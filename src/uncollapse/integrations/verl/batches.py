"""A rollout batch of verl as a `Batch`, and a planned step as tensors of a micro-batch, there and back.

verl pads on the driver: prompts on the left, responses on the right, both to the limits of the configuration. On
its way to the workers a batch loses the padding of its input ids (jagged tensors), while tensors of shape
`(row, response time)` stay padded and are sliced with the rows; that is how columns and weight maps travel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uncollapse.errors import DataError
from uncollapse.integrations.responses import response_columns
from uncollapse.integrations.verl.names import CLOCK, COLUMN, MASK, ROW, SCALAR, UID, stat_name
from uncollapse.policy.batch import Batch, Clock, Stat
from uncollapse.policy.protocols import Reporter, Term
from uncollapse.policy.recipe import Recipe

_READ_BY_LOSS = frozenset({"advantage", "old_logp", "weight", "part", "scale", "clipped"})


def rollout_batch(
    tensors: Any,
    prompt: Any,
    *,
    samples: int,
    ends: Sequence[int],
    clock: Clock,
    stats: Mapping[Stat, Tensor],
) -> Batch:
    """The rows of a rollout as verl's driver holds them.

    `tensors` are those of verl's DataProto by name, `prompt` its array `uid`, equal within a group. A response is finished if its last token is one of `ends`. Raises `DataError` if groups are not what the row
    numbers say: a group advantage over wrong groups would silently be another method.
    """
    ids, mask = tensors["responses"], tensors["response_mask"].bool()
    row = tensors[ROW].long()
    group = row // samples
    _check_groups(group, prompt, samples)
    length = tensors["attention_mask"][:, -ids.shape[1] :].sum(dim=1)
    columns: dict[str, Any] = {
        "ids": ids,
        "reward": tensors["token_level_scores"].sum(dim=1),
        "group": group,
        **response_columns(ids, length, ends=ends, limit=ids.shape[1]),
    }
    if "rollout_is_weights" in tensors:
        columns["weight"] = tensors["rollout_is_weights"] * mask
    inside = {stat: torch.where(mask, value, 0.0) for stat, value in stats.items()}
    return Batch(uid=row, mask=mask, columns=columns, stats=inside, clock=clock)


def _check_groups(group: Tensor, prompt: Any, samples: int) -> None:
    label = torch.from_numpy(np.unique(np.asarray(prompt, dtype=str), return_inverse=True)[1].reshape(-1))
    sizes = torch.bincount(label)
    if bool((sizes != samples).any()):
        raise DataError(
            f"a group has {int(sizes[sizes != samples][0])} rows where rollout.n is {samples}; "
            "every prompt needs exactly that many responses and a uid of its own"
        )
    pairs = torch.unique(torch.stack([group.cpu(), label]), dim=1)
    if pairs.shape[1] != len(sizes):
        raise DataError(
            "rows of one prompt are not next to each other before balancing; keep verl's row order"
        )


def sent(plan: Batch, recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plain data of a planned step that its loss reads on the workers."""
    rows = len(plan)
    tensors: dict[str, Tensor] = {UID: plan.uid, MASK: plan.mask}
    wanted = _columns(recipe)
    for name, value in plan.columns.items():
        if not isinstance(value, Tensor) or not (name in wanted or name.startswith(("own/", "map/"))):
            continue
        if value.ndim == 0:
            tensors[SCALAR + name] = value.expand(rows).contiguous()
        else:
            tensors[COLUMN + name] = value
    for stat in sorted(_stats(recipe), key=repr):
        tensors[stat_name(stat)] = plan.stats[stat]
    return tensors, {CLOCK: asdict(plan.clock)}


def received(data: Any, recipe: Recipe) -> Batch:
    """The rows of a micro-batch as they were planned; `data` is verl's TensorDict."""
    columns: dict[str, Any] = {}
    for name in data.keys():  # noqa: SIM118  (a TensorDict iterates over its rows)
        if name.startswith(COLUMN):
            columns[name[len(COLUMN) :]] = data[name]
        elif name.startswith(SCALAR):
            columns[name[len(SCALAR) :]] = data[name][0]
    clock = data[CLOCK]
    return Batch(
        uid=data[UID],
        mask=data[MASK],
        columns=columns,
        stats={stat: data[stat_name(stat)] for stat in _stats(recipe)},
        clock=Clock(**getattr(clock, "data", clock)),
    )


def _readers(recipe: Recipe) -> list[Any]:
    """The stages that act on the workers: terms, transforms of the scope `microbatch`, and those that report."""
    return [
        stage
        for _, stage in recipe.stages()
        if isinstance(stage, Term | Reporter) or getattr(stage, "scope", None) == "microbatch"
    ]


def _columns(recipe: Recipe) -> frozenset[str]:
    needs = {need for stage in _readers(recipe) for need in stage.needs if isinstance(need, str)}
    given = {name for stage in _readers(recipe) for name in getattr(stage, "gives", ())}
    return _READ_BY_LOSS | needs | given


def _stats(recipe: Recipe) -> frozenset[Stat]:
    needs = {need for stage in _readers(recipe) for need in stage.needs if isinstance(need, Stat)}
    return frozenset(stat for stat in needs if stat.whose != "now")
