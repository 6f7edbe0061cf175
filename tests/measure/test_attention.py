"""Entropy of attention rows: from matrices, and from queries and keys without them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.attention import (
    KeyMask,
    attention_entropy,
    attention_entropy_lower_bound,
    attention_rows,
    attention_rows_of_matrix,
    bound_from_logits,
    bound_from_weights,
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


def test_10_uniform_causal_attention():
    for length in (1, 4, 128):
        q = torch.zeros(1, 1, length, 2, dtype=torch.float64)
        rows = attention_rows(q, q, causal=True)
        assert float(rows.entropy.mean()) == pytest.approx(uniform_causal_entropy(length), abs=1e-12)
        assert rows.normalized[..., 1:].allclose(torch.ones(1).double())
        assert rows.normalized[..., 0].isnan().all()
    assert uniform_causal_entropy(128) == pytest.approx(3.878168, abs=1e-6)
    assert uniform_causal_entropy(4) == pytest.approx(math.log(24) / 4)


# ---- the lower bound: checks 1 to 4 of the specification of sigma-reparam -------------------------------------

NORMS = (0.0, 0.1, 1.0, 5.0, 20.0)


def test_1_values_of_the_bound():
    assert float(attention_entropy_lower_bound(1.0, 2)) == pytest.approx(0.494199917, abs=1e-9)
    assert float(attention_entropy_lower_bound(5.0, 17)) == pytest.approx(0.524477178, abs=1e-9)
    assert float(attention_entropy_lower_bound(3.0, 1)) == 0
    for keys in (2, 3, 17, 1024):
        assert float(attention_entropy_lower_bound(0.0, keys)) == pytest.approx(math.log(keys), abs=1e-14)


@pytest.mark.parametrize("keys", [2, 3, 17, 1024])
def test_1_one_logit_above_equal_others_reaches_the_bound(keys):
    s = torch.tensor(NORMS, dtype=torch.float64)
    row = (-s / math.sqrt(keys * (keys - 1)))[:, None].repeat(1, keys)
    row[:, 0] = s * math.sqrt((keys - 1) / keys)
    torch.testing.assert_close(torch.linalg.vector_norm(row, dim=-1), s)
    entropy = attention_entropy(logits=row[None, None], reduce="row")[0, 0]
    torch.testing.assert_close(entropy, attention_entropy_lower_bound(s, keys), atol=1e-12, rtol=0)
    torch.testing.assert_close(bound_from_logits(row[None, None])[0, 0], entropy, atol=1e-12, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    keys=st.sampled_from([2, 3, 5, 17, 64]),
    norm=st.floats(0, 30),
    shift=st.floats(-50, 50),
)
def test_2_random_rows_never_violate_the_bound(seed, keys, norm, shift):
    logits = torch.randn(250, keys, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits = norm * logits / torch.linalg.vector_norm(logits, dim=-1, keepdim=True)
    entropy = attention_entropy(logits=logits[None, None], reduce="row")[0, 0]
    assert (entropy >= attention_entropy_lower_bound(norm, keys) - 1e-12).all()
    assert (entropy >= bound_from_logits(logits[None, None])[0, 0] - 1e-12).all()
    moved = attention_entropy(logits=logits[None, None] + shift, reduce="row")[0, 0]
    torch.testing.assert_close(moved, entropy, atol=1e-11, rtol=0)


def test_3_two_keys_are_a_coin():
    s = torch.linspace(0, 10, 50, dtype=torch.float64)
    p = torch.sigmoid(s * math.sqrt(2))
    coin = torch.special.entr(p) + torch.special.entr(torch.sigmoid(-s * math.sqrt(2)))
    torch.testing.assert_close(attention_entropy_lower_bound(s, 2), coin, atol=1e-14, rtol=1e-10)


def test_4_it_falls_with_the_norm_and_decays_as_derived():
    s = torch.linspace(0, 40, 400, dtype=torch.float64)
    for keys in (2, 9, 1024):
        assert (attention_entropy_lower_bound(s, keys).diff() < 0).all()
    tail = torch.tensor([10.0, 20.0, 200.0], dtype=torch.float64)
    leading = tail * math.sqrt(9 * 8) * torch.exp(-tail * math.sqrt(9 / 8))
    ratio = attention_entropy_lower_bound(tail, 9) / leading
    assert (ratio > 1).all()
    slope = (ratio - 1) * tail
    assert slope[:2].tolist() == pytest.approx([0.9407, 0.9428], abs=1e-4)
    assert float(slope[2]) == pytest.approx(math.sqrt(8 / 9), abs=1e-9)


def test_the_bound_takes_arrays_and_broadcasts():
    norms, keys = np.linspace(0, 5, 6), np.array([2, 3, 9])
    found = attention_entropy_lower_bound(norms[:, None], keys)
    assert isinstance(found, np.ndarray)
    tensor = attention_entropy_lower_bound(torch.as_tensor(norms)[:, None], torch.as_tensor(keys))
    np.testing.assert_array_equal(found, tensor.numpy())
    np.testing.assert_array_equal(attention_entropy_lower_bound(2.0, keys), found[2])
    half = attention_entropy_lower_bound(torch.ones(2), keys=5)
    assert half.dtype == torch.float32
    norm = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: attention_entropy_lower_bound(s, 7), (norm,))


def test_the_bound_of_the_theorem_holds_for_its_matrices():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=generator, dtype=torch.float64) / 3 for shape in ((6, 4), (4, 4)))
    entropy = attention_entropy(logits=(x @ w @ x.mT)[None, None], reduce="row")
    assert float(entropy.min()) >= float(bound_from_weights(w, x))
    assert float(bound_from_weights(w, x, scale=0.5)) > float(bound_from_weights(w, x))


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
    with pytest.raises(DataError, match="norm"):
        attention_entropy_lower_bound(-1.0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_full(dtype):
    q, k, logits = (x.to(dtype) for x in parts(queries=40, keys=40))
    mask = causal(40, 40)
    exact = attention_entropy(logits=logits.double(), mask=mask, reduce="row")
    found = attention_entropy(logits=logits, mask=mask, reduce="row")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)
    attn = logits.float().masked_fill(~mask, -torch.inf).softmax(-1).to(dtype)
    torch.testing.assert_close(
        attention_entropy(attn=attn, mask=mask, reduce="row").double(),
        torch.special.entr(attn.double()).sum(-1), atol=1e-5, rtol=1e-5,
    )  # fmt: skip
    least = torch.finfo(dtype).min
    shifts = torch.linspace(-1, 1, 40).to(dtype).expand(1, 1, 40, 40).masked_fill(~mask, least)
    rows, exact_rows = (
        attention_rows(a, b, mask=m)
        for a, b, m in ((q, k, shifts), (q.double(), k.double(), shifts.double()))
    )
    torch.testing.assert_close(rows.entropy.double(), exact_rows.entropy, atol=0.05, rtol=0.05)
    assert torch.equal(rows.allowed.double(), exact_rows.allowed)
    torch.testing.assert_close(
        bound_from_logits(logits, mask).double(),
        bound_from_logits(logits.double(), mask),
        atol=1e-5,
        rtol=1e-4,
    )


def test_rows_that_are_not_finite_are_marked_and_spoil_no_other():
    q, k, logits = parts()
    q[1, 2, 3] = torch.nan
    q[0, 0, 0] = torch.inf
    mask = causal(7, 7)
    broken = torch.zeros(3, 4, 7, dtype=torch.bool)
    broken[1, 2, 3] = broken[0, 0, 0] = True
    whole = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    shown = whole.masked_fill(broken[..., None], torch.nan)
    for rows in (attention_rows(q, k, causal=True), attention_rows_of_matrix(shown, KeyMask.of(mask, 7, 7))):
        assert torch.equal(rows.nonfinite, broken)
        assert torch.equal(rows.normalized[..., 1:].isnan(), broken[..., 1:])
        expected = torch.special.entr(whole).sum(-1).masked_fill(broken, torch.nan)
        torch.testing.assert_close(rows.entropy, expected, equal_nan=True, atol=1e-12, rtol=1e-12)
        assert torch.equal(rows.peak.isnan(), broken)
        assert torch.equal(rows.first.isnan(), broken)
