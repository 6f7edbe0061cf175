"""What a policy can do on held-out prompts: sampled completions, pass@k, maj@k, distinct correct answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from uncollapse.measure.diversity import answer_ids, distinct_answers, majority_at_k, pass_at_k
from uncollapse.measure.statistics import Entropy, Logp
from uncollapse.measure.token_stats import token_stats_from_logits
from uncollapse.tasks.answers import final_answer, normalised
from uncollapse.tasks.task import Row, Task


@dataclass(frozen=True)
class Sampler:
    """Samples completions from a model outside of training, without touching the training's random numbers."""

    model: Any
    tokenizer: Any
    temperature: float
    max_tokens: int
    rows_at_once: int = 64

    def __call__(self, prompts: Sequence[Any], *, seed: int) -> Iterator[tuple[list[int], list[int], str]]:
        """For each prompt: its token ids, the ids of one completion (with its end token, if any) and its text."""
        device = next(self.model.parameters()).device
        settings = GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.max_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        with _own_randomness(seed), evaluating(self.model), torch.no_grad():
            for start in range(0, len(prompts), self.rows_at_once):
                inputs = self._encode(prompts[start : start + self.rows_at_once]).to(device)
                width = inputs["input_ids"].shape[1]
                output = self.model.generate(**inputs, generation_config=settings)
                for row, mask, prompt in zip(
                    output, inputs["attention_mask"], inputs["input_ids"], strict=True
                ):
                    completion = self._completion(row[width:])
                    yield prompt[mask.bool()].tolist(), completion, self._text(completion)

    def _encode(self, prompts: Sequence[Any]) -> Any:
        texts = [prompt if isinstance(prompt, str) else self._chat(prompt) for prompt in prompts]
        # A chat template writes the special tokens itself.
        plain = isinstance(prompts[0], str)
        return self.tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=plain,
            return_token_type_ids=False,
        )

    def _chat(self, messages: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _completion(self, ids: Tensor) -> list[int]:
        found = ids.tolist()
        end = self.model.generation_config.eos_token_id
        ends = set(end) if isinstance(end, list) else {end, self.tokenizer.eos_token_id}
        stop = next((place + 1 for place, token in enumerate(found) if token in ends), len(found))
        return found[:stop]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def evaluate(
    sampler: Sampler, task: Task, rows: Sequence[Row], *, samples: int, seed: int
) -> dict[str, float]:
    """`eval/...` metrics from `samples` completions of each held-out row.

    A completion is right if its score is 1. Rows with a completion that cannot be scored are left out. Answers are
    compared as text without box, case and spacing.
    """
    repeated = [row for row in rows for _ in range(samples)]
    texts = [text for _, _, text in sampler([row["prompt"] for row in repeated], seed=seed)]
    scores = scored(task, repeated, texts)
    right = (scores >= 1).reshape(len(rows), samples)
    known = ~np.isnan(scores).reshape(len(rows), samples).any(axis=1)
    if not known.any():
        return {}
    correct = right.sum(axis=1)[known]
    found = {"eval/reward": float(np.nanmean(scores))}
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples]
    for k in ks:
        found[f"eval/pass@{k}"] = float(pass_at_k(samples, correct, k).mean())
    answers = np.array([normalised(final_answer(text)) for text in texts], dtype=object).reshape(
        len(rows), samples
    )
    groups = [(list(answers[i]), right[i]) for i in np.flatnonzero(known)]
    found[f"eval/maj@{samples}"] = float(np.mean([_majority(given, good, samples) for given, good in groups]))
    distinct = [
        distinct_answers([a for a, g in zip(given, good, strict=True) if g]) for given, good in groups
    ]
    found["eval/distinct"] = float(np.mean(distinct))
    return found


def _majority(given: Sequence[str], good: np.ndarray, votes: int) -> float:
    """Chance that the most frequent answer is a right one: the sum over the right ones."""
    ids = answer_ids(given)
    counts = np.bincount(ids)
    right = sorted({int(i) for i, g in zip(ids, good, strict=True) if g})
    return sum((majority_at_k(counts, i, votes) for i in right), start=0.0)


def scored(task: Task, rows: Sequence[Row], texts: Sequence[str]) -> np.ndarray:
    """The task's verdicts on these texts; NaN where it has none."""
    chat = [not isinstance(row["prompt"], str) for row in rows]
    completions = [
        [{"role": "assistant", "content": text}] if conversational else text
        for text, conversational in zip(texts, chat, strict=True)
    ]
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
    scores = task.reward(prompts=[row["prompt"] for row in rows], completions=completions, **columns)
    return np.array([np.nan if score is None else score for score in scores], dtype=np.float64)


def probe_completions(
    sampler: Sampler, task: Task, rows: Sequence[Row], *, seed: int
) -> list[dict[str, Any]]:
    """One completion per row by the untrained model, to be scored again as training goes on."""
    found = list(sampler([row["prompt"] for row in rows], seed=seed))
    scores = scored(task, rows, [text for _, _, text in found])
    return [
        {
            "sample": f"probe-{i}",
            "prompt": row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"],
            "prompt_ids": prompt,
            "ids": ids,
            "reward": float(score),
        }
        for i, (row, (prompt, ids, _), score) in enumerate(zip(rows, found, scores, strict=True))
    ]


def score_probe(sampler: Sampler, probe: Mapping[str, Any], *, step: int) -> dict[str, Any]:
    """The record of one probe as the policy sees it now: entropy and log-probability of each of its tokens (nats)."""
    device = next(sampler.model.parameters()).device
    prompt, ids = probe["prompt_ids"], probe["ids"]
    with evaluating(sampler.model), torch.no_grad():
        logits = sampler.model(torch.tensor([[*prompt, *ids]], device=device)).logits[0, len(prompt) - 1 : -1]
        token = torch.tensor(ids, device=device)
        found = token_stats_from_logits(logits, token, temperature=sampler.temperature)
    return {
        "step": step,
        "sample": probe["sample"],
        "prompt": probe["prompt"],
        "tokens": [sampler.tokenizer.decode([token]) for token in ids],
        "entropy": found[Entropy()].tolist(),
        "logp": found[Logp()].tolist(),
        "reward": probe["reward"],
    }


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Random numbers of this block from its own seed; the training's continue as if nothing had happened."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode (no dropout), and back."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
