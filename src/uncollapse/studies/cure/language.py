"""CURE's sampler on a language model: what it cuts, and what comes of branching there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from uncollapse.errors import MissingExtra
from uncollapse.measure.entropy import shannon_entropy_from_logits
from uncollapse.models import MissingWeights, load
from uncollapse.policy.cure import CureSampler, ModelWriter, RolloutGroup, critical_tokens
from uncollapse.policy.cure.positions import Rows
from uncollapse.tasks.gym import gym_task

BRANCHES = 3
ORIGINALS = 2
SHARE = 10
"""One in so many tokens of an answer is a candidate. The paper's 20 are about one in fifty; answers here are short."""
BRANCH_TOKENS = 4
MODELS = "SmolLM2-135M-Instruct on chain_sum of reasoning-gym, temperature 1"


@dataclass
class Writer(ModelWriter):
    """The first call writes `max_new_tokens` tokens per prompt, later ones `BRANCH_TOKENS`.

    `variety` keeps, for the responses of the last `entropy`, the expected number of different tokens among `BRANCHES`
    draws at each position.
    """

    variety: Tensor = field(default_factory=lambda: torch.zeros(0, 0), init=False, repr=False)

    def generate(self, prompts: Rows) -> list[list[int]]:
        """One sampled continuation per prompt, its end of text included."""
        written = super().generate(prompts)
        self.max_new_tokens = BRANCH_TOKENS
        return written

    def entropy(self, prompts: Rows, responses: Rows) -> Float[Tensor, "row time"]:
        """Entropy (nats) of the distribution that each token was drawn from."""
        longest = max(map(len, responses))
        entropy = torch.zeros(len(responses), longest)
        self.variety = torch.zeros(len(responses), longest)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            logp = self.logp(prompt, response)
            entropy[row, : len(response)] = shannon_entropy_from_logits(logp)
            self.variety[row, : len(response)] = (1 - (1 - logp.exp()) ** BRANCHES).sum(-1)
        return entropy


def token_table(tokenizer: Any, size: int, shortest: int) -> Bool[Tensor, " vocab"]:
    """`critical_tokens` of a tokenizer, for a vocabulary of `size`."""
    decoded = [tokenizer.decode([token]) for token in range(size)]
    return critical_tokens(decoded, tokenizer.all_special_ids, shortest)


def branch_a_model(
    name: str, prompts: int, tokens: int, seed: int = 0, *, shortest: int = 2
) -> dict[str, Any]:
    """Branch answers of a model at critical and at random positions of the same answers.

    Per prompt, means over its originals: entropy of the answer and at the critical and the random position; different
    first tokens among the branches, sampled and expected. `broken` counts branches that do not continue prompt and
    prefix, `short` critical tokens that the table excludes: both have to be 0. `shortest` as in `critical_tokens`. Empty
    where the model is not there.
    """
    try:
        model, tokenizer = load(name)
        rows = gym_task("chain_sum").rows(prompts, split="test", seed=seed, style="chat")
    except (MissingExtra, MissingWeights) as error:
        return {"missing": str(error), "prompts": []}
    asked = [_encoded(tokenizer, row["prompt"]) for row in rows]
    table = token_table(tokenizer, model.config.vocab_size, shortest)
    found: list[dict[str, float]] = [{} for _ in asked]
    counts = {"broken": 0, "short": 0, "rows": 0}
    for mode, label in (("entropy", "critical"), ("random", "random")):
        writer = Writer(model, tokenizer, tokens, seed=seed)
        sampler = CureSampler(
            samples=ORIGINALS * (1 + BRANCHES),
            branches=BRANCHES,
            k=max(tokens // SHARE, 1),
            mode="entropy" if mode == "entropy" else "random",
            token_ok=table,
        )
        kept: list[Tensor] = []

        def entropy(
            prompts: Rows, responses: Rows, writer: Writer = writer, kept: list[Tensor] = kept
        ) -> Tensor:
            kept.append(writer.entropy(prompts, responses))
            return kept[0]

        group = sampler.rollout(writer.generate, entropy, asked, pad_id=tokenizer.pad_token_id)
        _describe(found, group, kept[0], writer.variety, label)
        broken, short = _check(group, asked, table)
        counts["broken"] += broken
        counts["short"] += short
        counts["rows"] += len(group.parent)
    return {"prompts": found, **counts}


def _encoded(tokenizer: Any, prompt: Any) -> list[int]:
    text = (
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        if tokenizer.chat_template
        else prompt[-1]["content"]
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _describe(
    found: list[dict[str, float]], group: RolloutGroup, entropy: Tensor, variety: Tensor, label: str
) -> None:
    original = group.parent == torch.arange(len(group.parent))
    mask = group.response_mask[original][:, : entropy.shape[1]]
    branch = group.response_ids[~original].view(-1, BRANCHES, group.response_ids.shape[1])
    cut = group.branch_pos[~original].view(-1, BRANCHES)[:, 0]
    different = torch.tensor([len(set(row)) for row in branch[:, :, 0].tolist()], dtype=torch.float64)
    mean = (entropy * mask).sum(1) / mask.sum(1).clamp(min=1)
    here = torch.arange(len(cut))
    values = {
        "mean-entropy": mean,
        f"{label}-entropy": entropy[here, cut],
        f"{label}-distinct": different,
        f"{label}-expected-distinct": variety[here, cut],
        f"{label}-cut": cut.double(),
    }
    for key, value in values.items():
        for row, number in zip(found, value.double().view(-1, ORIGINALS).mean(1).tolist(), strict=True):
            row[key] = number


def _check(group: RolloutGroup, asked: Sequence[list[int]], table: Tensor) -> tuple[int, int]:
    broken = short = 0
    for row, parent in enumerate(group.parent.tolist()):
        cut, width = int(group.branch_pos[row]), int(group.prompt_len[row])
        start = group.ids[row, group.ids.shape[1] - width :].tolist()
        answer = group.response_ids[parent].tolist()
        broken += start != [*asked[int(group.group_id[row])], *answer[:cut]]
        short += row != parent and cut > 0 and not bool(table[answer[cut]])
    return broken, short
