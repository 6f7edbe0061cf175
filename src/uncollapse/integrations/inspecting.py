"""Run a Hugging Face model over text and look at it: tokens in rows of equal length, or labelled texts one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from uncollapse.errors import ConfigError, DataError
from uncollapse.inspection import Inspection, watch
from uncollapse.integrations.evaluation import evaluating

Progress = Callable[[int, int], None]
"""Called with tokens or texts done and in total, over all passes."""


@torch.no_grad()
def inspect_text(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    tokens: int = 8192,
    length: int = 256,
    batch: int = 4,
    weights: bool = True,
    progress: Progress | None = None,
) -> Inspection:
    """Watch a model read `tokens` tokens of the texts, joined and cut into rows of `length`; no padding.

    Classes are the next tokens of a causal language model; any other model has none here.

    Raises:
        ConfigError: a number below its least.
        DataError: the texts have fewer tokens than one row.
    """
    if length < 2 or batch < 1 or tokens < length:
        raise ConfigError(
            f"inspect: needs length >= 2, batch >= 1 and tokens >= length; got {length}, {batch}, {tokens}"
        )
    rows = _rows(tokenizer, texts, tokens, length)
    with evaluating(model), watch(model) as seen:
        for start in range(0, len(rows), batch):
            model(input_ids=rows[start : start + batch].to(_device(model)), use_cache=False)
            if progress is not None:
                progress(min(start + batch, len(rows)) * length, rows.numel())
    return seen.result(weights=weights)


@torch.no_grad()
def inspect_labelled(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    length: int = 256,
    batch: int = 8,
    weights: bool = True,
    progress: Progress | None = None,
) -> Inspection:
    """Watch a text classifier read labelled texts, cut to `length` tokens and padded within a batch, and once more for NC4.

    Raises:
        DataError: no texts, or not one label for each.
    """
    if not texts or len(texts) != len(labels):
        raise DataError(
            f"inspect: {len(texts)} texts and {len(labels)} labels; a classifier needs one label a text"
        )
    classes = torch.empty(0, dtype=torch.long)
    passes = 2  # NC4 needs the class means

    def read(before: int) -> None:
        nonlocal classes
        for start in range(0, len(texts), batch):
            some, classes = list(texts[start : start + batch]), torch.tensor(labels[start : start + batch])
            inputs = tokenizer(some, return_tensors="pt", padding=True, truncation=True, max_length=length)
            model(**inputs.to(_device(model)))
            if progress is not None:
                progress(before + start + len(some), passes * len(texts))

    with evaluating(model):
        with watch(model, classes=lambda: classes) as seen:
            read(0)
        with seen.deciding():
            read(len(texts))
    return seen.result(weights=weights)


def _rows(tokenizer: Any, texts: Sequence[str], tokens: int, length: int) -> Int[Tensor, "row token"]:
    ids: list[int] = []
    for text in texts:
        if len(ids) >= tokens:
            break
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(tokens, len(ids)) // length
    if not count:
        raise DataError(
            f"inspect: the text has {len(ids)} tokens, one row takes {length}; give more text or a smaller length"
        )
    return torch.tensor(ids[: count * length]).reshape(count, length)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
