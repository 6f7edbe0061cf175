"""Entropy of attention rows: from matrices, and from queries and keys without them."""

from __future__ import annotations

import math

import pytest
import torch

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.attention import (
    attention_entropy,
    attention_entropy_lower_bound,
    attention_rows,
    bound_from_logits,
    uniform_causal_entropy,
)


def causal(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]


def parts(seed: int = 0, *, queries: int = 7, keys: int = 7, heads: int = 4, kv_heads: int = 2):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(3, heads, queries, 5, generator=generator, dtype=torch.float64) * 2
    k = torch.randn(3, kv_heads, keys, 5, generator=generator, dtype=torch.float64) * 2
    return q, k, q @ k.repeat_interleave(heads // kv_heads, 1).mT * 5**-0.5


@pytest.mark.parametrize("queries", [7, 3, 1])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 18])
def test_rows_from_queries_and_keys_are_those_of_the_whole_matrix(monkeypatch, queries, chunk):
    monkeypatch.setattr("uncollapse.measure.attention._CHUNK_ELEMENTS", chunk)
    q, k, logits = parts(queries=queries)
    mask = causal(queries, 7)
    whole = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    for rows in (
        attention_rows(q, k, causal=True),
        attention_rows(q, k, mask=mask),
        attention_rows(q, k, mask=torch.zeros(1, 1, queries, 7).double().masked_fill(~mask, -torch.inf)),
    ):
        torch.testing.assert_close(rows.entropy, torch.special.entr(whole).sum(-1), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(rows.peak, whole.amax(-1))
        torch.testing.assert_close(rows.first, whole[..., 0])
        assert torch.equal(rows.allowed, mask.sum(-1).expand(3, 4, queries).double())
    entropy = attention_entropy(logits=logits, mask=mask, reduce="row")
    torch.testing.assert_close(entropy, attention_rows(q, k, causal=True).entropy)
    torch.testing.assert_close(attention_entropy(attn=whole, reduce="row"), entropy)


def test_an_additive_mask_also_shifts_scores():
    q, k, logits = parts()
    bias = torch.randn(1, 4, 7, 7, dtype=torch.float64)
    whole = (logits + bias).softmax(-1)
    torch.testing.assert_close(attention_rows(q, k, mask=bias).entropy, torch.special.entr(whole).sum(-1))


def test_a_row_that_sees_nothing_is_nan_and_left_out():
    q, k, logits = parts()
    mask = causal(7, 7).repeat(3, 1, 1, 1)
    mask[1] = False
    rows = attention_rows(q, k, mask=mask)
    assert rows.entropy[1].isnan().all()
    assert rows.entropy[0].isfinite().all()
    assert attention_entropy(logits=logits, mask=mask).isfinite().all()
    torch.testing.assert_close(
        attention_entropy(logits=logits, mask=mask),
        attention_entropy(logits=logits[[0, 2]], mask=mask[[0, 2]]),
    )


def test_uniform_causal_attention():
    for length in (1, 4, 128):
        q = torch.zeros(1, 1, length, 2, dtype=torch.float64)
        rows = attention_rows(q, q, causal=True)
        assert float(rows.entropy.mean()) == pytest.approx(uniform_causal_entropy(length), abs=1e-12)
        assert rows.normalized[..., 1:].allclose(torch.ones(1).double())
        assert rows.normalized[..., 0].isnan().all()
    assert uniform_causal_entropy(128) == pytest.approx(3.878168, abs=1e-6)
    assert uniform_causal_entropy(4) == pytest.approx(math.log(24) / 4)


def test_values_of_the_bound():
    assert float(attention_entropy_lower_bound(1.0, 2)) == pytest.approx(0.494199917, abs=1e-9)
    assert float(attention_entropy_lower_bound(5.0, 17)) == pytest.approx(0.524477178, abs=1e-9)
    assert float(attention_entropy_lower_bound(3.0, 1)) == 0


def test_the_bound_of_a_row_holds_and_does_not_see_a_constant():
    _, _, logits = parts()
    mask = causal(7, 7)
    bound = bound_from_logits(logits, mask)
    assert (attention_entropy(logits=logits, mask=mask, reduce="row") >= bound - 1e-12).all()
    torch.testing.assert_close(bound, bound_from_logits(logits + 7, mask))


def test_what_is_refused():
    q, k, logits = parts()
    with pytest.raises(ConfigError, match="attn"):
        attention_entropy()
    with pytest.raises(ConfigError, match="reduce"):
        attention_entropy(logits=logits, reduce="mean")
    with pytest.raises(DataError, match="heads"):
        attention_rows(q, k.repeat(1, 2, 1, 1)[:, :3])
    with pytest.raises(DataError, match="NaN"):
        attention_rows(q * torch.nan, k)
    with pytest.raises(DataError, match="norm"):
        attention_entropy_lower_bound(-1.0, 3)
