"""Entropy of attention rows from queries and keys, and its gradient, against the whole matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.errors import ConfigError
from uncollapse.measure.attention import attention_rows
from uncollapse.measure.attention_gradient import attention_rows_with_gradient


def queries_and_keys(seed: int, *, queries: int = 6, keys: int = 6, heads: int = 4, kv_heads: int = 2):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, queries, 3, generator=generator, dtype=torch.float64) * 2
    k = torch.randn(2, kv_heads, keys, 3, generator=generator, dtype=torch.float64) * 2
    return q.requires_grad_(), k.requires_grad_()


def naive_entropy(q, k, scale, seen, softcap=None):
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -1e30)
    logp = scores.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


@given(
    seed=st.integers(0, 10**6),
    queries=st.sampled_from([6, 3, 1]),
    kv_heads=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    softcap=st.sampled_from([None, 1.5]),
    chunk=st.sampled_from([1, 100, 1 << 18]),
    scale=st.sampled_from([0.3, 2.0]),
)
def test_value_and_gradient_are_those_of_the_whole_matrix(
    seed, queries, kv_heads, causal, softcap, chunk, scale
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uncollapse.measure.attention._CHUNK_ELEMENTS", chunk)
        q, k = queries_and_keys(seed, queries=queries, kv_heads=kv_heads)
        seen = torch.ones(queries, 6, dtype=torch.bool)
        seen = seen.tril(6 - queries) if causal else seen
        weight = torch.randn(
            2, 4, queries, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        rows = attention_rows_with_gradient(q, k, scale=scale, causal=causal, softcap=softcap)
        found = torch.autograd.grad((rows.entropy * weight).sum(), (q, k))
    naive = naive_entropy(q, k, scale, seen, softcap)
    expected = torch.autograd.grad((naive * weight).sum(), (q, k))
    torch.testing.assert_close(rows.entropy, naive, atol=1e-11, rtol=1e-9)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


def test_against_finite_differences():
    q, k = queries_and_keys(1)
    assert torch.autograd.gradcheck(
        lambda q, k: attention_rows_with_gradient(q, k, causal=True).entropy, (q, k)
    )


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_and_rows_that_see_nothing(kind):
    q, k = queries_and_keys(2)
    seen = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    seen[0, 0, :, 0] = False  # left padding: the first row of the first sample is blind
    mask = (
        seen
        if kind == "bool"
        else torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    )
    rows = attention_rows_with_gradient(q, k, mask=mask)
    blind = ~seen.any(-1).expand(2, 4, 6)
    assert torch.equal(rows.entropy.isnan(), blind)
    found = torch.autograd.grad(rows.entropy.nansum(), (q, k))
    naive = naive_entropy(q, k, 3**-0.5, seen)
    expected = torch.autograd.grad(torch.where(blind, 0, naive).sum(), (q, k))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_other_columns_are_those_of_attention_rows_and_constants():
    q, k = queries_and_keys(3)
    rows, plain = attention_rows_with_gradient(q, k, causal=True), attention_rows(q, k, causal=True)
    for name in ("entropy", "allowed", "peak", "first"):
        assert torch.equal(getattr(rows, name), getattr(plain, name))
    assert [getattr(rows, name).requires_grad for name in ("entropy", "allowed", "peak", "first")] == [
        True, False, False, False,
    ]  # fmt: skip


def test_nothing_of_the_size_of_the_matrix_is_kept():
    length, kept = 128, []
    q = torch.randn(1, 2, length, 4, requires_grad=True)
    k = torch.randn(1, 2, length, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        attention_rows_with_gradient(q, k, causal=True).entropy.mean().backward()
    assert sum(kept) < length * length


def test_half_precision_gives_float32_entropies_and_half_precision_gradients():
    q, k = (x.detach().bfloat16().requires_grad_() for x in queries_and_keys(4))
    rows = attention_rows_with_gradient(q, k, causal=True)
    rows.entropy.sum().backward()
    assert rows.entropy.dtype == torch.float32
    assert q.grad.dtype == k.grad.dtype == torch.bfloat16
    naive = naive_entropy(q.double(), k.double(), 3**-0.5, torch.ones(6, 6, dtype=torch.bool).tril())
    torch.testing.assert_close(rows.entropy.double(), naive, atol=0.1, rtol=0.1)


def test_a_learned_bias_is_refused():
    q, k = queries_and_keys(5)
    with pytest.raises(ConfigError, match="learned bias"):
        attention_rows_with_gradient(q, k, mask=torch.zeros(1, 1, 6, 6, requires_grad=True))
