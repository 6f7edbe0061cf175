"""Make the real logs of `tests/data` again: TRL runs on the packaged tiny model, logged by every library at once.

    pip install tensorboard wandb trackio
    python tests/data/make_logs.py --verl DIRECTORY_WITH_AN_UNPACKED_VERL_WHEEL

`collapse` is plain TRL (`trl.GRPOTrainer`), whose entropy is spent within the run; `remedy` is our trainer with a
recipe that holds entropy up. `README.md` beside this file tells what each file is. Reading needs none of these
libraries. Wall times, run ids and time stamps differ from one making to the next; the rest does not.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata, resources
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEPS = 60
NAMES = ("collapse", "remedy")
LIBRARIES = ("torch", "transformers", "trl", "tensorboard", "wandb", "trackio")
QUIET = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TENSORBOARD_LOGGING_DIR": "tensorboard",
    "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_DISABLE_GIT": "true",
    "WANDB_DISABLE_CODE": "true", "WANDB_X_DISABLE_STATS": "true", "WANDB_X_DISABLE_META": "true",
    "WANDB_X_DISABLE_MACHINE_INFO": "true", "WANDB_X_SAVE_REQUIREMENTS": "false", "WANDB_HOST": "example",
    "WANDB_USERNAME": "example", "WANDB_PROJECT": "example", "WANDB_DIR": ".", "TRACKIO_DIR": "trackio",
}  # fmt: skip
"""Offline, and nothing in a log that tells of the machine that wrote it."""

VERL = {
    "entropy": "actor/entropy", "reward": "critic/score/mean", "completions/mean_length": "response_length/mean",
    "completions/max_length": "response_length/max", "completions/min_length": "response_length/min",
    "completions/clipped_ratio": "response_length/clip_ratio", "grad_norm": "actor/grad_norm",
    "learning_rate": "actor/lr", "clip_ratio/region_mean": "actor/pg_clipfrac", "step_time": "timing_s/step",
}  # fmt: skip
"""verl's names for the same quantities, with which the recorded numbers pass through verl's own loggers."""


def train(name: str) -> None:
    """One run of `STEPS` optimiser steps, two per rollout, in the working directory."""
    import torch
    import trl
    from datasets import Dataset
    from transformers.integrations import TrackioCallback

    from uncollapse import models, tasks
    from uncollapse.integrations.trl import GRPOTrainer
    from uncollapse.policy.config import load_recipes

    torch.set_num_threads(1)
    model, tokenizer = models.load("tiny")
    model.config._name_or_path = "tiny"
    task = tasks.task("modsum")
    common: dict[str, Any] = {
        "reward_funcs": task.reward,
        "args": trl.GRPOConfig(
            "out", run_name=name, project="example", max_steps=STEPS, per_device_train_batch_size=64,
            per_device_eval_batch_size=64, steps_per_generation=2, num_generations=8, temperature=1.0,
            max_completion_length=8, learning_rate=1e-3, lr_scheduler_type="constant", seed=0, logging_steps=2,
            logging_nan_inf_filter=False, eval_strategy="steps", eval_steps=20, save_steps=STEPS // 2,
            save_only_model=True, use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
            report_to=["tensorboard", "wandb"] if name == "collapse" else ["tensorboard"],
        ),
        "train_dataset": Dataset.from_list(task.rows(256, split="train", seed=0, style="plain")),
        "eval_dataset": Dataset.from_list(task.rows(8, split="test", seed=0, style="plain")),
        "processing_class": tokenizer,
    }  # fmt: skip
    if name == "collapse":
        # As a callback, and not in `report_to`: TRL would add a row for every timer to the database.
        trainer = trl.GRPOTrainer(model, callbacks=[TrackioCallback()], **common)
    else:
        with resources.as_file(resources.files("uncollapse.cli").joinpath("demo.yaml")) as path:
            recipe = load_recipes(path)["adaptive-entropy-demo"]
        trainer = GRPOTrainer(model, recipe=recipe, **common)
    trainer.train()


def own_run() -> None:
    """A short run of `uncollapse train` in the working directory."""
    from uncollapse.integrations.launch import train as launch
    from uncollapse.integrations.settings import settings

    launch(
        settings(
            recipe="grpo", model="tiny", task="modsum", steps=20, prompts=16, updates=2, max_tokens=8, eval_every=10,
            eval_prompts=8, checkpoint_every=0, probe_every=0, output="out",
        )
    )  # fmt: skip


def collect(made: Path, target: Path) -> None:
    """Keep the logs of a run: its trainer states, event file, offline run and database."""
    shutil.rmtree(target, ignore_errors=True)
    for checkpoint in sorted((made / "out").glob("checkpoint-*")):
        (target / checkpoint.name).mkdir(parents=True)
        shutil.copy(checkpoint / "trainer_state.json", target / checkpoint.name)
    (target / "tensorboard").mkdir()
    for number, file in enumerate(sorted((made / "tensorboard").glob("events.out.tfevents.*"))):
        second = file.name.split(".")[3]
        shutil.copy(file, target / "tensorboard" / f"events.out.tfevents.{second}.example.{number}.0")
    for file in (made / "wandb").glob("offline-run-*/*.wandb"):
        folder = target / "wandb" / file.parent.name
        folder.mkdir(parents=True)
        shutil.copy(file, folder)
    for file in (made / "trackio").glob("*.db"):
        (target / "trackio").mkdir()
        shutil.copy(file, target / "trackio")


def history(target: Path) -> list[dict[str, float]]:
    """The rows that the trainer logged, training and evaluation, as its state holds them."""
    state = json.loads((target / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "train_runtime" not in row]


def exports(target: Path, name: str) -> None:
    """The same numbers as a table that W&B's page exports, and as a plain table."""
    rows = [row for row in history(target) if "entropy" in row]
    with (target / "wandb_export.csv").open("w", newline="") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
        writer.writerow(["Step", *(f"{name} - train/entropy{end}" for end in ("", "__MIN", "__MAX"))])
        writer.writerows([row["step"], *[row["entropy"]] * 3] for row in rows)
    with (target / "table.csv").open("w", newline="") as stream:
        columns = ("step", "entropy", "reward", "reward_std", "grad_norm")
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows([row[column] for column in columns] for row in rows)


