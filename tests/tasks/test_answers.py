from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.tasks.answers import (
    MAX_ANSWER,
    as_number,
    completion_text,
    final_answer,
    normalised,
    same_answer,
    unboxed,
)


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        ("", ""),
        (None, None),
        (7, None),
        (b"bytes", None),
        ([], None),
        ([None, 3], None),
        ({"role": "assistant", "content": "one"}, "one"),
        ([{"role": "assistant", "content": "one"}], "one"),
        ([{"content": "no role"}], "no role"),
        ([{"role": "user", "content": "asked"}], None),
        ([{"role": "assistant", "content": None}], None),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}, "b"]}], "a"),
        (
            [
                {"role": "assistant", "content": "call"},
                {"role": "tool", "content": "result"},
                {"role": "assistant", "content": "end"},
            ],
            "call\nend",
        ),
    ],
)
def test_completion_text(completion, text):
    assert completion_text(completion) == text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", ""),
        ("7", "7"),
        ("so\nit is\n 7 \n\n", "7"),
        ("<answer>7</answer>", "7"),
        ("<answer>6</answer> no, <answer> 7 </answer> done", "7"),
        ("<answer>1\n2</answer>", "1\n2"),
        ("cut off <answer>7", "7"),
        ("</answer>7", "</answer>7"),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{7}", "7"),
        (r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{7", r"\boxed{7"),
        (r"\boxed{}", ""),
        ("none", "none"),
    ],
)
def test_unboxed(text, content):
    assert unboxed(text) == content


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", 7),
        ("-7", -7),
        ("+7.50", Fraction(15, 2)),
        ("1,234.5", Fraction(2469, 2)),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("2e-3", Fraction(1, 500)),
        ("2E3", 2000),
        ("3/4", Fraction(3, 4)),
        (" -3 / 4 ", Fraction(-3, 4)),
        ("1" * 60, int("1" * 60)),
    ],
)
def test_as_number_reads(text, number):
    assert as_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "-", "+-7", "--7", "1_000", "inf", "nan", "0x10", "1/0", "1/2/3", "7 8", "12,34", "1,2,3",
        "1e", "1e999999999", "1e301", "e5", "١٢٣", "\uff17", "²", "1" * 61, "1.2.3", "1e5.5", "1j",
    ],
)  # fmt: skip
def test_as_number_refuses(text):
    assert as_number(text) is None


@given(st.integers(-(10**30), 10**30))
def test_as_number_inverts_str(number):
    assert as_number(str(number)) == number
    assert as_number(f"{number:,}") == number


@given(st.fractions(max_denominator=10**9))
def test_as_number_inverts_fractions(number):
    assert as_number(str(number)) == number


@given(st.text())
def test_nothing_raises(text):
    as_number(text)
    final_answer(text)
    assert same_answer(text, text) is (len(text) <= MAX_ANSWER)


@pytest.mark.parametrize(
    ("given_", "expected", "same"),
    [
        ("0.5", "1/2", True),
        (r"\boxed{0.50}", "1/2", True),
        ("$7$", "7.0", True),
        ("7.", "7", True),
        ("Paris.", "paris", True),
        ("a  b", "A B", True),
        ("7", "8", False),
        ("", "7", False),
        ("0.3333", "1/3", False),
        ("nan", "nan", True),
        ("\uff11", "1", False),
    ],
)
def test_same_answer(given_, expected, same):
    assert same_answer(given_, expected) is same


def test_long_answers_are_wrong_and_quick():
    for hostile in ("(" * 1_000_000, "\\boxed{" * 200_000, "9" * 1_000_000, "<answer>" * 200_000):
        assert not same_answer(final_answer(hostile), "7")
        assert normalised(hostile[:2000]) is not None
