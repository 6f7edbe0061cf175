"""A ladder of small causal language models on real text, and the metrics of collapse of each rung.

Llama models with tied embeddings of several widths and depths, trained from scratch for several lengths on sources of the
standard library under a byte-pair vocabulary larger than the widths. The learning rate was chosen among 0.001, 0.003
and 0.01 by the held-out loss of width 64, depth 2, 300 steps, with seeds that the study does not use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from uncollapse.errors import MissingExtra
from uncollapse.representation.linguistic_collapse import NC4Accumulator, StreamingNC, collect_lm_features
from uncollapse.studies.testbeds.text import source_bytes

VOCABULARY = 512
LEARNING_RATE = 0.003
_PIECE = 100_000
"""Characters that the tokenizer takes at once."""


@dataclass(frozen=True)
class Ladder:
    """Sizes of the models and of the text; lengths are in steps of `rows` windows of `time` tokens."""

    widths: tuple[int, ...] = (32, 64, 128)
    depths: tuple[int, ...] = (1, 2, 4)
    lengths: tuple[int, ...] = (100, 300, 1000)
    rows: int = 8
    time: int = 128
    train_bytes: int = 2_000_000
    held_out_bytes: int = 300_000
    held_out_windows: int = 256
    siblings: int = 16
    """Runs of one size that differ in the seed alone: the middle width and depth, the shortest length."""

    @property
    def rungs(self) -> list[tuple[int, int, int, int]]:
        """Width, depth, length and seed of every run of the ladder; each has a seed of its own."""
        sizes = product(self.widths, self.depths, self.lengths)
        return [(width, depth, length, seed) for seed, (width, depth, length) in enumerate(sizes)]

    @property
    def equals(self) -> list[tuple[int, int, int, int]]:
        """The siblings, with seeds from 100 on."""
        middle = self.widths[len(self.widths) // 2], self.depths[len(self.depths) // 2], self.lengths[0]
        return [(*middle, 100 + seed) for seed in range(self.siblings)]


@dataclass(frozen=True)
class Windows:
    """Token ids of the text in windows; the held-out ones are of other modules."""

    train: Int[Tensor, "window time"]
    held_out: Int[Tensor, "held_out time"]


@lru_cache(maxsize=2)
def windows(ladder: Ladder) -> Windows:
    """The text under byte pairs that were learnt on its training part.

    Raises:
        MissingExtra: tokenizers is not installed.
    """
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError as error:
        raise MissingExtra("tokenizers", "rl") from error
    train, held_out = (
        bytes(part.to(torch.uint8).tolist()).decode(errors="replace")
        for part in source_bytes(ladder.train_bytes, ladder.held_out_bytes)
    )
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(_pieces(train), vocab_size=VOCABULARY, show_progress=False)

    def cut(text: str) -> Tensor:
        ids = torch.tensor([i for piece in _pieces(text) for i in tokenizer.encode(piece).ids])
        return ids[: len(ids) // ladder.time * ladder.time].view(-1, ladder.time)

    return Windows(cut(train), cut(held_out)[: ladder.held_out_windows])


def _pieces(text: str) -> list[str]:
    return [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]


def train(
    ladder: Ladder, width: int, depth: int, length: int, seed: int, *, rate: float = LEARNING_RATE
) -> Any:
    """A model after `length` steps of AdamW: warm-up over a tenth, then linearly to 0; windows in an order of the seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // 16),
        max_position_embeddings=ladder.time,
        tie_word_embeddings=True,
    )
    data = windows(ladder).train
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    warm = max(1, length // 10)
    for step in range(length):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warm, (length - step) / (length - warm + 1))
        at = torch.arange(step * ladder.rows, (step + 1) * ladder.rows) % len(order)
        ids = data[order[at]]
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def rung(ladder: Ladder, width: int, depth: int, length: int, seed: int) -> dict[str, float]:
    """Train one model; its held-out loss (nats a token), metrics on text it was trained on, NC4 on text it was not.

    `shuffled/...` are the same metrics with the tokens handed to the positions at random: what the numbers of features and
    of samples make of them by themselves.
    """
    model = train(ladder, width, depth, length, seed)
    text = windows(ladder)
    weight = model.get_output_embeddings().weight.detach()
    order = torch.randperm(len(text.train), generator=torch.Generator().manual_seed(seed))
    seen = text.train[order[: min(ladder.lengths) * ladder.rows]]
    real, shuffled = StreamingNC(*weight.shape), StreamingNC(*weight.shape)
    generator = torch.Generator().manual_seed(seed)
    for h, y in collect_lm_features(model, _batches(seen)):
        real.update(h, y)
        shuffled.update(h, y[torch.randperm(len(y), generator=generator)])
    found = _named(real, weight, model, text.held_out)
    control = _named(shuffled, weight, model, text.held_out)
    kept = {f"shuffled/{name}": control[name] for name in CONTROLLED}
    return found | kept | {"loss": held_out_loss(model, text.held_out)}


COMPARED = (
    "ln_cdnv",
    "ln_cdnv_p2",
    "ln_ratio_unbiased",
    "nc2/log_norm/cov",
    "nc2/interference/cov",
    "gnc2/log_kernel/cov",
    "nc3/cosine/mean",
    "unc3/cosine/cov",
    "nc4",
)
"""Metrics whose rank correlation with the loss is reported."""

CONTROLLED = ("ln_cdnv", "gnc2/log_kernel/cov", "nc3/cosine/mean", "unc3/cosine/cov", "nc4")
"""Those that are also computed with shuffled tokens."""


def _named(statistics: StreamingNC, weight: Tensor, model: Any, held_out: Tensor) -> dict[str, float]:
    report = statistics.compute(weight)
    squared = statistics.compute(cdnv_power=2)["nc1/cdnv/mean"]
    unbiased = report["nc1/ratio/unbiased"]
    agreement = NC4Accumulator(statistics.mean, statistics.count, weight)
    for h, y in collect_lm_features(model, _batches(held_out)):
        agreement.update(h, y)
    decided = agreement.compute()
    return report.values | {
        "ln_cdnv": math.log(report["nc1/cdnv/mean"]),
        "ln_cdnv_p2": math.log(squared),
        "ln_ratio_unbiased": math.log(unbiased) if unbiased > 0 else math.nan,
        "nc4": decided.full_head,
        "accuracy": decided.head_accuracy,
        "classes": float(report.classes),
    }


@torch.no_grad()
def held_out_loss(model: Any, held_out: Int[Tensor, "window time"]) -> float:
    """Mean cross-entropy of the next token, in nats."""
    total = sum(float(model(input_ids=ids, labels=ids).loss) * len(ids) for ids in _batches(held_out))
    return total / len(held_out)


def _batches(data: Tensor) -> Iterator[Tensor]:
    return iter(data.split(32))
