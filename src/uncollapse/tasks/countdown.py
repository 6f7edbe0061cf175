"""Countdown: reach the target from the given numbers with + - * /, each number at most once.

The expression is read by `arithmetic`, exactly and within limits; it is never evaluated as code. Anything
after the first `=` is ignored (`3*8=24`).

    prompt  "make 24 from 3 1 8:"    right answers  "3*8"  "8*3*1"  "8*(3*1)"
"""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction

from uncollapse.errors import ConfigError
from uncollapse.tasks.answers import MAX_ANSWER, final_answer
from uncollapse.tasks.arithmetic import NotAnExpression, evaluate
from uncollapse.tasks.task import GeneratedTask, Row, check_range

MAX_TARGET = 999


def countdown(*, min_numbers: int = 2, max_numbers: int = 3, max_value: int = 9) -> GeneratedTask:
    """The task with `min_numbers` to `max_numbers` numbers from 1 to `max_value`; every target can be reached.

    Args:
        min_numbers: fewest numbers, 2 or more (default 2).
        max_numbers: most numbers, at most 6 (default 3).
        max_value: largest number, at most 100 (default 9).

    Raises:
        ConfigError: if a number is out of range or the least is above the most.
    """
    check_range("min_numbers", min_numbers, 2, 6)
    check_range("max_numbers", max_numbers, 2, 6)
    check_range("max_value", max_value, 1, 100)
    if min_numbers > max_numbers:
        raise ConfigError(f"min_numbers is {min_numbers}, above max_numbers {max_numbers}; swap them")

    def draw(random_: random.Random) -> Row:
        while True:
            numbers = [
                random_.randint(1, max_value) for _ in range(random_.randint(min_numbers, max_numbers))
            ]
            expression = _random_expression(random_, random_.sample(numbers, len(numbers)))
            target = _value(expression)
            if target is not None and target.denominator == 1 and 0 <= target <= MAX_TARGET:
                return {
                    "prompt": f"make {target} from {' '.join(map(str, numbers))}:",
                    "answer": str(target),
                    "numbers": numbers,
                    "solution": expression,
                }

    return GeneratedTask(
        name="countdown",
        summary="reach the target from the given numbers with + - * /, each number at most once",
        draw=draw,
        judge=judge,
        question=question,
        columns=("answer", "numbers"),
    )


def judge(text: str, row: Row) -> float:
    """1.0 for an expression of the given numbers, each used at most as often as given, with the target as value."""
    written = final_answer(text)
    if len(written) > MAX_ANSWER:
        return 0.0
    try:
        value, used = evaluate(written.partition("=")[0])
    except NotAnExpression:
        return 0.0
    enough = not Counter(used) - Counter(int(n) for n in row["numbers"])
    return float(enough and value == Fraction(int(row["answer"])))


def question(row: Row) -> str:
    """The task in words."""
    return (
        f"Use the numbers {', '.join(map(str, row['numbers']))}, each at most once, with + - * / and parentheses "
        f"to make {row['answer']}. Give only the expression inside <answer></answer>."
    )


def demonstration(random_: random.Random, row: Row, *, right: float) -> str:
    """The expression the row was made from with probability `right`, else a random one of the same numbers."""
    if random_.random() < right:
        return str(row["solution"])
    return _random_expression(random_, random_.sample(row["numbers"], len(row["numbers"])))


def _random_expression(random_: random.Random, numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    cut = random_.randint(1, len(numbers) - 1)
    left, right = (_random_expression(random_, part) for part in (numbers[:cut], numbers[cut:]))
    wrapped = [part if part.isdecimal() else f"({part})" for part in (left, right)]
    return random_.choice("+-*/").join(wrapped)


def _value(expression: str) -> Fraction | None:
    try:
        return evaluate(expression)[0]
    except NotAnExpression:
        return None
