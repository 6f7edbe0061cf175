import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.errors import ConfigError, DataError
from uncollapse.tasks import GeneratedTask, Task, conversational, countdown, modsum, running_maximum, task
from uncollapse.tasks.arithmetic import evaluate

OWN = ["countdown", "modsum", "running-maximum"]


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def score(made, row, completion):
    return made.reward([row["prompt"]], [completion], **columns([row]))[0]


@pytest.mark.parametrize("name", OWN)
def test_rows_follow_the_column_convention_and_depend_on_seed_split_and_index_only(name):
    made = task(name)
    assert isinstance(made, Task)
    rows = made.rows(20)
    assert rows == made.rows(20) == made.rows(30)[:20]
    assert rows != made.rows(20, seed=1) != made.rows(20, seed=1, split="test")
    assert all(isinstance(row["prompt"], str) and isinstance(row["answer"], str) for row in rows)
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert made.rows(0) == []


@pytest.mark.parametrize("name", OWN)
def test_chat_rows_keep_the_answers_and_ask_in_words(name):
    made = task(name)
    plain, chat = made.rows(5), made.rows(5, style="chat")
    for a, b in zip(plain, chat, strict=True):
        (message,) = b["prompt"]
        assert message["role"] == "user"
        assert "<answer>" in message["content"]
        assert {**b, "prompt": None} == {**a, "prompt": None}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    "hostile",
    [
        "", " ", "\n\n", "\x00", "9" * 5_000, "(" * 10_000, "<answer>" * 1_000, "١٢٣٤٥٦", "\uff11\uff12", "½", "1e999",
        "__import__('os').system('true')", "\ud800", "-" * 1_000, "9" * 200_000, "|" * 1_000,
    ],
)  # fmt: skip
def test_hostile_text_is_wrong(name, hostile):
    made = task(name)
    for row in made.rows(3):
        assert score(made, row, hostile) == 0.0
        assert score(made, row, [{"role": "assistant", "content": hostile}]) == 0.0


@pytest.mark.parametrize("name", OWN)
def test_a_completion_that_is_none_cannot_be_scored(name):
    made = task(name)
    row = made.rows(1)[0]
    assert score(made, row, None) is None
    assert score(made, row, []) is None


@given(st.sampled_from(OWN), st.text())
def test_any_text_scores_zero_or_one(name, text):
    made = task(name)
    assert score(made, made.rows(1)[0], text) in (0.0, 1.0)


def test_reward_takes_what_trl_passes_beside_the_columns():
    made = task("modsum", digits=2)
    row = {"answer": ["7", "7"], "digits": [2, 2], "other": ["x", "y"]}
    scores = made.reward(
        prompts=["a", "b"], completions=["34", "35"], completion_ids=[[1], [2]], trainer_state=object(), **row
    )
    assert scores == [1.0, 0.0]


def test_reward_names_the_column_that_is_missing():
    with pytest.raises(DataError, match=r"'modsum' scores with the column 'digits'.*columns given: answer"):
        task("modsum").reward(["p"], ["123456"], answer=["1"])
    with pytest.raises(DataError, match="one value for each of the 2 completions"):
        task("running-maximum").reward(["p", "p"], ["1", "2"], answer=["1"])


@pytest.mark.parametrize(("size", "style"), [(-1, "plain"), (True, "plain"), (1, "loud")])
def test_rows_refuse(size, style):
    with pytest.raises(ConfigError):
        task("modsum").rows(size, style=style)


def test_conversational_keeps_conversations():
    rows = [
        {"prompt": "hello", "answer": "1"},
        {"prompt": [{"role": "system", "content": "x"}], "answer": "2"},
    ]
    first, second = conversational(rows)
    assert first["prompt"] == [{"role": "user", "content": "hello"}]
    assert second == rows[1]


@pytest.mark.parametrize("digits", [1, 2, 3, 4])
def test_modsum_has_ten_to_the_t_minus_one_right_answers(digits):
    made = task("modsum", digits=digits)
    for row in made.rows(3):
        texts = ["".join(d) for d in itertools.product("0123456789", repeat=digits)]
        got = made.reward(texts, texts, answer=[row["answer"]] * len(texts), digits=[digits] * len(texts))
        assert sum(got) == 10 ** (digits - 1)


