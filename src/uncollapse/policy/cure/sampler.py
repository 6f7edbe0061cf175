"""The sampler of two rounds: originals from the prompt, branches from where they were undecided."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from uncollapse.errors import ConfigError, DataError
from uncollapse.policy.batch import Batch, Clock, Columns, join
from uncollapse.policy.cure.families import family_variance
from uncollapse.policy.cure.positions import (
    SHORTEST,
    Keep,
    Mode,
    Rows,
    branch_prompts,
    critical_positions,
    critical_tokens,
    left_pad,
)
from uncollapse.policy.protocols import Engine, Metrics, Needs
from uncollapse.policy.stages.samplers import PlainSampler, refilled
from uncollapse.policy.stages.segments import group_index
from uncollapse.policy.stats import Entropy


@dataclass(frozen=True)
class RolloutGroup:
    """Originals and branches of several prompts, in group order: a group's originals, then its branches.

    `ids` are the prompts with their prefixes, padded on the left; the response is what was sampled after them.
    `parent` is the row that a branch continues (an original: its own), `branch_pos` how many of the parent's tokens
    it kept (an original: 0).
    """

    ids: Int[Tensor, "row start"]
    prompt_len: Int[Tensor, " row"]
    response_ids: Int[Tensor, "row time"]
    response_mask: Bool[Tensor, "row time"]
    group_id: Int[Tensor, " row"]
    family_id: Int[Tensor, " row"]
    parent: Int[Tensor, " row"]
    branch_pos: Int[Tensor, " row"]


@dataclass(frozen=True)
class CureSampler:
    """Originals from the prompt and branches from where each original was undecided: `samples` rows per prompt.

    Of a group of `samples` (G), samples / (1 + branches) are originals (N1), and each has `branches` (N2) branches. `k`
    and `mode` as in `critical_positions`. Columns: `family` (number of the original within its group, shared by its
    branches), `branch` (0 for an original, else 1..N2), `cut` (tokens of the original that a branch kept), and
    `within_family`, `between_families` (variance of the verifier's reward, of the row's group).

    `prefix_limit` is the most tokens that a branch keeps. Cuts beyond it are no candidates (`keep="reject"`), or are
    moved back to it (`keep="head"`, what the released truncation amounts to). `max_prompt_len` limits prompt and prefix
    together, as the released code does, in the same way; it needs the engine's column `prompt_length`. `token_ok` is a table over the vocabulary
    from `critical_tokens`; None lets any token be critical. It belongs to a tokenizer, hence to no YAML file: an engine
    with a tokenizer makes it, of tokens with at least `shortest` characters (1 for a tokenizer of single characters,
    in whose vocabulary no token is critical otherwise).

    Groups whose rewards are all equal are replaced by those of fresh prompts, branched in their turn, in at most `rounds`
    rounds (the official code: 10); what is dead after the last stays. With 1, the default, nothing is replaced.

    With `branches=0` it is `PlainSampler`. Branches are on-policy continuations, but of prefixes chosen by entropy: the
    states that the group visits are not those of the policy, and nothing corrects for it. Defaults: the official
    script (4 + 12 = 16, k = 20).
    """

    samples: int = 16
    branches: int = 3
    k: int = 20
    mode: Mode = "entropy"
    prefix_limit: int | None = None
    max_prompt_len: int | None = None
    keep: Keep = "reject"
    shortest: int = SHORTEST
    rounds: int = 1
    temperature: float = 1.0
    token_ok: Bool[Tensor, " vocab"] | None = field(default=None, compare=False, repr=False)
    needs: Needs = field(default=frozenset({"ids", "length", Entropy("old")}), init=False, repr=False)
    gives: frozenset[str] = field(
        default=frozenset({"family", "branch", "cut", "within_family", "between_families"}),
        init=False,
        repr=False,
    )

    def __post_init__(self) -> None:
        if self.samples < 1 or self.branches < 0 or self.k < 1 or self.temperature <= 0:
            raise ConfigError(
                f"cure: needs samples >= 1, branches >= 0, k >= 1 and temperature > 0; got {self}"
            )
        if self.rounds < 1 or (self.rounds > 1 and self.samples < 2):
            raise ConfigError(
                f"cure: needs rounds >= 1, and groups of at least 2 samples to replace those of equal rewards; got {self}"
            )
        if self.samples % (1 + self.branches):
            raise ConfigError(
                f"cure: {self.samples} samples are not originals with {self.branches} branches each; "
                f"take a multiple of {1 + self.branches}"
            )
        if self.mode not in ("entropy", "random") or self.keep not in ("reject", "head"):
            raise ConfigError(
                f"cure: mode is entropy or random, keep is reject or head; got {self.mode!r}, {self.keep!r}"
            )
        if self.prefix_limit is None and self.max_prompt_len is None and self.keep == "head":
            raise ConfigError(
                "cure: keep='head' says what to do at a prefix_limit or max_prompt_len; give one"
            )
        if self.shortest < 0:
            raise ConfigError(f"cure: shortest is a number of characters, 0 or more; got {self.shortest}")
        if self.prefix_limit is not None and self.prefix_limit < 0:
            raise ConfigError(f"cure: prefix_limit is a number of tokens; got {self.prefix_limit}")
        if self.max_prompt_len is not None:
            if self.max_prompt_len < 1:
                raise ConfigError(
                    f"cure: max_prompt_len is a number of tokens, 1 or more; got {self.max_prompt_len}"
                )
            object.__setattr__(self, "needs", self.needs | {"prompt_length"})
        if self.rounds > 1:
            object.__setattr__(self, "needs", self.needs | {"fresh_prompts"})

    def for_vocabulary(self, decoded: Sequence[str], special: Iterable[int]) -> CureSampler:
        """The same sampler with the table of `critical_tokens`, unless it has one. Engines with a tokenizer call this.

        Warns where no token is critical. Without branches nothing is cut, so that none is needed.
        """
        if self.token_ok is not None or not self.branches:
            return self
        return replace(self, token_ok=critical_tokens(decoded, special, self.shortest))

    @property
    def originals(self) -> int:
        """First-round answers per prompt (N1)."""
        return self.samples // (1 + self.branches)

    def __call__(self, engine: Engine, prompts: Sequence[Any], clock: Clock) -> Batch:
        """Scored rows in group order; `uid` is the row's number. Branches are sampled at the clock's next update."""

        def draw(rows: Sequence[Any], turn: int) -> Batch:
            return self._branched(engine, rows, replace(clock, update=clock.update + 2 * turn))

        return refilled(draw, engine, prompts, clock, samples=self.samples, rounds=self.rounds)

    def _branched(self, engine: Engine, prompts: Sequence[Any], clock: Clock) -> Batch:
        """Originals and branches of these prompts."""
        first = PlainSampler(self.originals, self.temperature)(engine, prompts, clock)
        if not self.branches:
            return unbranched(first, self.samples)
        cut = self.cuts(engine.measure(first, frozenset({Entropy("old")})))
        parent = torch.arange(len(first), device=cut.device).repeat_interleave(self.branches)
        kept = [ids[:end] for ids, end in zip(first.ids.tolist(), cut.tolist(), strict=True)]
        owner = first.group[parent]
        second = engine.generate(
            [prompts[group] for group in owner.tolist()],
            temperature=self.temperature,
            clock=replace(clock, update=clock.update + 1),
            prefixes=[kept[row] for row in parent.tolist()],
        )
        second = replace(second, uid=len(first) + torch.arange(len(second), device=cut.device))
        second = engine.score(second.with_columns(group=owner))
        order = _group_order(len(prompts), self.originals, self.branches).to(cut.device)
        both = join([first, second])[order]
        cuts = torch.cat([torch.zeros_like(cut), cut[parent]])[order]
        uid = torch.arange(len(both), device=cut.device)
        within = uid % self.samples
        numbered = (within - self.originals).clamp(min=0)
        branched = within >= self.originals
        return _labelled(
            replace(both, uid=uid).with_columns(group=uid // self.samples),
            family=torch.where(branched, numbered // self.branches, within),
            branch=torch.where(branched, numbered % self.branches + 1, 0),
            cut=cuts,
        )

    def cuts(self, batch: Batch) -> Int[Tensor, " row"]:
        """Where each row would be cut, from its `Entropy("old")`; the draw belongs to row and clock.

        Raises `DataError` for a prompt beyond `max_prompt_len`.
        """
        uniform = batch.clock.uniform(batch.uid, 1, "cure")[:, 0]
        lengths = None if self.max_prompt_len is None else batch.columns["prompt_length"]
        return self._choose(
            batch.stats[Entropy("old")], batch.ids, batch.mask, uniform, limit=self._limit(lengths)
        )

    def rollout(
        self,
        generate: Callable[[Rows], Rows],
        entropy: Callable[[Rows, Rows], Float[Tensor, "row time"]],
        prompts: Rows,
        *,
        pad_id: int = 0,
        clock: Clock | None = None,
    ) -> RolloutGroup:
        """Originals and branches with any generate function: `transformers`, an inference server, a script.

        `generate(prompts)` gives one continuation per prompt, `entropy(prompts, responses)` the entropy (nats) of the
        distribution that each token was drawn from, padded on the right. The entropy may be on any device; the result is on
        the CPU. Raises `DataError` for no prompts, for a prompt beyond `max_prompt_len`, and for a number of
        continuations or a shape of the entropy that does not fit; `ConfigError` for `rounds` above 1.
        """
        if self.rounds > 1:
            raise ConfigError(
                "cure: rollout knows no rewards, so it cannot replace groups; leave rounds at 1"
            )
        if not prompts:
            raise DataError("cure: there are no prompts; give at least one")
        clock = clock or Clock()
        parents = [list(prompt) for prompt in prompts for _ in range(self.originals)]
        first = _continued(generate, parents)
        ids, mask = _pad_right(first, pad_id)
        lengths = torch.tensor([len(parent) for parent in parents])
        uniform = clock.uniform(torch.arange(len(parents)), 1, "cure")[:, 0]
        limit = self._limit(lengths)
        level = entropy(parents, first)
        if level.shape != mask.shape:
            raise DataError(
                f"cure: entropy gave shape {tuple(level.shape)} for {len(first)} responses of up to {mask.shape[1]} tokens; "
                f"it has to be {tuple(mask.shape)}, padded on the right"
            )
        cut = self._choose(level.to(mask.device), ids, mask, uniform, limit=limit)
        starts = branch_prompts(parents, first, cut, self.max_prompt_len, self.keep)
        parent = torch.arange(len(parents))
        branch = parent.repeat_interleave(self.branches)
        begun = [starts[row] for row in branch.tolist()]
        second = _continued(generate, begun) if begun else []
        order = _group_order(len(prompts), self.originals, self.branches)
        place = order.argsort()  # where a row of the two rounds stands in group order
        all_parents = torch.cat([parent, branch])[order]
        response_ids, response_mask = _pad_right(first + second, pad_id)
        start_ids, attention, _ = left_pad([(parents + begun)[row] for row in order.tolist()], pad_id)
        return RolloutGroup(
            ids=start_ids,
            prompt_len=attention.sum(1),
            response_ids=response_ids[order],
            response_mask=response_mask[order],
            group_id=all_parents // self.originals,
            family_id=all_parents % self.originals,
            parent=place[all_parents],
            branch_pos=torch.cat([torch.zeros_like(cut), cut[branch]])[order],
        )

    def metrics(self, batch: Batch, own: Columns) -> Metrics:
        """Where branches start and how undecided the policy was there; what families and tokens are worth."""
        trained = batch.mask.any(1)
        is_branch = batch.columns["branch"] > 0
        counted = (is_branch & trained).double()
        first = batch.mask.int().argmax(1, keepdim=True)
        entropy = batch.stats[Entropy("old")].gather(1, first)[:, 0].double()
        rows = torch.ones_like(counted)

        def over(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return (values.double() * weight).sum(), weight.sum()

        return {
            "cure/branch/frac": over(is_branch, rows),
            "cure/cut/mean": over(batch.columns["cut"], is_branch.double()),
            "cure/cut/entropy": over(entropy, counted),
            "cure/reward/within": over(batch.columns["within_family"], rows),
            "cure/reward/between": over(batch.columns["between_families"], rows),
        }

    def _limit(self, prompt_length: Int[Tensor, " row"] | None) -> int | Int[Tensor, " row"] | None:
        """The most tokens that a branch of each row may keep; None where nothing limits it."""
        if self.max_prompt_len is None or prompt_length is None:
            return self.prefix_limit
        room = self.max_prompt_len - prompt_length
        if bool((room < 0).any()):
            raise DataError(
                f"cure: a prompt has {int(prompt_length.max())} tokens, more than max_prompt_len={self.max_prompt_len}; "
                "raise that, or leave long prompts out"
            )
        return room if self.prefix_limit is None else room.clamp(max=self.prefix_limit)

    def _choose(
        self,
        entropy: Float[Tensor, "row time"],
        ids: Int[Tensor, "row time"],
        mask: Bool[Tensor, "row time"],
        uniform: Float[Tensor, " row"],
        *,
        limit: int | Int[Tensor, " row"] | None,
    ) -> Int[Tensor, " row"]:
        token_ok = None if self.token_ok is None else _looked_up(self.token_ok, ids)
        most = limit if self.keep == "reject" else None
        cut = critical_positions(entropy, mask, token_ok, self.k, self.mode, most, uniform=uniform)
        if self.keep == "reject" or limit is None:
            return cut
        return torch.minimum(cut, torch.as_tensor(limit, device=cut.device).clamp(min=0))


def _looked_up(table: Bool[Tensor, " vocab"], ids: Int[Tensor, "row time"]) -> Bool[Tensor, "row time"]:
    """What the table says of each token; ids beyond it (padding of the vocabulary) may not be critical."""
    inside = (ids >= 0) & (ids < len(table))
    return table.to(ids.device)[torch.where(inside, ids, 0)] & inside


def _group_order(groups: int, originals: int, branches: int) -> Int[Tensor, " row"]:
    """Row numbers of (all originals, all branches), put so that every group stands together, originals first."""
    total = groups * originals
    first = torch.arange(total).view(groups, originals)
    second = total + torch.arange(total * branches).view(groups, originals * branches)
    return torch.cat([first, second], 1).flatten()


def _labelled(
    batch: Batch, family: Int[Tensor, " row"], branch: Int[Tensor, " row"], cut: Int[Tensor, " row"]
) -> Batch:
    within, between = family_variance(batch.reward, batch.group, family)
    index, _ = group_index(batch.group)
    return batch.with_columns(
        family=family, branch=branch, cut=cut, within_family=within[index], between_families=between[index]
    )


def unbranched(batch: Batch, samples: int) -> Batch:
    """Independent answers: each is the only one of its family."""
    none = torch.zeros_like(batch.uid)
    return _labelled(batch, family=batch.uid % samples, branch=none, cut=none)


def _continued(generate: Callable[[Rows], Rows], prompts: Rows) -> list[list[int]]:
    """One continuation per prompt, or `DataError`."""
    found = [list(response) for response in generate(prompts)]
    if len(found) != len(prompts):
        raise DataError(
            f"cure: generate gave {len(found)} continuations of {len(prompts)} prompts; give one for each"
        )
    return found


def _pad_right(rows: Rows, pad_id: int) -> tuple[Int[Tensor, "row time"], Bool[Tensor, "row time"]]:
    ids = pad_sequence(
        [torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=pad_id
    )
    widths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < widths[:, None]
