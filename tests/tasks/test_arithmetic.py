import ast
import operator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.tasks.arithmetic import MAX_DEPTH, MAX_LENGTH, NotAnExpression, evaluate

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def reference(text):
    """Python's own grammar, walked with fractions."""

    def value(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand)
        return OPERATORS[type(node.op)](value(node.left), value(node.right))

    return value(ast.parse(text, mode="eval").body)


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("7", 7, [7]),
        ("1+2*3", 7, [1, 2, 3]),
        ("(1+2)*3", 9, [1, 2, 3]),
        ("8-3-2", 3, [8, 3, 2]),
        ("8/3/2", Fraction(4, 3), [8, 3, 2]),
        ("8/3*3", 8, [8, 3, 3]),
        ("-2*-3", 6, [2, 3]),
        ("--2", 2, [2]),
        ("8 / (3 - 8/3)", 24, [8, 3, 8, 3]),
        ("007", 7, [7]),
        ("1/3+1/3+1/3", 1, [1, 3, 1, 3, 1, 3]),
    ],
)
def test_value(text, value, numbers):
    assert evaluate(text) == (value, numbers)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "ends too early"),
        ("   ", "ends too early"),
        ("1+", "ends too early"),
        ("(1", "ends too early"),
        ("(1 2)", "not closed"),
        ("1)", r"unexpected '\)'"),
        ("1 2", "unexpected '2'"),
        ("()", r"unexpected '\)'"),
        ("2**3", r"unexpected '\*'"),
        ("2//3", "unexpected '/'"),
        ("+1", r"unexpected '\+'"),
        ("1/0", "division by zero"),
        ("1/(2-2)", "division by zero"),
        ("1.5", "unexpected character"),
        ("1e5", "unexpected character"),
        ("x", "unexpected character"),
        ("٣+1", "unexpected character"),
        ("3\u00d72", "unexpected character"),
        ("1\n+1", "unexpected character"),
        ("__import__('os')", "unexpected character"),
        ("1234567890", "more than 9 digits"),
        ("1" * (MAX_LENGTH + 1), "longer than"),
        ("(" * 10_000 + ")" * 10_000, "longer than"),
        ("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1), "deep"),
        ("-" * 100 + "1", "deep"),
    ],
)
def test_refused(text, reason):
    with pytest.raises(NotAnExpression, match=reason):
        evaluate(text)


leaves = st.integers(0, 999).map(str)
expressions = st.recursive(
    leaves,
    lambda inner: (
        st.builds(lambda a, o, b: f"({a}{o}{b})", inner, st.sampled_from("+-*/"), inner)
        | st.builds(lambda a: f"(-{a})", inner)
    ),
    max_leaves=8,
)


@given(expressions)
def test_agrees_with_pythons_grammar(text):
    try:
        expected = reference(text)
    except ZeroDivisionError:
        expected = None
    try:
        value = evaluate(text)[0]
    except NotAnExpression as error:
        value = None if any(limit in str(error) for limit in ("deep", "longer", "division")) else str(error)
        expected = None
    assert value == expected


@given(st.text(alphabet="0123456789+-*/() ", max_size=300) | st.text(max_size=50))
def test_any_text_has_a_value_or_is_refused(text):
    try:
        value, numbers = evaluate(text)
    except NotAnExpression:
        return
    assert isinstance(value, Fraction)
    assert numbers
