"""The reference engine: one step of a recipe as it is meant, with all logits in hand.

A `Lab` is a small world whose policy is an `nn.Module`; `LogitsEngine` measures every statistic from its full
logits, and `Trainer` runs the life cycle of a step. Other engines are compared with this one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from uncollapse.policy.batch import Batch, Clock, Stat
from uncollapse.policy.metrics import rollout_stats
from uncollapse.policy.recipe import LossReport, Recipe
from uncollapse.studies.testbeds.drawing import Given


@runtime_checkable
class Lab(Protocol):
    """A world to sample in: prompts are objects of its own, responses are rows of token ids."""

    @property
    def token_limit(self) -> int:
        """The longest response, in tokens."""
        ...

    def sample(
        self,
        policy: nn.Module,
        prompts: Sequence[Any],
        *,
        temperature: float,
        seed: int,
        given: Given | None = None,
    ) -> tuple[Int[Tensor, "row time"], Tensor]:
        """Token ids and mask of one response per prompt, what is `given` included."""
        ...

    def fresh_prompts(self, count: int, *, seed: int) -> Sequence[Any]:
        """More prompts."""
        ...

    def logits(
        self, policy: nn.Module, prompts: Sequence[Any], ids: Int[Tensor, "row time"]
    ) -> Float[Tensor, "row time vocab"]:
        """The logits that each token was drawn from."""
        ...

    def reward(
        self, prompts: Sequence[Any], ids: Int[Tensor, "row time"], mask: Tensor
    ) -> Float[Tensor, " row"]:
        """The verifier's verdict."""
        ...


def _seed(clock: Clock, name: str) -> int:
    return int(clock.uniform(torch.tensor([0]), 1, name).item() * 2**31)


OFFERS: frozenset[str | type[Stat]] = frozenset(
    {"reward", "group", "ids", "length", "finished", "token_limit", "fresh_prompts", "other_logits", Stat}
)
"""Every kind of statistic, and all columns of single-turn data."""


@dataclass
class LogitsEngine:
    """Samples, scores and measures in a lab; holds the policy and, if a recipe asks, a frozen reference."""

    lab: Lab
    policy: nn.Module
    reference: nn.Module | None = None
    temperature: float = 1.0
    old: nn.Module | None = field(default=None, init=False, repr=False)

    @property
    def offers(self) -> frozenset[str | type[Stat]]:
        """Every kind of statistic, and all columns of single-turn data."""
        return OFFERS

    def remember(self) -> None:
        """Keep a copy of the policy as the old one, for statistics that read two policies' logits at once."""
        self.old = copy.deepcopy(self.policy).requires_grad_(False)

    def fresh_prompts(self, count: int, clock: Clock, turn: int) -> Sequence[Any]:
        """The lab's; which ones depends on the clock and the turn alone."""
        return self.lab.fresh_prompts(count, seed=_seed(clock, f"prompts/{turn}"))

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        temperature: float,
        clock: Clock,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> Batch:
        """One response per prompt; the seed of a step depends on the clock alone.

        A prefix stays at the start of `ids`; the column `prefix` says how many tokens it has.
        """
        seed = _seed(clock, "generate")
        start = torch.zeros(len(prompts), dtype=torch.long)
        given = None
        if prefixes is not None:
            start = torch.tensor([len(prefix) for prefix in prefixes])
            fixed = pad_sequence(
                [torch.tensor(list(p), dtype=torch.long) for p in prefixes], batch_first=True
            )
            given = fixed, torch.arange(fixed.shape[1]) < start[:, None]
        with torch.no_grad():
            ids, present = self.lab.sample(
                self.policy, prompts, temperature=temperature, seed=seed, given=given
            )
        mask = present.bool() & (torch.arange(ids.shape[1]) >= start[:, None])
        columns = {
            "prompt": list(prompts),
            "ids": ids,
            "prefix": start,
            "length": mask.sum(dim=1),
            "finished": present.sum(dim=1) < self.lab.token_limit,
            "token_limit": torch.tensor(float(self.lab.token_limit)),
        }
        return Batch(uid=torch.arange(len(ids)), mask=mask, columns=columns, clock=clock)

    def score(self, batch: Batch) -> Batch:
        """The lab's verdict in the column `reward`, of prefix and continuation together."""
        start = torch.arange(batch.mask.shape[1]) < batch.columns["prefix"][:, None]
        verdict = self.lab.reward(batch.columns["prompt"], batch.ids, batch.mask | start)
        return batch.with_columns(reward=verdict)

    def measure(self, batch: Batch, stats: frozenset[Stat], *, grad: bool = False) -> Batch:
        """The statistics from full logits at the policy temperature; 0 outside the mask."""
        with torch.set_grad_enabled(grad):
            found = {stat: self._one(batch, stat) for stat in sorted(stats, key=repr)}
        return batch.with_stats(found)

    def _one(self, batch: Batch, stat: Stat) -> Tensor:
        inside = batch.mask
        # An old statistic was measured when the old policy was the policy; beside the current one it needs its copy.
        second = {None: None, "old": self.old, "ref": self.reference}[stat.against]
        other = self._logits(batch, second)[inside] if stat.against else None
        own = self.reference if stat.whose == "ref" else self.policy
        value = stat.of(self._logits(batch, own)[inside], batch.ids[inside], other)
        return torch.zeros(inside.shape, dtype=value.dtype).masked_scatter(inside, value)

    def _logits(self, batch: Batch, module: nn.Module | None) -> Tensor:
        if module is None:
            raise ValueError(
                "the recipe reads a reference policy, or the old one beside the current, but the engine has none"
            )
        return self.lab.logits(module, batch.columns["prompt"], batch.ids) / self.temperature


