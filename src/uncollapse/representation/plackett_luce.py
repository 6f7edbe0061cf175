"""Plackett-Luce: the probability of a ranking as a series of choices, each by softmax among the classes that are left.

A weighted ranking loss, value and gradient in O(C) per row once the classes are ranked. With S_k the sum of exp(s) over the classes
not yet chosen before step k, the loss is sum_k alpha_k (log S_k - s_{pi_k}), and its derivative with respect to the logit of the
class chosen at step r is exp(s) sum_{k <= r} alpha_k / S_k - alpha_r: one running sum from the end, one from the start.

Source: Plackett (1975), "The Analysis of Permutations"; the gradient is the derivative of the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from uncollapse.errors import ConfigError, DataError

Choose: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Row numbers, and the logits there less their maximum -> classes in order and weights of the steps, both (row, step)."""

_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Logits worked on at once. A dozen tensors of that size are alive at a time."""

_SPAN = {torch.float32: 64.0, torch.float64: 600.0}
"""Largest distance between two logits of a row (nats) for which plain sums of exponentials neither overflow nor lose any."""


def weighted_ranking_loss(
    logits: Float[Tensor, "row class"],
    rows: Int[Tensor, " chosen"],
    choose: Choose,
    chunk: int | None = None,
) -> Float[Tensor, " row"]:
    """sum_k alpha_k (logsumexp_{l >= k} s_{pi_l} - s_{pi_k}) for each of `rows`, 0 for the others; nats, float32 or better.

    Differentiable (once) with respect to `logits`. A ranking may stop early: the other classes stand in the sums.

    Args:
        logits: any floating dtype; -inf for classes that are never chosen.
        rows: numbers of the rows to work on.
        choose: gives the ranking and its weights for a part of the rows.
        chunk: logits worked on at once; None takes a size that suits the device.

    Raises:
        ConfigError: a chunk that is not positive.
        DataError: NaN, +inf or nothing finite in one of `rows`; a class with logit -inf that is ranked first or has weight.
    """
    if chunk is not None and chunk < 1:
        raise ConfigError(
            f"weighted_ranking_loss: chunk is {chunk}; give a positive number of logits, or None"
        )
    found: Tensor = _RankingLoss.apply(logits, rows, choose, chunk)
    return found


def plackett_luce_log_prob(
    logits: Float[Tensor, "*position class"], order: Int[Tensor, "*position step"]
) -> Float[Tensor, "*position"]:
    """log P(order) = sum_k (s_{order_k} - logsumexp of the classes not yet chosen), in nats, at most 0.

    `order` names different classes, all of them or only the first ones; over all orders of one length P sums to 1.
    Differentiable (once) with respect to `logits`.

    Raises:
        DataError: an entry of `order` that is no class, a class twice, NaN or +inf, or a chosen class with logit -inf.
    """
    classes, flat = logits.shape[-1], order.reshape(-1, order.shape[-1]).long()
    ranked = flat.sort(-1).values
    if bool(((ranked < 0) | (ranked >= classes)).any() | (ranked[:, 1:] == ranked[:, :-1]).any()):
        raise DataError(f"plackett_luce_log_prob: order must name different classes from 0 to {classes - 1}")
    rows = torch.arange(len(flat), device=logits.device)

    def choose(part: Tensor, s_part: Tensor) -> tuple[Tensor, Tensor]:
        return flat[part], torch.ones_like(flat[part], dtype=s_part.dtype)

    return -weighted_ranking_loss(logits.reshape(-1, classes), rows, choose).reshape(logits.shape[:-1])


def argsort_descending(keys: Float[Tensor, "row class"]) -> Int[Tensor, "row class"]:
    """Numbers of the classes by falling key, equal keys by number; no NaN.

    float32 on a CPU takes a detour that is four times as fast: the bits of a float, read as an integer, order as the floats do (once
    negative ones are turned over), so key and number fit into one 64-bit integer, and NumPy sorts those with vector instructions.
    """
    if keys.device.type != "cpu" or keys.dtype != torch.float32:
        return keys.argsort(dim=-1, descending=True, stable=True)
    bits = (keys + 0.0).view(torch.int32)  # -0.0 becomes 0.0, which it equals
    falling = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    packed = (falling.long() << 32) | torch.arange(keys.shape[1])
    packed.numpy().sort(axis=1)
    return packed & 0xFFFFFFFF


def refuse_values(top: Tensor, whose: str, remedy: str = "mask=") -> None:
    """Raise `DataError` unless the row maxima `top` are finite; `remedy` is the caller's way to leave rows out."""
    if not bool(top.isfinite().all()):
        raise DataError(
            f"logits of the {whose} with NaN, +inf or a row of -inf; leave such rows out ({remedy})"
        )


