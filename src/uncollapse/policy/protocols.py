"""What the parts of a recipe promise to each other.

Two kinds of stage are kept apart. A `Transform` looks across all rows of its scope and has no gradient. A `Term`
has a gradient and is row-local: row i of its result depends on row i of its input and on what was decided for
it. That is why a loss does not depend on how its rows are split into micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from uncollapse.policy.batch import Batch, Clock, Columns, Stat, TokenMap, TokenMask

Scope: TypeAlias = Literal["rollout", "minibatch", "microbatch"]
"""When a decision is taken: once per rollout batch from the old policy, once per optimiser step from the current
one (costs a forward pass), or per micro-batch as most released code does (depends on the split)."""

Needs: TypeAlias = frozenset[str | Stat]


@runtime_checkable
class Stage(Protocol):
    """Anything in a slot of a recipe."""

    @property
    def needs(self) -> Needs:
        """Columns by name and statistics: a right to read. Reading anything else raises."""
        ...


@runtime_checkable
class Memory(Protocol):
    """A stage with state. `observe` is the only place where it changes."""

    def observe(self, batch: Batch) -> None:
        """Called once per rollout batch, after its updates, with the batch as the old policy saw it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep; plain numbers, strings, lists and tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        ...


Metrics: TypeAlias = Mapping[str, tuple[Float[Tensor, ""], Float[Tensor, ""]]]
"""`(sum, weight)` by name: both add up over micro-batches and processes, and the log shows their quotient."""


@runtime_checkable
class Reporter(Protocol):
    """A stage that says in the log what it did."""

    def metrics(self, batch: Batch, own: Columns) -> Metrics:
        """Numbers named `area/name/statistic`, of the rows of one micro-batch with their loss still to come.

        Readable are the stage's `needs`, what it `gives`, and for a term its `own` columns; of the current policy only
        what the loss measures. Without gradient.
        """
        ...


@runtime_checkable
class Transform(Stage, Protocol):
    """No gradient; may look across all rows of its scope. Rewards, filters, advantages and weights are this."""

    @property
    def scope(self) -> Scope:
        """When it is applied."""
        ...

    @property
    def gives(self) -> frozenset[str]:
        """Columns that it writes. `weight` multiplies and `keep` is and-ed with what is there."""
        ...

    def __call__(self, batch: Batch) -> Columns:
        """The columns named in `gives`."""
        ...


@runtime_checkable
class Term(Stage, Protocol):
    """With gradient; row i of the result depends on row i of the input and on `own` alone."""

    @property
    def scope(self) -> Scope | None:
        """When `decide` is called; None if there is nothing to decide."""
        ...

    def decide(self, batch: Batch) -> Columns:
        """Private columns, found without gradient from the whole scope.

        A number (0-dim) reaches `__call__` as `(row, 1)`. The reserved `"where"` (mask) narrows the tokens that
        the term's mean runs over.
        """
        ...

    def __call__(self, batch: Batch, own: Columns) -> TokenMap:
        """The unreduced loss per token."""
        ...


@runtime_checkable
class RolloutDecider(Term, Protocol):
    """A term that, whenever it decides, also needs something of the whole rollout batch, such as its first values."""

    def decide_rollout(self, batch: Batch) -> Columns:
        """More private columns, found once per rollout batch from the old policy, after all that is decided there."""
        ...


@runtime_checkable
class Surrogate(Term, Protocol):
    """The policy-gradient term."""

    def clipped(self, batch: Batch, own: Columns) -> TokenMask:
        """Tokens whose gradient the surrogate's own clipping has silenced."""
        ...


@runtime_checkable
class Engine(Protocol):
    """What samples, scores and measures: a testbed, TRL or verl."""

    @property
    def offers(self) -> frozenset[str | type[Stat]]:
        """Columns and kinds of statistic it can provide; a recipe that needs more is refused at the start."""
        ...

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        temperature: float,
        clock: Clock,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> Batch:
        """One row per prompt, with `ids`, `mask` and the engine's columns; `uid` numbers the rows of all processes.

        A row with a prefix (token ids of a response so far, which may be empty) continues it. The prefix is given, not
        sampled: it is outside `mask` and not counted in `length`, whether the engine keeps it in `ids` or with the prompt.
        """
        ...

    def fresh_prompts(self, count: int, clock: Clock, turn: int) -> Sequence[Any]:
        """Prompts that this step was not given; offered as `"fresh_prompts"`."""
        ...

    def score(self, batch: Batch) -> Batch:
        """The verifier's verdict in the column `reward`, unshaped; NaN where a row cannot be scored."""
        ...

    def measure(self, batch: Batch, stats: frozenset[Stat], *, grad: bool = False) -> Batch:
        """The batch with these statistics, taken at the policy temperature; 0 outside the mask."""
        ...


@runtime_checkable
class Sampler(Stage, Protocol):
    """Turns prompts into rows: how many, how hot, and which are sampled again."""

    @property
    def samples(self) -> int:
        """Completions per prompt, the size of a group."""
        ...

    @property
    def temperature(self) -> float:
        """The policy temperature: the sampler's, and the one that every statistic is taken at."""
        ...

    def __call__(self, engine: Engine, prompts: Sequence[Any], clock: Clock) -> Batch:
        """Rows with `uid`, `group` and `reward`."""
        ...


@runtime_checkable
class OfVocabulary(Sampler, Protocol):
    """A sampler that looks at what tokens say."""

    def for_vocabulary(self, decoded: Sequence[str], special: Iterable[int]) -> Sampler:
        """The sampler for a vocabulary: the text of every token id, and the ids of end of text, padding and the like."""
        ...


@runtime_checkable
class BoundByVocabulary(Stage, Protocol):
    """A stage with a number that a vocabulary may be too small for, such as a target of entropy."""

    def check_vocabulary(self, size: int) -> None:
        """Raise `ConfigError` for what no distribution over `size` tokens has; called where an engine knows the size."""
        ...


@runtime_checkable
class Replay(Stage, Protocol):
    """Rows from earlier steps, with their stored old statistics."""

    @property
    def mode(self) -> Literal["separate", "joint"]:
        """Whether replayed rows get optimiser steps of their own or join the policy's."""
        ...

    def draw(self, clock: Clock) -> Batch | None:
        """Rows of part `replay` with `scale`, `advantage` and old statistics, or None."""
        ...
