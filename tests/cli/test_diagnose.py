"""`uncollapse diagnose`: what it prints, when it fails, how it follows a run."""

from __future__ import annotations

import csv
import json
import time

import numpy as np
import pytest

from uncollapse.cli import diagnose as command
from uncollapse.cli import main
from uncollapse.studies.testbeds import logs


def run(capsys, *argv):
    code = main([str(part) for part in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def csv_of(path, kind, seed=0, rows=None, names=None):
    """A made-up run as a table that anyone could have written."""
    log = logs.make(kind, seed).log
    columns = {
        "step": log.step,
        **{(names or {}).get(name, name): values for name, values in log.columns.items()},
    }
    with path.open("w", newline="", encoding="utf-8") as stream:
        out = csv.writer(stream)
        out.writerow(columns)
        for i in range(len(log) if rows is None else rows):
            out.writerow(
                "" if np.isnan(values[i]) else repr(float(values[i])) if name != "step" else int(values[i])
                for name, values in columns.items()
            )
    return path


def test_a_collapsed_run_fails_and_says_what_to_paste(capsys, tmp_path):
    code, out, err = run(capsys, "diagnose", csv_of(tmp_path / "run.csv", "slow-collapse"))
    assert code == 1
    assert err == ""
    assert "This run has collapsed." in out
    assert "Entropy collapse" in out
    assert "use_adaptive_entropy=True," in out
    assert "actor_rollout_ref.actor.policy_loss.loss_mode=clip_cov" in out
    assert "\u2572" in out
    assert "\x1b[" not in out


def test_a_healthy_run_is_done(capsys, tmp_path):
    code, out, _ = run(capsys, "diagnose", csv_of(tmp_path / "run.csv", "healthy"))
    assert code == 0
    assert "This run is healthy." in out
    assert "What to try" not in out


@pytest.mark.parametrize(("fail_on", "code"), [("severe", 0), ("warning", 1), ("never", 0)])
def test_fail_on(capsys, tmp_path, fail_on, code):
    path = csv_of(tmp_path / "run.csv", "gradient-spikes", seed=1)
    assert run(capsys, "diagnose", path, "--fail-on", fail_on)[0] == code


def test_json_is_for_programs(capsys, tmp_path):
    code, out, _ = run(
        capsys, "diagnose", csv_of(tmp_path / "run.csv", "collapsing-late", 1), "--json", "--fail-on", "never"
    )
    assert code == 0
    data = json.loads(out)
    assert data["schema"] == 1
    assert [one["state"] for one in data["runs"]] == ["collapsing"]


def test_columns_can_be_named_by_hand(capsys, tmp_path):
    path = csv_of(tmp_path / "run.csv", "slow-collapse", names={"entropy/token/mean": "actor_h"})
    code, out, _ = run(capsys, "diagnose", path)
    assert code == 0
    assert "--map entropy=NAME" in " ".join(out.split())
    code, out, _ = run(capsys, "diagnose", path, "--map", "entropy=actor_h")
    assert code == 1
    assert "This run has collapsed." in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["{tmp}"], "holds no log"),
        (["{csv}", "--map", "entropy"], "--map takes KNOWN=NAME"),
        (["{csv}", "--map", "entrpy=x"], "unknown column 'entrpy'"),
        (["{csv}", "--map", "entropy=nothing"], "has no column 'nothing'"),
        (["{csv}", "--watch", "--every", "0"], "--every takes a number of seconds above 0"),
        (["{csv}", "--fail-on", "sever"], 'Did you mean "severe"'),
    ],
)
def test_a_mistake_is_one_line(capsys, tmp_path, argv, message):
    (tmp_path / "empty").mkdir()
    path = csv_of(tmp_path / "run.csv", "short-log")
    code, out, err = run(
        capsys, "diagnose", *(part.format(tmp=tmp_path / "empty", csv=path) for part in argv)
    )
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_several_runs_are_listed_and_a_page_is_written(capsys, tmp_path):
    for index, kind in enumerate(("healthy", "slow-collapse", "plateau", "short-log")):
        csv_of(tmp_path / f"{index}-{kind}.csv", kind)
    page = tmp_path / "page.html"
    code, out, err = run(capsys, "diagnose", tmp_path, "--html", page)
    assert code == 1
    assert "4 runs; name one of them" in out
    assert "0-healthy.csv" in out
    assert f"page: {page}" in err
    assert page.read_text(encoding="utf-8").count('<section id="run') == 4


