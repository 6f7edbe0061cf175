"""Trains two steps with scripted completions and saves losses and weights; run by `test_processes.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import toy
from test_trl import scripted

from uncollapse.integrations.trl import GRPOTrainer

output, name, processes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
trainer = GRPOTrainer(
    toy.llama(),
    toy.digit_share,
    toy.config(
        output, per_device_train_batch_size=8 // processes, gradient_accumulation_steps=2,
        max_grad_norm=0.0, optim="sgd", learning_rate=0.5, ddp_find_unused_parameters=False,
    ),
    train_dataset=toy.prompts(),
    processing_class=toy.tokenizer(),
    rollout_func=scripted,
    recipe=name,
)  # fmt: skip
trainer.train()
if trainer.accelerator.is_main_process:
    losses = [row["loss/surrogate"] for row in trainer.state.log_history if "loss/surrogate" in row]
    weights = {k: v for k, v in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()}
    torch.save({"losses": losses, "weights": weights}, output / "result.pt")
