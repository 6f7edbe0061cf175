"""Modsum: write T digits whose sum modulo 10 is the target.

Every prompt has 10^(T-1) right answers, so the policy of highest entropy among those with reward 1 has
(T-1) ln 10 nats: T-1 free digits, and a last one that is fixed. Entropy below that is collapse, not
necessity.

    prompt  "sum5=3:"    a right answer  "90842"  (their sum is 23)
"""

from __future__ import annotations

import random

from uncollapse.tasks.answers import final_answer
from uncollapse.tasks.task import GeneratedTask, Row, check_range

_DIGITS = frozenset("0123456789")


def modsum(*, digits: int = 5) -> GeneratedTask:
    """The task with a fixed number of digits.

    Args:
        digits: T, digits to write, 1 to 50 (default 5: short enough for hundreds of rollouts a second on
            one core, long enough for 10,000 right answers).

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
    """Digits in pairs that cancel modulo 10, then the target: `3 7 1 9 4` for 4, `5 5 8 2 6 8` for 4.

    The first digit of each pair is free, the second follows its rule with probability `right` and is uniform
    otherwise: a strategy that a small model learns in minutes, one of many (the policy of highest entropy
    leaves T-1 digits free, this one half of them). With an even number of digits the last pair makes the target.
    """
    digits, target = int(row["digits"]), int(row["answer"])
    written: list[int] = []
    while len(written) < digits:
        last = len(written) + 2 >= digits
        if len(written) + 1 == digits:
            wanted = target
        else:
            written.append(random_.randrange(10))
            wanted = ((target if last else 0) - written[-1]) % 10
        written.append(wanted if random_.random() < right else random_.randrange(10))
    return "".join(map(str, written))
