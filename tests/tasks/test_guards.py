import pytest
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.tasks.guards import arithmetic_only, formula_only, solution_or_literal

ENTRY = {"answer": "1 2 3", "metadata": {"valid_answers": ["_ Q", "Q _"]}}


@pytest.mark.parametrize(
    ("answer", "passed"),
    [
        ("1 2 3", "1 2 3"),
        (" Q _ ", "Q _"),
        ("[1,2, 3]", "[1, 2, 3]"),
        ("['A','B']", "['A', 'B']"),
        ("oracle_answer", None),
        ("valid_solutions", None),
        ("[x for x in y]", None),
        ("[f()]", None),
        ("__import__('os')", None),
        ("[" * 500, None),
        ("[" * 30 + "]" * 30, None),
        ("1" * 3_000, None),
        ("\x00", None),
        ("", None),
    ],
)
def test_solution_or_literal(answer, passed):
    assert solution_or_literal(answer, ENTRY) == passed


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ("(1+2)*3", True),
        ("2**9", False),
        ("x", False),
        ("exit()", False),
        ("1/0", False),
        ("24", True),
        ("5!", False),
    ],
)
def test_arithmetic_only(answer, passes):
    assert (arithmetic_only(answer, ENTRY) == answer) is passes


@pytest.mark.parametrize(
    "answer",
    [
        "x**2/2 + C",
        "3*x*exp(2*x) - sin(x)**2",
        "-log(x + 1)",
        "0.5*x",
        "x**(1/2)",
        "E**x + pi",
        "12*a*b**2 - 7*z",
        "asin(x)",
    ],
)
def test_formulas_pass(answer):
    assert formula_only(answer, ENTRY) == answer


@pytest.mark.parametrize(
    "answer",
    [
        "", "   ", "x.evalf()", "exit()", "eval(x)", "x(2)", "2(3)", "(x)(2)", "__class__", "x[0]", "'x'", "x, y", "lambda: x",
        "9**9**9", "9**999", "x==x", "x:=2", "1" * 30, "open(x)", "x if x else x", "(" * 30 + "x" + ")" * 30, "x" * 600, "é",
        "while", "π", "None(x)", "print(x)",
    ],
)  # fmt: skip
def test_formulas_refused(answer):
    assert formula_only(answer, ENTRY) is None


@given(st.text(alphabet="xCEpi019+-*/(). sqrtexp", max_size=60))
def test_what_passes_has_no_attribute_no_subscript_and_calls_listed_functions_only(text):
    import ast

    from uncollapse.tasks.guards import FUNCTIONS

    if formula_only(text, ENTRY) is None:
        return
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        assert not isinstance(node, (ast.Attribute, ast.Subscript, ast.Lambda, ast.Starred, ast.Compare))
        if isinstance(node, ast.Call):
            assert isinstance(node.func, ast.Name)
            assert node.func.id in FUNCTIONS
