"""Per-token statistics of a language model without ever holding its logits.

From hidden states and an LM head (`token_stats`) or from logits in hand (`token_stats_from_logits`): the
log-probability of the sampled token, the Shannon entropy and any other `Statistic`, each with its exact gradient.

Two ways, chosen by what is asked for:

- *streamed* (`Logp` and `Entropy` only). Tiles of (up to 2048 tokens) x (some hundred vocabulary entries) pass
  by once. Everything is measured from the sampled token's own logit z_y: with S = sum exp(z - z_y) and
  T = sum (z - z_y) exp(z - z_y), log p_y = -log S and H = log S - T / S. The forward pass keeps two numbers per
  token and a bounded number of tiles; the backward pass recomputes the other tiles and turns each in place into
  dz = -p (a + b (log p + H)) for incoming gradients a, b. The one-hot part never enters a tile: it is one row of
  the weight per token. Where exp overflows (log p_y below about -88 in float32) the row is done the other way.
- *whole rows*: blocks of complete rows, for statistics that need to sort or compare a whole distribution.

Differs from the paper: nothing published; written from the derivatives of the softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure._vocabulary import Given, Head, Kept, row_count, spans, tile_size
from uncollapse.measure.statistics import FLOOR, Entropy, Logp, Rows, Statistic

Source: TypeAlias = Head | Given
DEFAULT: tuple[Statistic, ...] = (Logp(), Entropy())


def token_stats(
    hidden: Float[Tensor, "*position hidden"],
    token: Int[Tensor, "*position"],
    *,
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None = None,
    mask: Bool[Tensor, "*position"] | None = None,
    temperature: float = 1.0,
    stats: Sequence[Statistic] = DEFAULT,
    chunk: int | None = None,
) -> dict[Statistic, Float[Tensor, "*position"]]:
    """Measure the next-token distributions softmax((hidden W^T + b) / temperature) at sampled tokens.

    `out[Entropy()]` and the like have the shape of `token`, in nats unless the statistic says otherwise, and are
    differentiable (once) with respect to `hidden`, `weight` and `bias`; what needs no gradient costs none.

    Args:
        hidden: last hidden states, already aligned: `hidden[i]` predicts `token[i]`. Any floating dtype; products
            and sums are done in float32 or better, so half precision gives float32 statistics.
        token: sampled token ids; outside `mask` they may be anything (-100, for instance).
        weight: LM head, (vocab, hidden). A final softcap on the logits is not supported: use
            `token_stats_from_logits` for such models.
        bias: of the LM head; -inf excludes a token.
        mask: True where a token counts. Elsewhere nothing is computed, values are 0, gradients are 0, and NaN in
            `hidden` does no harm.
        temperature: divides the logits, > 0. Default 1: the model's own distribution.
        stats: what to measure; default log-probability and Shannon entropy, the cheapest pair.
        chunk: elements of logits held at once; None takes a size that suits the device and keeps some logits from
            the forward pass for the backward pass. No influence on results beyond rounding.

    Raises:
        ConfigError: temperature or chunk not positive, no statistic.
        DataError: a counted token id outside the vocabulary; shapes that do not belong together.

    Cost: forward one product (tokens x hidden x vocab); backward three, one fewer if the weight is frozen, and less
    by the share of the logits that was kept. Memory beyond inputs and gradients: a few times `chunk`, and between the
    passes two numbers per token and, unless `chunk` is given, up to 24 million logits (96 MB; 256 MB on a GPU).
    """
    _check_shapes(hidden, token, mask)
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _measure(flat, token, weight, bias, mask, temperature, stats, chunk, vocab=len(weight))


def token_stats_from_logits(
    logits: Float[Tensor, "*position vocab"],
    token: Int[Tensor, "*position"],
    *,
    mask: Bool[Tensor, "*position"] | None = None,
    temperature: float = 1.0,
    stats: Sequence[Statistic] = DEFAULT,
    chunk: int | None = None,
) -> dict[Statistic, Float[Tensor, "*position"]]:
    """Measure softmax(logits / temperature); arguments, results and errors as in `token_stats`.

    -inf excludes a token. The gradient has the dtype of the logits, the statistics are float32 or better.

    Cost: no copy of the logits is kept; the backward pass allocates their gradient and a few times `chunk`.
    """
    _check_shapes(logits, token, mask)
    flat = logits.reshape(-1, logits.shape[-1])
    return _measure(flat, token, None, None, mask, temperature, stats, chunk, vocab=logits.shape[-1])


def _measure(
    flat: Tensor,
    token: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    stats: Sequence[Statistic],
    chunk: int | None,
    *,
    vocab: int,
) -> dict[Statistic, Tensor]:
    _check_options(temperature, stats, chunk)
    asked = tuple(dict.fromkeys(stats))
    chosen = token.reshape(-1)
    where = None if mask is None else mask.reshape(-1).nonzero().squeeze(-1)
    if where is not None:
        flat, chosen = flat.index_select(0, where), chosen.index_select(0, where)
    _check_tokens(chosen, vocab)
    with torch.autocast(flat.device.type, enabled=False):  # it would round the products to half precision
        values = _TokenStats.apply(flat, weight, bias, chosen.long(), float(temperature), asked, chunk)
    if where is not None:
        values = [value.new_zeros(token.numel()).index_copy(0, where, value) for value in values]
    return {stat: value.reshape(token.shape) for stat, value in zip(asked, values, strict=True)}


def _check_options(temperature: float, stats: Sequence[Statistic], chunk: int | None) -> None:
    if not temperature > 0:
        raise ConfigError(f"token_stats: temperature is {temperature}; give a number above 0")
    if not stats:
        raise ConfigError("token_stats: stats is empty; name at least one statistic, for instance Entropy()")
    if chunk is not None and chunk < 1:
        raise ConfigError(f"token_stats: chunk is {chunk}; give a positive number of elements, or None")


def _check_shapes(x: Tensor, token: Tensor, mask: Tensor | None) -> None:
    if token.shape != x.shape[:-1] or (mask is not None and mask.shape != token.shape):
        shapes = f"{tuple(x.shape)} and {tuple(token.shape)}" + (
            "" if mask is None else f", mask {tuple(mask.shape)}"
        )
        raise DataError(
            f"token_stats: hidden states (or logits) and token have shapes {shapes}; each position needs one token, "
            "usually hidden[:, :-1] and ids[:, 1:]"
        )


def _check_tokens(token: Tensor, vocab: int) -> None:
    if token.numel():
        low, high = torch.stack(token.aminmax()).tolist()  # one synchronisation; an id on a GPU would abort
        if low < 0 or high >= vocab:
            raise DataError(
                f"token_stats: token ids run from {low} to {high}, the vocabulary from 0 to {vocab - 1}; "
                "mask padding with mask=, or check that the LM head belongs to the tokenizer"
            )


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, token: Tensor,
                temperature: float, stats: tuple[Statistic, ...], chunk: int | None) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.set_materialize_grads(False)
        streamed = set(stats) <= set(DEFAULT)
        source = _source(x, weight, bias, temperature)
        ctx.options = temperature, stats, chunk, streamed
        ctx.kept = Kept(source.worth_keeping if any(ctx.needs_input_grad[:3]) and chunk is None else 0)
        if not streamed:
            ctx.save_for_backward(x, weight, bias, token)
            return _whole_rows(source, token, stats, chunk, ctx.kept)
        logp, lse, entropy = _stream(source, token, chunk, ctx.kept, entropy=Entropy() in stats)
        ctx.save_for_backward(x, weight, bias, token, lse, entropy)
        return tuple(entropy.clone() if stat == Entropy() else logp for stat in stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, weight, bias, token, *kept = ctx.saved_tensors
        temperature, stats, chunk, streamed = ctx.options
        source = _source(x, weight, bias, temperature)
        source.open(ctx.needs_input_grad[:3])
        with torch.autocast(x.device.type, enabled=False):
            if streamed:
                of = dict(zip(stats, grads, strict=True))
                lse, entropy = kept
                _stream_backward(
                    source, token, chunk, ctx.kept, lse, entropy, of.get(Logp()), of.get(Entropy())
                )
            else:
                _whole_rows_backward(source, token, chunk, ctx.kept, stats, grads)
        return *source.close(), None, None, None, None


def _source(x: Tensor, weight: Tensor | None, bias: Tensor | None, temperature: float) -> Source:
    return Given(x, temperature) if weight is None else Head(x, weight, bias, temperature)


def _stream(
    source: Source, token: Tensor, chunk: int | None, kept: Kept, *, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, log-sum-exp and entropy of every row (entropy stays 0 if not asked for)."""
    reference, total, moment = (
        torch.zeros(source.count, dtype=source.dtype, device=token.device) for _ in range(3)
    )
    scratch = Scratch()
    for rows, width in source.blocks(tile_size(chunk, token.device)):
        reference[rows] = source.sampled(rows, token[rows])
        for cols in spans(source.vocab, width):
            logits = source.tile(rows, cols)
            kept.offer(rows, cols, logits)
            above = logits.sub_(reference[rows].unsqueeze(-1)).clamp_(min=FLOOR)
            weight = scratch(torch.exp, above)
            total[rows] += weight.sum(-1)
            if entropy:
                moment[rows] += weight.mul_(above).sum(-1)
    log_total = total.log()
    values = log_total.neg().clamp_(max=0), reference + log_total, (log_total - moment / total).clamp_(min=0)
    lost = (~(total.isfinite() & moment.isfinite())).nonzero().squeeze(-1)
    if not entropy:
        values[2].zero_()
    if len(lost):
        _recover(source, token, lost, chunk, values)
    return values


