from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse import runs
from uncollapse.errors import ConfigError, DataError
from uncollapse.runs import BrokenLines, Comparison, Run, open_directory, write_text


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", {"recipe": "grpo", "seed": 3})


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_round_trip_of_config_and_rows(run: Run) -> None:
    run.append({"step": 0, "entropy/token/mean": 2.0, "note": "ä\u2028x"})
    run.append({"step": 1, "entropy/token/mean": np.float32(1.5), "law": {"terms": [1, None]}})
    again = Run.open(run.path)
    assert again.config == {"schema": 1, "recipe": "grpo", "seed": 3}
    first, second = again.metrics()
    assert first == {"step": 0, "entropy/token/mean": 2.0, "note": "ä\u2028x"}
    assert second["entropy/token/mean"] == 1.5
    assert second["law"] == {"terms": [1, None]}
    assert run.checkpoints.is_dir()
    assert run.broken_lines() == {}


def test_an_empty_run_has_no_rows(run: Run) -> None:
    assert run.metrics() == []
    assert run.tokens() == []


def test_create_never_overwrites(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"already holds a run; continue it with --resume or choose another --output"
    ) as e:
        Run.create(run.path, {})
    one_line(e)
    log_only = tmp_path / "log"
    log_only.mkdir()
    (log_only / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(DataError, match="already holds a run"):
        Run.create(log_only, {})
    assert (log_only / "metrics.jsonl").read_text() == '{"step": 0}\n'
    with pytest.raises(DataError, match="already holds a comparison or a run"):
        Comparison.create(run.path, {})


def test_create_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="could not write") as e:
        Run.create(tmp_path / "file", {})
    one_line(e)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no run directory"),
        ("a: [1\nb: 2\n", "line 2"),
        ("- 1\n", "not a mapping"),
        ("recipe: grpo\n", "no valid `schema`"),
        ("schema: 99\n", "upgrade uncollapse"),
    ],
)
def test_open_says_in_one_line_what_is_wrong(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DataError, match=message) as e:
        Run.open(tmp_path)
    assert str(tmp_path) in one_line(e)


