"""SmolLM2-135M on sources of the standard library: metrics at a vocabulary of 49,152, with a permuted head as control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from uncollapse.errors import UncollapseError
from uncollapse.representation.linguistic_collapse import (
    NC4Accumulator,
    StreamingNC,
    collect_lm_features,
    uniform_log_kernel,
)
from uncollapse.studies.testbeds.text import source_bytes

MODEL = "smollm2-135m"
TIME = 256
"""Tokens of a window."""

_CHARACTERS_PER_TOKEN = 8
"""More than there are; the text is cut to the tokens that are wanted."""


def real_model(parts: int, windows: int, held_out: int, *, model: str = MODEL) -> dict[str, Any]:
    """Metrics on `parts` disjoint stretches of text, `windows` windows each, and on all together; NC4 on other modules.

    `permuted/...`: the rows of the head handed to other classes at random. `note` says why there is nothing to report
    where the weights are not installed.
    """
    from uncollapse.models import load

    try:
        network, tokenizer = load(model)
    except UncollapseError as error:
        return {"note": f"not measured: {error}"}
    weight = network.get_output_embeddings().weight.detach()
    permuted = weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))]
    size = parts * TIME * _CHARACTERS_PER_TOKEN
    texts, others = (
        _stretches(tokenizer, data, parts, count)
        for data, count in zip(
            source_bytes(size * windows, size * held_out), (windows, held_out), strict=True
        )
    )
    every = StreamingNC(*weight.shape)
    unseen: list[tuple[Tensor, Tensor]] = []
    found = []
    for text, other in zip(texts, others, strict=True):
        part = StreamingNC(*weight.shape)
        for h, y in collect_lm_features(network, text.split(4)):
            part.update(h, y)
        features = list(collect_lm_features(network, other.split(4)))
        found.append(_described(part, weight, permuted, features))
        every.merge(part)
        unseen += features
    return {"note": "", "parts": found, "all": _described(every, weight, permuted, unseen)}


def _stretches(tokenizer: Any, data: Tensor, parts: int, windows: int) -> list[Tensor]:
    """Windows of token ids from the start of each of `parts` equal stretches of the bytes."""
    pieces = data.to(torch.uint8).view(parts, -1)
    texts = [bytes(piece.tolist()).decode(errors="replace") for piece in pieces]
    return [torch.tensor(tokenizer(text)["input_ids"])[: windows * TIME].view(-1, TIME) for text in texts]


def _described(
    statistics: StreamingNC, weight: Tensor, permuted: Tensor, held_out: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    report, control = statistics.compute(weight), statistics.compute(permuted, pairs=1000)
    decided, lost = (NC4Accumulator(statistics.mean, statistics.count, head) for head in (weight, permuted))
    for h, y in held_out:
        decided.update(h, y)
        lost.update(h, y)
    nc4 = decided.compute()
    return report.values | {
        "classes": report.classes,
        "singletons": report.singletons,
        "samples": report.samples,
        "held_out": nc4.samples,
        "twice/cdnv": statistics.compute(n_min=2)["nc1/cdnv/mean"],
        "above_uniform": report["gnc2/log_kernel/mean"] - uniform_log_kernel(statistics.dim),
        "nc4/full": nc4.full_head,
        "nc4/seen": nc4.seen_head,
        "accuracy": nc4.head_accuracy,
        "accuracy/centres": nc4.centre_accuracy,
        "permuted/cosine": control["nc3/cosine/mean"],
        "permuted/nc4": lost.compute().full_head,
    }
