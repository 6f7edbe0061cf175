"""The stages of AEPO: two samplers that answer some prompts again at another temperature, and what trains on the answers.

Tempered rows are of part `tempered`, so no group statistic, entropy or mean of the policy's own rows ever sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.policy.aepo_arbitrary.controller import EntropyController
from uncollapse.policy.aepo_arbitrary.formulas import Mode, is_right, reweighting_share, tempered_reweighting
from uncollapse.policy.batch import PARTS, Batch, Clock, Columns, join
from uncollapse.policy.protocols import Engine, Metrics, Needs, Scope
from uncollapse.policy.stages.samplers import PlainSampler
from uncollapse.policy.stages.segments import group_index, scorable_stats
from uncollapse.policy.stats import Entropy, Logp, TemperedLogp


def policy_entropy(batch: Batch) -> float:
    """Mean entropy per token (nats) of the old policy over rows of part `policy`; NaN without such a token.

    Rows that a filter has dropped count, as in `entropy/token/mean`: else the entropy would be that of undecided prompts
    alone, and unknown once all groups are dead.
    """
    mask = batch.columns.get("sampled", batch.mask)
    if "part" in batch.columns:
        mask = mask & (batch.columns["part"] == PARTS["policy"])[:, None]
    return _masked_mean(batch.stats[Entropy("old")], mask)


def _masked_mean(values: Tensor, mask: Tensor) -> float:
    return float(torch.where(mask, values, 0.0).double().sum() / mask.sum())


def _tempered(batch: Batch) -> Tensor:
    return batch.columns["part"] == PARTS["tempered"]


def _steering_metrics(controller: EntropyController, rows: Tensor) -> Metrics:
    """What the controller does in this step, weighted with the rows that report it."""
    values = {
        "temperature/mean": controller.temperature,
        "entropy_gap/mean": controller.target - controller.last_entropy,
        "saturated/frac": float(controller.saturated),
    }
    found = {f"tempered/{name}": (value * rows, rows) for name, value in values.items()}
    if controller.recent:
        found["tempered/hot/frac"] = (controller.duty_cycle * rows, rows)
    return found


@dataclass(frozen=True)
class _SteeredSampler:
    """What both samplers share: the policy's groups, some prompts again at the controller's temperature, its memory."""

    samples: int = 5
    temperature: float = 1.0
    share: float = 1 / 64
    target: float = 0.5
    mode: Mode = "bang"
    low: float = 0.8
    high: float = 1.2
    hysteresis: float = 0.0
    patience: int = 50
    controller: EntropyController = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        PlainSampler(self.samples, self.temperature)
        if not 0 < self.share <= 1:
            raise ConfigError(
                f"share is the part of the prompts that is sampled again, in (0, 1]; got {self.share:g}"
            )
        steered = EntropyController(
            self.target, self.mode, self.low, self.high, self.hysteresis, self.patience
        )
        object.__setattr__(self, "controller", steered)

    def _policy(self, engine: Engine, prompts: Sequence[Any], clock: Clock) -> Batch:
        batch = PlainSampler(self.samples, self.temperature)(engine, prompts, clock)
        return _marked(batch, "policy", 1.0)

    def _again(self, engine: Engine, prompts: Sequence[Any], clock: Clock, after: Batch) -> Batch:
        """Scored groups at the controller's temperature, whose row and group numbers come after those of `after`."""
        hot = PlainSampler(self.samples, self.temperature * self.controller.temperature)
        batch = hot(engine, prompts, replace(clock, update=1))
        groups = len(after) // self.samples
        return replace(batch, uid=batch.uid + len(after)).with_columns(group=batch.group + groups)

    def state_dict(self) -> dict[str, Any]:
        """The controller's state."""
        return self.controller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the controller's state."""
        self.controller.load_state_dict(state)

    def metrics(self, batch: Batch, own: Columns) -> Metrics:
        """Temperature, distance to the target, duty cycle, saturation and the share of tempered rows."""
        rows = (batch.columns["part"] != PARTS["idle"]).double().sum()
        extra = _tempered(batch).double().sum()
        return {**_steering_metrics(self.controller, rows), "tempered/rows/frac": (extra, rows)}


def _marked(batch: Batch, part: str, scale: float) -> Batch:
    reward = batch.reward
    return batch.with_columns(
        part=torch.full((len(batch),), PARTS[part], dtype=torch.long, device=reward.device),
        scale=torch.full_like(reward, scale),
    )


