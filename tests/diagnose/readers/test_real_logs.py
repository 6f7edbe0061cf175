"""Logs that the real libraries wrote of one run (`tests/data`): the same columns from each of them."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from uncollapse.diagnose.names import unit
from uncollapse.diagnose.readers import read

DATA = Path(__file__).parents[2] / "data"
COLLAPSE = DATA / "collapse"
STATE = COLLAPSE / "checkpoint-60"


def only(path, **options):
    (log,) = read(path, **options)
    return log


def wandb_run():
    return next(COLLAPSE.glob("wandb/*/*.wandb"))


def snapshot(root):
    """Names, bytes, modes and times of change of everything below a directory."""
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mtime_ns,
            path.lstat().st_mode,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else sorted(os.listdir(path)),
        )
        for path in [root, *sorted(root.rglob("*"))]
    }


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (COLLAPSE / "tensorboard", "TensorBoard events"),
        (wandb_run(), "W&B offline run"),
        (COLLAPSE / "trackio" / "example.db", "trackio database"),
        (COLLAPSE / "verl.jsonl", "verl file logger"),
        (COLLAPSE / "verl_console.log", "verl console log"),
        (COLLAPSE / "wandb_export.csv", "W&B export"),
        (COLLAPSE / "table.csv", "table"),
    ],
)
def test_one_run_reads_the_same_from_every_format(path, kind):
    truth, log = only(STATE), only(path)
    assert truth.format == "Transformers trainer state"
    assert log.format == kind
    assert log.has("entropy/token/mean", 30)
    common = set(truth.columns) & set(log.columns)
    assert len(common) >= (1 if kind == "W&B export" else 4)
    for name in common:
        there = np.isin(log.step, truth.step)
        assert list(log.step[there]) == list(truth.step)
        # Event files hold single precision; the others hold the numbers themselves.
        tolerance = 1e-6 if kind == "TensorBoard events" else 1e-12
        np.testing.assert_allclose(log[name][there], truth[name], rtol=tolerance, err_msg=name)
        assert not np.isfinite(log[name][~there]).any()
    for values in log.columns.values():
        assert values.shape == log.step.shape


@pytest.mark.parametrize("path", [STATE, COLLAPSE / "tensorboard", wandb_run(), COLLAPSE / "trackio"])
def test_everything_trl_logs_under_a_known_name_is_found(path):
    log = only(path)
    wanted = {
        "entropy/token/mean", "reward/mean", "reward/std", "reward/zero_variance_groups", "eval/reward", "length/mean",
        "length/min", "length/max", "length/truncated", "clip/high/frac", "clip/low/frac", "clip/ppo/frac", "grad/norm",
        "loss/total", "lr", "time/step",
    }  # fmt: skip
    assert wanted == set(log.columns)
    assert all(log.has(name) for name in wanted)
    assert unit("length/mean") == "tokens"
    assert not [note for note in log.notes if note.kind != "gap"], log.notes
    assert np.nanmax(log["entropy/token/mean"]) > 1.3
    assert log["entropy/token/mean"][-1] < 0.1


def test_our_trainers_own_names_pass_through_trl():
    state, events = only(DATA / "remedy" / "checkpoint-60"), only(DATA / "remedy" / "tensorboard")
    for log in (state, events):
        assert {"covariance/token/mean", "kl/old/k3", "clip/high/frac", "reward/mean"} <= set(log.columns)
        assert log["entropy/token/mean"][-1] > 0.4
    assert state.origin["reward/mean"] == "reward/mean"
    assert "reward" in state.other
    assert "entropy/token/p90" in state.other


def test_our_own_run_with_its_settings():
    log = only(DATA / "own")
    assert log.format == "uncollapse run"
    assert list(log.step) == list(range(20))
    assert log.has("eval/pass@4")
    assert log.settings["recipe.name"] == "grpo"
    assert log.settings["learning_rate"] == 1e-3
    assert only(DATA / "own" / "metrics.jsonl").columns.keys() == log.columns.keys()


def test_settings_are_what_the_log_tells():
    for path in (COLLAPSE / "tensorboard", wandb_run(), COLLAPSE / "trackio"):
        settings = only(path).settings
        assert settings["num_generations"] == 8
        assert settings["learning_rate"] == 1e-3
        assert settings["model_type"] == "llama"
    assert only(STATE).settings["max_steps"] == 60


def test_an_output_directory_is_one_run_read_from_its_newest_checkpoint(tmp_path):
    shutil.copytree(
        COLLAPSE, tmp_path / "out", ignore=shutil.ignore_patterns("verl*", "*.csv", "trackio", "wandb")
    )
    log = only(tmp_path / "out")
    assert log.format == "Transformers trainer state"
    assert len(log) == 30
    # The newest one is cut off, as by a full disk: the one before it is read, and that is told.
    newest = tmp_path / "out" / "checkpoint-60" / "trainer_state.json"
    newest.write_bytes(newest.read_bytes()[:-700])
    log = only(tmp_path / "out")
    assert len(log) == 15
    assert [note.kind for note in log.notes] == ["broken"]


def test_a_directory_of_several_runs_gives_each_once_the_last_written_first(tmp_path):
    for number, name in enumerate(("collapse", "remedy")):
        shutil.copytree(DATA / name, tmp_path / name)
        for file in (tmp_path / name).rglob("*.*"):
            os.utime(file, (1e9 + number, 1e9 + number))
    logs = read(tmp_path)
    assert [Path(log.source).parent.parent.name for log in logs] == ["remedy", "collapse"]


def test_a_comparison_gives_its_runs(tmp_path):
    (tmp_path / "compare.yaml").write_text("schema: 1\nrecipes: [grpo]\n")
    for seed in (0, 1):
        shutil.copytree(DATA / "own", tmp_path / "runs" / f"grpo-seed{seed}")
    logs = read(tmp_path)
    assert [Path(log.source).name for log in logs] == ["grpo-seed0", "grpo-seed1"]


def test_gzip_is_unpacked(tmp_path):
    for name in ("verl.jsonl", "table.csv", "verl_console.log"):
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress((COLLAPSE / name).read_bytes()))
        assert len(only(packed)) == 30


def test_reading_leaves_every_file_and_directory_as_it_was(tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(DATA, copy, ignore=shutil.ignore_patterns("corpus", "__pycache__"))
    before = snapshot(copy)
    for path in [copy, *copy.rglob("*")]:
        if path.suffix not in {".py", ".md", ".yaml"} and path.name != "versions.json":
            read(path)
    assert snapshot(copy) == before


def test_a_live_trackio_database_is_read_with_what_its_log_holds(tmp_path):
    import sqlite3

    base = sqlite3.connect(tmp_path / "live.db")
    base.execute("PRAGMA journal_mode = WAL")
    base.execute("PRAGMA wal_autocheckpoint = 0")
    base.execute("CREATE TABLE metrics (id INTEGER PRIMARY KEY, run_name TEXT, step INTEGER, metrics TEXT)")
    for step in range(5):
        base.execute(
            "INSERT INTO metrics (run_name, step, metrics) VALUES ('a', ?, ?)", (step, '{"entropy": 1.5}')
        )
    base.commit()
    before = snapshot(tmp_path)
    assert (tmp_path / "live.db-wal").stat().st_size > 0
    assert list(only(tmp_path / "live.db").step) == [0, 1, 2, 3, 4]
    assert snapshot(tmp_path) == before
    base.close()


def test_importing_and_reading_need_neither_torch_nor_the_libraries_of_the_logs():
    code = (
        "import sys\nfrom uncollapse.diagnose.readers import read\n"
        f"read({str(DATA)!r})\nread({str(wandb_run())!r})\n"
        "heavy = {'torch', 'wandb', 'trackio', 'tensorboard', 'google.protobuf', 'pandas', 'pyarrow', 'scipy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", json.dumps(done.stderr)
