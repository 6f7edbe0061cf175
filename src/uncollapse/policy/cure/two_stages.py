"""Two stages: branch while it widens what the policy sees, then train from the prompts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from uncollapse.errors import ConfigError
from uncollapse.policy.batch import Batch, Clock
from uncollapse.policy.cure.sampler import CureSampler, unbranched
from uncollapse.policy.protocols import Engine, Needs
from uncollapse.policy.stages.samplers import DynamicSampler
from uncollapse.policy.stats import Entropy


@dataclass
class TwoStageSchedule:
    """When the second stage begins: at `switch_step` rollout batches, or when the reward has stopped rising.

    It has stopped rising when its mean over the last `patience` batches is not more than `gain` above that over the
    `patience` before. Whichever comes first; None leaves a rule out. There is no way back. The released scripts switch
    by hand, after 300 steps.
    """

    switch_step: int | None = 300
    patience: int | None = None
    gain: float = 0.0
    rewards: list[float] = field(default_factory=list, init=False, repr=False)
    switched: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.switch_step is None and self.patience is None:
            raise ConfigError("two stages: give switch_step or patience, else the second never begins")
        if (self.switch_step or 0) < 0 or (self.patience is not None and self.patience < 1):
            raise ConfigError(f"two stages: needs switch_step >= 0 and patience >= 1; got {self}")

    def second(self, clock: Clock) -> bool:
        """Whether the step belongs to the second stage."""
        return self.switched or (self.switch_step is not None and clock.step >= self.switch_step)

    def see(self, reward: float) -> None:
        """Note the mean reward of a rollout batch; NaN is none."""
        if self.patience is None or self.switched or reward != reward:
            return
        self.rewards = [*self.rewards, reward][-2 * self.patience :]
        before, last = self.rewards[: self.patience], self.rewards[self.patience :]
        if len(last) == self.patience:
            self.switched = sum(last) - sum(before) <= self.gain * self.patience

    def state_dict(self) -> dict[str, Any]:
        """The rewards seen, and whether the second stage has begun by them."""
        return {"rewards": list(self.rewards), "switched": self.switched}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.rewards, self.switched = list(state["rewards"]), bool(state["switched"])


@dataclass(frozen=True)
class TwoStageSampler(CureSampler):
    """`CureSampler` until `TwoStageSchedule` says otherwise, then independent answers to the prompts alone.

    `switch_step`, `patience` and `gain` are those of the schedule, which sees the mean reward of the originals that train:
    with `rounds` above 1, without most of the groups whose rewards are all equal. The second stage is `DynamicSampler`
    with as many `rounds`.
    """

    switch_step: int | None = 300
    patience: int | None = None
    gain: float = 0.0
    needs: Needs = field(
        default=frozenset({"ids", "length", "reward", Entropy("old")}),
        init=False,
        repr=False,
    )
    schedule: TwoStageSchedule = field(
        default_factory=TwoStageSchedule, init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        DynamicSampler(self.samples, self.temperature, self.rounds)  # refuses what it cannot honour
        schedule = TwoStageSchedule(self.switch_step, self.patience, self.gain)
        object.__setattr__(self, "schedule", schedule)

    def __call__(self, engine: Engine, prompts: Sequence[Any], clock: Clock) -> Batch:
        """Scored rows of the stage that the step belongs to, with the same columns in both."""
        if not self.schedule.second(clock):
            return super().__call__(engine, prompts, clock)
        plain = DynamicSampler(self.samples, self.temperature, self.rounds)
        return unbranched(plain(engine, prompts, clock), self.samples)

    def observe(self, batch: Batch) -> None:
        """Let the schedule see the mean reward of the originals, which is that of the policy from the prompt."""
        reward = batch.reward[batch.columns["branch"] == 0]
        self.schedule.see(float(reward[~torch.isnan(reward)].double().mean()))

    def state_dict(self) -> dict[str, Any]:
        """The schedule's."""
        return self.schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the schedule."""
        self.schedule.load_state_dict(state)