class _RankingLoss(torch.autograd.Function):
    """The gradient is made with the value, a part of the rows at a time, and is all that is kept."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, rows: Tensor, choose: Choose, chunk: int | None) -> Tensor:
        work = s.dtype if s.dtype in _SPAN else torch.float32
        loss = torch.zeros(len(s), dtype=work, device=s.device)
        # not rounded to half precision before the scale of a loss has come: small entries would be lost
        gradient = torch.zeros_like(s, dtype=work) if ctx.needs_input_grad[0] else None
        size = chunk or _CHUNK.get(s.device.type, _CHUNK["cpu"])
        for part in rows.split(max(1, size // s.shape[-1])) if len(rows) else ():
            s_part = s[part].to(work)
            top = s_part.amax(-1, keepdim=True)
            refuse_values(top, "student")
            s_part -= top  # the loss does not change, and large logits would cost precision
            loss[part], own = _value_and_gradient(s_part, *choose(part, s_part), gradient is not None)
            if gradient is not None:
                gradient[part] = own
        ctx.dtype = s.dtype
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * incoming[:, None].to(gradient.dtype)).to(ctx.dtype), None, None, None


def _value_and_gradient(
    s: Tensor, order: Tensor, alpha: Tensor, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Loss (row) and its gradient (row, class) at logits whose row maximum is 0; unless wanted, the gradient is `s`."""
    chosen = s.gather(1, order)
    lowest = s.amin()
    if bool(lowest == -torch.inf):
        _refuse_excluded(chosen, alpha)
        lowest = s.masked_fill(s == -torch.inf, 0.0).amin()
    plain = bool(lowest >= -_SPAN[s.dtype])
    steps, partial = order.shape[1], order.shape[1] < s.shape[1]
    ranked = chosen
    if partial:  # what is never chosen is one more entry at the end
        ranked = torch.cat([chosen, s.scatter(1, order, -torch.inf).logsumexp(-1, keepdim=True)], -1)
    lse = _suffix_logsumexp(ranked, plain)[:, :steps]
    loss = torch.where(alpha > 0, alpha * (lse - chosen), 0.0).sum(-1)
    if not want_gradient:
        return loss, s
    log_sum = _log_prefix_sum(alpha, lse, plain)
    gradient = (s + log_sum[:, -1:]).exp() if partial else torch.empty_like(s)
    return loss, gradient.scatter_(1, order, (chosen + log_sum).exp() - alpha)


def _suffix_logsumexp(s: Tensor, plain: bool) -> Tensor:
    """log sum_{l >= k} exp(s_l) for every k. torch.logcumsumexp survives any logits but takes many times as long."""
    turned = s.flip(-1)
    return (turned.exp().cumsum(-1).log() if plain else turned.logcumsumexp(-1)).flip(-1)


def _log_prefix_sum(alpha: Tensor, lse: Tensor, plain: bool) -> Tensor:
    """log sum_{k <= r} alpha_k exp(-lse_k) for every r."""
    if plain:
        return torch.where(alpha > 0, alpha * (-lse).exp(), 0.0).cumsum(-1).log()
    return torch.where(alpha > 0, alpha.log() - lse, -torch.inf).logcumsumexp(-1)


def _refuse_excluded(chosen: Tensor, alpha: Tensor) -> None:
    """Choosing a class of probability 0 costs infinitely much; ranked first, it is refused at any weight."""
    excluded = chosen == -torch.inf
    if bool(excluded[:, 0].any()):
        raise DataError(
            "the student excludes (logit -inf) what is ranked first, the true label; let it in or mask the row"
        )
    if bool((excluded & (alpha > 0)).any()):
        raise DataError(
            "the student excludes (logit -inf) a class that the ranking gives weight; exclude it from the teacher too"
        )