def test_logs_are_not_touched(capsys, tmp_path):
    path = csv_of(tmp_path / "run.csv", "healthy")
    before = path.read_bytes(), path.stat().st_mtime_ns, sorted(tmp_path.iterdir())
    run(capsys, "diagnose", path)
    assert (path.read_bytes(), path.stat().st_mtime_ns, sorted(tmp_path.iterdir())) == before


def test_watching_says_what_is_new_once_and_ends_with_the_first_severe_finding(capsys, tmp_path, monkeypatch):
    path, seen = tmp_path / "run.csv", []
    stages = iter([None, 5, 30, 60, 120, 180, 240, 320, 380])

    def pass_time(seconds):
        seen.append(seconds)
        csv_of(path, "slow-collapse", rows=min(next(stages), len(logs.make("slow-collapse", 0).log)))

    monkeypatch.setattr(time, "sleep", pass_time)
    path.write_text("")
    next(stages)
    code, out, err = run(capsys, "diagnose", path, "--watch", "--every", "7")
    assert code == 1
    assert set(seen) == {7.0}
    assert "waiting: " in err
    assert out.count("Few steps so far") == 1
    assert "severe" in out
    assert len(seen) < 9


def test_watching_as_json_is_a_line_a_finding(capsys, tmp_path):
    path = csv_of(tmp_path / "run.csv", "slow-collapse")
    code, out, _ = run(capsys, "diagnose", path, "--watch", "--json")
    assert code == 1
    rows = [json.loads(line) for line in out.splitlines()]
    assert {row["finding"] for row in rows} >= {"entropy-collapse"}


def test_ctrl_c_ends_watching_with_130(capsys, tmp_path, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    assert run(capsys, "diagnose", csv_of(tmp_path / "run.csv", "healthy"), "--watch")[0] == 130


def test_a_file_that_changes_is_seen(tmp_path):
    path = tmp_path / "a"
    path.write_text("x")
    before = command._stamp(tmp_path)
    path.write_text("xy")
    assert command._stamp(tmp_path) != before
    assert command._stamp(tmp_path / "absent") == ()


@pytest.fixture
def dump(tmp_path):
    pytest.importorskip("pyarrow")
    from uncollapse.token_dump import TokenDump

    rng = np.random.default_rng(0)
    made = TokenDump(tmp_path / "dump")
    for step in range(2):
        token = rng.integers(0, 5, (8, 6))
        made.write(
            step, token=token, mask=np.ones((8, 6), bool), old_logp=-rng.exponential(size=(8, 6)), advantage=rng.normal(size=8),
            entropy=rng.random((8, 6)), text=[[f"<b>{i}" for i in row] for row in token],
        )  # fmt: skip
    return tmp_path / "dump"


def test_a_token_dump_is_accounted_for_everywhere(capsys, tmp_path, dump):
    path, page = csv_of(tmp_path / "run.csv", "short-log"), tmp_path / "page.html"
    code, out, _ = run(capsys, "diagnose", path, "--tokens", dump, "--html", page)
    assert code == 0
    assert "Which tokens spent the entropy" in out
    assert "rare rewarded" in out
    html = page.read_text(encoding="utf-8")
    assert '<section id="tokens"' in html
    assert "&lt;b&gt;" in html
    assert "<b>1" not in html
    data = json.loads(run(capsys, "diagnose", path, "--tokens", dump, "--json")[1])
    assert data["tokens"]["tokens"] == 96
    assert sum(one["drive"] for one in data["tokens"]["quadrants"].values()) == pytest.approx(
        data["tokens"]["drive"]
    )


def test_tokens_go_with_one_run_looked_at_once(capsys, tmp_path, dump):
    (tmp_path / "runs").mkdir()
    for name in ("a", "b"):
        path = csv_of(tmp_path / "runs" / f"{name}.csv", "short-log")
    code, _, err = run(capsys, "diagnose", tmp_path / "runs", "--tokens", dump)
    assert (code, "here are 2; name one of them" in err) == (2, True)
    code, _, err = run(capsys, "diagnose", path, "--tokens", dump, "--watch")
    assert (code, "leave it out with --watch" in err) == (2, True)
