"""Times the parts of optimiser steps in one of several processes; started by `processes.py`."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig

from uncollapse import models, tasks
from uncollapse.integrations.quiet import quiet_libraries
from uncollapse.integrations.trl import GRPOTrainer

SAMPLES, TOKENS = 8, 24


class Steps(TrainerCallback):
    """Seconds of each step and of its parts."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.parts, self.start = {}, getattr(self, "end", time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.end = time.perf_counter()
        self.steps.append(self.parts | {"step": self.end - self.start})

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - start

        return wrapped


def trainer(name: str, rows: int, steps: int, folder: str, clock: Steps) -> GRPOTrainer:
    model, tokenizer = models.load(name)
    style = "chat" if tokenizer.chat_template else "plain"
    task = tasks.task("modsum" if name == "tiny" else "reasoning-gym:chain_sum")
    processes = dist.get_world_size()
    arguments = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=rows // processes, num_generations=SAMPLES,
        max_completion_length=TOKENS, max_steps=steps, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
        disable_tqdm=True, gradient_checkpointing=False, learning_rate=1e-6, logging_steps=1, dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    made = GRPOTrainer(
        model, task.reward, arguments, train_dataset=Dataset.from_list(task.rows(64, split="train", seed=0, style=style)),
        processing_class=tokenizer, recipe="grpo", callbacks=[clock],
    )  # fmt: skip
    # Completions of one length: otherwise their lengths, which differ between cases, would be measured.
    made.generation_config.min_new_tokens = TOKENS
    made._generate_single_turn = clock.timed("generate", made._generate_single_turn)
    made._scorer = clock.timed("score and update", made._scorer)
    made.accelerator.backward = clock.timed("score and update", made.accelerator.backward)
    made.accelerator.gather = clock.timed("wait and exchange", made.accelerator.gather)
    return made


def all_reduce(numbers: int) -> float:
    """Median seconds of a sum over the processes."""
    values, seconds = torch.zeros(numbers), []
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    name, rows, steps, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    quiet_libraries()
    clock = Steps()
    dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(name, rows, steps, folder, clock)
        made.train()
    numbers = sum(parameter.numel() for parameter in made.model.parameters())
    found = {
        part: statistics.median(step.get(part, 0.0) for step in clock.steps[1:])
        for part in ("step", "generate", "score and update", "wait and exchange")
    }
    found["rest"] = found["step"] - sum(value for part, value in found.items() if part != "step")
    found["all-reduce"] = all_reduce(numbers)
    if dist.get_rank() == 0:
        output.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
