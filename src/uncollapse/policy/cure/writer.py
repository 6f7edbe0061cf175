"""A language model as the two functions that `CureSampler.rollout` asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.entropy import shannon_entropy_from_logits
from uncollapse.policy.cure.positions import Rows, left_pad


@dataclass
class ModelWriter:
    """`generate` and `entropy` of a causal language model of transformers, with its tokenizer.

    `generate` samples from the whole distribution (no top-k, no top-p) at `temperature`, at most `max_new_tokens` tokens,
    up to and with the end of text; `entropy` is of the same distribution. Give the sampler the same temperature. Draws
    follow from `seed` and the number of the call, and leave torch's own generator as it was. The model stays in the mode
    it is in: call `model.eval()` for one with dropout.

    Raises `ConfigError` for an impossible option, `DataError` for a prompt without tokens or one that the model has no
    room for.
    """

    model: Any
    tokenizer: Any
    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 0
    calls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature <= 0:
            raise ConfigError(
                f"ModelWriter: needs max_new_tokens >= 1 and temperature > 0; got {self.max_new_tokens} and "
                f"{self.temperature:g}"
            )
        if self.tokenizer.pad_token_id is None:
            raise ConfigError("ModelWriter: the tokenizer has no padding token; set tokenizer.pad_token")

    @torch.no_grad()
    def generate(self, prompts: Rows) -> list[list[int]]:
        """One sampled continuation per prompt, its end of text included."""
        self._check(prompts)
        ids, attention, _ = left_pad(prompts, self.tokenizer.pad_token_id)
        device = self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed + self.calls)
            output = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=attention.to(device),
                do_sample=True,
                temperature=self.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        self.calls += 1
        return [self._until_end(row) for row in output[:, ids.shape[1] :].tolist()]

    def entropy(self, prompts: Rows, responses: Rows) -> Float[Tensor, "row time"]:
        """Entropy (nats) of the distribution that each token was drawn from, padded with 0; one forward pass per row."""
        entropy = torch.zeros(len(responses), max(map(len, responses), default=0))
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            entropy[row, : len(response)] = shannon_entropy_from_logits(self.logp(prompt, response)).cpu()
        return entropy

    @torch.no_grad()
    def logp(self, prompt: Sequence[int], response: Sequence[int]) -> Float[Tensor, "time vocab"]:
        """Log-probabilities (nats) of all tokens at each place of a response, at the writer's temperature."""
        whole = torch.tensor([[*prompt, *response]], device=self.model.device)
        logits: Tensor = self.model(whole).logits[0, len(prompt) - 1 : -1]
        return (logits.float() / self.temperature).log_softmax(-1)

    def _check(self, prompts: Rows) -> None:
        if min(map(len, prompts), default=1) < 1:
            raise DataError(
                "ModelWriter: a prompt has no token; give it at least one, such as the start of text"
            )
        longest = max(map(len, prompts), default=0)
        context = getattr(self.model.config, "max_position_embeddings", None)
        if context is not None and longest + self.max_new_tokens > context:
            raise DataError(
                f"ModelWriter: a prompt with its prefix has {longest} tokens and {self.max_new_tokens} may follow, but the "
                f"model has room for {context}; limit branches with the sampler's max_prompt_len="
                f"{max(context - self.max_new_tokens, 1)}, or lower max_new_tokens"
            )

    def _until_end(self, row: Sequence[int]) -> list[int]:
        end = self.model.generation_config.eos_token_id
        ends = {*end} if isinstance(end, list) else {end, self.tokenizer.eos_token_id}
        stop = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        return list(row[:stop])
