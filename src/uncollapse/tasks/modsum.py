"""Modsum: write T digits whose sum modulo 10 is the target.

Every prompt has 10^(T-1) right answers, so the policy of highest entropy among those with reward 1 has
(T-1) ln 10 nats: T-1 free digits, and a last one that is fixed. Entropy below that is collapse, not
necessity.

    prompt  "sum6=3:"    a right answer  "908457"  (their sum is 33)
"""

from __future__ import annotations

import random

from uncollapse.tasks.answers import final_answer
from uncollapse.tasks.task import GeneratedTask, Row, check_range

_DIGITS = frozenset("0123456789")


def modsum(*, digits: int = 6) -> GeneratedTask:
    """The task with a fixed number of digits.

    Args:
        digits: T, digits to write, 1 to 50 (default 6: short enough for hundreds of rollouts a second on
            one core, long enough for 100,000 right answers).

    Raises:
        ConfigError: if `digits` is out of range.
    """
    check_range("digits", digits, 1, 50)

    def draw(random_: random.Random) -> Row:
        target = random_.randrange(10)
        return {"prompt": f"sum{digits}={target}:", "answer": str(target), "digits": digits}

    return GeneratedTask(
        name="modsum",
        summary="write T digits whose sum modulo 10 is the target; 10^(T-1) right answers for each prompt",
        draw=draw,
        judge=judge,
        question=question,
        columns=("answer", "digits"),
    )


def judge(text: str, row: Row) -> float:
    """1.0 for exactly T ASCII digits (spaces between them allowed) with the right sum, else 0.0."""
    written = final_answer(text).replace(" ", "")
    if len(written) != int(row["digits"]) or not _DIGITS.issuperset(written):
        return 0.0
    return float(sum(map(int, written)) % 10 == int(row["answer"]))


def question(row: Row) -> str:
    """The task in words."""
    return (
        f"Write {row['digits']} digits whose sum has {row['answer']} as its last digit. "
        "Give only the digits, without spaces, inside <answer></answer>."
    )


def demonstration(random_: random.Random, row: Row, *, right: float) -> str:
    """Digits in pairs that cancel, the last pair making the target: `3 7 5 5 1 2` for 3.

    The first digit of each pair is free, the second follows its rule with probability `right` and is uniform
    otherwise: a strategy that a small model learns in minutes, one of many (the policy of highest entropy
    leaves T-1 digits free, this one half of them). With an odd number of digits the first one stands alone
    and the last one makes up for it.
    """
    digits = int(row["digits"])
    alone = digits % 2
    written = [random_.randrange(10) for _ in range(alone)]
    while len(written) < digits:
        free = random_.randrange(10)
        last = len(written) + 2 == digits
        other = (int(row["answer"]) - sum(written[:alone]) - free if last else -free) % 10
        written += [free, other if random_.random() < right else random_.randrange(10)]
    return "".join(map(str, written))