def test_config_must_be_plain(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no plain YAML"):
        Run.create(tmp_path / "a", {"path": object()})
    with pytest.raises(ConfigError, match="schema 2"):
        Run.create(tmp_path / "b", {"schema": 2})
    assert not (tmp_path / "a").exists()


def test_nonfinite_numbers_are_strict_json_and_come_back(run: Run) -> None:
    run.append({"step": 0, "a": math.nan, "b": math.inf, "c": np.float64(-math.inf), "d": [1.0, math.nan]})
    text = (run.path / "metrics.jsonl").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    raw = json.loads(text, parse_constant=refuse)
    assert raw["a"] is None
    assert raw["nonfinite"] == {"b": "inf", "c": "-inf"}
    (row,) = run.metrics()
    assert math.isnan(row["a"])
    assert row["b"] == math.inf
    assert row["c"] == -math.inf
    assert row["d"][0] == 1.0
    assert math.isnan(row["d"][1])


@given(
    values=st.dictionaries(
        st.text(max_size=8).filter(lambda key: key not in ("step", "nonfinite")),
        st.floats(width=64) | st.integers(-(2**53), 2**53) | st.text(max_size=5) | st.booleans(),
        max_size=5,
    )
)
@settings(max_examples=60, deadline=None)
def test_every_row_survives(tmp_path_factory: pytest.TempPathFactory, values: dict) -> None:
    run = Run.create(tmp_path_factory.mktemp("rows") / "run", {})
    run.append({"step": 7, **values})
    (row,) = run.metrics()
    assert row.pop("step") == 7
    assert list(row) == list(values)
    for key, value in values.items():
        assert row[key] == value or (row[key] != row[key] and value != value)


def test_partial_last_line_is_healed_and_reported_once(run: Run) -> None:
    run.append({"step": 0, "x": 1.0})
    path = run.path / "metrics.jsonl"
    with path.open("ab") as stream:
        stream.write(b'{"step": 1, "x": 0.')
    before = path.read_bytes()
    run.append({"step": 1, "x": 2.0})
    assert path.read_bytes().startswith(before + b"\n")
    with pytest.warns(BrokenLines, match=r"metrics.jsonl: skipped 1 broken line \(2\)") as caught:
        rows = run.metrics()
    assert len(caught) == 1
    assert [(row["step"], row["x"]) for row in rows] == [(0, 1.0), (1, 2.0)]
    assert run.broken_lines() == {"metrics.jsonl": [2]}


def test_many_broken_lines_make_one_warning(run: Run) -> None:
    lines = ["[]", "{", '{"x": 1}', '{"step": -1}', '{"step": true}', '{"step": "1"}', "", '{"step": 4}']
    data = "\n".join([*lines, *["nope"] * 9]).encode() + b"\n\xff\xfe\n" + b"[" * 100_000
    (run.path / "metrics.jsonl").write_bytes(data)
    with pytest.warns(
        BrokenLines, match=r"skipped 17 broken lines \(1, 2, 3, 4, 5, 6, 9, 10 and 9 more\)"
    ) as caught:
        assert run.metrics() == [{"step": 4}]
    assert len(caught) == 1


def test_after_a_rewind_the_last_row_of_a_step_counts_and_nothing_is_deleted(run: Run) -> None:
    for step, value in [(0, 0.0), (1, 1.0), (2, 2.0), (1, 10.0)]:
        run.append({"step": step, "x": value})
    assert [(row["step"], row["x"]) for row in run.metrics()] == [(0, 0.0), (1, 10.0), (2, 2.0)]
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    "row", [{}, {"step": -1}, {"step": 1.0}, {"step": True}, {"step": 0, "nonfinite": 1}]
)
def test_append_refuses_rows_that_could_not_be_read(run: Run, row: dict) -> None:
    with pytest.raises(DataError) as e:
        run.append(row)
    one_line(e)
    assert not (run.path / "metrics.jsonl").exists()


def test_append_refuses_objects(run: Run) -> None:
    with pytest.raises(DataError, match="reward/mean is of type object"):
        run.append({"step": 0, "reward/mean": object()})


def test_full_disk_names_the_step_and_keeps_the_rest(run: Run) -> None:
    run.append({"step": 0})
    (run.path / "tokens.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        DataError, match=r"tokens.jsonl \(step 4\): No space left on device; everything .* intact"
    ) as e:
        run.append_tokens({"step": 4, "sample": "p", "tokens": []})
    one_line(e)
    assert run.metrics() == [{"step": 0}]


