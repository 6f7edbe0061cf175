"""A forward pass that gives per-token statistics in place of logits, for any causal language model of transformers.

The call goes through `model.forward`, so DDP, FSDP, DeepSpeed and PEFT see an ordinary forward pass.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.errors import ConfigError
from uncollapse.integrations.shared_prefix import pack, packed_inputs
from uncollapse.measure.statistics import Statistic
from uncollapse.measure.token_stats import token_stats

REQUEST = "completion_stats"
"""Keyword of the patched forward: `(statistics, sampled tokens, where they count, what predicts them)`."""


def logit_scale(config: Any) -> float:
    """What a model multiplies its logits by before the softmax, by its configuration.

    Raises `ConfigError` for a final softcap, which no scale can express.
    """
    if getattr(config, "final_logit_softcapping", None):
        raise ConfigError(
            f"models of type {config.model_type!r} with a final logit softcap are not supported; choose another model"
        )
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def add_completion_stats(model: nn.Module, temperature: float) -> None:
    """Let `model(..., completion_stats=(statistics, token, mask, source))` return `{"0": values, "1": ...}` per statistic.

    With `source` None, `token` and `mask` are (row, time), the last `time` positions of the input. Otherwise the input
    is one row, and its position `source[i]` predicts `token[i]`. Values have the shape of `token`, 0 outside the mask,
    differentiable, at this temperature. Without the keyword the forward is the model's own.
    """
    scale = logit_scale(model.config.get_text_config())  # type: ignore[operator, union-attr]
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = kwargs.pop(REQUEST, None)
        if request is None:
            return original(*args, **kwargs)
        statistics, token, mask, source = request
        kwargs["use_cache"] = False
        states = self.base_model(*args, **kwargs).last_hidden_state
        hidden = states[:, -token.shape[1] - 1 : -1] if source is None else states[0].index_select(0, source)
        # Looked up on each call: FSDP and PEFT replace modules after patching.
        head = self.get_output_embeddings()
        values = _called(
            head,
            hidden,
            lambda states: token_stats(
                states.to(head.weight.device),
                token,
                weight=head.weight,
                bias=head.bias,
                mask=mask,
                temperature=temperature / scale,
                stats=statistics,
            ),
        )
        return {str(index): values[statistic] for index, statistic in enumerate(statistics)}

    model.forward = types.MethodType(forward, model)


def _called(layer: nn.Module, states: Tensor, forward: Callable[[Tensor], Any]) -> Any:
    """`forward(states)` as a call of the layer: its hooks run, which gather its weights where they are sharded."""
    own = vars(layer).get("forward")
    vars(layer)["forward"] = forward
    try:
        return layer(states)
    finally:
        if own is None:
            del vars(layer)["forward"]
        else:
            vars(layer)["forward"] = own


def padded_stats(
    model: nn.Module,
    statistics: Sequence[Statistic],
    *,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    counted: Tensor,
    positions: bool = True,
) -> dict[Statistic, Tensor]:
    """Statistics (row, time) of completions after left-padded prompts; `counted` says which tokens to measure.

    With `positions` the position ids of left-padded rows start at their first token, as they do in generation.
    """
    attention = torch.cat([prompt_mask, completion_mask], dim=1)
    inputs = {"input_ids": torch.cat([prompt_ids, completion_ids], dim=1), "attention_mask": attention}
    if positions:
        inputs["position_ids"] = (attention.cumsum(dim=1) - 1).clamp(min=0)
    values = model(**inputs, **{REQUEST: (tuple(statistics), completion_ids, counted, None)})
    return {statistic: values[str(index)] for index, statistic in enumerate(statistics)}


def packed_stats(
    model: nn.Module,
    statistics: Sequence[Statistic],
    *,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    counted: Tensor,
) -> dict[Statistic, Tensor]:
    """The same from one packed row in which neighbouring completions of one prompt share it; needs `enable_packing`."""
    packed = pack(prompt_ids, prompt_mask, completion_ids, completion_mask, counted)
    request = (tuple(statistics), packed.token, None, packed.source)
    values = model(**packed_inputs(packed), **{REQUEST: request})
    grid = counted.new_zeros(counted.numel(), dtype=torch.float32)
    return {
        statistic: grid.to(values[str(index)].dtype)
        .index_copy(0, packed.target, values[str(index)])
        .view_as(counted)
        for index, statistic in enumerate(statistics)
    }
