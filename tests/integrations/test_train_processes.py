"""`uncollapse train` in two processes: the run of one, one directory, one voice, stopping and resuming together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pytest

from uncollapse.errors import ConfigError
from uncollapse.integrations.launch import finished, last_checkpoint, settings_of
from uncollapse.integrations.launch import train as train_here
from uncollapse.integrations.processes import ProcessError, Processes, join
from uncollapse.runs import Run

pytestmark = pytest.mark.filterwarnings("ignore")
SCRIPT = Path(__file__).with_name("train_scripted.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
CPU = str(resources.files("uncollapse.integrations").joinpath("launchers", "cpu.yaml"))
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch", "--config_file", CPU, "--main_process_port", "0",
    "--num_processes", "2", "-m",
]  # fmt: skip
SMALL = ["--model", "tiny", "--task", "modsum", "--prompts", "4", "--max-tokens", "6", "--eval-every", "0"]
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def scripted(launcher: list[str], *commands: list[str]) -> subprocess.CompletedProcess:
    """Run these commands in one launch."""
    command = [*launcher, str(SCRIPT), *(" ".join(words) for words in commands)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_processes_write_the_run_of_one(tmp_path):
    """Two processes stop after a step and resume, one goes through."""
    settings = [*SMALL, "--updates", "1", "--probe-every", "1"]
    uneven = ["--model", "tiny", "--prompts", "1", "--updates", "8", "--output", str(tmp_path / "uneven")]
    one, two = tmp_path / "1" / "run", tmp_path / "2" / "run"
    done = scripted([sys.executable], ["train", *settings, "--steps", "2", "--output", str(one)])
    both = scripted(
        TORCHRUN,
        ["train", *uneven],
        ["train", *settings, "--steps", "1", "--output", str(two)],
        ["train", "--resume", "--steps", "2", "--output", str(two)],
    )
    assert done.stdout.count("report:") == 1
    assert both.stdout.count("report:") == 2
    assert both.stderr.count("step 2/2") == 1
    assert both.stderr.count("2 0 0\n") == 2  # exit codes, in each process
    told = "1 rows of an optimiser step (1 prompts x 8 samples / 8 updates) cannot be split over 2 processes"
    assert both.stderr.count(told) == 1
    assert not (tmp_path / "uneven").exists()
    for output in (one, two):
        assert [path.name for path in output.parent.iterdir()] == ["run"]
        assert len((output / "metrics.jsonl").read_text().splitlines()) == 2
        assert finished(Run.open(output))
        assert not Run.open(output).broken_lines()
    for left, right in zip(_numbers(one), _numbers(two), strict=True):
        assert right.keys() == left.keys()
        for key, value in left.items():
            assert right[key] == pytest.approx(value, abs=2e-6, rel=1e-5, nan_ok=True), key


def _numbers(path: Path) -> list[dict[str, float]]:
    """What the metrics and the probes of a run say, apart from times."""
    run = Run.open(path)
    rows = [{key: value for key, value in row.items() if key != "time/step"} for row in run.metrics()]
    return rows + [{name: sum(record[name]) for name in ("entropy", "logp")} for record in run.tokens()]


def test_a_stopped_run_of_two_processes_resumes_in_one(tmp_path):
    output = tmp_path / "run"
    train = ["uncollapse", "train", *SMALL, "--updates", "2", "--probe-every", "0", "--output", str(output)]
    log, metrics = tmp_path / "log", output / "metrics.jsonl"
    with log.open("w") as stream:
        launcher = subprocess.Popen(
            [*ACCELERATE, *train, "--steps", "100000"], env=ENVIRONMENT, stdout=stream, stderr=stream
        )
        deadline = time.monotonic() + 200
        while not (metrics.exists() and metrics.read_text().count("\n") > 1) and time.monotonic() < deadline:
            time.sleep(0.1)
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(timeout=100) != 0
    assert log.read_text().count("continue with --resume") == 1, log.read_text()[-3000:]
    run = Run.open(output)
    done = len(run.metrics())
    assert last_checkpoint(run).name == f"checkpoint-{2 * done}"
    assert (output / "report.html").exists()
    longer = train_here(settings_of(run, steps=done + 1), resume=True)
    assert [row["step"] for row in longer.metrics()] == list(range(done + 1))
    assert not longer.broken_lines()
    assert finished(longer)


def test_launches_that_would_do_something_else_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"start it with ddp\.yaml or torchrun"):
        join()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match=r"starts one process whatever --num_processes says; use torchrun"):
        join()


def test_an_error_that_one_process_alone_knows_is_told_by_it():
    ours = ConfigError("no")
    assert Processes(rank=0, count=2).alone(ours) is ours
    assert str(Processes(rank=1, count=2).alone(ours)) == "process 1: no"
    lost = Processes(rank=0, count=2).alone(RuntimeError("gloo: Connection closed by peer [127.0.0.1]"))
    assert isinstance(lost, ProcessError)
    bug = TypeError("a bug")
    assert Processes(rank=1, count=2).alone(bug) is bug
    assert Processes().alone(lost) is lost
