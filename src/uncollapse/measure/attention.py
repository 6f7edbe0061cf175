"""How spread attention is: entropy of its rows, what bounds it, and where the mass goes; in nats.

A row of attention is the distribution of one query over the keys it may see. `attention_entropy` takes whole matrices,
`attention_rows` queries and keys: it computes the matrix again, a few query rows at a time, and works with any kernel
(SDPA, flash) that never shows it. Uniform attention over n keys has entropy ln n; a causal row i sees i + 1 keys, so
that uniform causal attention has (ln T!)/T on average, not ln T.

Differs from the paper: the bound of Zhai et al. (2023) is stated for the product of two matrix norms, which is nearly
vacuous in real models; `bound_from_logits` takes the norm of each centred logit row, which softmax cannot tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.precision import at_least_float32

_LOW = -1e30
"""A logit that no key may have: exp gives an exact 0, and 0 times it is 0 where that of -inf would be NaN."""

_LEAST = -80.0
"""Scores so far below the largest of their row add nothing; exp is several times slower where its result underflows."""

_BLOCKED = -9e3
"""Added to a score, this or less means that the key may not be seen; models write -1e4, -1e9 or the least number."""

_CHUNK_ELEMENTS = 1 << 18
"""Elements of the score matrix held at once: about what stays in a core's cache."""


def attention_entropy(
    attn: Float[Tensor, "batch head query key"] | None = None,
    logits: Float[Tensor, "batch head query key"] | None = None,
    mask: Bool[Tensor, "#batch #head #query key"] | None = None,
    reduce: str = "head",
    normalize: bool = False,
) -> Float[Tensor, "*rows"]:
    """Entropy of attention rows from probabilities or, better, logits; 0 to ln(number of allowed keys), float32 or better.

    Args:
        attn: rows that sum to 1, or `logits`: what the softmax is taken of. Exactly one of them.
        mask: True where a query may see a key. A row that sees none is NaN and left out of means.
        reduce: "head" averages over batch and queries, shape (head,); "row" gives (batch, head, query).
        normalize: divide by ln(allowed keys), 0 to 1; rows that see one key have nothing to spread and are left out.

    Raises:
        ConfigError: neither or both of `attn` and `logits`, or another `reduce`.
    """
    if (attn is None) == (logits is None):
        raise ConfigError("attention_entropy: give attn (probabilities) or logits, one of them")
    if reduce not in ("head", "row"):
        raise ConfigError(f"attention_entropy: reduce is {reduce!r}; give 'head' or 'row'")
    if logits is not None:
        wide = at_least_float32(logits)
        rows = _entropy_of_logits(wide if mask is None else wide.masked_fill(~mask, _LOW))
        shape, keys = logits.shape[:-1], logits.shape[-1]
    else:
        assert attn is not None
        wide = at_least_float32(attn)
        seen = wide if mask is None else wide.masked_fill(~mask, 0)
        rows = torch.special.entr(seen).sum(-1)
        shape, keys = attn.shape[:-1], attn.shape[-1]
    allowed = torch.full(shape, keys, device=rows.device) if mask is None else mask.sum(-1).expand(shape)
    if normalize:
        rows = rows / allowed.to(rows.dtype).log()
    rows = rows.masked_fill(allowed < (2 if normalize else 1), torch.nan)
    return rows.nanmean(dim=(0, 2)) if reduce == "head" else rows


def uniform_causal_entropy(length: int) -> float:
    """Mean entropy of uniform causal attention over `length` tokens, (ln T!)/T nats: the true ceiling of a causal head.

    Raises:
        ConfigError: length below 1.
    """
    if length < 1:
        raise ConfigError(f"uniform_causal_entropy: length is {length}; give at least 1")
    return math.lgamma(length + 1) / length


