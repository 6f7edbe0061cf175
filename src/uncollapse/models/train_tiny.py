"""Make `tiny`: train a character-level causal LM of 1.6 million parameters on our own three tasks.

    python -m uncollapse.models.train_tiny --output DIR

Supervised training on demonstrations that the tasks draw themselves, in two parts. The first teaches: every
demonstration is right. The second roughens: demonstrations are as often wrong as those of a base model should
be, so that reinforcement learning has room and the policy starts with the entropy of the demonstrations. Deterministic for one seed, one thread and one machine.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uncollapse.models.characters import character_tokenizer
from uncollapse.tasks import countdown, modsum, running_maximum
from uncollapse.tasks.task import GeneratedTask

IGNORED = -100
MODSUM, MAXIMUM, COUNTDOWN = modsum.modsum(), running_maximum.running_maximum(), countdown.countdown()
SHARES = {"modsum": 0.3, "running-maximum": 0.4, "countdown": 0.3}
"""Share of the batches that each task has."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the weights depend on.

    Args:
        seed: of the initial weights and of the demonstrations.
        learn_steps, roughen_steps: optimiser steps of the two parts.
        batch: rows a step, all of one task.
        learning_rate: AdamW's highest.
        modsum_right: probability that a digit follows its rule while roughening.
        maximum_wrong: probability of a wrong partial maximum while roughening.
        countdown_right: probability of a right expression while roughening.
        hidden, layers, heads: size of the model.
    """

    seed: int = 0
    learn_steps: int = 500
    roughen_steps: int = 120
    batch: int = 64
    learning_rate: float = 2e-3
    modsum_right: float = 0.6
    maximum_wrong: float = 0.08
    countdown_right: float = 0.8
    hidden: int = 256
    layers: int = 2
    heads: int = 8


def new_model(settings: Settings, vocabulary: int) -> Any:
    """A Llama of the size of the settings, tied embeddings, initialised from the seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=settings.hidden,
            intermediate_size=settings.hidden * 8 // 3,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def demonstrations(
    draw: random.Random, settings: Settings, *, rough: bool
) -> tuple[str, list[str], list[str]]:
    """One batch: name of its task, prompts, completions. All rows are about as long, so little is padded."""
    name = draw.choices(list(SHARES), list(SHARES.values()))[0]
    length, checks = draw.randint(2, 7), draw.randint(0, 3)
    maximum = running_maximum.running_maximum(min_digits=length, max_digits=length)
    prompts, completions = [], []
    for _ in range(settings.batch):
        if name == "modsum":
            row = MODSUM.draw(draw)
            text = modsum.demonstration(draw, row, right=settings.modsum_right if rough else 1.0)
        elif name == "running-maximum":
            row = maximum.draw(draw)
            wrong = settings.maximum_wrong if rough else 0.0
            text = running_maximum.demonstration(draw, row, wrong=wrong, checks=checks)
        else:
            row = COUNTDOWN.draw(draw)
            text = countdown.demonstration(draw, row, right=settings.countdown_right if rough else 1.0)
        prompts.append(row["prompt"])
        completions.append(text)
    return name, prompts, completions


def encode(tokenizer: Any, prompts: list[str], completions: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids (row time) padded on the right, and targets that ignore the prompt and the padding."""
    ids = [tokenizer.encode(p) for p in prompts]
    rows = [p + tokenizer.encode(c) + [tokenizer.eos_token_id] for p, c in zip(ids, completions, strict=True)]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    targets = torch.tensor(
        [
            [IGNORED] * len(p) + row[len(p) :] + [IGNORED] * (longest - len(row))
            for p, row in zip(ids, rows, strict=True)
        ]
    )
    return tokens, targets


def train(settings: Settings, log: Callable[[str], None]) -> tuple[Any, Any]:
    """The trained model and its tokenizer; `log` gets one line of JSON every 50 steps."""
    tokenizer = character_tokenizer()
    model = new_model(settings, len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    steps = settings.learn_steps + settings.roughen_steps
    draw, started = random.Random(settings.seed), time.monotonic()
    losses: dict[str, list[float]] = {task: [] for task in SHARES}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(settings, step, steps)
        name, *texts = demonstrations(draw, settings, rough=step >= settings.learn_steps)
        tokens, targets = encode(tokenizer, *texts)
        logits = model(input_ids=tokens).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses[name].append(loss.detach().item())
        if (step + 1) % 50 == 0:
            line = {task: round(sum(values) / len(values), 4) for task, values in losses.items() if values}
            line = {"step": step + 1, "seconds": round(time.monotonic() - started, 1), **line}
            log(json.dumps(line))
            losses = {task: [] for task in SHARES}
    return model.eval(), tokenizer


def _learning_rate(settings: Settings, step: int, steps: int) -> float:
    """Linear warm-up over 50 steps, then a cosine down to a tenth."""
    warm = min(1.0, (step + 1) / 50)
    return settings.learning_rate * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))


@torch.no_grad()
def measure(
    model: Any, tokenizer: Any, task: GeneratedTask, *, prompts: int = 64, group: int = 16
) -> dict[str, float]:
    """What sampling at temperature 1 gives on fresh rows of a task.

    Returns:
        accuracy (mean reward), pass@8 (unbiased), entropy (mean Shannon entropy of the sampled positions,
        nats a token, end of sequence included), length (tokens, end of sequence included).
    """
    rows = task.rows(prompts, split="test", seed=1)
    scores, entropy, tokens = [], 0.0, 0
    for row in rows:
        ids = torch.tensor([tokenizer.encode(row["prompt"])] * group)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=48,
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        written = out.sequences[:, ids.shape[1] :]
        logp = torch.stack(out.logits, 1).float().log_softmax(-1)
        ended = (written == tokenizer.eos_token_id).cumsum(1)
        live = (ended - (written == tokenizer.eos_token_id).long()) == 0
        entropy += float(((-(logp.exp() * logp).sum(-1)) * live).sum())
        tokens += int(live.sum())
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        columns = {column: [row[column]] * group for column in task.columns}
        scores.append(sum(float(s or 0.0) for s in task.reward([row["prompt"]] * group, texts, **columns)))
    misses = [math.comb(group - int(s), 8) / math.comb(group, 8) for s in scores]
    return {
        "accuracy": sum(scores) / (prompts * group),
        "pass@8": 1 - sum(misses) / prompts,
        "entropy": entropy / tokens,
        "length": tokens / (prompts * group),
    }


def main() -> None:
    """Train, measure and save."""
    parser = argparse.ArgumentParser(description="Train the packaged model 'tiny' from scratch.")
    parser.add_argument(
        "--output", type=Path, required=True, help="directory for weights, config and tokenizer"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learn-steps", type=int, default=Settings.learn_steps)
    parser.add_argument("--roughen-steps", type=int, default=Settings.roughen_steps)
    parser.add_argument("--batch", type=int, default=Settings.batch)
    options = parser.parse_args()
    settings = Settings(**{k: v for k, v in vars(options).items() if k != "output"})
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()
    model, tokenizer = train(settings, lambda line: print(line, file=sys.stderr, flush=True))
    minutes = (time.monotonic() - started) / 60
    model = model.half().float()  # measure what is saved
    torch.manual_seed(settings.seed)
    table = {task.name: measure(model, tokenizer, task) for task in (MODSUM, MAXIMUM, COUNTDOWN)}
    model.half().save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    facts = {"parameters": model.num_parameters(), "minutes": round(minutes, 1), "settings": asdict(settings)}
    report = json.dumps({**facts, "measured": table}, indent=2)
    (options.output / "training.json").write_text(report + "\n", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