@dataclass
class Trainer:
    """The life cycle of a step, as written in the documentation of the policy layer.

    `minibatches` optimiser steps per rollout batch, each split into `microbatches` pieces. The gradient norm is
    clipped at `max_grad_norm`. The recipe is copied: what its stages remember belongs to this run alone.
    """

    recipe: Recipe
    engine: LogitsEngine
    optimizer: torch.optim.Optimizer
    seed: int = 0
    total: int | None = None
    minibatches: int = 1
    microbatches: int = 1
    max_grad_norm: float | None = 1.0
    steps_done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.recipe = copy.deepcopy(self.recipe)
        self.recipe.check("the testbed", self.engine.offers)
        self.engine.temperature = self.recipe.sampler.temperature

    def rollout(self, prompts: Sequence[Any]) -> Batch:
        """Sample, score, measure and prepare one rollout batch."""
        if any(stat.against == "old" for stat in self.recipe.stats("loss") | self.recipe.stats("plan")):
            self.engine.remember()
        clock = Clock(step=self.steps_done, total=self.total, seed=self.seed)
        batch = self.recipe.sampler(self.engine, prompts, clock)
        batch = self.engine.measure(batch, rollout_stats(self.recipe))
        return self.recipe.prepare(batch)

    def queue(self, batch: Batch) -> Iterator[Batch]:
        """The rows of each optimiser step, drawn without replacement by the clock's hash."""
        order = batch.clock.uniform(batch.uid, 1, "minibatches")[:, 0].argsort()
        for update, rows in enumerate(order.chunk(self.minibatches)):
            yield replace(batch[rows], clock=replace(batch.clock, update=update))

    def backward(self, mini: Batch) -> LossReport:
        """Plan one optimiser step and add up gradients over its micro-batches; returns their sum."""
        if self.recipe.has("minibatch"):
            fresh = mini.clock.update == 0
            mini = mini.old_as_now() if fresh else self.engine.measure(mini, self.recipe.stats("plan"))
        mini = self.recipe.plan(mini)
        reports = []
        for rows in torch.arange(len(mini)).chunk(self.microbatches):
            micro = self.engine.measure(mini[rows], self.recipe.stats("loss"), grad=True)
            report = self.recipe.loss(micro)
            report.loss.backward()
            reports.append(report)
        return add_up(reports)

    def step(self, prompts: Sequence[Any]) -> tuple[Batch, list[LossReport]]:
        """One rollout batch and all its optimiser steps."""
        batch = self.rollout(prompts)
        reports = []
        for mini in self.queue(batch):
            self.optimizer.zero_grad()
            reports.append(self.backward(mini))
            if self.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.engine.policy.parameters(), self.max_grad_norm)
            self.optimizer.step()
        self.recipe.observe(batch)
        self.steps_done += 1
        return batch, reports


def add_up(reports: Sequence[LossReport]) -> LossReport:
    """The report of the whole from the reports of its pieces."""
    loss = sum((report.loss.detach() for report in reports), torch.zeros(()))
    terms = {key: sum((r.terms[key] for r in reports), torch.zeros(())) for key in reports[0].terms}
    metrics = {
        key: (
            sum((r.metrics[key][0] for r in reports), torch.zeros(())),
            sum((r.metrics[key][1] for r in reports), torch.zeros(())),
        )
        for key in reports[0].metrics
    }
    return LossReport(loss, terms, metrics)