@overload
def attention_entropy_lower_bound(norm: Tensor | float, keys: Tensor | int) -> Tensor: ...
@overload
def attention_entropy_lower_bound(norm: np.ndarray, keys: np.ndarray | int) -> np.ndarray: ...
@overload
def attention_entropy_lower_bound(norm: float, keys: np.ndarray) -> np.ndarray: ...
def attention_entropy_lower_bound(
    norm: Tensor | np.ndarray | float, keys: Tensor | np.ndarray | int
) -> Tensor | np.ndarray:
    """Least entropy of a softmax over `keys` = T logits whose vector has Euclidean norm at most `norm` = s; nats.

    ln(1 + (T-1) b) + s sqrt(T(T-1)) b / (1 + (T-1) b) with b = exp(-s sqrt(T/(T-1))); reached by one logit
    s sqrt((T-1)/T) and T-1 equal ones. ln T at s = 0, about T s exp(-s) for large s, and 0 for one key.

    Norms and numbers of keys broadcast. Arrays give arrays, everything else tensors: of the dtype of a floating norm,
    float64 otherwise.

    Source: Zhai et al. (2023), arXiv 2303.06296, theorem 3.1.

    Raises:
        DataError: a negative or NaN norm, or fewer than one key.
    """
    if isinstance(norm, np.ndarray) or isinstance(keys, np.ndarray):
        given = torch.as_tensor(np.asarray(norm, dtype=np.float64)), torch.as_tensor(np.asarray(keys))
        return attention_entropy_lower_bound(*given).numpy()
    s = torch.as_tensor(norm)
    s = s if s.is_floating_point() and isinstance(norm, Tensor) else s.double()
    t = torch.as_tensor(keys, dtype=s.dtype, device=s.device)
    if not bool((s.detach() >= 0).all()) or not bool((t >= 1).all()):
        raise DataError("attention_entropy_lower_bound: needs norms >= 0 and at least one key")
    others = (t - 1).clamp(min=1)
    b = torch.exp(-s * (t / others).sqrt())
    spread = others * b
    bound = spread.log1p() + s * (t * others).sqrt() * b / (1 + spread)
    return torch.where(t > 1, bound, torch.zeros_like(bound))


def bound_from_logits(
    logits: Float[Tensor, "*batch query key"], mask: Bool[Tensor, "*#batch #query key"] | None = None
) -> Float[Tensor, "*batch query"]:
    """The lower bound of each row from the norm of its own logits about their mean, over the keys it may see."""
    logits = at_least_float32(logits)
    allowed = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask.expand(logits.shape)
    count = allowed.sum(-1, keepdim=True)
    kept = logits.masked_fill(~allowed, 0)
    centred = (kept - kept.sum(-1, keepdim=True) / count.clamp(min=1)).masked_fill(~allowed, 0)
    bound = attention_entropy_lower_bound(
        torch.linalg.vector_norm(centred, dim=-1), count[..., 0].clamp(min=1)
    )
    return bound.masked_fill(count[..., 0] == 0, torch.nan)


def bound_from_weights(
    query_key: Float[Tensor, "feature feature"], inputs: Float[Tensor, "token feature"], *, scale: float = 1.0
) -> Float[Tensor, ""]:
    """The bound in the form of the theorem: s = scale ||W_K W_Q^T||_2 ||X X^T||_2. Nearly 0 in real models."""
    norm = torch.linalg.matrix_norm(query_key, 2) * torch.linalg.matrix_norm(inputs, 2).square() * scale
    return attention_entropy_lower_bound(norm, len(inputs))


@dataclass(frozen=True)
class AttentionRows:
    """What the rows of attention are like; float32 or better, NaN where a row sees no key or its scores are not finite.

    Attributes:
        entropy: nats, 0 to ln(allowed).
        allowed: keys that the row may see.
        peak: largest probability.
        first: probability of the first key, the usual place of an attention sink.
    """

    entropy: Float[Tensor, "batch head query"]
    allowed: Float[Tensor, "batch head query"]
    peak: Float[Tensor, "batch head query"]
    first: Float[Tensor, "batch head query"]

    @property
    def nonfinite(self) -> Bool[Tensor, "batch head query"]:
        """Rows whose scores or probabilities contain NaN or inf."""
        return self.entropy.isnan() & (self.allowed > 0)

    @property
    def normalized(self) -> Float[Tensor, "batch head query"]:
        """Entropy over ln(allowed), 0 to 1; NaN for rows that see fewer than two keys."""
        return (self.entropy / self.allowed.log()).masked_fill(self.allowed < 2, torch.nan)


