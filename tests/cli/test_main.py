"""The command line in process: what is printed where, exit codes, one line for what a user can mend."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from uncollapse import __version__
from uncollapse.cli import main
from uncollapse.cli.live import duration, sparkline


def run(capsys, *argv):
    code = main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys, *argv):
    """The one line of an error; nothing on stdout, exit code 2."""
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err.removeprefix("error: ").rstrip()


def test_help_names_every_verb_and_says_where_to_start(capsys):
    code, out, err = run(capsys, "--help")
    assert code == 0
    assert err == ""
    for verb in (
        "demo",
        "train",
        "compare",
        "list",
        "show",
        "recipe",
        "reproduce",
        "report",
        "diagnose",
        "doctor",
    ):
        (line,) = (line for line in out.splitlines() if line.strip("│ ").startswith(f"{verb} "))
        assert len(line.strip("│ ").split()) > 4, "the list of verbs says what each does"
    assert "uncollapse demo" in out
    assert "\x1b[" not in out


@pytest.mark.parametrize(
    "verb", ["demo", "train", "compare", "list", "show", "reproduce", "report", "diagnose", "doctor"]
)
def test_the_help_of_every_verb_has_an_example(capsys, verb):
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert f"uncollapse {verb}" in out.split("Usage", 1)[1].split("\n", 1)[1]


def test_version(capsys):
    assert run(capsys, "--version") == (0, __version__ + "\n", "")


def test_help_does_not_import_torch():
    code = "import sys; from uncollapse.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
    )
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], 'Did you mean "train"'),
        (["train", "--recipee", "grpo"], "--recipe"),
        (["list", "recipe"], 'Did you mean "recipes"'),
        (["train", "--steps", "many"], 'unable to convert "many" into int'),
        (["show", "entropy-mechansm"], "unknown paper 'entropy-mechansm'; did you mean entropy-mechanism"),
        (["recipe", "show", "clip-conv"], "unknown recipe 'clip-conv'; did you mean clip-cov"),
        (
            ["train", "--recipe", "clip-conv", "--dry-run"],
            "unknown recipe 'clip-conv'; did you mean clip-cov",
        ),
        (["train", "--steps", "0", "--dry-run"], "steps has to be at least 1, got 0"),
        (
            ["train", "--task", "modsum", "--dataset", "x.jsonl", "--dry-run"],
            "task and dataset are both given",
        ),
        (["train", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["compare", "--seeds", "0,x"], "--seeds takes whole numbers"),
        (["compare", "--recipes", "grpo,grpo", "--output", "{tmp}/c"], "recipe grpo is given twice"),
        (["compare", "--recipes", "", "--output", "{tmp}/c"], "give at least one recipe"),
        (["report", "{tmp}"], "is no run directory"),
        (["reproduce", "dysts"], "dysts has no study yet"),
    ],
)
def test_a_mistake_is_one_line(capsys, tmp_path, argv, message):
    assert message in fails(capsys, *(part.format(tmp=tmp_path) for part in argv))


def test_a_mistake_in_a_file_names_the_line(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: tiny\nstesp: 3\n")
    assert (
        fails(capsys, "train", str(path))
        == "run.yaml:2: unknown setting 'stesp'; did you mean steps or updates or task?"
    )
    path.write_text("model: tiny\nrecipe:\n  name: mine\n  base: grpo\n  weights: [clip-cvo]\n")
    assert fails(capsys, "train", str(path)).startswith(
        "run.yaml:5: recipe.weights[0]: unknown weights stage 'clip-cvo'"
    )
    path.write_text("model: tiny\nlearning_rate: fast\n")
    assert fails(capsys, "train", str(path)) == "run.yaml:2: learning_rate: expected a number, got 'fast'"
    path.write_text("model: [tiny\nsteps: 3\n")
    assert fails(capsys, "train", str(path)).startswith("run.yaml:")


def test_dry_run_prints_settings_that_can_be_read_again_and_flags_win(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("recipe: clip-cov\nlearning_rate: 1e-4\nsteps: 7\ndataset: a.jsonl\n")
    code, out, _ = run(capsys, "train", str(path), "--steps", "9", "--task", "countdown", "--dry-run")
    assert code == 0
    assert "steps: 9\n" in out
    assert "learning_rate: 0.0001\n" in out
    assert "task: countdown\n" in out
    assert "dataset: null\n" in out
    (tmp_path / "again.yaml").write_text(out)
    assert run(capsys, "train", str(tmp_path / "again.yaml"), "--dry-run")[1] == out


def test_list_and_show(capsys):
    code, out, err = run(capsys, "list", "papers")
    assert (code, err) == (0, "")
    assert "entropy-mechanism" in out
    rows = json.loads(run(capsys, "list", "recipes", "--json")[1])
    assert {"grpo", "clip-cov"} <= {row["recipe"] for row in rows}
    code, out, _ = run(capsys, "show", "entropy-mechanism")
    assert code == 0
    assert "uncollapse train --recipe clip-cov" in out
    assert json.loads(run(capsys, "show", "entropy-mechanism", "--json")[1])["arxiv"] == "2505.22617"
    assert "not built yet" in run(capsys, "show", "nlse")[1]


def test_show_quotes_a_result_file(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = {
        "claims": [{"id": "E1", "verdict": "inconclusive", "effect": "gap", "paper_says": "[bold]more[/]"}],
        "estimates": {"gap": {"value": 0.5, "low": -0.1, "high": 1.1}},
        "provenance": {"seeds": [0, 1]},
    }
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "entropy-mechanism.json").write_text(json.dumps(result))
    _, out, _ = run(capsys, "show", "entropy-mechanism")
    assert "inconclusive" in out
    assert "0.5 (-0.1 to 1.1)" in out
    assert "[bold]more[/]" in out
    (tmp_path / "results" / "entropy-mechanism.json").write_text("{")
    assert "run: uncollapse reproduce entropy-mechanism" in fails(capsys, "show", "entropy-mechanism")


def test_recipe_show(capsys):
    code, out, _ = run(capsys, "recipe", "show", "kl-cov", "--updates", "1")
    assert code == 0
    assert "testbed: runs" in out
    assert "verl: runs (level trainer)" in out
    assert "not at level registry: it cannot drop rows" in out
    assert "kl-cov does nothing with one optimiser step" in out
    assert "optimiser step" in out
    code, out, _ = run(capsys, "recipe", "show", "grpo", "--yaml")
    assert out.startswith("name: grpo\n")
    card = json.loads(run(capsys, "recipe", "show", "grpo", "--json")[1])
    assert card["engines"]["testbed"] == card["engines"]["verl"] == []
    assert card["verl"]["level"] == "registry"


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "torch" in out
    assert "extra rl" in out


def test_interruption_and_full_disk_have_their_codes(capsys, monkeypatch):
    def raising(error):
        def show(slug):
            raise error

        return show

    monkeypatch.setattr("uncollapse.cli.catalogue.paper", raising(KeyboardInterrupt()))
    code, _, err = run(capsys, "show", "entropy-mechanism")
    assert (code, err) == (130, "interrupted\n")
    monkeypatch.setattr(
        "uncollapse.cli.catalogue.paper", raising(OSError(28, "No space left on device", "x.bin"))
    )
    assert (
        fails(capsys, "show", "entropy-mechanism")
        == "the disk is full (x.bin); make room and continue with --resume"
    )


def test_sparkline_and_duration():
    assert sparkline([]) == ""
    assert sparkline([1.0, 0.5, 0.0]) == "█▅▁"
    assert sparkline([float("nan"), 0.0]) == "▁"
    assert len(sparkline([float(i) for i in range(1000)])) <= 32
    assert [duration(s) for s in (4.4, 75.0, 3725.0)] == ["4 s", "1:15", "1:02:05"]
