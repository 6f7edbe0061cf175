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

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.attention import AttentionRows, KeyMask, attention_rows, scores_by_rows

_FAINT = 1e-30
"""A weight below this, beside the 1 of its row's largest, adds nothing. Left as it is, masked keys above all, its slope would
underflow, and products of matrices full of such numbers take several times as long."""


def attention_rows_with_gradient(
    query: Float[Tensor, "batch head query feature"],
    key: Float[Tensor, "batch kv_head key feature"],
    *,
    scale: float | None = None,
    mask: Shaped[Tensor, "#batch #head #query key"] | KeyMask | None = None,
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
    if not isinstance(mask, KeyMask):
        mask = KeyMask.of(mask, query.shape[-2], key.shape[-2], causal=causal, device=query.device)
    if mask.additive is not None and mask.additive.requires_grad:
        raise ConfigError(
            "attention_rows_with_gradient: the mask is a learned bias, which would get no gradient; detach it"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return AttentionRows(*_Rows.apply(query, key, scale, mask, softcap))


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, scale: float, mask: KeyMask, softcap: float | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = attention_rows(query, key, scale=scale, mask=mask, softcap=softcap)
        if bool(rows.nonfinite.any()):
            raise DataError("attention: queries or keys contain NaN or inf")
        ctx.scale, ctx.mask, ctx.softcap = scale, mask, softcap
        ctx.save_for_backward(query, key, rows.entropy)
        ctx.mark_non_differentiable(rows.allowed, rows.peak, rows.first)
        return rows.entropy, rows.allowed, rows.peak, rows.first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor, *constants: Any) -> tuple[Tensor | None, ...]:
        query, key, entropy = ctx.saved_tensors
        batch, heads, queries, width = query.shape
        kv_heads = key.shape[1]
        grouped = (query * ctx.scale).reshape(batch, kv_heads, heads // kv_heads, queries, width)
        to_query = torch.empty_like(grouped)
        to_key = key.new_zeros(key.shape, dtype=entropy.dtype)
        blind = entropy.isnan()
        above, entropy = above.masked_fill(blind, 0), entropy.masked_fill(blind, 0)
        for here, scores in scores_by_rows(grouped, key.mT, ctx.mask, ctx.softcap):
            end = scores.shape[-1]
            weight = torch.threshold_(scores.exp(), _FAINT, 0.0)
            total = weight.sum(-1, keepdim=True)  # a = weight / total, ln a = scores - ln total
            slope = scores.sub_(total.log() - entropy[:, :, here, None])
            slope = (
                slope.mul_(weight).mul_(-above[:, :, here, None] / total).reshape(batch, kv_heads, -1, end)
            )
            part = grouped[:, :, :, here].reshape(batch, kv_heads, -1, width)
            if ctx.softcap is not None:  # d(c tanh(s/c))/ds, of the scores before the cap
                plain = (part @ key[:, :, :end].mT).to(slope.dtype)
                slope = slope * (1 - (plain / ctx.softcap).tanh().square())
            slope = slope.to(query.dtype)
            to_query[:, :, :, here] = (slope @ key[:, :, :end]).reshape(to_query[:, :, :, here].shape)
            to_key[:, :, :end] += slope.mT @ part
        return (to_query * ctx.scale).reshape(query.shape), to_key.to(key.dtype), None, None, None
