"""The data that flows through a recipe: rows of tokens, their columns and their per-token statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.errors import UncollapseError

Whose: TypeAlias = Literal["old", "now", "ref"]
"""Whose logits a statistic reads: the policy before the step's updates, the policy now, the reference."""

TokenMask: TypeAlias = Bool[Tensor, "row time"]
TokenMap: TypeAlias = Float[Tensor, "row time"]
Columns: TypeAlias = Mapping[str, Any]
"""Tensors of shape `()`, `(row,)` or `(row, time)`, or a sequence with one object per row."""

PARTS: Mapping[str, int] = {"policy": 0, "tempered": 1, "replay": 2, "idle": 3}
"""Where a row comes from: the codes of the column `part` (absent: every row is of part `policy`).

A row of part `idle` comes from nowhere: it has no token and only makes the shares of processes equally large.
"""


class UndeclaredRead(UncollapseError):
    """A stage read a column or a statistic that it does not declare in `needs`."""


@dataclass(frozen=True)
class Stat:
    """One number per position from its logits and its sampled token; hashable, so that needs are sets.

    `whose` says whose logits are read, `against` names a second policy (exact divergences only).
    """

    whose: Whose = "now"
    against: Literal["old", "ref"] | None = None

    def of(
        self,
        logits: Float[Tensor, "n vocab"],
        token: Int[Tensor, " n"],
        other: Float[Tensor, "n vocab"] | None = None,
    ) -> Float[Tensor, " n"]:
        """The statistic at `n` positions; `logits` are already divided by the policy temperature."""
        raise NotImplementedError

    def by(self, whose: Whose) -> Stat:
        """The same statistic of another policy."""
        return replace(self, whose=whose)


