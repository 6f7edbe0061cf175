"""Trains a model whose parameters accelerate shards; run by `test_launchers.py` in one process and, sharded, in two."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))
import toy

from uncollapse.integrations.trl import GRPOTrainer


def shard_on_a_cpu() -> None:
    """Let accelerate shard on a CPU: it does so on accelerators only, though all that it calls runs on gloo."""
    begin = PartialState.__init__

    def initialise(self: PartialState, cpu: bool = False, **options: Any) -> None:
        begin(self, cpu, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = initialise


def trainer(folder: Path, processes: int, *, tied: bool, recipe: str, **options: Any) -> GRPOTrainer:
    settings = {
        "per_device_train_batch_size": 8 // processes, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0,
        "optim": "sgd", "learning_rate": 0.5, "max_steps": 3,
    }  # fmt: skip
    return GRPOTrainer(
        toy.llama(tied=tied), toy.digit_share, toy.config(folder, **(settings | options)),
        train_dataset=toy.prompts(), processing_class=toy.tokenizer(), recipe=recipe,
    )  # fmt: skip


def compared(folder: Path, processes: int, tied: bool, recipe: str) -> dict[str, Any]:
    """Losses and weights of a scripted run."""
    made = toy.scripted(trainer(folder, processes, tied=tied, recipe=recipe))
    made.train()
    # Every process holds a part of the weights; gathering them is the work of all.
    weights = made.accelerator.get_state_dict(made.model)
    return {
        "losses": [row["loss/surrogate"] for row in made.state.log_history if "loss/surrogate" in row],
        "weights": {name: value.clone() for name, value in weights.items()},
        "sharded": any(isinstance(parameter, DTensor) for parameter in made.model.parameters()),
    }


def sampled(folder: Path, processes: int) -> dict[str, Any]:
    """Losses of a run that samples for itself, is saved, and goes on in another trainer."""
    options = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3}
    first = trainer(folder, processes, tied=True, recipe="grpo", max_steps=2, **options)
    first.train()
    second = trainer(folder, processes, tied=True, recipe="grpo", max_steps=4, **options)
    second.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return {"entropy": [row["entropy/token/mean"] for row in second.state.log_history if "loss" in row]}


if __name__ == "__main__":
    output, processes = Path(sys.argv[1]), int(sys.argv[2])
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_a_cpu()
    found = {
        f"{recipe}, {'tied' if tied else 'untied'}": compared(
            output / f"{recipe}-{tied}", processes, tied, recipe
        )
        for recipe, tied in (("grpo", False), ("clip-cov", True), ("dapo", True))
    }
    found["sampled"] = sampled(output / "sampled", processes)
    if PartialState().is_main_process:
        torch.save(found, output / "result.pt")