@pytest.mark.parametrize(
    ("text", "right"), [("908457", 1.0), ("9 0 8 4 5 7", 1.0), ("90845", 0.0), ("9084570", 0.0)]
)
def test_modsum_wants_exactly_its_digits(text, right):
    row = {"prompt": "sum6=3:", "answer": "3", "digits": 6}
    assert score(task("modsum"), row, text) == right


@pytest.mark.parametrize("digits", [1, 2, 5, 6])
def test_modsum_demonstrations(digits):
    made, draw = task("modsum", digits=digits), random.Random(0)
    rows = made.rows(300)
    written = [modsum.demonstration(draw, row, right=1.0) for row in rows]
    if digits > 1:
        assert all(score(made, row, text) == 1.0 for row, text in zip(rows, written, strict=True))
    guesses = [modsum.demonstration(draw, row, right=0.0) for row in rows]
    assert sum(score(made, row, text) for row, text in zip(rows, guesses, strict=True)) < 60


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("9", 1.0),
        ("5;5;9;|9", 1.0),
        ("5;9;?5;9;|9", 1.0),
        ("<answer>9</answer>", 1.0),
        ("9|", 0.0),
        ("9|5", 0.0),
        ("9;", 0.0),
        ("09", 0.0),
    ],
)
def test_running_maximum_judges_what_follows_the_end_of_thinking(text, right):
    row = {"prompt": "max3519:", "answer": "9"}
    assert score(task("running-maximum"), row, text) == right


@pytest.mark.parametrize("checks", [0, 1, 3])
def test_running_maximum_demonstrations(checks):
    made, draw = task("running-maximum", min_digits=2, max_digits=7), random.Random(0)
    for row in made.rows(50):
        text = running_maximum.demonstration(draw, row, wrong=0.0, checks=checks)
        digits = len(row["prompt"]) - len("max:")
        assert score(made, row, text) == 1.0
        assert len(text) == (checks + 1) * 2 * (digits - 1) + checks + 2
        assert running_maximum.demonstration(draw, row, wrong=1.0, checks=checks)[-2] == "|"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("3*8", 1.0), ("8*3*1", 1.0), ("(3 * 8) / 1 = 24", 1.0), ("<answer>3*8</answer>", 1.0), ("24", 0.0),
        ("3*8*1*1", 0.0), ("3+8", 0.0), ("8*3/0", 0.0), ("38-8-3-3", 0.0), ("24=3*8", 0.0), ("3**8", 0.0),
    ],
)  # fmt: skip
def test_countdown(text, right):
    row = {"prompt": "make 24 from 3 1 8:", "answer": "24", "numbers": [3, 1, 8]}
    assert score(task("countdown"), row, text) == right


def test_countdown_is_exact():
    row = {"prompt": "", "answer": "1", "numbers": [1, 1, 1, 3, 3, 3]}
    assert score(task("countdown"), row, "1/3+1/3+1/3") == 1.0


@pytest.mark.parametrize("options", [{}, {"min_numbers": 4, "max_numbers": 5, "max_value": 20}])
def test_every_countdown_target_can_be_reached(options):
    made = task("countdown", **options)
    for row in made.rows(100):
        assert score(made, row, row["solution"]) == 1.0
        assert sorted(evaluate(row["solution"])[1]) == sorted(row["numbers"])
        assert score(made, row, countdown.demonstration(random.Random(0), row, right=1.0)) == 1.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("modsum", {"digits": 0}, "digits is 0; expected an integer from 1 to 50"),
        ("modsum", {"digit": 6}, "unexpected keyword argument 'digit'"),
        ("running-maximum", {"min_digits": 5, "max_digits": 3}, "above max_digits"),
        ("countdown", {"max_numbers": 7}, "max_numbers is 7"),
        ("countdown", {"min_numbers": 5, "max_numbers": 3}, "above max_numbers"),
    ],
)
def test_options_out_of_range(name, options, message):
    with pytest.raises(ConfigError, match=message):
        task(name, **options)


def test_generated_task_scores_what_its_judge_says():
    made = GeneratedTask(
        name="echo",
        summary="",
        draw=lambda r: {"prompt": "p", "answer": "a"},
        judge=lambda text, row: None,
        question=str,
    )
    assert made.reward(["p"], ["x"], answer=["a"]) == [None]