@dataclass(frozen=True)
class TemperedSampler(_SteeredSampler):
    """The ordinary groups, and a `share` of the prompts again at the controller's temperature, weighing `alpha` in the loss.

    At least one whole group is sampled again, so with few prompts the extra cost is above `share`; which prompts is
    decided by the clock; of several processes each takes the share of its own prompts. The loss becomes (mean over the policy's rows) + alpha (mean over the tempered rows), each with
    the recipe's reduction; all `samples` answers of a tempered prompt stay, right or wrong. With several optimiser steps
    per rollout each step takes these means over its own rows. `alpha=0` samples nothing twice and is the recipe without.
    Goes with `tempered-positives`: with group advantages hot wrong answers would be pushed away, which hastens collapse.
    Temperatures are relative to the policy's. Defaults: alpha and share 1/64 (SCOPE-RL), two temperatures and
    target 0.5 (released code).
    """

    alpha: float = 1 / 64
    needs: Needs = field(default=frozenset({"sampled", Entropy("old")}), init=False, repr=False)
    gives: frozenset[str] = field(default=frozenset({"part", "scale"}), init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise ConfigError(f"alpha weighs the tempered answers in the loss, 0 or more; got {self.alpha:g}")

    def __call__(self, engine: Engine, prompts: Sequence[Any], clock: Clock) -> Batch:
        """Scored rows of part `policy`, then of part `tempered`."""
        policy = self._policy(engine, prompts, clock)
        if self.alpha == 0:
            return policy
        keys = clock.uniform(torch.arange(len(prompts)), 1, "tempered-prompts")[:, 0]
        count = max(1, round(self.share * len(prompts)))
        chosen = [prompts[index] for index in keys.argsort()[:count].sort().values.tolist()]
        tempered = self._again(engine, chosen, clock, policy)
        return join([policy, _marked(tempered, "tempered", self.alpha)])

    def observe(self, batch: Batch) -> None:
        """The exact entropy of the policy's own rows, for the next step's temperature."""
        if self.alpha:
            self.controller.observe(policy_entropy(batch))


@dataclass(frozen=True)
class ReplacingSampler(_SteeredSampler):
    """The released code: rows of the policy give way to right tempered answers, so that as many rows train as before.

    The first `share` of the prompts is answered again. Positives are answers that beat their group by 0.05 deviations, so a
    group that is right throughout gives none. K = min(`most`, positives), halved above the target; K positives take the
    place of the first K rows, which the filter `drop-replaced` leaves out of the loss. For them to weigh what those would,
    the recipe's mean has to be one over both parts (`joint`; another is refused). Of several processes each replaces up to `most` of its own
    rows. The entropy is estimated as -log pi of all tokens that train, tempered ones included, which is biased while
    both differ.
    """

    joint: ClassVar[bool] = True
    share: float = 0.25
    patience: int = 0
    most: int = 60
    needs: Needs = field(default=frozenset({Logp("old")}), init=False, repr=False)
    gives: frozenset[str] = field(default=frozenset({"part", "scale", "replaced"}), init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most < 1:
            raise ConfigError(f"most is the largest number of replaced rows, at least 1; got {self.most}")

    def __call__(self, engine: Engine, prompts: Sequence[Any], clock: Clock) -> Batch:
        """Scored rows of part `policy`, some of them `replaced`, then those of part `tempered` that replace them."""
        policy = self._policy(engine, prompts, clock)
        again = prompts[: max(1, int(self.share * len(prompts)))]
        tempered = self._again(engine, again, clock, policy)
        positive = _beats_its_group(tempered).nonzero()[:, 0]
        count = min(self.most, len(positive), len(policy))
        if self.controller.last_entropy > self.controller.aim:
            count //= 2
        replaced = torch.arange(len(policy), device=policy.mask.device) < count
        policy = policy.with_columns(replaced=replaced)
        if not count:
            return policy
        chosen = _marked(tempered[positive[:count]], "tempered", 1.0)
        return join([policy, chosen.with_columns(replaced=torch.zeros_like(replaced[:count]))])

    def observe(self, batch: Batch) -> None:
        """-log pi of the tokens that train, of both parts, for the next step's temperature."""
        self.controller.observe(-_masked_mean(batch.stats[Logp("old")], batch.mask))


def _beats_its_group(batch: Batch, by: float = 0.05) -> Tensor:
    index, groups = group_index(batch.group)
    _, mean, std = scorable_stats(batch.reward, index, groups)
    return (std[index] > 0) & (batch.reward - mean[index] > by * std[index])


@dataclass(frozen=True)
class DropReplaced:
    """Leave out the rows whose place tempered answers have taken; needs `replacing-sampler`."""

    needs: Needs = frozenset({"replaced"})
    gives: frozenset[str] = frozenset({"keep"})
    scope: Scope = "rollout"

    def __call__(self, batch: Batch) -> Columns:
        """`keep`."""
        return {"keep": ~batch.columns["replaced"]}


@dataclass(frozen=True)
class TemperedPositives:
    """Tempered rows get advantage 1[R = 1], all others keep theirs: one-sided imitation of right answers.

    Stands last among the advantages and reads the reward as it is by then: with a penalty for length a right but long
    answer is no positive. The ratio is against the policy at its own temperature, so it is 1 in the first update.
    """

    needs: Needs = frozenset({"advantage", "reward", "part"})
    gives: frozenset[str] = frozenset({"advantage"})
    scope: Scope = "rollout"

    def __call__(self, batch: Batch) -> Columns:
        """`advantage`."""
        if "part" not in batch.columns:
            raise ConfigError(
                "tempered-positives: no row is marked as tempered; use the sampler tempered-sampler"
            )
        imitated = (is_right(batch.reward)[:, None] & batch.mask).to(batch.advantage.dtype)
        return {"advantage": torch.where(_tempered(batch)[:, None], imitated, batch.advantage)}

    def metrics(self, batch: Batch, own: Columns) -> Metrics:
        """Right answers among the tempered ones, and what each of them cost."""
        tempered = _tempered(batch)
        right = (tempered & is_right(batch.reward)).double().sum()
        return {
            "tempered/positive/frac": (right, tempered.double().sum()),
            "tempered/tokens/per_positive": (batch.mask[tempered].double().sum(), right),
        }


@dataclass(frozen=True)
class TemperedReweighting:
    """A <- (1 - alpha) A + alpha 1[R = 1] pi_T / pi per token: AEPO without extra answers (DCPO of the released code).

    alpha follows from the gap to the target, at most `limit` nats, and the success rate; see `reweighting_share`. The
    temperature comes from the controller, as for the samplers. It reads log-probabilities at two temperatures.
    """

    target: float = 0.5
    mode: Mode = "bang"
    low: float = 0.8
    high: float = 1.2
    hysteresis: float = 0.0
    patience: int = 50
    limit: float = 0.1
    gives: frozenset[str] = frozenset({"advantage"})
    scope: Scope = "rollout"
    controller: EntropyController = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.limit <= 0:
            raise ConfigError(f"limit bounds the gap to the target, in nats above 0; got {self.limit:g}")
        steered = EntropyController(
            self.target, self.mode, self.low, self.high, self.hysteresis, self.patience
        )
        object.__setattr__(self, "controller", steered)

    @property
    def needs(self) -> Needs:
        """Log-probabilities at both temperatures (the controller's one is that of this step), entropy, rewards."""
        return frozenset(
            {"advantage", "reward", "part", "sampled", Entropy("old"), Logp("old"), self._tempered_logp}
        )

    @property
    def _tempered_logp(self) -> TemperedLogp:
        return TemperedLogp("old", temperature=self.controller.temperature)

    def __call__(self, batch: Batch) -> Columns:
        """`advantage`."""
        gap = batch.reward.new_tensor(self.controller.aim - self.controller.last_entropy)
        known = ~torch.isnan(batch.reward)
        success = is_right(batch.reward).to(batch.reward.dtype).sum() / known.sum().clamp(min=1)
        alpha = reweighting_share(gap, success, self.limit)
        added = tempered_reweighting(
            batch.stats[self._tempered_logp], batch.stats[Logp("old")], batch.reward, alpha
        )
        mixed = (1 - alpha) * batch.advantage + torch.where(batch.mask, added, 0.0).to(batch.advantage.dtype)
        return {"advantage": mixed}

    def observe(self, batch: Batch) -> None:
        """The exact entropy of the policy's own rows, for the next step's temperature."""
        self.controller.observe(policy_entropy(batch))

    def state_dict(self) -> dict[str, Any]:
        """The controller's state."""
        return self.controller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the controller's state."""
        self.controller.load_state_dict(state)

    def metrics(self, batch: Batch, own: Columns) -> Metrics:
        """Temperature, distance to the target, duty cycle and saturation."""
        rows = torch.tensor(float(len(batch)), dtype=torch.float64, device=batch.mask.device)
        return _steering_metrics(self.controller, rows)
