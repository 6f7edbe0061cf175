"""A recipe: the stages of a method and the one loss path that every method and every engine share.

The way is one direction: sampler, scores, old statistics, then `prepare` (rewards, filters, advantage, weights),
`plan` (decisions and weight maps of one optimiser step), `loss` (one micro-batch) and `observe`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.policy.batch import PARTS, Batch, Columns, Stat
from uncollapse.policy.protocols import (
    BoundByVocabulary,
    Memory,
    Metrics,
    Needs,
    Replay,
    Reporter,
    RolloutDecider,
    Sampler,
    Scope,
    Stage,
    Surrogate,
    Term,
    Transform,
)
from uncollapse.policy.reduction import Mean, Sum
from uncollapse.policy.schedules import Schedule, value_at
from uncollapse.policy.stats import Logp

TRANSFORM_SLOTS = ("rewards", "filters", "advantage", "weights")


@dataclass(frozen=True)
class Weighted:
    """A regularizer: a term with its coefficient, its own reduction and the parts of the batch it applies to.

    Raises `ConfigError` for a reduction that a term with an attribute `mean` does not mean.
    """

    term: Term
    coef: Schedule = 1.0
    mean: Mean | Sum = field(default_factory=Mean)
    parts: frozenset[str] = frozenset({"policy"})

    def __post_init__(self) -> None:
        only = getattr(self.term, "mean", self.mean)
        if only != self.mean:
            raise ConfigError(
                f"{type(self.term).__name__} is defined with the mean {only} and no other; give it that"
            )

    @property
    def active(self) -> bool:
        """False for a coefficient that is the constant 0: the term then costs nothing."""
        return callable(self.coef) or self.coef != 0


@dataclass(frozen=True)
class LossReport:
    """The loss of one micro-batch; everything in it adds up over micro-batches and processes."""

    loss: Float[Tensor, ""]
    terms: Mapping[str, Float[Tensor, ""]]
    metrics: Metrics


@dataclass(frozen=True)
class _Slot:
    """A term in its place: the key that its columns are filed under, its reduction and its parts."""

    key: str
    term: Term
    mean: Mean | Sum
    coef: Schedule
    parts: frozenset[str]


@dataclass(frozen=True)
class Recipe:
    """A method for reinforcement learning with verifiable rewards, as stages that any engine can run.

    Raises `ConfigError` for a sampler with `joint` set and a mean without.
    """

    name: str
    paper: str
    summary: str
    surrogate: Surrogate
    mean: Mean | Sum
    sampler: Sampler
    rewards: tuple[Transform, ...] = ()
    filters: tuple[Transform, ...] = ()
    advantage: tuple[Transform, ...] = ()
    weights: tuple[Transform, ...] = ()
    regularizers: tuple[Weighted, ...] = ()
    replay: Replay | None = None

    def __post_init__(self) -> None:
        if getattr(self.sampler, "joint", False) and not getattr(self.mean, "joint", False):
            raise ConfigError(
                f"{type(self.sampler).__name__} puts rows in the place of others, which have to weigh what those did; "
                "give the recipe a mean with joint: true"
            )

    # ---- what it needs -------------------------------------------------------------------------------------

    def _transforms(self, scope: Scope) -> Iterator[tuple[str, Transform]]:
        for slot in TRANSFORM_SLOTS:
            for transform in getattr(self, slot):
                if transform.scope == scope:
                    yield slot, transform

    @cached_property
    def _slots(self) -> tuple[_Slot, ...]:
        surrogate = _Slot("surrogate", self.surrogate, self.mean, 1.0, frozenset(PARTS))
        names = [type(weighted.term).__name__ for weighted in self.regularizers]
        regularizers = [
            _Slot(f"{name}.{index}" if names.count(name) > 1 else name, w.term, w.mean, w.coef, w.parts)
            for index, (name, w) in enumerate(zip(names, self.regularizers, strict=True))
            if w.active
        ]
        return (surrogate, *regularizers)

    def stages(self) -> Iterator[tuple[str, Stage]]:
        """Every stage with the name of its place, in the order in which they act."""
        yield "sampler", self.sampler
        for slot in TRANSFORM_SLOTS:
            for index, transform in enumerate(getattr(self, slot)):
                yield f"{slot}.{index}", transform
        for place in self._slots:
            yield place.key, place.term
        if self.replay is not None:
            yield "replay", self.replay

    def has(self, scope: Scope) -> bool:
        """Whether any stage decides at this scope."""
        return any(True for _ in self._transforms(scope)) or any(
            slot.term.scope == scope for slot in self._slots
        )

    @property
    def split_dependent(self) -> bool:
        """Whether the loss depends on how a step is split into micro-batches (parity with released code only)."""
        return self.has("microbatch")

    @property
    def columns(self) -> frozenset[str]:
        """Columns that the engine has to bring."""
        given = {"weight", "keep", "clipped", "advantage", "old_logp", "part", "sampled", "scale", "reward"}
        given.update(*(_gives(stage) for _, stage in self.stages()))
        needed = {need for _, stage in self.stages() for need in stage.needs if isinstance(need, str)}
        needed.update(*(slot.mean.needs for slot in self._slots))
        return frozenset(needed - given) | {"reward"}

    def _now(self, scope: Scope) -> frozenset[Stat]:
        """Statistics of the current policy that decisions at this scope read."""
        needs: set[str | Stat] = set()
        for _, transform in self._transforms(scope):
            needs |= transform.needs
        for slot in self._slots:
            if slot.term.scope == scope:
                needs |= slot.term.needs
        if "clipped" in needs:
            needs |= self.surrogate.needs
        return frozenset(n for n in needs if isinstance(n, Stat) and n.whose == "now")

    def stats(self, moment: str) -> frozenset[Stat]:
        """Statistics to measure: `rollout` (old and reference), `plan` (now, no gradient), `loss` (now, gradient)."""
        if moment == "plan":
            return self._now("minibatch")
        if moment == "loss":
            needs = {need for slot in self._slots for need in slot.term.needs}
            return frozenset(n for n in needs if isinstance(n, Stat) and n.whose == "now") | self._now(
                "microbatch"
            )
        if moment == "rollout":
            declared = {need for _, stage in self.stages() for need in stage.needs if isinstance(need, Stat)}
            fixed = {stat for stat in declared if stat.whose != "now"}
            as_old = {stat.by("old") for stat in self._now("rollout") | self._now("minibatch")}
            return frozenset(fixed | as_old | {Logp("old")})
        raise ValueError(f"no such moment: {moment!r}")

    def check(self, engine: str, offers: frozenset[str | type[Stat]]) -> None:
        """Refuse before the first step what the engine cannot provide. Raises `ConfigError` with the reasons."""
        reasons = self.refusals(offers)
        if reasons:
            raise ConfigError(f"recipe {self.name!r} cannot run on {engine}: {'; '.join(reasons)}")

    def check_vocabulary(self, size: int) -> None:
        """Refuse before the first step what a vocabulary of `size` tokens cannot give. Raises `ConfigError`."""
        for _, stage in self.stages():
            if isinstance(stage, BoundByVocabulary):
                stage.check_vocabulary(size)

    def refusals(self, offers: frozenset[str | type[Stat]]) -> list[str]:
        """Why an engine with these offers cannot run the recipe; empty if it can."""
        kinds = tuple(offer for offer in offers if isinstance(offer, type))
        reasons = [f"it has no column {name!r}" for name in sorted(self.columns - offers)]
        wanted = self.stats("rollout") | self.stats("plan") | self.stats("loss")
        missing = {type(stat).__name__ for stat in wanted if not isinstance(stat, kinds)}
        reasons += [f"it cannot measure {name}" for name in sorted(missing)]
        if any(stat.against for stat in wanted) and "other_logits" not in offers:
            reasons.append("it does not hold two policies' logits at once, which an exact divergence needs")
        if self.replay is not None and f"replay:{self.replay.mode}" not in offers:
            reasons.append(f"it has no place for {self.replay.mode} replay")
        return reasons

    # ---- one step ------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> Batch:
        """Rewards, filters, advantage and weights that are decided once per rollout batch, from the old policy.

        `batch` holds `reward`, the sampler's columns and `stats("rollout")`. Rows whose reward is NaN cannot be
        scored: they are named in a warning, leave the loss, and no group statistic counts them. The column `sampled` keeps
        the mask as it was before any row left.
        """
        columns = {**batch.columns, "sampled": batch.mask}
        columns.setdefault("old_logp", batch.stats[Logp("old")])
        batch = replace(batch, columns=columns)
        batch = self._transform(batch.old_as_now(), "rollout", slots=("rewards",))
        batch = _drop_unscorable(batch)
        batch = self._decide(batch, "rollout", slots=("filters", "advantage", "weights"))
        for slot in self._slots:
            if isinstance(slot.term, RolloutDecider):
                batch = _file(slot, batch, slot.term.decide_rollout)
        return batch

    def plan(self, batch: Batch) -> Batch:
        """Decisions of one optimiser step over all its rows, then the weight maps.

        `batch` holds `stats("plan")` if `has("minibatch")`.
        """
        batch = self._decide(batch, "minibatch", slots=TRANSFORM_SLOTS)
        present = _parts(batch).keys()
        maps = {f"map/{slot.key}": _weight_map(slot, batch) for slot in self._slots if slot.parts & present}
        return batch.with_columns(**maps)

    def loss(self, batch: Batch) -> LossReport:
        """The loss of one micro-batch of a planned step; add up over micro-batches and processes.

        `batch` holds `stats("loss")` with gradient.
        """
        batch = self._decide(batch, "microbatch", slots=TRANSFORM_SLOTS, detached=True)
        total = torch.zeros((), dtype=batch.columns["map/surrogate"].dtype, device=batch.mask.device)
        terms: dict[str, Tensor] = {}
        for slot in self._slots:
            weights = batch.columns.get(f"map/{slot.key}")
            if weights is None:  # the step holds no row of the term's parts
                continue
            if slot.key == "surrogate" and "weight" in batch.columns:
                weights = weights * batch.columns["weight"]
            coef = value_at(slot.coef, batch.clock)
            value = slot.term(batch.view(slot.term.needs, slot.key), _own(batch, slot.key))
            # Outside the map a term may be anything, NaN included; `where` keeps it out of value and gradient.
            term = coef * (weights * torch.where(weights != 0, value, torch.zeros_like(value))).sum()
            terms[slot.key] = term.detach()
            total = total + term
        return LossReport(total, terms, {**self._loss_metrics(batch), **self._stage_metrics(batch)})

    def observe(self, batch: Batch) -> None:
        """Let the stages with memory see the rollout batch after its updates.

        A term sees the rows of its parts, a transform the policy's own, sampler and replay all.
        """
        for key, stage in self.stages():
            if isinstance(stage, Memory):
                own = isinstance(stage, Transform)
                seen = batch.of_parts("policy") if own else self._seen_by(key, batch)
                stage.observe(seen.old_as_now().view(stage.needs | _gives(stage), key))

    # ---- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of all stages with memory, and the recipe's name."""
        memories = {key: stage.state_dict() for key, stage in self.stages() if isinstance(stage, Memory)}
        return {"recipe": self.name, "stages": memories}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the stages' state. Raises `ConfigError` for the state of another recipe."""
        memories = {key: stage for key, stage in self.stages() if isinstance(stage, Memory)}
        if state.get("recipe") != self.name or set(state.get("stages", {})) != set(memories):
            raise ConfigError(
                f"the checkpoint is of recipe {state.get('recipe')!r}, this run is of {self.name!r}; "
                "resume with the recipe that wrote it or start a new run"
            )
        for key, stage in memories.items():
            stage.load_state_dict(state["stages"][key])

    # ---- inside --------------------------------------------------------------------------------------------

    def _seen_by(self, key: str, batch: Batch) -> Batch:
        """The rows of the parts that a term applies to; all rows for any other stage."""
        parts = next((slot.parts for slot in self._slots if slot.key == key), frozenset(PARTS))
        return batch if parts == frozenset(PARTS) else batch.of_parts(*parts)

    @torch.no_grad()
    def _stage_metrics(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for key, stage in self.stages():
            if isinstance(stage, Reporter):
                seen = self._seen_by(key, batch)
                own = {name: value.detach() for name, value in _own(seen, key).items()}
                found.update(stage.metrics(seen.view(stage.needs | _gives(stage), key), own))
        return found

    def _transform(self, batch: Batch, scope: Scope, slots: tuple[str, ...]) -> Batch:
        for slot, transform in self._transforms(scope):
            if slot in slots:
                reader = f"{slot}: {type(transform).__name__}"
                written = _by_part(batch, transform, transform.needs, reader, frozenset(PARTS))
                batch = _merge(batch, transform, written, reader)
        return batch

    @torch.no_grad()
    def _decide(self, batch: Batch, scope: Scope, slots: tuple[str, ...], detached: bool = False) -> Batch:
        """Everything that is decided at this scope; weights come last, since they may read `clipped`."""
        if not self.has(scope):
            return batch
        seen = replace(batch, stats={s: v.detach() for s, v in batch.stats.items()}) if detached else batch
        before = tuple(slot for slot in slots if slot != "weights")
        seen = self._transform(seen, scope, slots=before)
        terms = self._slots
        seen = _decide_term(terms[0], seen, scope)
        readers = [t for _, t in self._transforms(scope) if "clipped" in t.needs]
        if readers:
            view = seen.view(self.surrogate.needs, "surrogate")
            seen = seen.with_columns(
                clipped=self.surrogate.clipped(view, _own(seen, "surrogate")) & seen.mask
            )
        seen = self._transform(seen, scope, slots=("weights",))
        for slot in terms[1:]:
            seen = _decide_term(slot, seen, scope)
        return replace(seen, stats=batch.stats) if detached else seen

    @torch.no_grad()
    def _loss_metrics(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        weight = batch.mask.double().sum()
        clipped = self.surrogate.clipped(
            batch.view(self.surrogate.needs, "surrogate"), _own(batch, "surrogate")
        )
        clipped = clipped & batch.mask
        ahead = batch.advantage > 0
        log_ratio = (batch.old_logp - batch.stats[Logp()])[batch.mask].double()
        return {
            "clip/high/frac": ((clipped & ahead).double().sum(), weight),
            "clip/low/frac": ((clipped & ~ahead).double().sum(), weight),
            "kl/old/k3": ((log_ratio.exp() - 1 - log_ratio).sum(), weight),
        }


def _gives(stage: Stage) -> frozenset[str]:
    """Columns that a transform or a sampler writes."""
    found: frozenset[str] = getattr(stage, "gives", frozenset())
    return found


def _own(batch: Batch, key: str) -> dict[str, Any]:
    prefix = f"own/{key}/"
    return {name[len(prefix) :]: value for name, value in batch.columns.items() if name.startswith(prefix)}


def _drop_unscorable(batch: Batch) -> Batch:
    bad = torch.isnan(batch.reward)
    if not bool(bad.any()):
        return batch
    rows = ", ".join(str(row) for row in bad.nonzero()[:8, 0].tolist())
    more = ", ..." if int(bad.sum()) > 8 else ""
    warnings.warn(
        f"{int(bad.sum())} of {len(batch)} rewards are NaN (rows {rows}{more}); "
        "these rows are treated as unscorable and leave the loss",
        stacklevel=3,
    )
    return replace(batch, mask=batch.mask & ~bad[:, None])


def _merge(batch: Batch, transform: Transform, written: Mapping[str, Any], reader: str) -> Batch:
    """File what a transform wrote: `weight` multiplies, `keep` is and-ed, the rest only over what it has read."""
    if set(written) != set(transform.gives):
        raise ConfigError(f"{reader} declares {sorted(transform.gives)} but wrote {sorted(written)}")
    columns = dict(batch.columns)
    mask = batch.mask
    for name, value in written.items():
        if name == "weight":
            columns[name] = value * columns[name] if name in columns else value
        elif name == "keep":
            columns[name] = value & columns[name] if name in columns else value
            mask = mask & value[:, None]
        elif name in columns and name not in transform.needs:
            raise ConfigError(
                f"{reader} overwrites the column {name!r} of an earlier stage without reading it"
            )
        else:
            columns[name] = value
    return replace(batch, columns=columns, mask=mask)


def _parts(batch: Batch) -> dict[str, Tensor | None]:
    """The rows of each part that is present; None stands for all rows."""
    if "part" not in batch.columns:
        return {"policy": None}
    codes = batch.columns["part"]
    return {name: codes == code for name, code in PARTS.items() if bool((codes == code).any())}


def _by_part(
    batch: Batch, stage: Callable[[Batch], Columns], needs: Needs, reader: str, parts: frozenset[str]
) -> dict[str, Any]:
    """What a stage writes when it sees one part at a time, so that replayed or tempered rows never enter on-policy
    statistics. A number per part becomes one per row."""
    columns: dict[str, Any] = {}
    for name, rows in _parts(batch).items():
        if name not in parts:
            continue
        pool = batch if rows is None else batch[rows]
        for key, value in stage(pool.view(needs, reader)).items():
            per_row = value.reshape(1, 1).expand(len(pool), 1) if value.ndim == 0 else value
            columns[key] = per_row if rows is None else _scatter(per_row, rows, columns.get(key))
    return columns


def _decide_term(slot: _Slot, batch: Batch, scope: Scope) -> Batch:
    if slot.term.scope != scope:
        return batch
    decided = _file(slot, batch, slot.term.decide)
    if scope == "microbatch" and f"own/{slot.key}/where" in decided.columns:
        raise ConfigError(f"{slot.key}: 'where' cannot be decided per micro-batch; its mean needs all rows")
    return decided


def _file(slot: _Slot, batch: Batch, stage: Callable[[Batch], Columns]) -> Batch:
    """The batch with a term's private columns."""
    found = _by_part(batch, stage, slot.term.needs, slot.key, slot.parts)
    return batch.with_columns(**{f"own/{slot.key}/{key}": value for key, value in found.items()})


def _scatter(value: Tensor, rows: Tensor, into: Tensor | None) -> Tensor:
    if into is None:
        into = value.new_zeros((len(rows), *value.shape[1:]))
    return into.index_copy(0, rows.nonzero()[:, 0], value)


def _weight_map(slot: _Slot, batch: Batch) -> Tensor:
    where = batch.mask & batch.columns.get(f"own/{slot.key}/where", batch.mask)
    total = torch.zeros_like(batch.mask, dtype=torch.float64)
    pools = [rows for name, rows in _parts(batch).items() if name in slot.parts]
    if isinstance(slot.mean, Mean) and slot.mean.joint and len(pools) > 1:
        pools = [torch.stack([rows for rows in pools if rows is not None]).any(0)]
    for rows in pools:
        pool = batch if rows is None else replace(batch, mask=batch.mask & rows[:, None])
        total = total + slot.mean.weights(where & pool.mask, pool)
    if "scale" in batch.columns:
        total = total * batch.columns["scale"][:, None]
    return total.to(batch.advantage.dtype)


REGISTERED: dict[str, Recipe] = {}
"""Recipes by name, filled by `register`; `uncollapse.policy.registry` looks them up."""


def register(recipe: Recipe) -> Recipe:
    """Make a recipe known by its name. Raises `ConfigError` if the name is taken."""
    if recipe.name in REGISTERED:
        raise ConfigError(f"a recipe named {recipe.name!r} is registered already; choose another name")
    REGISTERED[recipe.name] = recipe
    return recipe
