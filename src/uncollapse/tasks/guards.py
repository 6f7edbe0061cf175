"""Which reasoning-gym scorers evaluate the text they judge, and what is let through to them.

Nine scorers of reasoning-gym 0.1.25 hand a model's answer to `eval` or to SymPy's `parse_expr`, which ends in
`eval`. An answer reaches those only if it is inert: one of the stored solutions word for word, a Python
literal rewritten from its value, or an expression in a grammar of numbers, listed names and operators. Anything
else scores what an empty answer scores. Without this `__import__("os").system(...)` runs, and
`oracle_answer`, a name inside the scorer, earns a reward.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

from uncollapse.tasks.arithmetic import NotAnExpression, evaluate

Guard = Callable[[str, dict[str, Any]], str | None]

MAX_LITERAL = 2_000
MAX_NESTING = 20
MAX_FORMULA = 500
FUNCTIONS = frozenset(
    {
        "Abs",
        "acos",
        "acosh",
        "asin",
        "asinh",
        "atan",
        "atanh",
        "cos",
        "cosh",
        "cot",
        "csc",
        "exp",
        "ln",
        "log",
        "sec",
    }
    | {"sin", "sinh", "sqrt", "tan", "tanh"}
)
CONSTANTS = frozenset(("pi", "E"))

_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]{1,9}(?:\.[0-9]{1,9})?)|(?P<name>[A-Za-z]{1,5})|(?P<mark>\*\*|[-+*/()]))"
)


def solution_or_literal(answer: str, entry: dict[str, Any]) -> str | None:
    """The answer if it is a stored solution; a literal rewritten from its value; else None."""
    solutions = {entry["answer"], str(entry["answer"]).strip(), *entry["metadata"].get("valid_answers", ())}
    for candidate in (answer, answer.strip()):
        if candidate in solutions:
            return candidate
    if (
        len(answer) > MAX_LITERAL
        or sum(map(answer.count, "([{")) > MAX_LITERAL // 4
        or _nesting(answer) > MAX_NESTING
    ):
        return None
    try:
        return repr(ast.literal_eval(answer.strip()))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def arithmetic_only(answer: str, entry: dict[str, Any]) -> str | None:
    """The answer if it is an expression of numbers and + - * / ( ) that has a value, else None."""
    try:
        evaluate(answer)
    except NotAnExpression:
        return None
    return answer


def formula_only(answer: str, entry: dict[str, Any]) -> str | None:
    """The answer if it consists of numbers, one-letter symbols, listed functions and + - * / ** ( ), else None.

    A name before a parenthesis must be a function; a power must not be raised to a power without
    parentheses, and a literal exponent has at most two digits.
    """
    if len(answer) > MAX_FORMULA or _nesting(answer) > MAX_NESTING:
        return None
    found, position = [], 0
    text = answer.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        found.append((match.lastgroup or "", match.group(match.lastgroup or 0)))
        position = match.end()
    return answer if found and _is_inert(found) else None


def _is_inert(found: list[tuple[str, str]]) -> bool:
    powers = 0
    for i, (kind, text) in enumerate(found):
        following = found[i + 1][1] if i + 1 < len(found) else ""
        if kind == "name":
            if not (text in FUNCTIONS if following == "(" else len(text) == 1 or text in CONSTANTS):
                return False
        elif kind == "number" and (following[:1] == "(" or following[:1].isdigit()):
            return False
        if text == ")" and following == "(":
            return False
        if text == "**":
            powers += 1
            if following.isdigit() and len(following) > 2:
                return False
            if i + 2 < len(found) and found[i + 2][1] == "**":
                return False
    return powers <= 40


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


GUARDS: dict[str, Guard] = {
    "binary_matrix": solution_or_literal,
    "n_queens": solution_or_literal,
    "spiral_matrix": solution_or_literal,
    "string_insertion": solution_or_literal,
    "countdown": arithmetic_only,
    "puzzle24": arithmetic_only,
    "intermediate_integration": formula_only,
    "polynomial_multiplication": formula_only,
    "simple_integration": formula_only,
}
