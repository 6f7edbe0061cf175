"""Training runs with a tiny random model: what is on disk, resuming after any kind of end, mistakes in one line."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

pytest.importorskip("trl")

from transformers import LlamaConfig, LlamaForCausalLM

from uncollapse import tasks
from uncollapse.cli import main
from uncollapse.errors import ConfigError, DataError, UnknownName
from uncollapse.integrations.comparison import compare
from uncollapse.integrations.interrupts import Interrupted
from uncollapse.integrations.launch import finished, last_checkpoint, settings_of, train
from uncollapse.integrations.settings import TrainConfig, settings
from uncollapse.models.characters import character_tokenizer
from uncollapse.policy.registry import recipe
from uncollapse.policy.stages.samplers import PlainSampler
from uncollapse.runs import BrokenLines, Run
from uncollapse.tasks.task import GeneratedTask

pytestmark = pytest.mark.filterwarnings("ignore")
TASK = "variety"


def judge(text, row):
    """Something that a random model gets right about half of the time; cannot judge what holds a digit 0."""
    return None if "0" in text else float(len(set(text)) % 2)


with contextlib.suppress(ConfigError):
    tasks.register_task(
        TASK,
        lambda: GeneratedTask(
            name=TASK,
            summary="",
            draw=lambda r: {"prompt": f"{r.randrange(10)}:", "answer": "1"},
            judge=judge,
            question=lambda row: row["prompt"],
        ),
    )


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = character_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def config(model, tmp_path):
    small = replace(recipe("grpo"), name="small", sampler=PlainSampler(samples=4))
    return TrainConfig(
        recipe=small,
        model=model,
        task=TASK,
        steps=3,
        output=str(tmp_path / "run"),
        prompts=2,
        updates=2,
        max_tokens=6,
        rows=16,
        learning_rate=1e-2,
        checkpoint_every=1,
        eval_every=2,
        eval_prompts=3,
        eval_samples=4,
        probe_every=1,
        probes=2,
    )


def rows_without_time(run):
    drop = ("time/step",)
    return [{k: v for k, v in row.items() if k not in drop} for row in run.metrics()]


class Killed(BaseException):
    """Stands for a kill: nothing after it runs but the file system's work."""


def killed_after(step):
    def watch(progress):
        if progress.row and progress.done == step:
            raise Killed

    return watch


def test_a_run_leaves_config_metrics_probes_and_a_complete_checkpoint(config):
    seen = []
    run = train(config, progress=seen.append)
    rows = run.metrics()
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        for key in (
            "reward/mean",
            "entropy/token/mean",
            "kl/old/k3",
            "loss/total",
            "grad/norm",
            "lr",
            "time/step",
        ):
            assert math.isfinite(row[key]), key
    assert {"eval/pass@1", "eval/pass@4", "eval/maj@4", "eval/distinct", "eval/reward"} <= set(rows[0])
    assert "eval/pass@1" in rows[1]
    assert "eval/pass@1" in rows[2]
    tokens = run.tokens()
    assert {record["step"] for record in tokens} == {0, 1, 2, 3}
    assert {record["sample"] for record in tokens} <= {"probe-0", "probe-1"}
    assert tokens[0]["entropy"] != tokens[-1]["entropy"]
    assert finished(run)
    assert [p.done for p in seen if p.row] == [1, 2, 3]
    assert replace(settings_of(run), output="") == replace(config.resolved(10), output="")
    assert run.config["recipe"]["name"] == "small"
    assert {"uncollapse", "torch", "trl"} <= set(run.config["versions"])


def test_a_run_does_not_overwrite_another_one(config):
    train(replace(config, steps=1))
    with pytest.raises(DataError, match="already holds a run"):
        train(config)