def through_verl(target: Path, verl: Path) -> None:
    """The same numbers as verl's console logger and its file logger write them."""
    console = module(verl / "verl/utils/logger/aggregate_logger.py")
    os.environ["VERL_FILE_LOGGER_PATH"] = str(target / "verl.jsonl")
    log = module(verl / "verl/utils/tracking.py").FileLogger("example", "run")
    lines = ["\x1b[36m(TaskRunner pid=71)\x1b[0m Total training steps: 60"]
    for row in history(target):
        if "entropy" not in row:
            continue
        step = int(row["step"])
        data = {theirs: row[ours] for ours, theirs in VERL.items() if ours in row}
        lines.append(f"\x1b[36m(TaskRunner pid=71)\x1b[0m {console.concat_dict_to_str(data, step)}")
        log.log(data, step)
    log.finish()
    (target / "verl_console.log").write_text("\n".join(lines) + "\n")


def module(path: Path) -> Any:
    """One file of verl as a module: the package itself needs Ray."""
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    made = importlib.util.module_from_spec(found)
    found.loader.exec_module(made)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--verl", type=Path, help="directory that holds the package `verl`; left out, so are its logs"
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        own_run() if arguments.only == "own" else train(arguments.only)
        return
    for name in (*NAMES, "own"):
        with tempfile.TemporaryDirectory() as made:
            command = [sys.executable, str(Path(__file__).resolve()), "--only", name]
            subprocess.run(command, cwd=made, env=os.environ | QUIET, check=True)
            target = HERE / name
            if name == "own":
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir()
                for file in ("config.yaml", "metrics.jsonl"):
                    shutil.copy(Path(made, "out", file), target)
                continue
            collect(Path(made), target)
        if name == "collapse":
            exports(target, name)
        if arguments.verl and name == "collapse":
            through_verl(target, arguments.verl)
    versions = {library: metadata.version(library) for library in LIBRARIES}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
