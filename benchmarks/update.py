"""Score and update of one group on SmolLM2-135M: its prompt packed once, against padded rows and TRL's logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import OURS, Case, Goal
from benchmarks.prompts import prompts

SUMMARY = (
    "Old log-probabilities and entropies of a group of 8 completions, then loss and gradient, on SmolLM2-135M. "
    "*uncollapse* does what our trainer does where a rollout is one micro-batch: one packed pass gives the old "
    "statistics and the gradient. *scored before* takes them from a packed pass of their own, as every later update "
    "of a rollout has to. *padded rows* is the same in two passes with sharing off: our fused LM head on 8 rows of prompt and "
    "completion. *TRL logits* is TRL's way for both passes: the logits of all completion positions, "
    "`selective_log_softmax` and `entropy_from_logits`; *all logits* takes the logits of the prompt as well, as a plain "
    "call of a causal model does."
)
GROUP = 8
SIZES = {"P100 T24": (100, 24), "P40 T20": (40, 20), "P60 T64": (60, 64)}
AT_LEAST = {"P100 T24": 3.9, "P40 T20": 2.1, "P60 T64": 1.4}
BEFORE, PADDED, TRL, ALL = "scored before", "padded rows", "TRL logits", "all logits"


Measure = Callable[[], tuple[Tensor, Tensor]]


class Problem:
    """One group with random completions, as in a run that is far from its end: no completion is short."""

    def __init__(self, prompt_tokens: int, completion_tokens: int) -> None:
        from uncollapse.integrations.scorer import Scorer
        from uncollapse.models import load

        self.model, tokenizer = load("smollm2-135m")
        ids = tokenizer(prompts(tokenizer, prompt_tokens, 1), return_tensors="pt")["input_ids"]
        shape = (GROUP, completion_tokens)
        drawn = torch.randint(0, len(tokenizer), shape, generator=torch.Generator().manual_seed(0))
        self.inputs = {
            "prompt_ids": ids.repeat(GROUP, 1), "prompt_mask": torch.ones(GROUP, prompt_tokens, dtype=torch.long),
            "completion_ids": drawn, "completion_mask": torch.ones(shape, dtype=torch.long),
        }  # fmt: skip
        self.advantage = torch.linspace(-1, 1, GROUP)[:, None]
        # The padded path goes first: packing changes where the model's attention is looked up.
        self.padded = Scorer(self.model, temperature=1.0, share_prompts=False)
        other = copy.deepcopy(self.model)
        del other.forward
        self.other = other
        self.packed = Scorer(other, temperature=1.0, share_prompts=True)

    def fused(self, model: Any, scorer: Any) -> Measure:
        from uncollapse.policy.stats import Entropy, Logp

        stats = [Logp("now"), Entropy("now")]
        counted = self.inputs["completion_mask"].bool()

        def measure() -> tuple[Tensor, Tensor]:
            found = scorer(model, self.inputs, counted, stats)
            return found[stats[0]], found[stats[1]]

        return measure

    def logits(self, keep: int) -> Measure:
        """The last `keep` positions' logits (0 for all), then TRL's functions on those of the completions."""
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

        joined = torch.cat([self.inputs["prompt_ids"], self.inputs["completion_ids"]], dim=1)
        attention = torch.cat([self.inputs["prompt_mask"], self.inputs["completion_mask"]], dim=1)
        token = self.inputs["completion_ids"]

        def measure() -> tuple[Tensor, Tensor]:
            output = self.model(
                input_ids=joined, attention_mask=attention, logits_to_keep=keep, use_cache=False
            )
            logits = output.logits[:, -token.shape[1] - 1 : -1]
            with torch.no_grad():
                entropy = entropy_from_logits(logits)
            return selective_log_softmax(logits, token), entropy

        return measure

    def one_pass(self, model: Any, measure: Measure) -> dict[str, Any]:
        model.zero_grad(set_to_none=True)
        now, entropy = measure()
        return self._updated(model, now, now.detach(), entropy)

    def two_passes(self, model: Any, measure: Measure) -> dict[str, Any]:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            old, entropy = measure()
        now, _ = measure()
        return self._updated(model, now, old, entropy)

    def _updated(self, model: Any, now: Tensor, old: Tensor, entropy: Tensor) -> dict[str, Any]:
        ratio = (now - old).exp()
        loss = -torch.min(ratio * self.advantage, ratio.clamp(0.8, 1.2) * self.advantage).mean()
        loss.backward()
        gradient = model.get_input_embeddings().weight.grad
        return {"logp": old, "entropy": entropy.detach(), "gradient": gradient}

    def contestants(self) -> dict[str, Callable[[], Any]]:
        packed, padded = self.fused(self.other, self.packed), self.fused(self.model, self.padded)
        some, every = self.logits(self.inputs["completion_ids"].shape[1] + 1), self.logits(0)
        return {
            OURS: lambda: self.one_pass(self.other, packed),
            BEFORE: lambda: self.two_passes(self.other, packed),
            PADDED: lambda: self.two_passes(self.model, padded),
            TRL: lambda: self.two_passes(self.model, some),
            ALL: lambda: self.two_passes(self.model, every),
        }


def difference(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    worst = 0.0
    for name, value in theirs.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-3 * scale, msg=name)
        worst = max(worst, (mine[name] - value).abs().max().item() / scale)
    return worst


def case(size: str) -> Case:
    """The group of one size."""
    prompt_tokens, completion_tokens = SIZES[size]
    problem = Problem(prompt_tokens, completion_tokens)
    contestants = problem.contestants()

    def check() -> dict[str, float]:
        mine = {name: value.clone() for name, value in contestants[OURS]().items()}
        return {name: difference(mine, contestants[name]()) for name in (BEFORE, PADDED, TRL, ALL)}

    least = AT_LEAST[size]
    return Case(
        size=f"G={GROUP}, P={prompt_tokens}, T={completion_tokens}, float32",
        contestants=contestants,
        check=check,
        versions=("torch", "trl", "transformers"),
        goals=(
            Goal("time of a plain call over ours", lambda rows: rows[ALL]["time_over_ours"], least, True),
            Goal("time of padded rows over ours", lambda rows: rows[PADDED]["time_over_ours"], least, True),
            Goal(
                "our extra peak memory over that of TRL's way",
                lambda rows: rows[OURS]["extra_peak_mb"] / rows[TRL]["extra_peak_mb"],
                1.0,
                False,
            ),
        ),
    )