_MASK64 = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _mix(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The finaliser of splitmix64 on int64 tensors, whose products wrap modulo 2**64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@dataclass(frozen=True)
class Clock:
    """When a stage is called: what schedules read and what random choices hang on.

    `step` counts rollout batches, `update` the optimiser steps within the current one; `total` is the planned
    number of steps, if there is one.
    """

    step: int = 0
    total: int | None = None
    seed: int = 0
    update: int = 0

    def uniform(self, uid: Int[Tensor, " row"], time: int, name: str) -> Float[Tensor, "row time"]:
        """Uniform numbers in [0, 1) in float64: a hash of (seed, step, update, name, uid, position).

        A random choice is "the n smallest keys", so it depends neither on the order of the rows nor on padding,
        split, number of processes or engine, and a checkpoint needs no generator state.
        """
        salt = f"{self.seed}/{self.step}/{self.update}/{name}".encode()
        start = _signed(int.from_bytes(hashlib.blake2b(salt, digest_size=8).digest(), "little"))
        gamma = _signed(0x9E3779B97F4A7C15)
        row = _mix(uid.long() * gamma + start)
        position = torch.arange(1, time + 1, device=uid.device, dtype=torch.long) * gamma
        bits = _mix(row[:, None] + position[None, :])
        return ((bits >> 11) & ((1 << 53) - 1)).double() / float(1 << 53)


class _Guarded(Mapping[Any, Any]):
    """A mapping that hands out only what was declared; anything else raises `UndeclaredRead`."""

    def __init__(self, data: Mapping[Any, Any], allowed: frozenset[Any], reader: str) -> None:
        self._data, self._allowed, self._reader = data, allowed, reader

    def __getitem__(self, key: Any) -> Any:
        if key not in self._allowed:
            raise UndeclaredRead(
                f"{self._reader} reads {key!r} without declaring it in `needs`; add it there"
            )
        return self._data[key]

    def __iter__(self) -> Iterator[Any]:
        return (key for key in self._data if key in self._allowed)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class Batch:
    """Rows of one scope, from all processes. Only inside a `Term` do the `now` statistics carry gradient.

    `uid` names the sample and is the same in every engine. `mask` holds the trainable tokens of kept rows;
    statistics are 0 outside it.
    """

    uid: Int[Tensor, " row"]
    mask: TokenMask
    columns: Columns = field(default_factory=dict)
    stats: Mapping[Stat, Float[Tensor, "..."]] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)

    def __len__(self) -> int:
        return len(self.uid)

    def __getitem__(self, rows: Any) -> Batch:
        """The batch of these rows: a slice, a boolean mask or a tensor of row numbers."""
        picked = torch.arange(len(self), device=self.uid.device)[rows]
        return replace(
            self,
            uid=self.uid[picked],
            mask=self.mask[picked],
            columns={name: _rows(value, picked) for name, value in self.columns.items()},
            stats={stat: value[picked] for stat, value in self.stats.items()},
        )

    def of_parts(self, *names: str) -> Batch:
        """The rows of these parts; without the column `part` every row is of part `policy`."""
        if "part" not in self.columns:
            return self if "policy" in names else self[:0]
        codes = torch.tensor(sorted(PARTS[name] for name in names), device=self.mask.device)
        return self[torch.isin(self.columns["part"], codes)]

    def view(self, needs: frozenset[str | Stat], reader: str) -> Batch:
        """The same batch, in which a read outside `needs` raises `UndeclaredRead`."""
        return replace(
            self,
            columns=_Guarded(self.columns, needs, reader),
            stats=_Guarded(self.stats, needs, reader),
        )

    def with_columns(self, **columns: Any) -> Batch:
        """The same batch with these columns added or replaced."""
        return replace(self, columns={**self.columns, **columns})

    def with_stats(self, stats: Mapping[Stat, Tensor]) -> Batch:
        """The same batch with these statistics added or replaced."""
        return replace(self, stats={**self.stats, **stats})

    def old_as_now(self) -> Batch:
        """The batch as the policy sees it before its first update, when it still is the old policy."""
        aliases = {stat.by("now"): value for stat, value in self.stats.items() if stat.whose == "old"}
        return replace(self, stats={**self.stats, **aliases})

    @property
    def ids(self) -> Int[Tensor, "row time"]:
        """Sampled token ids (column `ids`)."""
        return self.columns["ids"]

    @property
    def advantage(self) -> TokenMap:
        """Advantage per token (column `advantage`)."""
        return self.columns["advantage"]

    @property
    def reward(self) -> Float[Tensor, " row"]:
        """Reward per row (column `reward`); NaN where the row could not be scored."""
        return self.columns["reward"]

    @property
    def group(self) -> Int[Tensor, " row"]:
        """Number of the group, that is of the prompt, of each row (column `group`)."""
        return self.columns["group"]

    @property
    def old_logp(self) -> TokenMap:
        """What ratios are taken against (column `old_logp`); starts as the old policy's log-probability."""
        return self.columns["old_logp"]


def _rows(value: Any, picked: Int[Tensor, " picked"]) -> Any:
    if isinstance(value, Tensor):
        return value if value.ndim == 0 else value[picked]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [value[i] for i in picked.tolist()]
    return value


def _pad(value: Tensor, time: int) -> Tensor:
    if value.ndim < 2 or value.shape[1] == time:
        return value
    return torch.nn.functional.pad(value, (0, time - value.shape[1]))


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of the rows of all, padded to the longest; columns and statistics that only some have are dropped.

    Scalars and the clock are those of the first.
    """
    first = batches[0]
    time = max(batch.mask.shape[1] for batch in batches)
    columns: dict[str, Any] = {}
    for name in first.columns:
        if not all(name in batch.columns for batch in batches):
            continue
        values = [batch.columns[name] for batch in batches]
        if isinstance(values[0], Tensor):
            columns[name] = values[0] if values[0].ndim == 0 else torch.cat([_pad(v, time) for v in values])
        else:
            columns[name] = [item for value in values for item in value]
    shared = [stat for stat in first.stats if all(stat in batch.stats for batch in batches)]
    return replace(
        first,
        uid=torch.cat([batch.uid for batch in batches]),
        mask=torch.cat([_pad(batch.mask, time) for batch in batches]),
        columns=columns,
        stats={stat: torch.cat([_pad(batch.stats[stat], time) for batch in batches]) for stat in shared},
    )
