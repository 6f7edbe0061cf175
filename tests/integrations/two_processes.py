"""Trains two steps of each recipe with scripted completions and saves losses and weights; run by `test_processes.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import toy

from uncollapse.integrations.trl import GRPOTrainer
from uncollapse.policy.registry import recipe
from uncollapse.policy.stages.samplers import DynamicSampler


def train(folder: Path, name: str, processes: int) -> dict | None:
    """Losses, what was sampled and weights, on the main process."""
    dynamic = isinstance(recipe(name).sampler, DynamicSampler)
    trainer = toy.scripted(GRPOTrainer(
        toy.llama(),
        toy.odd_prompts_are_dead if dynamic else toy.digit_share,
        toy.config(
            folder, per_device_train_batch_size=8 // processes, gradient_accumulation_steps=2,
            max_grad_norm=0.0, optim="sgd", learning_rate=0.5, ddp_find_unused_parameters=False,
        ),
        train_dataset=toy.prompts(),
        processing_class=toy.tokenizer(),
        recipe=name,
    ))  # fmt: skip
    trainer.train()
    if not trainer.accelerator.is_main_process:
        return None
    rows = [row for row in trainer.state.log_history if "loss/surrogate" in row]
    return {
        "losses": [row["loss/surrogate"] for row in rows],
        "rewards": [row["reward/mean"] for row in rows],
        "oversampling": [row.get("sampler/oversampling", 1.0) for row in rows],
        "weights": dict(trainer.accelerator.unwrap_model(trainer.model).state_dict()),
    }


if __name__ == "__main__":
    output, processes, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    found = {name: train(output / name, name, processes) for name in names}
    if found[names[0]] is not None:
        torch.save(found, output / "result.pt")
