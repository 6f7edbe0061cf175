import ast
from pathlib import Path

import pytest

from uncollapse.errors import ConfigError, UnknownName
from uncollapse.tasks import Task, task, task_names
from uncollapse.tasks.guards import GUARDS

reasoning_gym = pytest.importorskip("reasoning_gym")
EVALUATORS = ("eval", "exec", "parse_expr", "sympify", "literal_eval")


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def score(made, rows, completions):
    given = columns(rows)
    return made.reward(given.pop("prompt"), completions, **given)


def test_every_generator_is_a_task():
    from reasoning_gym.factory import DATASETS

    assert {f"reasoning-gym:{name}" for name in DATASETS} < set(task_names())


def test_rows_and_their_own_answers():
    sums = task("reasoning-gym:chain_sum", min_terms=2, max_terms=3, min_digits=1, max_digits=2)
    rows = sums.rows(4)
    assert isinstance(sums, Task)
    assert rows == sums.rows(4)
    assert {r["prompt"] for r in rows}.isdisjoint(r["prompt"] for r in sums.rows(4, split="test"))
    assert {r["gym_seed"] for r in rows}.isdisjoint(r["gym_seed"] for r in sums.rows(4, seed=1))
    assert "<answer>" in sums.rows(1, style="chat")[0]["prompt"][0]["content"]
    right = [f"I think\n<answer>{row['answer']}</answer>" for row in rows]
    assert score(sums, rows, right) == [1.0] * 4
    assert score(sums, rows, [rows[0]["answer"], None, "", "x" * 50_000]) == [1.0, None, 0.0, 0.0]
    assert not sums.unscorable


def test_unknown_data_set_and_configuration():
    with pytest.raises(UnknownName, match="did you mean reasoning-gym:chain_sum"):
        task("reasoning-gym:chain_sun")
    with pytest.raises(ConfigError, match="does not accept"):
        task("reasoning-gym:chain_sum", terms=3)
    with pytest.raises(ConfigError, match="does not accept"):
        task("reasoning-gym:chain_sum", min_terms=-1)
    with pytest.raises(ConfigError, match="seed is an argument of rows"):
        task("reasoning-gym:chain_sum", seed=3)
    with pytest.raises(ConfigError, match="time_limit is 0"):
        task("reasoning-gym:chain_sum", time_limit=0)


def test_a_scorer_that_hangs_gives_none_and_the_next_answer_is_judged():
    made = task("reasoning-gym:coin_flip", time_limit=0.5)
    rows = made.rows(1)
    assert score(made, rows, ["1e999999999"]) == [None]
    assert made.unscorable == {"timed out": 1}
    assert score(made, rows, [rows[0]["answer"]]) == [1.0]


@pytest.mark.parametrize("name", ["string_insertion", "countdown", "polynomial_multiplication"])
def test_answers_are_never_executed(name, tmp_path):
    made = task(f"reasoning-gym:{name}", time_limit=60)
    rows = made.rows(1)
    witness = tmp_path / "ran"
    attacks = [
        f"open({str(witness)!r}, 'w')",
        f"__import__('pathlib').Path({str(witness)!r}).touch()",
        f"[__import__('pathlib').Path({str(witness)!r}).touch()]",
        "oracle_answer",
        "entry['answer']",
    ]
    (nothing,) = score(made, rows, [""])
    assert score(made, rows * len(attacks), attacks) == [nothing] * len(attacks)
    assert not witness.exists()
    assert score(made, rows, [f"<answer>{rows[0]['answer']}</answer>"]) == [1.0]


def test_the_guards_cover_every_scorer_that_evaluates_text():
    """Reads reasoning-gym's source: scorers that call eval, exec or parse_expr on something other than the entry."""
    found = set()
    for file in Path(reasoning_gym.__file__).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if not any(name in text for name in EVALUATORS):
            continue
        tree = ast.parse(text)
        scorers = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "score_answer"]
        for call in (n for scorer in scorers for n in ast.walk(scorer) if isinstance(n, ast.Call)):
            called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if called in EVALUATORS and not ast.unparse(call.args[0]).startswith(("entry[", "metadata[")):
                found.add(file.stem)
    found.discard("propositional_logic")  # its parse_expr is its own parser
    assert found == set(GUARDS)
