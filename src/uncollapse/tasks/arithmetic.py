"""Exact value of a small arithmetic expression, read by a parser of our own and never evaluated as code.

    sum     = product (("+" | "-") product)*
    product = factor (("*" | "/") factor)*
    factor  = "-" factor | "(" sum ")" | digits

Rational arithmetic is exact (`fractions.Fraction`), division by zero has no value. The text is bounded
in length, the literals in size and the nesting in depth, so no input is slow or exhausts the stack.
"""

from __future__ import annotations

from fractions import Fraction

MAX_LENGTH = 200
"""Characters of an expression."""
MAX_DEPTH = 20
"""Nested parentheses and signs."""
MAX_LITERAL = 9
"""Digits of one literal."""

_OPERATORS = frozenset("+-*/()")
_DIGITS = frozenset("0123456789")


class NotAnExpression(ValueError):
    """The text is not an arithmetic expression within the limits, or it divides by zero."""


def tokens(text: str) -> list[str]:
    """Numbers and operators of an expression.

    Raises:
        NotAnExpression: for a character that is none of `0-9 + - * / ( )` or a space, and beyond the limits.
    """
    if len(text) > MAX_LENGTH:
        raise NotAnExpression(f"longer than {MAX_LENGTH} characters")
    found: list[str] = []
    start = 0
    while start < len(text):
        end = start + 1
        if text[start] in _DIGITS:
            while end < len(text) and text[end] in _DIGITS:
                end += 1
            if end - start > MAX_LITERAL:
                raise NotAnExpression(f"a number of more than {MAX_LITERAL} digits")
            found.append(text[start:end])
        elif text[start] in _OPERATORS:
            found.append(text[start])
        elif text[start] != " ":
            raise NotAnExpression(f"unexpected character {text[start]!r}")
        start = end
    return found


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression, and the numbers written in it from left to right.

    Raises:
        NotAnExpression: if the text does not follow the grammar, exceeds a limit or divides by zero.
    """
    reader = _Reader(tokens(text))
    value = reader.sum(0)
    if reader.peek() is not None:
        raise NotAnExpression(f"unexpected {reader.peek()!r}")
    return value, reader.numbers


class _Reader:
    """Position in the tokens of one expression, and the numbers met so far."""

    def __init__(self, found: list[str]) -> None:
        self._tokens = found
        self._next = 0
        self.numbers: list[int] = []

    def peek(self) -> str | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def take(self) -> str:
        token = self.peek()
        if token is None:
            raise NotAnExpression("the expression ends too early")
        self._next += 1
        return token

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.peek() in ("+", "-"):
            operator, right = self.take(), self.product(depth)
            value = value + right if operator == "+" else value - right
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while self.peek() in ("*", "/"):
            operator, right = self.take(), self.factor(depth)
            if operator == "/" and right == 0:
                raise NotAnExpression("division by zero")
            value = value * right if operator == "*" else value / right
        return value

    def factor(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise NotAnExpression(f"nested more than {MAX_DEPTH} deep")
        token = self.take()
        if token == "-":
            return -self.factor(depth + 1)
        if token == "(":
            value = self.sum(depth + 1)
            if self.take() != ")":
                raise NotAnExpression("a parenthesis is not closed")
            return value
        if token[0] in _DIGITS:
            self.numbers.append(int(token))
            return Fraction(int(token))
        raise NotAnExpression(f"unexpected {token!r}")
