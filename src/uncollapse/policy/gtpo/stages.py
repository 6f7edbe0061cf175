"""GTPO as stages: conflict weights, entropy filter, entropy shaping and the on-policy surrogate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.policy.batch import Batch, Columns, Stat, TokenMap, TokenMask
from uncollapse.policy.gtpo.conflicts import Normalise, advantage_sign, conflict_weights, per_conflict
from uncollapse.policy.gtpo.objective import LN2, Filtered, entropy_filter, trajectory_entropy
from uncollapse.policy.protocols import Metrics, Needs, Scope
from uncollapse.policy.stages.segments import group_index, group_sum
from uncollapse.policy.stats import Entropy, Logp


def _share(chosen: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    return (chosen & of).double().sum(), of.double().sum()


@dataclass(frozen=True)
class ConflictWeights:
    """lambda: at conflict tokens `amplify` in answers above their group's mean and `suppress` in those below it.

    Signs come from reward minus group mean, whatever was done to the advantage since. `normalise` divides the loss of an
    answer by max(1, n): `count` takes for n its number of conflict tokens, `released` the official miscount of it
    (`conflict_count`). `align_truncated=False` gives answers cut off by the token limit no trailing run; the default
    aligns them like finished ones, as released. See `conflict_weights`. A conflict needs the whole group, hence
    the scope.
    """

    amplify: float = 2.0
    suppress: float = 0.0
    normalise: Normalise = "none"
    align_truncated: bool = True
    gives: frozenset[str] = frozenset({"weight", "gtpo/conflict"})
    scope: Scope = "rollout"

    def __post_init__(self) -> None:
        if self.amplify < 0 or self.suppress < 0 or self.normalise not in ("none", "count", "released"):
            raise ConfigError(
                "conflict-weights: needs amplify >= 0, suppress >= 0 and normalise none, count or released; "
                f"got {self.amplify}, {self.suppress}, {self.normalise!r}"
            )

    @property
    def needs(self) -> Needs:
        """Ids, rewards and groups of all rows; whether they finished, if that matters."""
        return frozenset({"ids", "reward", "group"} | (set() if self.align_truncated else {"finished"}))

    def __call__(self, batch: Batch) -> Columns:
        """`weight`, and `gtpo/conflict`: 1 on the conflict tokens of good answers, -1 on those of bad ones, 0 elsewhere."""
        sign = advantage_sign(batch.reward, batch.group)
        cut = None if self.align_truncated else ~batch.columns["finished"].bool()
        weight, forward, backward = conflict_weights(
            batch.ids,
            batch.mask,
            sign,
            batch.group,
            amplify=self.amplify,
            suppress=self.suppress,
            truncated_mask=cut,
        )
        return {
            "weight": per_conflict(weight, forward, backward, self.normalise),
            "gtpo/conflict": (forward | backward) * sign[:, None],
        }

    def metrics(self, batch: Batch, own: Columns) -> Metrics:
        """Shares of the trainable tokens."""
        conflict = batch.columns["gtpo/conflict"]
        return {
            "conflict/amplified/frac": _share(conflict > 0, batch.mask),
            "conflict/suppressed/frac": _share(conflict < 0, batch.mask),
        }


@dataclass(frozen=True)
class EntropyShaping:
    """Subtracts `gamma` (reward per nat) times the answer's mean entropy from its advantage.

    Without gradient through the entropy: it lowers the weight of every answer by gamma <H>_i, and so makes an
    average answer a slightly bad one. Put it after the stage that centres the advantage. Default: the paper's 0.1
    (tried: 0.1, 0.01, 0.001, 1e-6), with rewards up to 20.
    """

    gamma: float = 0.1
    needs: Needs = frozenset({"advantage", Entropy("old")})
    gives: frozenset[str] = frozenset({"advantage"})
    scope: Scope = "rollout"

    def _penalty(self, batch: Batch) -> Tensor:
        return self.gamma * trajectory_entropy(batch.stats[Entropy("old")], batch.mask)

    def __call__(self, batch: Batch) -> Columns:
        """`advantage`."""
        penalty = self._penalty(batch)[:, None].to(batch.advantage.dtype)
        return {"advantage": torch.where(batch.mask, batch.advantage - penalty, 0.0)}

    def metrics(self, batch: Batch, own: Columns) -> Metrics:
        """What was subtracted (unit of the reward), mean over answers."""
        present = batch.mask.any(1).double()
        return {"advantage/entropy_penalty/mean": ((self._penalty(batch) * present).sum(), present.sum())}


@dataclass
class EntropyFilter:
    """delta: weight 0 for answers whose mean entropy (old policy, nats) exceeds `threshold`, unless it did from the start.

    Filtered answers still create conflicts and still count in the mean. With `spare_high_start` (the paper) nothing
    is filtered if the initial entropy exceeds the threshold: the mean over the answers of the first rollout batch, kept
    in the checkpoint. Without it the rule is the official code's. `answers="negative"` filters only those below
    their group's mean reward. If no answer is left the step has loss and gradient 0, a warning says so, and
    `entropy_filter/kept/frac` is 0.
    """

    threshold: float = LN2
    spare_high_start: bool = True
    answers: Filtered = "all"
    gives: frozenset[str] = frozenset({"weight", "gtpo/kept", "gtpo/initial_entropy"})
    scope: Scope = "rollout"
    initial_entropy: float | None = field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.threshold <= 0 or self.answers not in ("all", "negative"):
            raise ConfigError(
                "entropy-filter: needs threshold > 0 (nats) and answers all or negative; "
                f"got {self.threshold}, {self.answers!r}"
            )

    @property
    def needs(self) -> Needs:
        """Entropies; rewards and groups if the sign of the advantage matters."""
        read: set[str | Stat] = {Entropy("old")}
        return frozenset(read | ({"reward", "group"} if self.answers == "negative" else set()))

    def _start(self, entropy: Tensor, present: Tensor) -> Tensor:
        """The initial mean entropy: remembered, or that of this batch if it is the first."""
        if self.initial_entropy is not None:
            return entropy.new_tensor(self.initial_entropy)
        return entropy.sum() / present.sum().clamp(min=1)

    def __call__(self, batch: Batch) -> Columns:
        """`weight`, 1 or 0; `gtpo/kept`, the same as a mask of rows; `gtpo/initial_entropy` (nats)."""
        entropy = trajectory_entropy(batch.stats[Entropy("old")], batch.mask)
        present = batch.mask.any(1)
        sign = advantage_sign(batch.reward, batch.group) if self.answers == "negative" else None
        start = self._start(entropy, present)
        spare = start if self.spare_high_start else None
        kept = entropy_filter(entropy, spare, self.threshold, self.answers, advantages=sign)
        self._say_if_silent(kept, entropy, present)
        weight = kept[:, None] * batch.mask.to(entropy.dtype)
        return {"weight": weight, "gtpo/kept": kept, "gtpo/initial_entropy": start}

    def _say_if_silent(self, kept: Tensor, entropy: Tensor, present: Tensor) -> None:
        if bool((kept & present).any()) or not bool(present.any()):
            return
        warnings.warn(
            f"entropy-filter: all {int(present.sum())} answers of this rollout batch have a mean entropy above "
            f"{self.threshold:.3g} nats (lowest {float(entropy[present].min()):.3g}): nothing is learnt from it; "
            "raise the threshold, or let a start above it spare all (spare_high_start)",
            stacklevel=3,
        )

    def metrics(self, batch: Batch, own: Columns) -> Metrics:
        """Share of answers kept; mean over answers of their mean entropy; the initial one (nats)."""
        present = batch.mask.any(1)
        count = present.double().sum()
        entropy = trajectory_entropy(batch.stats[Entropy("old")], batch.mask).double()
        start = batch.columns["gtpo/initial_entropy"][:, 0]
        return {
            "entropy_filter/kept/frac": _share(batch.columns["gtpo/kept"], present),
            "entropy/trajectory/mean": (entropy.sum(), count),
            "entropy/initial/mean": ((start * present).sum(), count),
        }

    def observe(self, batch: Batch) -> None:
        """Remember the first batch's entropy."""
        present = batch.mask.any(1)
        if self.initial_entropy is None and bool(present.any()):
            entropy = trajectory_entropy(batch.stats[Entropy("old")], batch.mask)
            self.initial_entropy = float(self._start(entropy, present))

    def state_dict(self) -> dict[str, Any]:
        """The initial entropy."""
        return {"initial_entropy": self.initial_entropy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the initial entropy."""
        self.initial_entropy = state["initial_entropy"]


@dataclass(frozen=True)
class SumOverGroup:
    """Weight G on the rows of a group of G: turns the mean over rows into the mean over prompts of the sum over answers.

    The official loss adds up the answers of the one prompt that a process holds. For Adam this is a matter of where
    the clip of the gradient norm bites.
    """

    needs: Needs = frozenset({"group", "advantage"})
    gives: frozenset[str] = frozenset({"weight"})
    scope: Scope = "rollout"

    def __call__(self, batch: Batch) -> Columns:
        """`weight`: the number of answers of the group that have a trainable token."""
        index, groups = group_index(batch.group)
        size = group_sum(batch.mask.any(1).to(batch.advantage.dtype), index, groups)
        return {"weight": size[index][:, None] * batch.mask}


@dataclass(frozen=True)
class Reinforce:
    """`-A r` with r = exp(log pi - sg(log pi)): value -A, gradient -A grad log pi, no clip.

    Strictly on-policy. With several updates per rollout batch the ratio stays 1: from the second update on the gradient
    weighs answers of an older policy as if the current one had given them, and nothing bounds how far it goes
    (`kl/old/k3` shows how far). Use one update, or `unclipped` or `ppo-clip`, which have the same gradient in the first.
    """

    needs: Needs = frozenset({"advantage", Logp("now")})
    scope: None = None

    def decide(self, batch: Batch) -> Columns:
        """Nothing."""
        return {}

    def __call__(self, batch: Batch, own: Columns) -> TokenMap:
        """Unreduced loss."""
        logp = batch.stats[Logp("now")]
        return -batch.advantage * (logp - logp.detach()).exp()

    def clipped(self, batch: Batch, own: Columns) -> TokenMask:
        """No token ever is."""
        return torch.zeros_like(batch.mask)