def test_resuming_equals_running_through(config, tmp_path):
    whole = train(config)
    with pytest.raises(Killed):
        train(replace(config, output=str(tmp_path / "cut")), progress=killed_after(2))
    cut = Run.open(tmp_path / "cut")
    assert not finished(cut)
    assert last_checkpoint(cut).name == "checkpoint-2"
    with (cut.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "reward/me')  # the line that a kill cut short
    again = train(settings_of(cut), resume=True)
    assert finished(again)
    with pytest.warns(BrokenLines, match="skipped 1 broken line"):
        rows = rows_without_time(again)
    assert rows == rows_without_time(whole)
    assert again.tokens() == whole.tokens()


def test_resuming_a_run_that_has_no_checkpoint_yet_starts_it(config, tmp_path):
    with pytest.raises(Killed):
        train(config, progress=killed_after(1))
    assert last_checkpoint(Run.open(config.output)) is None
    again = train(config, resume=True)
    assert rows_without_time(again) == rows_without_time(
        train(replace(config, output=str(tmp_path / "whole")))
    )


def test_a_checkpoint_cut_short_is_passed_over(config):
    with pytest.raises(Killed):
        train(config, progress=killed_after(3))
    run = Run.open(config.output)
    partial = run.checkpoints / "checkpoint-99"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert last_checkpoint(run).name == "checkpoint-4"
    assert finished(train(config, resume=True))


def test_a_finished_run_is_returned_and_can_be_extended(config):
    run = train(replace(config, steps=1))
    before = run.metrics()
    assert train(replace(config, steps=1), resume=True).metrics() == before
    longer = train(settings_of(run, steps=2), resume=True)
    assert [row["step"] for row in longer.metrics()] == [0, 1]
    assert Run.open(run.path).config["steps"] == 2


def test_ctrl_c_finishes_the_step_writes_a_checkpoint_and_can_be_resumed(config, tmp_path):
    def press(progress):
        if progress.row and progress.done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    lazy = replace(config, checkpoint_every=0)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="continue with --resume --output"):
        train(lazy, progress=press)
    assert signal.getsignal(signal.SIGINT) is before
    run = Run.open(lazy.output)
    assert last_checkpoint(run).name == "checkpoint-2"
    assert rows_without_time(train(lazy, resume=True)) == rows_without_time(
        train(replace(lazy, output=str(tmp_path / "whole")))
    )


@pytest.mark.slow
def test_a_killed_process_resumes(config, tmp_path, model):
    path = tmp_path / "killed"
    command = [
        sys.executable, "-m", "uncollapse", "train", "--model", model, "--task", "modsum", "--output", str(path),
        "--prompts", "2", "--updates", "2", "--max-tokens", "6", "--eval-every", "0", "--probe-every", "0",
        "--checkpoint-every", "1",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([*command, "--steps", "100000"], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while (
            not list(path.glob("checkpoints/checkpoint-*/uncollapse_recipe.pt"))
            and time.monotonic() < deadline
        ):
            time.sleep(0.1)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    run = Run.open(path)
    kept = run.metrics()
    assert kept
    steps = len(kept) + 2
    done = subprocess.run(
        [sys.executable, "-m", "uncollapse", "train", "--resume", "--output", str(path), "--steps", str(steps)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = Run.open(path).metrics()
    assert [row["step"] for row in rows] == list(range(steps))
    assert (path / "report.html").exists()


def test_interruption_on_the_command_line(config, tmp_path, capsys, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config.to_dict()))
    monkeypatch.setattr("uncollapse.integrations.recorder.Recorder.on_train_begin", _pressing)
    assert main(["train", str(file)]) == 130
    err = capsys.readouterr().err
    assert "stopping after this step" in err
    assert "report so far" in err
    assert f"continue with --resume --output {config.output}" in err
    assert (tmp_path / "run" / "report.html").exists()
    monkeypatch.undo()
    assert main(["train", "--resume", "--output", config.output]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"report: {config.output}/report.html\n"
    assert "step 3/3" in captured.err


def _pressing(self, *_, **__):
    os.kill(os.getpid(), signal.SIGINT)


# ---- mistakes ----------------------------------------------------------------------------------------------


def test_the_recipe_of_a_run_cannot_be_changed(config):
    run = train(replace(config, steps=1))
    with pytest.raises(
        ConfigError, match=r"is a run of recipe 'small', not 'dapo'; resume with the recipe that"
    ):
        train(settings_of(run, recipe="dapo"), resume=True)
    other = replace(config, steps=2, recipe=replace(config.recipe, summary="another"))
    with pytest.raises(ConfigError, match="recipe 'small', with other options than given now"):
        train(other, resume=True)
    with pytest.raises(ConfigError, match="was started with seed 0, not 5"):
        train(replace(config, seed=5), resume=True)


def test_resume_without_a_run(config):
    with pytest.raises(DataError, match="is no run directory"):
        train(config, resume=True)


def test_what_is_no_model_or_task_leaves_no_directory(config, tmp_path):
    (tmp_path / "empty").mkdir()
    for broken, error in (
        (replace(config, model=str(tmp_path / "empty")), DataError),
        (replace(config, model="tinny"), UnknownName),
        (replace(config, task="modsun"), UnknownName),
        (replace(config, task=None, dataset=str(tmp_path / "none.jsonl")), DataError),
        (replace(config, rows=1), DataError),
    ):
        with pytest.raises(error):
            train(broken)
        assert not (tmp_path / "run").exists()


def test_a_data_set_of_ones_own_with_other_names(config, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}:", "gold": str(i)}) + "\n" for i in range(20)))
    mapped = replace(
        config, task=None, dataset=str(path), columns={"question": "prompt", "gold": "answer"}, steps=1
    )
    assert len(train(mapped).metrics()) == 1
    path.write_text('{"prompt": "1:"}\n')
    with pytest.raises(DataError, match="answer"):
        train(replace(config, task=None, dataset=str(path), output=str(tmp_path / "b")))


def test_a_full_disk_is_one_line_and_earlier_rows_stay(config, monkeypatch):
    write, count = os.write, 0

    def full(descriptor, data):
        nonlocal count
        if data.startswith(b'{"step": 1') and b"reward/mean" in data:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(
        DataError, match=r"could not write .*metrics.jsonl \(step 1\): No space left on device"
    ):
        train(config)
    monkeypatch.undo()
    assert [row["step"] for row in Run.open(config.output).metrics()] == [0]
    assert finished(train(config, resume=True))


def test_a_full_disk_while_a_checkpoint_is_written(config, monkeypatch):
    import torch

    def full(*_, **__):
        raise RuntimeError(
            "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"
        )

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DataError, match=r"the disk is full: a file below .* could not be written"):
        train(config)


def test_completions_that_cannot_be_scored_are_named_and_left_out(config, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "judge", lambda text, row: None)
    with pytest.warns(UserWarning, match=r"rewards are NaN \(rows 0, 1, 2.*treated as unscorable"):
        run = train(replace(config, steps=1, task="unscorable"))
    row = run.metrics()[0]
    assert row["reward/unscorable"] == 1.0
    assert "reward/mean" not in row
    assert row["grad/norm"] == 0.0


with contextlib.suppress(ConfigError):
    tasks.register_task(
        "unscorable",
        lambda: GeneratedTask(
            name="unscorable",
            summary="",
            draw=lambda r: {"prompt": f"{r.randrange(10)}:", "answer": "1"},
            judge=lambda text, row: None,
            question=lambda row: row["prompt"],
        ),
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"updates": 3}, "128 rows per rollout .* cannot be split into 3 equal updates"),
        ({"micro_batch": 5}, "micro_batch 5 does not divide the 32 rows of an optimiser step; try 4"),
        ({"learning_rate": 0.0}, "learning_rate has to be above 0"),
        ({"seed": -1}, "seed has to be at least 0"),
        ({"columns": {"a": "prompt"}}, "columns belong to a dataset"),
    ],
)
def test_settings_that_cannot_be_honoured(given, message):
    with pytest.raises(ConfigError, match=message):
        settings(**given)


