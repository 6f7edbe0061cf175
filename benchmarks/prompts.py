"""Prompts of reasoning-gym with an exact number of SmolLM2's tokens, for benchmarks of a training step."""

from __future__ import annotations

from typing import Any

POOL = ("syllogism", "leg_counting", "word_sorting", "gsm_symbolic")
DRAWN = 400


def prompts(tokenizer: Any, length: int, count: int) -> list[str]:
    """`count` questions of `length` tokens, taken from the tasks in turn."""
    import reasoning_gym

    found: list[list[str]] = []
    for name in POOL:
        questions = (row["question"] for row in reasoning_gym.create_dataset(name, size=DRAWN, seed=0))
        found.append([text for text in questions if len(tokenizer(text)["input_ids"]) == length])
    longest = max(map(len, found))
    turns = [texts[turn] for turn in range(longest) for texts in found if turn < len(texts)]
    if len(turns) < count:
        raise ValueError(
            f"only {len(turns)} of {DRAWN} questions each of {', '.join(POOL)} have {length} tokens"
        )
    return turns[:count]
