"""Attention entropy of every head of SmolLM2-135M during a forward pass, against asking for all attention matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import OURS, Case, Goal

SUMMARY = (
    "Entropy, peak and sink mass of all 270 attention heads of SmolLM2-135M while it reads 512 tokens (float32, logits included), by "
    "`uncollapse.watch`, with eager and with SDPA attention. *all matrices* is what transformers offers: `output_attentions=True`, "
    "then the entropy of what comes back."
)
LENGTH = 512
PLAIN, PLAIN_SDPA, OURS_SDPA, MATRICES = "eager, plain", "sdpa, plain", "uncollapse, sdpa", "all matrices"
ONE_LAYER_MB = 9 * LENGTH * LENGTH * 4 / 1e6


def case() -> Case:
    """One model, whose attention is switched between calls."""
    from uncollapse.inspection.attention import attention_statistics, head_table
    from uncollapse.models import load

    model, _ = load("smollm2-135m")
    ids = torch.randint(0, model.config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def forward(kernel: str) -> Any:
        model.set_attn_implementation(kernel)
        return model(input_ids=ids, use_cache=False)

    def watched(kernel: str) -> torch.Tensor:
        with attention_statistics(model) as tally:
            forward(kernel)
        return head_table(tally.layers)["entropy"]

    @torch.no_grad()
    def matrices() -> torch.Tensor:
        model.set_attn_implementation("eager")
        shown = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
        return torch.stack([torch.special.entr(one).sum(-1).mean(dim=(0, 2)) for one in shown])

    def check() -> dict[str, float]:
        expected = matrices().double()
        found = {OURS: watched("eager"), OURS_SDPA: watched("sdpa")}
        gaps = {name: float((value - expected).abs().max()) for name, value in found.items()}
        if max(gaps.values()) > 1e-4:
            raise RuntimeError(f"entropies differ by {gaps}")
        return gaps

    contestants: dict[str, Callable[[], Any]] = {
        PLAIN: lambda: forward("eager"),
        OURS: lambda: watched("eager"),
        PLAIN_SDPA: lambda: forward("sdpa"),
        OURS_SDPA: lambda: watched("sdpa"),
        MATRICES: matrices,
    }
    return Case(
        size=f"1 x {LENGTH} tokens, 30 layers of 9 heads",
        contestants=contestants,
        check=check,
        warm_up=contestants,
        baseline=PLAIN,
        versions=("torch", "transformers"),
        goals=(
            Goal(
                "time with eager attention over a plain forward pass",
                lambda r: r[OURS]["time_over_ours"],
                1.1,
                False,
            ),
            Goal(
                "time with SDPA over a plain pass with eager",
                lambda r: r[OURS_SDPA]["time_over_ours"],
                1.1,
                False,
            ),
            Goal(
                "extra peak memory over the plain pass (MB; all matrices are 283)",
                lambda r: r[OURS]["extra_peak_mb"] - r[PLAIN]["extra_peak_mb"],
                2 * ONE_LAYER_MB,
                False,
            ),
        ),
    )