@dataclass(frozen=True)
class KeyMask:
    """Which keys a query may see, read once for all layers that share a mask.

    Attributes:
        additive: numbers added to the scores, large and negative where a key may not be seen; None if only order decides.
        causal: no query sees a key behind its own place, counted from the last; such scores are not even computed.
        allowed: how many keys each query sees.
    """

    additive: Float[Tensor, "#batch #head #query key"] | None
    causal: bool
    allowed: Float[Tensor, "#batch #head query"]

    @classmethod
    def of(
        cls,
        mask: Shaped[Tensor, "#batch #head #query key"] | None,
        queries: int,
        keys: int,
        *,
        causal: bool = False,
        device: torch.device | str | None = None,
    ) -> KeyMask:
        """From True where a key may be seen, or numbers to add to the scores (as kernels take them), and the order."""
        device = mask.device if mask is not None else device
        ordered = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        if mask is None:
            seen = ordered if causal else torch.ones_like(ordered)
            return cls(None, causal, seen.sum(-1).float()[None, None])
        additive = at_least_float32(torch.zeros_like(mask) if mask.dtype == torch.bool else mask)
        blocked = ~mask if mask.dtype == torch.bool else mask < _BLOCKED
        seen = ~blocked.expand(*mask.shape[:2], queries, keys)
        causal = causal or not bool((seen & ~ordered).any())
        if causal:
            seen = seen & ordered
        if torch.equal(seen, ordered.expand_as(seen)) and not bool(additive.masked_fill(blocked, 0).any()):
            return cls(None, True, seen[:1, :1].sum(-1).float())
        return cls(additive.masked_fill(blocked, _LOW), causal, seen.sum(-1).float())