def _recover(
    source: Source, token: Tensor, lost: Tensor, chunk: int | None, values: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Redo rows whose sampled token is too improbable to be the reference."""
    logp, lse, entropy = values
    for span in spans(len(lost), row_count(chunk, token.device, source.vocab)):
        where = lost[span]
        logits = source.tile(where, slice(0, source.vocab))
        rows = Rows(logits.log_softmax(-1), token[where])
        logp[where], lse[where], entropy[where] = rows.sampled, logits.logsumexp(-1), rows.entropy


class Scratch:
    """Output tensor of an elementwise operation, reused while the shape stays the same or shrinks."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def __call__(self, operation: Callable[..., Tensor], value: Tensor) -> Tensor:
        """Apply `operation(value, out=...)`."""
        if self._buffer is None or self._buffer.numel() < value.numel():
            self._buffer = torch.empty_like(value)
        return operation(value, out=self._buffer.view(-1)[: value.numel()].view(value.shape))


def _stream_backward(
    source: Source,
    token: Tensor,
    chunk: int | None,
    kept: Kept,
    lse: Tensor,
    entropy: Tensor,
    of_logp: Tensor | None,
    of_entropy: Tensor | None,
) -> None:
    scratch = Scratch()
    for rows, width in source.blocks(tile_size(chunk, token.device)):
        constant, slope = _coefficients(rows, entropy, of_logp, of_entropy)
        for cols in spans(source.vocab, width):
            logits = kept.take(rows, cols)
            if logits is None:
                logits = source.tile(rows, cols)
            logp = logits.sub_(lse[rows].unsqueeze(-1)).clamp_(min=FLOOR)
            p = scratch(torch.exp, logp)
            grad = p.mul_(constant) if slope is None else logp.mul_(slope).add_(constant).mul_(p)
            last = cols.stop == source.vocab
            source.add(
                rows, cols, grad, (token[rows], of_logp[rows]) if last and of_logp is not None else None
            )


def _coefficients(
    rows: slice, entropy: Tensor, of_logp: Tensor | None, of_entropy: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Write -(a + b (log p + H)) as constant + slope log p, one column each; no slope without b."""
    constant = torch.zeros_like(entropy[rows]) if of_logp is None else -of_logp[rows]
    if of_entropy is None:
        return constant.unsqueeze(-1), None
    slope = -of_entropy[rows]
    return torch.addcmul(constant, slope, entropy[rows]).unsqueeze(-1), slope.unsqueeze(-1)


def _row_blocks(source: Source, token: Tensor, chunk: int | None) -> Iterator[slice]:
    return spans(source.count, row_count(chunk, token.device, source.vocab))


def _whole_rows(
    source: Source, token: Tensor, stats: tuple[Statistic, ...], chunk: int | None, kept: Kept
) -> tuple[Tensor, ...]:
    values = [torch.empty(source.count, dtype=source.dtype, device=token.device) for _ in stats]
    everything = slice(0, source.vocab)
    for rows in _row_blocks(source, token, chunk):
        table = Rows(source.tile(rows, everything).log_softmax(-1), token[rows])
        for stat, value in zip(stats, values, strict=True):
            value[rows] = stat.value(table)
        kept.give(rows, everything, table.logp)
    return tuple(values)


def _whole_rows_backward(
    source: Source,
    token: Tensor,
    chunk: int | None,
    kept: Kept,
    stats: tuple[Statistic, ...],
    grads: tuple[Tensor | None, ...],
) -> None:
    wanted = [(stat, grad) for stat, grad in zip(stats, grads, strict=True) if grad is not None]
    everything = slice(0, source.vocab)
    for rows in _row_blocks(source, token, chunk):
        logp = kept.take(rows, everything)
        if logp is None:
            logp = source.tile(rows, everything).log_softmax(-1)
        table = Rows(logp, token[rows])
        total = torch.zeros_like(logp)
        for stat, grad in wanted:
            total.addcmul_(stat.gradient(table), grad[rows].unsqueeze(-1))
        source.add(rows, everything, total)
