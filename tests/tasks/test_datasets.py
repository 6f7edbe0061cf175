import json

import pytest

from uncollapse.errors import ConfigError, DataError
from uncollapse.tasks import Task, from_dataset, task

ROWS = [{"prompt": f"{i}+{i}=", "answer": 2 * i, "note": "n"} for i in range(30)]


def write(path, rows=ROWS):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        path.write_text(
            "prompt,answer,note\n" + "".join(f"{r['prompt']},{r['answer']},{r['note']}\n" for r in rows)
        )
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_task(tmp_path, suffix):
    made = task(str(write(tmp_path / f"rows{suffix}")))
    assert isinstance(made, Task)
    train, test = made.rows(100), made.rows(100, split="test")
    assert len(train) == 27
    assert len(test) == 3
    assert {r["prompt"] for r in train} | {r["prompt"] for r in test} == {r["prompt"] for r in ROWS}
    assert all(r["answer"] == str(2 * int(r["prompt"].split("+")[0])) and r["note"] == "n" for r in train)
    assert made.rows(5) == train[:5]
    assert made.rows(27, seed=1) != train
    assert made.rows(1, style="chat")[0]["prompt"][0]["role"] == "user"
    assert made.reward(["", "", ""], [r"\boxed{4.0}", "5", None], answer=["4", "4", "4"]) == [1.0, 0.0, None]
    assert "30 rows" in made.summary


def test_few_rows_are_not_split(tmp_path):
    made = from_dataset(write(tmp_path / "rows.jsonl", ROWS[:9]))
    assert len(made.rows(100)) == len(made.rows(100, split="test")) == 9


def test_columns_are_mapped(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "1+1=", "target": 2}])
    assert from_dataset(path, map={"question": "prompt", "target": "answer"}).rows(1) == [
        {"prompt": "1+1=", "answer": "2"}
    ]
    with pytest.raises(DataError, match="has no column 'q' to map; columns: question, target"):
        from_dataset(path, map={"q": "prompt"})
    with pytest.raises(
        DataError, match=r"row 1 has no 'prompt'; columns: question, target; name .* --map COLUMN=prompt"
    ):
        from_dataset(path)
    with pytest.raises(DataError, match=r"has no 'answer'; columns: prompt, target; .*--map COLUMN=answer"):
        from_dataset(path, map={"question": "prompt"})


def test_conversations_and_verls_ground_truth_are_read(tmp_path):
    conversation = [{"role": "user", "content": "1+1="}]
    for suffix in (".jsonl", ".parquet"):
        path = write(
            tmp_path / f"verl{suffix}", [{"prompt": conversation, "reward_model": {"ground_truth": "2"}}]
        )
        (row,) = from_dataset(path).rows(1, style="chat")
        assert row["prompt"] == conversation
        assert row["answer"] == "2"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "p", "answer": 1}\n{"prompt": ', "a.jsonl: line 2: not JSON"),
        ("a.jsonl", '{"prompt": "p", "answer": 1}\n\n[1]\n', "line 3: list, expected a JSON object"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", "", "no rows"),
        ("a.jsonl", '{"prompt": 7, "answer": 1}', "'prompt' is 7; expected text or a list of messages"),
        ("a.jsonl", '{"prompt": [], "answer": 1}', "'prompt' is .*; expected text"),
        ("a.jsonl", '{"prompt": "p", "answer": null}', "'answer' is None"),
        ("a.json", "{}", "expected a JSON list of objects"),
        ("a.json", "nonsense", "not JSON"),
        ("a.csv", "prompt,answer\n", "no rows"),
        ("a.csv", "question\n1\n", "has no 'prompt'; columns: question"),
        ("a.parquet", "nonsense", "not a readable Parquet file"),
        ("a.txt/", "", "no such file"),
    ],
)
def test_broken_data_is_named_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if not name.endswith("/"):
        path.write_text(content)
        source = str(path)
    else:
        source = str(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match=message) as caught:
        from_dataset(source)
    assert "\n" not in str(caught.value)


def test_not_utf8_and_not_a_data_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match="not readable as jsonl in UTF-8"):
        from_dataset(tmp_path / "a.jsonl")
    (tmp_path / "notes").write_text("x")
    with pytest.raises(DataError, match="not a data file; expected one of"):
        from_dataset(tmp_path / "notes")


def test_a_reward_written_for_trl_runs_as_it_is(tmp_path):
    seen = {}

    def length_reward(completions, note, **kwargs):
        seen.update(kwargs)
        return [float(len(c)) if n == "n" else None for c, n in zip(completions, note, strict=True)]

    made = from_dataset(write(tmp_path / "rows.jsonl"), reward=length_reward)
    columns = {"answer": ["0", "2"], "note": ["n", "m"]}
    assert made.reward(["a", "b"], ["xx", "yyy"], **columns) == [2.0, None]
    assert seen == {"prompts": ["a", "b"], "answer": ["0", "2"]}


def test_a_reward_that_breaks_the_contract(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="expected a list of 1 numbers"):
        from_dataset(path, reward=lambda **columns: 1.0).reward(["a"], ["b"])
    assert from_dataset(path, reward=lambda **columns: [float("nan")]).reward(["a"], ["b"]) == [None]
    with pytest.raises(ConfigError, match="reward is 'loose'"):
        from_dataset(path, reward="loose")