@torch.no_grad()
def attention_rows(
    query: Float[Tensor, "batch head query feature"],
    key: Float[Tensor, "batch kv_head key feature"],
    *,
    scale: float | None = None,
    mask: Shaped[Tensor, "#batch #head #query key"] | KeyMask | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> AttentionRows:
    """Statistics of attention rows, recomputed from queries and keys; never holds more than a few query rows.

    Args:
        scale: factor of the scores; 1/sqrt(feature) if not given.
        mask: True where a key may be seen, or numbers added to the scores (as kernels take it), or either as a `KeyMask`.
        causal: query i of n sees the keys up to the i-th of the last n; keys beyond are not even computed.
        softcap: scores s become softcap tanh(s / softcap) before the mask.

    Raises:
        DataError: heads that the key heads do not divide.
    """
    batch, heads, queries, width = query.shape
    kv_heads, keys = key.shape[1:3]
    if heads % kv_heads:
        raise DataError(f"attention_rows: {heads} query heads cannot share {kv_heads} key heads")
    if not isinstance(mask, KeyMask):
        mask = KeyMask.of(mask, queries, keys, causal=causal, device=query.device)
    scale = width**-0.5 if scale is None else scale
    grouped = (query.detach() * scale).reshape(batch, kv_heads, heads // kv_heads, queries, width)
    entropy, peak, first = query.new_empty(
        3, batch, heads, queries, dtype=torch.promote_types(query.dtype, torch.float32)
    )
    for here, scores in scores_by_rows(grouped, key.detach().mT, mask, softcap):
        weight = scores.exp()
        total = weight.sum(-1)
        entropy[..., here] = total.log() - torch.linalg.vecdot(weight, scores) / total
        peak[..., here] = 1 / total
        first[..., here] = weight[..., 0] / total
    return _rows(entropy, mask.allowed, peak, first)


@torch.no_grad()
def attention_rows_of_matrix(attn: Float[Tensor, "batch head query key"], mask: KeyMask) -> AttentionRows:
    """The same statistics of probabilities that a kernel has shown, for less: one logarithm a probability."""
    batch, heads, queries, keys = attn.shape
    attn = attn.detach()
    entropy, peak = attn.new_empty(2, batch, heads, queries)
    least = torch.finfo(attn.dtype).tiny
    for here in _row_slices(queries, batch * heads * keys):
        some = attn[:, :, here, : max(1, keys - queries + here.stop) if mask.causal else keys]
        entropy[..., here] = some.clamp(min=least).log_().mul_(some).sum(-1).neg_()
        peak[..., here] = some.amax(-1)
    return _rows(entropy, mask.allowed, peak, attn[..., 0])


def _rows(entropy: Tensor, allowed: Tensor, peak: Tensor, first: Tensor) -> AttentionRows:
    allowed = allowed.to(entropy).expand(entropy.shape)
    unknown = (allowed == 0) | ~entropy.isfinite()
    return AttentionRows(
        entropy=entropy.clamp(min=0).masked_fill(unknown, torch.nan),
        allowed=allowed,
        peak=peak.masked_fill(unknown, torch.nan),
        first=first.masked_fill(unknown, torch.nan),
    )


def _row_slices(queries: int, elements_of_row: int) -> Iterator[slice]:
    """Query rows, as many at once as stay in a core's cache."""
    rows = max(1, min(queries, _CHUNK_ELEMENTS // max(1, elements_of_row)))
    for start in range(0, queries, rows):
        yield slice(start, min(start + rows, queries))


def scores_by_rows(
    grouped: Float[Tensor, "batch kv_head group query feature"],
    keys_t: Float[Tensor, "batch kv_head feature key"],
    mask: KeyMask,
    softcap: float | None,
) -> Iterator[tuple[slice, Float[Tensor, "batch head row some_keys"]]]:
    """A few query rows at a time and their scores, less the largest of each row; queries are scaled already.

    Keys at the end that none of the rows may see are left out. The scores may be written into.
    """
    batch, kv_heads, group, queries, _ = grouped.shape
    behind = None
    for here in _row_slices(queries, batch * kv_heads * group * keys_t.shape[-1]):
        if behind is None:  # the first part is the largest
            behind = torch.ones(here.stop, here.stop, dtype=torch.bool, device=grouped.device).triu(1)
        yield here, _scores(grouped, keys_t, mask, here, behind, softcap)


def _scores(
    grouped: Tensor, keys_t: Tensor, mask: KeyMask, here: slice, behind: Tensor, softcap: float | None
) -> Tensor:
    batch, kv_heads, group, queries, width = grouped.shape
    rows, keys = here.stop - here.start, keys_t.shape[-1]
    end = max(1, keys - queries + here.stop) if mask.causal else keys
    query = grouped[:, :, :, here].reshape(batch, kv_heads, group * rows, width)
    scores = (query @ keys_t[..., :end]).reshape(batch, kv_heads * group, rows, end)
    scores = at_least_float32(scores)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask.additive is not None:
        added = mask.additive[..., here, :end] if mask.additive.shape[-2] > 1 else mask.additive[..., :end]
        scores.add_(added)
    if mask.causal:  # what is behind the place of a row stands in the last columns
        corner = min(rows, end)
        scores[..., end - corner :].masked_fill_(behind[:rows, rows - corner : rows], _LOW)
    return scores.sub_(scores.amax(-1, keepdim=True)).clamp_(min=_LEAST)


def _entropy_of_logits(logits: Tensor) -> Tensor:
    """lse(a) - sum softmax(a) a: no log of a probability."""
    a = logits.clamp(min=_LOW)
    a = a - a.amax(-1, keepdim=True).detach()
    total = torch.logsumexp(a, -1)
    return total - (torch.softmax(a, -1) * a).sum(-1)
