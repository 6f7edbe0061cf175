"""`uncollapse cliff`: what it reads, what it answers, and one line for what it cannot."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from uncollapse.cli import main
from uncollapse.cli.reward_table import read_rewards, shown
from uncollapse.errors import DataError
from uncollapse.runs import Run
from uncollapse.token_dump import TokenDump


def run(capsys, *argv):
    code = main([str(part) for part in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def cliff_json(capsys, *argv):
    code, out, _ = run(capsys, "cliff", *argv, "--json")
    assert code == 0
    return json.loads(out)


ROWS = [
    {"prompt": "tied", "completion": "a", "reward": 1.0},
    {"prompt": "tied", "completion": "b", "reward": 1.0},
    {"prompt": "tied", "completion": "c", "reward": 0.0},
    {"prompt": "close", "completion": "a", "reward": 1.0},
    {"prompt": "close", "completion": "b", "reward": 0.999},
    {"prompt": "firm", "completion": "a", "reward": 1.0},
    {"prompt": "firm", "completion": "b", "reward": 0.0},
    {"prompt": "same answer twice", "completion": "a", "reward": 1.0},
    {"prompt": "same answer twice", "completion": "a", "reward": 1.0},
]


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            out = csv.DictWriter(stream, list(rows[0]))
            out.writeheader()
            out.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_every_format_gives_the_same_answers(capsys, tmp_path, suffix):
    found = cliff_json(capsys, write(tmp_path / f"rewards{suffix}", ROWS))
    summary = found["summary"]
    assert (summary["prompts"], summary["comparable"], summary["tied"], summary["flipped"]) == (4, 3, 1, 1)
    assert [one["prompt"] for one in found["worst"]] == ["tied", "close", "firm"]
    assert [one["ties"] for one in found["worst"]] == [2, 1, 1]
    np.testing.assert_allclose([one["flip"] for one in found["worst"]], [0, 5e-4, 0.5])
    assert found["weights"] == {"reward": 1.0}
    assert summary["bound"] == pytest.approx(np.tanh(0.05))


def test_what_it_prints(capsys, tmp_path):
    code, out, err = run(capsys, "cliff", write(tmp_path / "rewards.csv", ROWS), "--top", "2")
    assert code == 0
    assert err == ""
    assert "9 completions of 4 prompts" in out
    assert "1 of 3 comparable prompts (33%) have more than one best answer" in out
    assert "Of the 2 with one best answer, 1 can change it within a reward change of 0.01" in out
    assert "What temperature buys" in out
    assert "2 of 3" in out
    assert "firm" not in out
    assert "\x1b[" not in out


def test_weights_make_the_effective_reward(capsys, tmp_path):
    rows = [
        {"prompt": "p", "completion": c, "correct_reward": r, "format_reward": f}
        for c, r, f in (("a", 1, 0.0), ("b", 1, 1.0), ("c", 0, 1.0))
    ]
    path = write(tmp_path / "rewards.csv", rows)
    found = cliff_json(capsys, path)
    assert found["weights"] == {"correct_reward": 1.0, "format_reward": 1.0}
    assert found["worst"][0]["ties"] == 1
    assert found["worst"][0]["ties_by_reward"] == {"correct_reward": 2, "format_reward": 2}
    found = cliff_json(capsys, path, "--weights", "correct_reward=1", "format_reward=0.02")
    assert found["worst"][0]["gap"] == pytest.approx(0.02)
    found = cliff_json(capsys, path, "--weights", "correct_reward=1")
    assert found["worst"][0]["ties"] == 2


def test_shift_and_temperature(capsys, tmp_path):
    path = write(tmp_path / "rewards.csv", ROWS)
    found = cliff_json(capsys, path, "--alpha", "0.5", "--shift", "0.6")
    assert [one["alpha"] for one in found["temperatures"]] == [0.01, 0.03, 0.1, 0.3, 0.5, 1]
    assert found["summary"]["flipped"] == 2
    assert found["summary"]["bound"] == pytest.approx(np.tanh(0.6))
    bounds = [one["bound"] for one in found["temperatures"]]
    moved = [one["soft_worst"] for one in found["temperatures"]]
    assert bounds == sorted(bounds, reverse=True)
    assert all(m <= b for m, b in zip(moved, bounds, strict=True))
    still = cliff_json(capsys, path, "--shift", "0")
    assert still["summary"]["hard_worst"] == still["summary"]["soft_worst"] == 0


def test_names_of_other_frameworks(capsys, tmp_path):
    verl = [{"input": "p", "output": c, "score": s, "step": 3} for c, s in (("a", 1), ("b", 1))]
    trl = [
        {
            "step": 1,
            "prompt": [{"role": "user", "content": "p"}],
            "completion": c,
            "accuracy_reward": s,
            "advantage": 0.1,
        }
        for c, s in (("a", 1.0), ("b", 0.0))
    ]
    own = [{"frage": "p", "antwort": c, "rewards": {"ok": s, "kurz": 0}} for c, s in (("a", 1), ("b", 1))]
    assert cliff_json(capsys, write(tmp_path / "verl.jsonl", verl))["summary"]["tied"] == 1
    folder = tmp_path / "trl"
    folder.mkdir()
    write(folder / "completions_00001.parquet", trl)
    write(folder / "completions_00002.parquet", [row | {"completion": "c"} for row in trl])
    found = cliff_json(capsys, folder)
    assert found["weights"] == {"accuracy_reward": 1.0}
    assert found["worst"][0]["answers"] == 3
    path = write(tmp_path / "own.jsonl", own)
    assert run(capsys, "cliff", path)[2].count("--map prompt=NAME") == 1
    found = cliff_json(capsys, path, "--map", "prompt=frage", "completion=antwort")
    assert found["weights"] == {"rewards/ok": 1.0, "rewards/kurz": 1.0}
    assert found["summary"]["tied"] == 1


def test_a_total_is_not_counted_twice(tmp_path):
    rows = [{"prompt": "p", "reward": 1.5, "format_reward": 0.5, "completion": "a"}]
    assert read_rewards(write(tmp_path / "t.jsonl", rows)).names == ("reward",)


def test_listed_answers_are_weighed_by_their_probability(capsys, tmp_path):
    rows = [
        {"prompt": "p", "completion": c, "reward": r, "logp": np.log(p)}
        for c, r, p in (("a", 1.0, 0.01), ("b", 0.9, 0.98), ("c", 0.0, 0.01))
    ]
    path = write(tmp_path / "t.csv", rows)
    sampled, listed = cliff_json(capsys, path), cliff_json(capsys, path, "--enumerated")
    law = np.array([0.01, 0.98, 0.01]) * np.exp(np.array([1.0, 0.9, 0.0]) / 0.1)
    expected = (law / law.sum()) @ [1.0, 0.9, 0.0]
    assert listed["worst"][0]["expected"] == pytest.approx(expected)
    assert sampled["worst"][0]["expected"] > listed["worst"][0]["expected"]
    code, _, err = run(capsys, "cliff", write(tmp_path / "no.csv", ROWS), "--enumerated")
    assert code == 2
    assert "--enumerated needs one" in err


# runs and dumps ---------------------------------------------------------------------------------------------------


def dump(path, *, groups=True, reward=True):
    token = np.array([[1, 2, 3], [1, 2, 4], [5, 6, 0], [5, 6, 0]])
    arrays = {
        "token": token,
        "mask": token > 0,
        "old_logp": np.full(token.shape, -0.5),
        "advantage": np.zeros(token.shape),
    }
    arrays |= {"group": np.array([0, 0, 1, 1])} if groups else {}
    arrays |= {"reward": np.array([1.0, 1.0, 0.5, 0.5])} if reward else {}
    for step in (0, 4):
        TokenDump(path).write(step, **arrays)
    return path


def test_a_token_dump_is_a_reward_table(capsys, tmp_path):
    path = dump(tmp_path / "token-dump")
    for source in (path, path / "step-00000004.parquet"):
        table = read_rewards(source)
        steps = 2 if source == path else 1
        assert table.prompt.tolist() == [i // 2 for i in range(4 * steps)]
        assert table.logp.tolist() == [-1.5, -1.5, -1.0, -1.0] * steps
    found = cliff_json(capsys, path)
    assert found["summary"]["prompts"] == 4
    assert found["summary"]["comparable"] == found["summary"]["tied"] == 2
    assert found["worst"][0]["prompt"] == "step 0, group 0"
    made = Run.create(tmp_path / "run", {"recipe": "grpo"})
    dump(made.path / "token-dump")
    assert cliff_json(capsys, made.path)["summary"]["tied"] == 2
    code, _, err = run(capsys, "cliff", dump(tmp_path / "nameless", groups=False))
    assert code == 2
    assert "no column group" in err
    code, _, err = run(capsys, "cliff", dump(tmp_path / "worthless", reward=False))
    assert code == 2
    assert "holds no rewards" in err


def test_probes_of_a_run_are_a_reward_table(capsys, tmp_path):
    made = Run.create(tmp_path / "run", {"recipe": "grpo"})
    assert "--dump-tokens" in run(capsys, "cliff", made.path)[2]
    for step in (0, 5):
        for sample, reward in (("one", 1.0), ("two", 1.0), ("three", None)):
            made.append_tokens(
                {
                    "step": step,
                    "sample": sample,
                    "prompt": "p",
                    "tokens": [sample, "!"],
                    "logp": [-1.0, -0.5],
                    "entropy": [0.1, 0.1],
                    "reward": reward,
                }
            )
    found = cliff_json(capsys, made.path)
    assert found["worst"][0]["completions"] == 2
    assert found["worst"][0]["ties"] == 2


# bad input --------------------------------------------------------------------------------------------------------


def test_one_completion_per_prompt_says_nothing(capsys, tmp_path):
    rows = [{"prompt": str(i), "completion": "a", "reward": i} for i in range(3)]
    code, out, _ = run(capsys, "cliff", write(tmp_path / "t.csv", rows))
    assert code == 0
    assert "Nothing can be said" in out
    found = cliff_json(capsys, tmp_path / "t.csv")
    assert found["summary"]["comparable"] == 0
    assert found["summary"]["soft_mean"] is None
    assert found["worst"] == []


def test_unscored_completions_are_left_out(capsys, tmp_path):
    cells = ["1", "", "nan", "None", "True", "wrong", "1e999999"]
    rows = [{"prompt": "p", "completion": str(i), "reward": cell} for i, cell in enumerate(cells[:-1])]
    code, out, err = run(capsys, "cliff", write(tmp_path / "t.csv", rows))
    assert code == 0
    assert "1 reward could not be read as a number" in err
    assert "6 completions of 1 prompts, 4 without a score left out" in out
    found = cliff_json(capsys, tmp_path / "t.csv")
    assert found["worst"][0]["completions"] == 2
    rows.append({"prompt": "p", "completion": "x", "reward": cells[-1]})
    code, _, err = run(capsys, "cliff", write(tmp_path / "u.csv", rows))
    assert code == 2
    assert "the reward of completion 6 (from 0) is infinite" in err


def test_every_domain_may_have_rewards_of_its_own(capsys, tmp_path):
    rows = [
        {"prompt": domain, "completion": c, "math_reward": None, "code_reward": None}
        | {f"{domain}_reward": r}
        for domain, r, c in (("math", 1.0, "a"), ("math", 1.0, "b"), ("code", 0.5, "a"), ("code", 0.0, "b"))
    ]
    rows.append({"prompt": "code", "completion": "c", "math_reward": None, "code_reward": None})
    path = write(tmp_path / "t.parquet", rows)
    code, out, _ = run(capsys, "cliff", path)
    assert code == 0
    assert "5 completions of 2 prompts, 1 without a score left out, 4 with a reward missing" in " ".join(
        out.split()
    )
    found = cliff_json(capsys, path)
    assert (found["completions"], found["unscored"], found["partly_scored"]) == (5, 1, 4)
    assert found["summary"]["comparable"] == 2
    assert [one["ties_by_reward"] for one in found["worst"]] == [
        {"math_reward": 2, "code_reward": 0},
        {"math_reward": 0, "code_reward": 1},
    ]
    assert [one["gap"] for one in found["worst"]] == [0.0, 0.5]
    # one domain alone, as in a file of a step: the other column is empty and no mistake
    code, out, err = run(capsys, "cliff", write(tmp_path / "one.jsonl", rows[:2]))
    assert code == 0
    assert "the column 'code_reward' holds no number" in err
    assert "1 of 1 comparable prompts (100%) have more than one best answer" in out


def test_the_tolerance_of_ties_is_told(capsys, tmp_path):
    rows = [{"prompt": "p", "completion": c, "reward": r} for c, r in (("a", 0.30000001192), ("b", 0.3))]
    path = write(tmp_path / "t.jsonl", rows)
    found = cliff_json(capsys, path)
    assert found["worst"][0]["ties"] == 2
    assert found["summary"]["tolerance"] == [1e-6, 1e-6]
    assert "rewards are within 1e-06\n" in run(capsys, "cliff", path)[1]
    found = cliff_json(capsys, path, "--tolerance", "1e-9")
    assert (found["worst"][0]["ties"], found["worst"][0]["tolerance"]) == (1, 1e-9)
    rows += [{"prompt": "q", "completion": c, "reward": r} for c, r in (("a", 30.0), ("b", 0.3))]
    path = write(tmp_path / "u.jsonl", rows)
    assert "within 1e-06 to 3e-05, where rewards are large" in run(capsys, "cliff", path)[1]
    assert "tolerance -1 has to be" in run(capsys, "cliff", path, "--tolerance", "-1")[2]


def test_a_truncated_table_keeps_its_whole_rows(capsys, tmp_path):
    for suffix, end in ((".jsonl", '{"prompt": "cut'), (".csv", 'tied,"cut')):
        path = write(tmp_path / f"t{suffix}", ROWS)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(end)
        code, out, err = run(capsys, "cliff", path)
        assert code == 0
        assert "left out 1 broken or incomplete row" in err
        assert "9 completions of 4 prompts" in out


def test_long_and_unusual_cells(tmp_path):
    rows = [{"prompt": "p\nq", "completion": c * 200_000, "reward": 1} for c in "ab"]
    table = read_rewards(write(tmp_path / "t.csv", rows))
    assert len(set(table.answer.tolist())) == 2
    assert table.prompts == ["p q"]
    many = [{"prompt": "p", "completion": "a", "reward": 10**400}, {"prompt": "p", "reward": 1.0}]
    table = read_rewards(write(tmp_path / "t.jsonl", many))
    assert np.isnan(table.rewards[0, 0])


def test_model_text_is_shown_and_never_obeyed(capsys, tmp_path):
    hostile = "[bold red]\x1b[31m\x9b2J\u202e{{7*7}}__import__('os')\x07\nend \ud800"
    rows = [{"prompt": hostile, "completion": c, "reward": 1} for c in ("a", "[/]", "\x1b[2J")]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, out, err = run(capsys, "cliff", path)
    assert code == 0
    assert err == ""
    assert "[bold red]\\x1b[31m\\x9b2J\\u202e{{7*7}}" in out.replace("\n", "").replace(" ", "").replace(
        "[boldred]", "[bold red]"
    )
    assert not set(out) & set("\x1b\x9b\x07\u202e")
    assert cliff_json(capsys, path)["worst"][0]["ties"] == 3
    assert shown("x" * 100, 10) == "x" * 9 + "\u2026"


@pytest.mark.parametrize(
    ("name", "content", "argv", "message"),
    [
        (None, "", [], "does not exist"),
        ("t.txt", "x", [], "is no reward table"),
        ("t.csv", "", [], "holds no row"),
        ("t.csv", "prompt,completion,reward\n", [], "holds no row"),
        ("t.csv", "prompt,completion\np,a\n", [], "no column reward or score"),
        ("t.csv", "reward,completion\n1,a\n", [], "no column prompt"),
        ("t.csv", "prompt,reward\np,a\np,\n", [], "holds no number"),
        ("t.csv", "prompt,reward\np,1\n", ["--weights", "rewrd=1"], "no column 'rewrd'"),
        ("t.csv", "prompt,reward\np,1\n", ["--weights", "reward"], "--weights takes NAME=NUMBER"),
        ("t.csv", "prompt,reward\np,1\n", ["--weights", "reward=0"], "not all 0"),
        ("t.csv", "prompt,reward\np,1\n", ["--weights", "reward=nan"], "finite"),
        ("t.csv", "prompt,reward\np,1\n", ["--map", "prompt"], "--map takes KNOWN=NAME"),
        ("t.csv", "prompt,reward\np,1\n", ["--map", "prompt=frage"], "no column 'frage'"),
        ("t.csv", "prompt,reward\np,1\n", ["--temperature", "0"], "above 0"),
        ("t.csv", "prompt,reward\np,1\n", ["--shift", "-1"], ">= 0"),
        ("t.csv", "prompt,reward\np,1\n", ["--top", "-1"], "--top"),
        ("t.json", '[{"prompt": "p", "rew', [], "is no JSON document"),
        ("t.json", '{"prompt": "p"}', [], "no list of rows"),
        ("t.jsonl", "[1]\n2\n", [], "holds no row"),
        ("t.parquet", "PAR1 not at all", [], "no readable Parquet file"),
    ],
)
def test_a_mistake_is_one_line(capsys, tmp_path, name, content, argv, message):
    path = tmp_path / (name or "nowhere.csv")
    if name:
        path.write_text(content, encoding="utf-8")
    code, out, err = run(capsys, "cliff", path, *argv)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_truncated_parquet_file_and_an_empty_directory(capsys, tmp_path):
    path = write(tmp_path / "t.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-40])
    code, _, err = run(capsys, "cliff", path)
    assert code == 2
    assert "no readable Parquet file" in err
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no reward table"):
        read_rewards(tmp_path / "empty")


def test_rows_without_completions_count_one_by_one(capsys, tmp_path):
    rows = [{"prompt": "p", "reward": 1.0}] * 3
    code, _, err = run(capsys, "cliff", write(tmp_path / "t.csv", rows))
    assert code == 0
    assert "every row counts as an answer of its own" in err
    assert cliff_json(capsys, tmp_path / "t.csv")["worst"][0]["ties"] == 3
