"""Entropy of attention rows with its gradient, from queries and keys: no matrix of attention is ever kept.

For scores s of one row, a = softmax(s) and H = -sum_j a_j ln a_j, the gradient is dH/ds_j = -a_j (ln a_j + H). It needs the
scores alone, so the backward pass computes them again, a few query rows at a time, as the forward pass does. Kept are
queries and keys, which attention's own backward pass keeps anyway, and one number per row.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from uncollapse.errors import ConfigError
from uncollapse.measure import attention
from uncollapse.measure.attention import AttentionRows, attention_rows

_LOW = -1e30
"""A score that no key may have: its softmax is exactly 0, and 0 times it is 0 where that of -inf would be NaN."""


def attention_rows_with_gradient(
    query: Float[Tensor, "batch head query feature"],
    key: Float[Tensor, "batch kv_head key feature"],
    *,
    scale: float | None = None,
    mask: Shaped[Tensor, "#batch #head #query key"] | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> AttentionRows:
    """`attention_rows` whose entropy (nats) is differentiable in queries and keys; the other columns are constants.

    Arguments and errors as in `attention_rows`. First derivatives only. Costs one more matrix of scores forward and one
    backward, in pieces; memory beyond the inputs' gradients is one piece.

    Raises:
        ConfigError: a mask that wants a gradient (a learned position bias); it would get none.
        DataError: heads that the key heads do not divide, or a non-finite score.
    """
    if mask is not None and mask.requires_grad:
        raise ConfigError(
            "attention_rows_with_gradient: the mask is a learned bias, which would get no gradient; detach it"
        )
    return AttentionRows(*_Rows.apply(query, key, scale, mask, causal, softcap))


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        scale: float | None,
        mask: Tensor | None,
        causal: bool,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = attention_rows(query, key, scale=scale, mask=mask, causal=causal, softcap=softcap)
        ctx.scale = query.shape[-1] ** -0.5 if scale is None else scale
        ctx.causal, ctx.softcap = causal, softcap
        ctx.save_for_backward(query, key, mask, rows.entropy)
        ctx.mark_non_differentiable(rows.allowed, rows.peak, rows.first)
        return rows.entropy, rows.allowed, rows.peak, rows.first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor, *constants: Any) -> tuple[Tensor | None, ...]:
        query, key, mask, entropy = ctx.saved_tensors
        batch, heads, queries, width = query.shape
        kv_heads, keys = key.shape[1:3]
        grouped = query.reshape(batch, kv_heads, heads // kv_heads, queries, width) * ctx.scale
        to_query = torch.empty_like(grouped)
        to_key = key.new_zeros(key.shape, dtype=entropy.dtype)
        blind = entropy.isnan()
        above, entropy = above.masked_fill(blind, 0), entropy.masked_fill(blind, 0)
        size = max(1, attention._CHUNK_ELEMENTS // max(1, batch * heads * keys))
        for start in range(0, queries, size):
            here = slice(start, min(start + size, queries))
            part = grouped[:, :, :, here].reshape(batch, kv_heads, -1, width)
            plain = (part @ key.mT).reshape(batch, heads, -1, keys).to(entropy.dtype)
            scores = plain if ctx.softcap is None else ctx.softcap * (plain / ctx.softcap).tanh()
            scores = _masked(scores, mask, ctx.causal, here, queries)
            surprise = scores.log_softmax(-1).add_(entropy[:, :, here, None])
            slope = scores.softmax(-1).mul_(surprise).mul_(-above[:, :, here, None])
            if ctx.softcap is not None:
                slope = slope * (1 - (plain / ctx.softcap).tanh().square())
            slope = slope.reshape(batch, kv_heads, -1, keys).to(query.dtype)
            to_query[:, :, :, here] = (slope @ key).reshape(to_query[:, :, :, here].shape)
            to_key += slope.mT @ part
        to_query = (to_query * ctx.scale).reshape(query.shape)
        return to_query, to_key.to(key.dtype), None, None, None, None


def _masked(scores: Tensor, mask: Tensor | None, causal: bool, here: slice, queries: int) -> Tensor:
    """Scores of the query rows `here` with their mask, very low where a key may not be seen."""
    keys = scores.shape[-1]
    if mask is not None:
        part = mask[..., here, :] if mask.shape[-2] > 1 else mask
        scores = (
            scores.masked_fill(~part, _LOW) if part.dtype == torch.bool else (scores + part).clamp(min=_LOW)
        )
    if causal:
        place = torch.arange(here.start, here.stop, device=scores.device) + keys - queries
        scores = scores.masked_fill(torch.arange(keys, device=scores.device) > place[:, None], _LOW)
    return scores