# ---- compare -----------------------------------------------------------------------------------------------


def test_a_comparison_skips_what_is_finished_and_goes_on_with_what_is_not(config, tmp_path):
    base = replace(config, output=str(tmp_path / "c"), steps=2)
    made = [replace(base.recipe, name="a"), replace(base.recipe, name="b")]
    with pytest.raises(Killed):
        compare(base, made, [0], progress=killed_in_second_run())
    started = []
    comparison = compare(base, made, [0, 1], following=lambda *what: started.append(what))
    assert started == [("a", 0, 1, 4), ("b", 0, 2, 4), ("a", 1, 3, 4), ("b", 1, 4, 4)]
    assert {name: len(runs) for name, runs in comparison.runs().items()} == {"a": 2, "b": 2}
    with pytest.raises(ConfigError, match="compares with steps 2, not 3"):
        compare(replace(base, steps=3), made, [0])


def killed_in_second_run():
    ends = 0

    def watch(progress):
        nonlocal ends
        ends += bool(progress.row)
        if ends == 3:
            raise Killed

    return watch


def test_compare_prints_a_table_and_writes_a_report(config, tmp_path, capsys):
    file = tmp_path / "base.yaml"
    plain = {k: v for k, v in config.to_dict().items() if k not in ("recipe", "seed", "output")}
    file.write_text(json.dumps({**plain, "steps": 1}))
    output = tmp_path / "c"
    assert (
        main(["compare", str(file), "--recipes", "grpo,clip-cov", "--seeds", "0,1", "--output", str(output)])
        == 0
    )
    captured = capsys.readouterr()
    assert "grpo" in captured.out
    assert "±" in captured.out
    assert f"report: {output}/report.html" in captured.out
    assert (output / "comparison.json").exists()
    assert "clip-cov seed 1 (4/4)" in captured.err
