"""Trainers on SmolLM2-135M that take the same steps on the same prompts, for benchmarks."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from benchmarks.prompts import prompts


def reward(completions: list[str], **columns: Any) -> list[float]:
    """A number of the text: rarely equal within a group, never expensive."""
    return [float(sum(map(ord, text)) % 11) for text in completions]


def settings(completion_tokens: int, **changes: Any) -> Any:
    """Every completion has exactly so many tokens, so that all contestants do the same work."""
    from trl import GRPOConfig

    fixed = {
        "output_dir": tempfile.mkdtemp(), "max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 8,
        "max_completion_length": completion_tokens, "generation_kwargs": {"min_new_tokens": completion_tokens},
        "learning_rate": 1e-6, "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True, "bf16": False,
        "disable_tqdm": True, "gradient_checkpointing": False, "save_strategy": "no", "seed": 0, "logging_steps": 1,
    }  # fmt: skip
    return GRPOConfig(**(fixed | changes))


def trainer(make: Any, prompt_tokens: int, args: Any, model: Any = None, **options: Any) -> Any:
    """A trainer of class `make` on prompts of exactly `prompt_tokens` tokens."""
    from datasets import Dataset
    from transformers import PrinterCallback

    from uncollapse.models import load

    tokenizer = _tokenizer()
    rows = Dataset.from_list([{"prompt": text} for text in prompts(tokenizer, prompt_tokens, 16)])
    built = make(
        model or load("smollm2-135m")[0],
        reward_funcs=reward,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        **options,
    )
    built.remove_callback(PrinterCallback)
    return built


@lru_cache
def _tokenizer() -> Any:
    from uncollapse.models import load

    return load("smollm2-135m")[1]


def steps(built: Any) -> Callable[[], Any]:
    """What is timed: `max_steps` steps from the start, quietly."""

    def run() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return built.train()

    return run
