"""The monitor inside a trainer: what it warns of, when it stops, what it hands on."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path

import pytest
import trl
from transformers import TrainerControl, TrainerState, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent))
import toy

from uncollapse import report
from uncollapse.errors import ConfigError, UnknownName
from uncollapse.integrations.monitor import CollapseMonitor, CollapseWarning
from uncollapse.integrations.trl import GRPOTrainer


@pytest.fixture
def arguments(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)


def play(monitor, arguments, rows, main=True):
    """Give the monitor rows as `Trainer.log` would; the step at which it asked to stop, or None."""
    control = TrainerControl()
    for step, row in enumerate(rows, start=1):
        state = TrainerState(global_step=step, is_world_process_zero=main, is_local_process_zero=main)
        monitor.on_log(arguments, state, control, logs=dict(row))
        if control.should_training_stop:
            break
    else:
        step = None
    monitor.on_train_end(arguments, TrainerState(global_step=len(rows), is_world_process_zero=main), control)
    return step


def collapsing(n=80):
    return [
        {"entropy": 0.9 * math.exp(-0.06 * i) * (1 + 0.03 * math.sin(7 * i)), "reward": 0.01 * i, "loss": 0.1}
        for i in range(n)
    ]


def healthy(n=60):
    return [
        {"entropy": 0.9 + 0.02 * math.sin(7 * i), "reward": 0.01 * i + 0.01 * math.sin(3 * i), "loss": 0.1}
        for i in range(n)
    ]


def test_it_warns_once_and_again_when_it_gets_graver(arguments):
    monitor = CollapseMonitor(every=5)
    with pytest.warns(CollapseWarning) as caught:
        assert play(monitor, arguments, collapsing()) is None
    told = [str(one.message) for one in caught if "ntropy" in str(one.message)]
    assert 1 <= len(told) <= 2
    assert told[-1].startswith(("Entropy collapse (severe)", "Entropy is collapsing (severe)"))
    assert "Try: Steer the entropy towards a target." in told[-1]
    assert monitor.diagnosis.state == "collapsed"


def test_it_stops_early_when_asked_to(arguments):
    monitor = CollapseMonitor(every=5, stop_on="severe")
    with pytest.warns(CollapseWarning):
        step = play(monitor, arguments, collapsing())
    assert step is not None
    assert step < 70
    assert step % 5 == 0


def test_a_healthy_run_is_left_alone(arguments):
    pages = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            play(CollapseMonitor(every=3, stop_on="warning", at_end=pages.append), arguments, healthy())
            is None
        )
    assert [page.state for page in pages] == ["healthy"]


def test_other_processes_decide_alike_but_say_nothing(arguments):
    pages = []
    monitor = CollapseMonitor(every=5, stop_on="severe", at_end=pages.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = play(monitor, arguments, collapsing(), main=False)
    with pytest.warns(CollapseWarning):
        assert play(CollapseMonitor(every=5, stop_on="severe"), arguments, collapsing()) == step
    assert pages == []


def test_evaluations_and_the_summary_are_no_steps(arguments):
    monitor = CollapseMonitor(every=1)
    rows = [row for one in healthy(20) for row in (one, {"eval_reward": one["reward"]})]
    control = TrainerControl()
    for i, row in enumerate(rows):
        monitor.on_log(arguments, TrainerState(global_step=1 + i // 2), control, logs=row)
    monitor.on_log(
        arguments, TrainerState(global_step=20), control, logs={"train_runtime": 3.0, "train_loss": 0.1}
    )
    monitor.on_log(arguments, TrainerState(global_step=20), control, logs=None)
    assert len(monitor.log) == 20
    assert monitor.log.has("eval/reward", at_least=20)


def test_names_can_be_given_by_hand(arguments):
    monitor = CollapseMonitor(every=100, mapping={"entropy": "mine"})
    play(monitor, arguments, [{"mine": row["entropy"]} for row in healthy(20)])
    assert monitor.log.origin["entropy/token/mean"] == "mine"


@pytest.mark.parametrize(
    ("options", "error"),
    [({"every": 0}, ConfigError), ({"mapping": {"entrpy": "x"}}, UnknownName)],
)
def test_options_that_cannot_be_honoured_are_refused(options, error):
    with pytest.raises(error):
        CollapseMonitor(**options)


@pytest.mark.filterwarnings("ignore")
def test_it_watches_our_trainer_as_well(tmp_path):
    monitor = CollapseMonitor(every=1)
    trainer = GRPOTrainer(
        model=toy.llama(), args=toy.config(tmp_path, max_steps=2), reward_funcs=toy.digit_share, train_dataset=toy.prompts(),
        processing_class=toy.tokenizer(), callbacks=[monitor], recipe="grpo",
    )  # fmt: skip
    trainer.train()
    assert monitor.log.has("entropy/token/mean", at_least=2)
    assert monitor.log.has("reward/mean", at_least=2)


def test_it_watches_a_real_trainer_and_writes_the_page(tmp_path):
    monitor = CollapseMonitor(
        every=1, warn_on="severe", at_end=report.diagnosis.writer(tmp_path / "page.html")
    )
    trainer = trl.GRPOTrainer(
        model=toy.llama(), args=toy.config(tmp_path, max_steps=3), reward_funcs=toy.digit_share, train_dataset=toy.prompts(),
        processing_class=toy.tokenizer(), callbacks=[monitor],
    )  # fmt: skip
    trainer.train()
    assert monitor.diagnosis is not None
    assert monitor.log.has("entropy/token/mean", at_least=3)
    assert monitor.log.has("reward/mean", at_least=3)
    assert "Few steps so far" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert monitor.log.settings["loss_type"] == trainer.args.loss_type
