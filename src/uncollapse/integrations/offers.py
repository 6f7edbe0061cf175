"""What each engine can provide to a recipe; light to import, so that a recipe can be checked without its engine."""

from __future__ import annotations

from uncollapse.policy.batch import Stat
from uncollapse.policy.stats import Entropy, Logp, Measured

_SINGLE_TURN = frozenset({"reward", "group", "ids", "length", "finished", "token_limit"})

TRL: frozenset[str | type[Stat]] = _SINGLE_TURN | {"fresh_prompts", "prompt_length", Measured}
"""All columns of single-turn data and every statistic of one policy; two policies' logits at once it cannot hold."""

VERL_TRAINER: frozenset[str | type[Stat]] = _SINGLE_TURN | {Logp, Entropy}
"""What verl's workers report of themselves: log-probability and entropy, with gradient."""

VERL_ENGINE: frozenset[str | type[Stat]] = _SINGLE_TURN | {Measured}
"""With our engine in verl's workers: every statistic of one policy."""
