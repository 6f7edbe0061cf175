"""What each engine can provide to a recipe; light to import, so that a recipe can be checked without its engine."""

from __future__ import annotations

from uncollapse.policy.batch import Stat
from uncollapse.policy.stats import Measured

TRL: frozenset[str | type[Stat]] = frozenset(
    {"reward", "group", "ids", "length", "finished", "token_limit", "fresh_prompts", Measured}
)
"""All columns of single-turn data and every statistic of one policy; two policies' logits at once it cannot hold."""
