"""Running maximum: say the largest of a few digits, with or without thinking first.

A completion may think before it answers: partial maxima, each followed by a semicolon, then further blocks
that go over the digits again after a `?`, then `|`, the end of thinking, and the answer. Only what follows
the last `|` is judged, so how long to think is for the model to learn (truncation, length penalties).

    prompt  "max3519:"    a right completion  "5;5;9;|9"    a longer one  "5;5;9;?5;5;9;|9"
"""

from __future__ import annotations

import random
from collections import Counter

from uncollapse.errors import ConfigError
from uncollapse.tasks.answers import final_answer
from uncollapse.tasks.task import GeneratedTask, Row, check_range

END_OF_THINKING = "|"


def running_maximum(*, min_digits: int = 2, max_digits: int = 7) -> GeneratedTask:
    """The task with `min_digits` to `max_digits` digits a prompt, each number of digits equally likely.

    Args:
        min_digits: fewest digits of a prompt, 2 or more (default 2).
        max_digits: most digits of a prompt, at most 50 (default 7).

    Raises:
        ConfigError: if a number is out of range or the least is above the most.
    """
    check_range("min_digits", min_digits, 2, 50)
    check_range("max_digits", max_digits, 2, 50)
    if min_digits > max_digits:
        raise ConfigError(f"min_digits is {min_digits}, above max_digits {max_digits}; swap them")

    def draw(random_: random.Random) -> Row:
        digits = [random_.randrange(10) for _ in range(random_.randint(min_digits, max_digits))]
        return {"prompt": f"max{''.join(map(str, digits))}:", "answer": str(max(digits))}

    return GeneratedTask(
        name="running-maximum",
        summary="say the largest of a few digits; thinking aloud is allowed and can be shortened",
        draw=draw,
        judge=judge,
        question=question,
    )


def judge(text: str, row: Row) -> float:
    """1.0 if what follows the last end-of-thinking mark is the answer, else 0.0."""
    return float(final_answer(text.rpartition(END_OF_THINKING)[2]) == row["answer"])


def question(row: Row) -> str:
    """The task in words."""
    digits = ", ".join(row["prompt"].removeprefix("max").removesuffix(":"))
    return f"What is the largest of these digits: {digits}? Give only the digit inside <answer></answer>."


def demonstration(random_: random.Random, row: Row, *, wrong: float, checks: int) -> str:
    """A noisy trace: partial maxima, `checks` further blocks, the answer by majority of the blocks.

    Each partial maximum is replaced by a random digit with probability `wrong` and the block goes on from
    the replacement, so a check that disagrees really repairs an answer.
    """
    digits = [int(d) for d in row["prompt"].removeprefix("max").removesuffix(":")]
    blocks = [_partial_maxima(random_, digits, wrong) for _ in range(1 + checks)]
    answer = Counter(block[-1] for block in blocks).most_common(1)[0][0]
    thinking = "?".join("".join(f"{m};" for m in block) for block in blocks)
    return f"{thinking}{END_OF_THINKING}{answer}"


def _partial_maxima(random_: random.Random, digits: list[int], wrong: float) -> list[int]:
    partial, highest = [], digits[0]
    for digit in digits[1:]:
        highest = random_.randrange(10) if random_.random() < wrong else max(highest, digit)
        partial.append(highest)
    return partial