def test_a_short_write_is_an_error_and_the_next_row_is_whole(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.append({"step": 0})
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(runs.os, "write", lambda descriptor, data: write(descriptor, data[:5]))
        with pytest.raises(DataError, match="only part of the line fitted"):
            run.append({"step": 1})
    run.append({"step": 1})
    with pytest.warns(BrokenLines, match=r"\(2\)"):
        assert run.metrics() == [{"step": 0}, {"step": 1}]


def test_write_text_is_atomic(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run.write_text("report.html", "old")
    assert path == run.path / "report.html"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(runs.os, "fsync", full)
        with pytest.raises(DataError, match=r"report.html: No space left on device; everything"):
            run.write_text("report.html", "new")
    assert path.read_text() == "old"
    run.write_text("report.html", "new \udcff")
    assert path.read_text() == "new ?"
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "config.yaml", "report.html"]


def test_a_kill_in_the_middle_loses_no_finished_row(tmp_path: Path) -> None:
    code = (
        "import sys, itertools; from uncollapse.runs import Run\n"
        "run = Run.create(sys.argv[1], {})\n"
        "for step in itertools.count():\n"
        "    run.append({'step': step, 'x': step / 7})\n"
        "    print(step, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if int(line) == 20:
                break
        process.kill()
        process.wait()
    run = Run.open(tmp_path / "run")
    run.append({"step": 10**6})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BrokenLines)
        rows = run.metrics()
    assert [row["step"] for row in rows[:21]] == list(range(21))
    assert rows[-1]["step"] == 10**6


def test_token_records(run: Run) -> None:
    record = {"sample": "probe-0", "prompt": "2+2=", "tokens": ["NaN", "\ud800"], "reward": 1.0}
    run.append_tokens({"step": 5, **record, "entropy": [0.5, math.nan], "logp": np.array([-1.0, -2.0])})
    run.append_tokens({"step": 0, **record, "entropy": [1.5, 1.0]})
    run.append_tokens({"step": 0, **record, "entropy": [2.5, 1.0]})
    early, late = run.tokens()
    assert early["entropy"] == [2.5, 1.0]
    assert late["tokens"] == ["NaN", "\ud800"]
    assert late["logp"] == [-1.0, -2.0]
    assert math.isnan(late["entropy"][1])
    with pytest.raises(DataError, match="2 tokens but 1 values of entropy"):
        run.append_tokens({"step": 0, **record, "entropy": [1.0]})
    with pytest.raises(DataError, match="has no `sample`"):
        run.append_tokens({"step": 0, "tokens": []})


def make_comparison(path: Path) -> Comparison:
    comparison = Comparison.create(path, {"recipes": ["kl-cov", "grpo"], "seeds": [0, 1, 10]})
    for recipe in ("grpo", "kl-cov", "clip-cov"):
        for seed in (10, 1, 0):
            Run.create(comparison.run_path(recipe, seed), {"recipe": recipe, "seed": seed})
    return comparison


def test_comparison_groups_its_runs(tmp_path: Path) -> None:
    make_comparison(tmp_path / "c")
    comparison = open_directory(tmp_path / "c")
    assert isinstance(comparison, Comparison)
    grouped = comparison.runs()
    assert list(grouped) == ["kl-cov", "grpo", "clip-cov"]
    assert [run.config["seed"] for run in grouped["grpo"]] == [0, 1, 10]
    assert isinstance(open_directory(comparison.run_path("grpo", 0)), Run)


def test_comparison_leaves_out_what_is_no_run(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path / "c")
    (comparison.path / "runs" / "grpo-seed7").mkdir()
    (comparison.path / "runs" / "notes-seedling").mkdir()
    with pytest.warns(BrokenLines, match="grpo-seed7 is no run directory"):
        assert len(comparison.runs()["grpo"]) == 3


def test_comparison_summary(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path / "c")
    assert comparison.summary() is None
    comparison.write_summary({"grpo": {"reward": math.nan, "entropy": np.float32(0.5)}})
    assert comparison.summary() == {"schema": 1, "grpo": {"reward": None, "entropy": 0.5}}
    comparison.write_text("comparison.json", "{")
    with pytest.raises(DataError, match="cannot be read"):
        comparison.summary()


@pytest.mark.parametrize(("recipe", "seed"), [("../x", 0), ("", 0), ("a/b", 1), (".hidden", 0), ("grpo", -1)])
def test_comparison_refuses_names_that_leave_the_directory(tmp_path: Path, recipe: str, seed: int) -> None:
    with pytest.raises(ConfigError, match="makes no directory name"):
        Comparison.create(tmp_path / "c", {}).run_path(recipe, seed)


def test_opening_what_is_neither(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run directory"):
        open_directory(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no comparison directory"):
        Comparison.open(tmp_path)
    with pytest.raises(DataError, match="could not write"):
        write_text(tmp_path / "no" / "where.txt", "x")


def test_config_on_disk_is_readable_yaml(run: Run) -> None:
    assert yaml.safe_load((run.path / "config.yaml").read_text())["schema"] == 1


def test_import_is_light() -> None:
    code = "import sys, uncollapse.runs; print({'torch', 'matplotlib', 'numpy'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert out.stdout.strip() == "set()"
