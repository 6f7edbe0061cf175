"""Entropy-guided attention: the exact checks of its specification, a naive reference, and the add-on on real models."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from uncollapse.attention.entropy_guided_attention import (
    ARCHITECTURES,
    Architecture,
    CausalAttention,
    EntropyRegularizer,
    ReducedDecoder,
    ScaledFusedFFN,
    SoftmaxOnlyBlock,
    TemperedAttention,
    attach_entropy_regularizer,
    collect_attention_entropy,
    diagnose_heads,
    fuse_linear,
)
from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.attention import attention_entropy, attention_rows

F64 = torch.float64
GRANULARITIES = ("head", "head_per_sample", "row_mean", "row_sum")


def some_attention(
    seed: int, *, layers: int = 2, batch: int = 3, heads: int = 4, time: int = 6, sharp: float = 2.0
):
    """Causal attention probabilities of every layer, from random scores."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(layers, batch, heads, time, time, generator=generator, dtype=F64) * sharp
    scores = scores.masked_fill(~torch.ones(time, time, dtype=torch.bool).tril(), -torch.inf)
    return list(scores.softmax(-1))


def some_theta(seed: int, layers: int = 2, heads: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.rand(layers, heads, generator=generator, dtype=F64)


def naive(attn_list, theta, gamma, granularity, reference, *, eps=0.0, skip=False, mask=None) -> float:
    """The penalty in loops, straight from the formula."""
    layers, (batch, heads, time, keys) = len(attn_list), attn_list[0].shape
    total = 0.0
    for layer in range(layers):
        for head in range(heads):
            entropy, ceiling = {}, {}
            for b in range(batch):
                for i in range(time):
                    if (skip and i == 0) or (mask is not None and not mask[b, i]):
                        continue
                    row = attn_list[layer][b, head, i].tolist()
                    entropy[b, i] = -sum(a * math.log(a + eps) for a in row if a > 0)
                    ceiling[b, i] = math.log(keys if reference == "log_T" else i + 1)

            def gated(where, entropy=entropy, ceiling=ceiling, layer=layer, head=head):
                e = sum(entropy[x] for x in where) / len(where)
                c = sum(ceiling[x] for x in where) / len(where)
                d = e - float(theta[layer][head]) * c
                return d * d if abs(d) > gamma * c else 0.0

            places = list(entropy)
            if granularity == "head":
                total += gated(places)
            elif granularity == "head_per_sample":
                samples = sorted({b for b, _ in places})
                total += sum(gated([x for x in places if x[0] == b]) for b in samples) / len(samples)
            else:
                sums = sum(gated([x]) for x in places)
                total += sums if granularity == "row_sum" else sums / len(places)
    return total / layers / heads


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("reference", ["log_T", "causal"])
@pytest.mark.parametrize("gamma", [0.0, 0.2])
@pytest.mark.parametrize("skip", [False, True])
def test_the_penalty_is_that_of_the_loops(granularity, reference, gamma, skip):
    attn, theta = some_attention(1), some_theta(1)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = False
    made = EntropyRegularizer(
        gamma=gamma, coef=0.3, granularity=granularity, reference=reference, skip_trivial_rows=skip
    )
    loss, _ = made(attn, theta, query_mask=mask)
    expected = 0.3 * naive(attn, theta, gamma, granularity, reference, skip=skip, mask=mask)
    assert loss.item() == pytest.approx(expected, abs=1e-13)


def test_parity_with_the_released_code():
    """Rows gated by themselves, summed over batch and queries, over heads and layers, 1e-9 inside the logarithm."""
    attn, theta = some_attention(2, sharp=5.0), some_theta(2)
    made = EntropyRegularizer(gamma=0.2, coef=1e-5, granularity="row_sum", eps=1e-9)
    loss, _ = made(attn, theta)
    assert loss.item() == pytest.approx(
        1e-5 * naive(attn, theta, 0.2, "row_sum", "log_T", eps=1e-9), rel=1e-12
    )
    # its example takes the thresholds of the first layer for all
    shared, _ = made(attn, theta[:1])
    assert float(shared) == pytest.approx(float(made(attn, theta[:1].expand(2, 4))[0]), rel=1e-12)


# 1 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("time", "expected"), [(128, 3.8782), (4, math.log(24) / 4)])
def test_01_uniform_causal_attention(time, expected):
    zeros = torch.zeros(1, 2, time, 4, dtype=F64)
    entropy = attention_rows(zeros, zeros, causal=True).entropy.mean()
    assert float(entropy) == pytest.approx(math.lgamma(time + 1) / time, abs=1e-12)
    assert float(entropy) == pytest.approx(expected, abs=5e-5)
    uniform = [
        torch.ones(1, 2, time, time, dtype=F64).tril() / torch.arange(1.0, time + 1, dtype=F64)[:, None]
    ]
    full = EntropyRegularizer(gamma=0.0, coef=1.0)(uniform, torch.zeros(1, 2, dtype=F64))[0]
    assert float(full) == pytest.approx((math.lgamma(time + 1) / time) ** 2, rel=1e-12)


# 2 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["head", "row_mean"])
def test_02_one_hot_rows(granularity):
    attn = [torch.eye(5, dtype=F64).expand(2, 3, 5, 5)]
    made = EntropyRegularizer(gamma=0.2, coef=1.0, granularity=granularity)
    for theta, expected in ((0.5, (0.5 * math.log(5)) ** 2), (0.1, 0.0), (0.2, 0.0)):
        loss, stats = made(attn, torch.full((1, 3), theta, dtype=F64))
        assert loss.item() == pytest.approx(expected, abs=1e-14)
        assert float(stats["attention_entropy/deviation/mean"]) == pytest.approx(theta * math.log(5))
        assert float(stats["attention_entropy/head/mean"]) == 0.0
    # with the released code's 1e-9 a one-hot row has -1e-9, on the active side at equality
    tipped = EntropyRegularizer(gamma=0.2, coef=1.0, granularity=granularity, eps=1e-9)
    assert float(tipped(attn, torch.full((1, 3), 0.2, dtype=F64))[0]) > 0.1


# 3 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.1])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_03_uniform_full_attention_at_threshold_one(gamma, granularity):
    attn = [torch.full((2, 3, 5, 5), 0.2, dtype=F64)]
    theta = torch.ones(1, 3, dtype=F64)
    loss, _ = EntropyRegularizer(gamma=gamma, coef=1.0, granularity=granularity)(attn, theta)
    assert loss.item() <= 1e-28
    with_eps = EntropyRegularizer(gamma=gamma, coef=1.0, granularity=granularity, eps=1e-9)
    assert float(with_eps(attn, theta)[0]) <= 1e-15


# 4 ----------------------------------------------------------------------------------------------------------------


def test_04_no_dead_zone_and_nothing_but_dead_zone():
    attn, theta = some_attention(4), some_theta(4)
    rows = attention_entropy(attn=torch.cat(attn, 1), reduce="row").view(3, 2, 4, 6)
    squares = (rows - theta[None, :, :, None] * math.log(6)).square()
    loss, _ = EntropyRegularizer(gamma=0.0, coef=1.0, granularity="row_mean")(attn, theta)
    assert loss.item() == pytest.approx(float(squares.mean()), rel=1e-12)
    for granularity in GRANULARITIES:
        for gate in ("hard", "smooth"):
            wide = EntropyRegularizer(gamma=1.0, coef=1.0, granularity=granularity, gate=gate)
            loss, stats = wide(attn, theta)
            assert loss.item() == 0.0
            assert float(stats["attention_entropy/active/frac"]) == 0.0


# 5 ----------------------------------------------------------------------------------------------------------------


def row_entropy(z: torch.Tensor, t: torch.Tensor, d_k: int) -> torch.Tensor:
    return attention_entropy(logits=(z / (t * d_k**0.5))[None, None, None], reduce="row")[0, 0, 0]


@given(seed=st.integers(0, 10**6), t=st.floats(0.05, 20.0))
def test_05_entropy_rises_with_temperature_at_the_known_rate(seed, t):
    d_k = 3
    z = torch.randn(7, dtype=F64, generator=torch.Generator().manual_seed(seed)) * 2
    temperature = torch.tensor(t, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(row_entropy(z, temperature, d_k), temperature)
    a = (z / (t * d_k**0.5)).softmax(-1)
    variance = (a * z.square()).sum() - (a * z).sum().square()
    assert float(slope) == pytest.approx(float(variance / (d_k * t**3)), rel=1e-6, abs=1e-9)
    assert slope >= -1e-12


def test_05_limits_of_the_temperature_and_the_closed_form():
    z, d_k = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=F64), 3
    assert float(row_entropy(z, torch.tensor(1e6, dtype=F64), d_k)) == pytest.approx(math.log(4), abs=1e-9)
    assert float(row_entropy(z, torch.tensor(1e-6, dtype=F64), d_k)) == 0.0
    twice = torch.tensor([2.0, -1.0, 2.0], dtype=F64)
    assert float(row_entropy(twice, torch.tensor(1e-6, dtype=F64), d_k)) == pytest.approx(math.log(2))
    s = z / (0.7 * d_k**0.5)
    closed = s.logsumexp(-1) - (s.softmax(-1) * s).sum()
    assert float(row_entropy(z, torch.tensor(0.7, dtype=F64), d_k)) == pytest.approx(float(closed), abs=1e-14)


def test_05_the_module_divides_queries_of_each_head_and_position():
    attention = TemperedAttention(6, 2, context=4, t_init=0.5).double()
    with torch.no_grad():
        attention.raw_temperature += torch.rand(2, 4, dtype=F64)
    x = torch.randn(3, 7, 6, dtype=F64)
    q, k, v = attention.qkv(x).view(3, 7, 3, 2, 3).permute(2, 0, 3, 1, 4)
    t = attention.temperature[:, [0, 1, 2, 3, 3, 3, 3]]  # positions beyond the context share the last
    scores = q @ k.mT / (t[..., None] * 3**0.5)
    scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf)
    expected = attention.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(3, 7, 6))
    torch.testing.assert_close(attention(x), expected)


def test_temperatures_stay_positive_and_start_where_told():
    for kind in ("clamp", "softplus"):
        for t in (1e-3, 0.01, 1.0, 30.0):
            made = TemperedAttention(4, 2, 3, t_init=t, parametrization=kind).double()
            torch.testing.assert_close(made.temperature, torch.full((2, 3), t, dtype=F64), rtol=1e-4, atol=0)
        with torch.no_grad():
            made.raw_temperature.fill_(-5.0)
        assert (made.temperature > 0).all()
    plain = CausalAttention(4, 2)
    tempered = TemperedAttention(4, 2, 3)
    tempered.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(plain(x), tempered(x))


# 6 ----------------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), shift=st.floats(-50, 50), c=st.floats(0.1, 10))
def test_06_constants_and_common_factors_change_nothing(seed, shift, c):
    z = torch.randn(7, dtype=F64, generator=torch.Generator().manual_seed(seed))
    one = torch.tensor(1.0, dtype=F64)
    base = float(row_entropy(z, one, 4))
    assert float(row_entropy(z + shift, one, 4)) == pytest.approx(base, abs=1e-10)
    assert float(row_entropy(c * z, c * one, 4)) == pytest.approx(base, abs=1e-10)


# 7 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("gate", ["hard", "smooth"])
def test_07_gradient_of_the_thresholds(granularity, gate):
    attn, theta = some_attention(7), some_theta(7).requires_grad_()
    made = EntropyRegularizer(gamma=0.2, coef=1.0, granularity=granularity, gate=gate)
    (found,) = torch.autograd.grad(made(attn, theta)[0], theta)
    rows = torch.stack([attention_entropy(attn=one, reduce="row") for one in attn])  # layer batch head query
    if granularity == "head":
        rows = rows.mean((1, 3), keepdim=True)
    elif granularity == "head_per_sample":
        rows = rows.mean(3, keepdim=True)
    deviation = rows - theta.detach()[:, None, :, None] * math.log(6)
    deviation = deviation * (deviation.abs() > 0.2 * math.log(6))
    each = deviation.sum((1, 3)) if granularity == "row_sum" else deviation.mean((1, 3))
    torch.testing.assert_close(found, -2 * math.log(6) * each / (2 * 4))
    assert found.any()


def test_07_gradient_of_the_attention_against_finite_differences():
    scores = torch.randn(2, 3, 4, 4, dtype=F64, requires_grad=True)
    theta = torch.full((1, 3), 0.9, dtype=F64, requires_grad=True)
    made = EntropyRegularizer(gamma=0.01, coef=1.0, granularity="head")
    assert torch.autograd.gradcheck(lambda s, t: made([s.softmax(-1)], t)[0], (scores, theta))


def test_exact_zeros_in_the_probabilities_leave_finite_gradients():
    scores = torch.zeros(1, 1, 3, 3, dtype=F64, requires_grad=True)
    hidden = torch.tensor(
        [[0.0, -torch.inf, -torch.inf], [0.0, 1.0, -torch.inf], [0.0, -3000.0, 1.0]], dtype=F64
    )
    loss, _ = EntropyRegularizer(gamma=0.0, coef=1.0, granularity="row_sum")(
        [(scores + hidden).softmax(-1)], torch.ones(1, 1, dtype=F64)
    )
    loss.backward()
    assert scores.grad.isfinite().all()
    assert scores.grad.any()


# 8 ----------------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), gamma=st.floats(0, 0.6))
def test_08_sums_and_means(seed, gamma):
    attn, theta = some_attention(seed), some_theta(seed)
    value = {
        name: float(EntropyRegularizer(gamma=gamma, coef=1.0, granularity=name)(attn, theta)[0])
        for name in GRANULARITIES
    }
    assert value["row_sum"] == pytest.approx(value["row_mean"] * 3 * 6, rel=1e-12)
    open_gate = {
        name: float(EntropyRegularizer(gamma=0.0, coef=1.0, granularity=name)(attn, theta)[0])
        for name in GRANULARITIES
    }
    assert open_gate["head"] <= open_gate["head_per_sample"] + 1e-14
    assert open_gate["head_per_sample"] <= open_gate["row_mean"] + 1e-14


# 9 ----------------------------------------------------------------------------------------------------------------


def test_09_limits_of_the_scales_and_fusion():
    block = SoftmaxOnlyBlock(8, 2, context=5).double()
    x = torch.randn(3, 5, 8, dtype=F64)
    attended = x + block.attention(x)
    w, b = block.feed_forward.linear.weight, block.feed_forward.linear.bias
    torch.testing.assert_close(block(x), attended + attended @ w.T + b)  # alpha = beta = 1
    with torch.no_grad():
        block.feed_forward.alpha.fill_(1e18)
    torch.testing.assert_close(block(x), attended, atol=1e-14, rtol=0)
    with torch.no_grad():
        block.feed_forward.alpha.fill_(2.0)
        block.feed_forward.beta.fill_(3.0)
    torch.testing.assert_close(block(x), 3 * attended + (attended @ w.T + b) / 2)


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_09_fusing_a_linear_layer_changes_nothing(biases):
    up, down = nn.Linear(6, 24, bias=biases[0]).double(), nn.Linear(24, 6, bias=biases[1]).double()
    x = torch.randn(5, 6, dtype=F64)
    torch.testing.assert_close(fuse_linear(up, down)(x), down(up(x)))
    torch.testing.assert_close(ScaledFusedFFN.from_linear(up, down)(x), x + down(up(x)))
    assert (fuse_linear(up, down).bias is not None) == any(biases)


# 10 ---------------------------------------------------------------------------------------------------------------


@given(
    entropies=st.lists(st.floats(0, 4.0), min_size=1, max_size=12),
    T=st.integers(2, 500),
    seed=st.integers(0, 1000),
)
def test_10_histograms_sum_to_one_and_do_not_see_the_order(entropies, T, seed):
    e = torch.tensor([entropies], dtype=F64)
    found = diagnose_heads(e, T)
    for bins in found.bins.values():
        assert sum(bins) == pytest.approx(1.0)
    order = torch.randperm(len(entropies), generator=torch.Generator().manual_seed(seed))
    assert diagnose_heads(e[:, order], T).bins == found.bins
    assert found.references["log_T"] == pytest.approx(math.log(T))
    assert found.overload_frac > 0 or max(entropies) == 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_10_permuted_heads_permute_the_penalty(granularity):
    attn, theta = some_attention(10), some_theta(10).requires_grad_()
    made = EntropyRegularizer(gamma=0.2, coef=1.0, granularity=granularity)
    loss, _ = made(attn, theta)
    order = torch.tensor([2, 0, 3, 1])
    turned = theta.detach()[:, order].requires_grad_()
    again, _ = made([a[:, order] for a in attn], turned)
    torch.testing.assert_close(again, loss)
    (g,), (h,) = torch.autograd.grad(loss, theta), torch.autograd.grad(again, turned)
    torch.testing.assert_close(h, g[:, order])


# Diagnosis --------------------------------------------------------------------------------------------------------


def test_diagnosis_by_hand():
    entropy = torch.tensor([[0.0, 0.4, 1.2, 4.0], [2.0, 3.0, math.nan, 0.2]], dtype=F64)
    first = torch.tensor([[0.9, 0.1, 0.1, 0.0], [0.2, 0.2, 0.2, 0.5]], dtype=F64)
    found = diagnose_heads(entropy, 128, first)
    assert found.hist == pytest.approx((3 / 7, 1 / 7, 1 / 7, 2 / 7))
    assert (found.collapse_frac, found.overload_frac) == (found.hist[0], found.hist[3])
    assert found.sink_frac == pytest.approx(2 / 7)
    assert found.references == pytest.approx(
        {"max_observed": 4.0, "log_T": math.log(128), "causal": math.lgamma(129) / 128}
    )
    assert found.at("log_T") == pytest.approx((4 / 7, 1 / 7, 1 / 7, 1 / 7))
    assert math.isnan(diagnose_heads(entropy, 128).sink_frac)
    assert diagnose_heads(torch.zeros(1, 3), 8).hist == (1.0, 0.0, 0.0, 0.0)


def test_uniform_heads_need_the_fixed_reference():
    """A causal model whose heads all are uniform: on top by what was observed, and by what a causal head can reach."""
    zeros = torch.zeros(1, 4, 128, 2, dtype=F64)
    entropy = attention_rows(zeros, zeros, causal=True).entropy.mean((0, 2))[None]
    uniform, half = diagnose_heads(entropy, 128), diagnose_heads(entropy / 8, 128)
    assert uniform.hist == half.hist == (0.0, 0.0, 0.0, 1.0)
    assert uniform.at("causal") == (0.0, 0.0, 0.0, 1.0)
    assert half.at("causal") == (1.0, 0.0, 0.0, 0.0)


# Architectures ----------------------------------------------------------------------------------------------------


def decoder(name: str | Architecture = "SM(t)+ScFuFFN", seed: int = 0, **options) -> ReducedDecoder:
    sizes = {"vocab": 11, "width": 8, "layers": 3, "heads": 2, "context": 6} | options
    return ReducedDecoder(name, seed=seed, **sizes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_causal_and_has_the_nonlinearities_it_names(name):
    model = decoder(name).double().eval()  # in training the spectral norm changes from pass to pass
    ids = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0))
    logits = model(ids)
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    assert torch.equal(model(changed)[:, :4], logits[:, :4])
    assert not torch.equal(model(changed)[:, 4], logits[:, 4])
    kinds = {type(module) for module in model.modules()}
    assert (nn.LayerNorm in kinds) == ("LN" in name)
    assert (nn.GELU in kinds) == name.endswith("+G")
    assert (nn.ReLU in kinds) == name.endswith("+R")
    assert (TemperedAttention in kinds) == ("(t)" in name)
    assert (ScaledFusedFFN in kinds) == ("ScFu" in name)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["SM+SNorm", "SM(t)+ScFuFFN"])
def test_weights_depend_on_the_seed_alone(name):
    torch.manual_seed(1)
    one = decoder(name, seed=3)
    before = torch.rand(1)
    torch.manual_seed(1)
    two = decoder(name, seed=3)
    assert torch.equal(before, torch.rand(1))
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(decoder(name, seed=4).token.weight, one.token.weight)


def test_the_weight_norms_hold():
    spectral = decoder("SM+SNorm", width=16).blocks[0].feed_forward.up
    assert float(torch.linalg.matrix_norm(spectral.weight, 2).detach()) == pytest.approx(1.0, rel=0.05)
    plain, weight = decoder("SM"), decoder("SM+WNorm")
    torch.testing.assert_close(
        weight.blocks[1].feed_forward.up.weight, plain.blocks[1].feed_forward.up.weight
    )


def test_a_linear_decoder_fused_by_hand_is_the_same_function():
    plain, fused = decoder("SM").double(), decoder("SM+ScFuFFN").double()
    for mine, theirs in zip(fused.blocks, plain.blocks, strict=True):
        mine.attention = theirs.attention
        mine.feed_forward = ScaledFusedFFN.from_linear(theirs.feed_forward.up, theirs.feed_forward.down)
    fused.token, fused.position = plain.token, plain.position
    ids = torch.randint(0, 11, (2, 6))
    torch.testing.assert_close(fused(ids), plain(ids))


# The add-on -------------------------------------------------------------------------------------------------------


def gpt2(attention: str = "sdpa") -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    config._attn_implementation = attention
    return sharpened(GPT2LMHeadModel(config))


def llama(attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    config._attn_implementation = attention
    return sharpened(LlamaForCausalLM(config)).float()  # its eager softmax is float32 whatever the model is


def sharpened(model):
    """Weights large enough for attention to be far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 10
    return model.double().train()


REG = EntropyRegularizer(gamma=0.1, coef=0.5, granularity="head")


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_the_add_on_has_value_and_gradient_of_the_eager_probabilities(make, attention, padding):
    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.long)
    if padding != "none":
        mask[1, :3] = 0 if padding == "left" else 1
        mask[1, 4:] = 0 if padding == "right" else 1
    model, reference = make(attention), make("eager")
    attached = attach_entropy_regularizer(model, REG, theta_init=0.8)
    model(input_ids=ids, attention_mask=mask)
    loss = attached.penalty()
    loss.backward()
    theta = torch.full((2, 4), 0.8, dtype=F64, requires_grad=True)
    probabilities = reference(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    expected, stats = REG(probabilities, theta, query_mask=mask.bool())
    expected.backward()
    exact = make is gpt2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9 if exact else 1e-5)
    assert loss > 0
    torch.testing.assert_close(
        attached.theta.grad.double(), theta.grad, rtol=1e-6 if exact else 1e-4, atol=1e-9
    )
    assert {name: float(v) for name, v in attached.stats.items()} == pytest.approx(
        {name: float(v) for name, v in stats.items()}, rel=1e-5
    )
    other = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if name in other and other[name].grad is not None:
            torch.testing.assert_close(
                parameter.grad, other[name].grad, atol=1e-10 if exact else 1e-4, rtol=1e-3
            )
    assert any(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if name in other)


def test_a_mask_given_by_position_counts_as_well():
    ids, mask = torch.randint(0, 50, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    model = llama()
    attached = attach_entropy_regularizer(model, REG, theta_init=0.8)
    found = []
    for call in (lambda: model(ids, mask), lambda: model(ids, attention_mask=mask), lambda: model(ids)):
        call()
        found.append(attached.penalty().item())
    assert found[0] == found[1] != found[2]


def test_the_model_computes_what_it_did_and_is_left_as_it_was():
    model = gpt2()
    names, ids = list(model.state_dict()), torch.randint(0, 50, (2, 7))
    before = model(input_ids=ids).logits
    attached = attach_entropy_regularizer(model, REG)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert "entropy_thresholds.theta" in model.state_dict()
    attached.detach()
    assert list(model.state_dict()) == names
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    attach_entropy_regularizer(model, REG).detach()  # and again


def test_no_penalty_in_eval_mode_nor_twice():
    model, ids = gpt2(), torch.randint(0, 50, (2, 7))
    attached = attach_entropy_regularizer(model, REG, theta_init=0.9)
    model.eval()
    model(input_ids=ids)
    assert attached.penalty().item() == 0.0
    model.train()
    model(input_ids=ids)
    assert attached.penalty().item() > 0.0
    assert attached.penalty().item() == 0.0


def test_gradient_checkpointing_gives_the_same_gradient():
    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    gradients = []
    for checkpointed in (False, True):
        model = llama()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        attached = attach_entropy_regularizer(model, REG, theta_init=0.8)
        (model(input_ids=ids, labels=ids).loss + attached.penalty()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore")
def test_reentrant_checkpointing_is_refused():
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    attached = attach_entropy_regularizer(model, REG)
    model.enable_input_require_grads()
    model(input_ids=torch.randint(0, 50, (2, 7)))
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        attached.penalty()


def test_thresholds_come_back_when_they_are_attached_before_loading(tmp_path):
    model = gpt2()
    attach_entropy_regularizer(model, REG, theta_init=0.7)
    model.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path)
    attached = attach_entropy_regularizer(again, REG)
    assert (attached.theta == 0.5).all()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert (attached.theta - 0.7).abs().max() < 1e-6


def test_attention_that_is_not_finite_is_refused():
    model, ids = gpt2(), torch.randint(0, 50, (2, 7))
    attached = attach_entropy_regularizer(model, REG)
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match="NaN or inf"):
        collect_attention_entropy(model, ids)
    model(input_ids=ids)
    with pytest.raises(DataError, match="NaN or inf"):
        attached.penalty()


def test_thresholds_train_move_copy_and_keep_out_of_weight_decay():
    model = gpt2()
    attached = attach_entropy_regularizer(model, REG, theta_init=0.9)
    own, thresholds = attached.parameter_groups(1e-3, theta_lr_scale=10.0)
    assert thresholds == {"params": [attached.theta], "lr": 1e-2, "weight_decay": 0.0}
    assert len(own["params"]) == len(list(model.parameters())) - 1
    optimizer = torch.optim.AdamW([own, thresholds])
    ids = torch.randint(0, 50, (2, 7))
    model(input_ids=ids)
    attached.penalty().backward()
    optimizer.step()
    assert (attached.theta < 0.9).any()
    copied = copy.deepcopy(model)
    copied(input_ids=ids)
    assert copied.entropy_thresholds.penalty().item() > 0
    assert attached.penalty().item() == 0.0
    attached.detach()
    frozen = attach_entropy_regularizer(model, REG, freeze_theta=True)
    assert frozen.parameter_groups(1e-3)[1]["params"] == []
    with pytest.raises(DataError, match="attached to no model"):
        attached.parameter_groups(1e-3)


def test_the_penalty_keeps_no_matrix_of_attention():
    model, kept, length = decoder(context=128).train(), [], 128
    attached = attach_entropy_regularizer(model, REG, layers=3, heads=2)
    model(torch.randint(0, 11, (1, length)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        penalty = attached.penalty()
    penalty.backward()
    assert max(kept) < length * length / 2
    assert sum(kept) < 3 * 2 * length * length


def test_models_of_plain_torch():
    model = decoder().double()
    attached = attach_entropy_regularizer(model, REG, layers=3, heads=2, theta_init=0.9)
    ids = torch.randint(0, 11, (2, 6))
    model(ids)
    attached.penalty().backward()
    assert model.blocks[0].attention.raw_temperature.grad.any()


def test_collected_entropies_are_those_of_eager_attention():
    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0
    found = collect_attention_entropy(llama().eval(), {"input_ids": ids, "attention_mask": mask})
    probabilities = torch.stack(
        llama("eager").eval()(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    )
    rows = torch.special.entr(probabilities).sum(-1)
    kept = mask.bool()[None, :, None]
    expected = torch.where(kept, rows, 0).sum((1, 3)) / mask.sum()
    torch.testing.assert_close(found.entropy, expected.to(found.entropy.dtype))
    assert found.T == 7
    assert len(found.layers) == 2
    assert found.diagnose() == diagnose_heads(found.entropy, 7, found.first)


# Bad input --------------------------------------------------------------------------------------------------------


def test_batches_and_samples_without_a_row_give_zero_and_no_nan():
    attn, theta = some_attention(11), some_theta(11).requires_grad_()
    mask = torch.zeros(3, 6, dtype=torch.bool)
    for granularity in GRANULARITIES:
        for reference in ("log_T", "causal"):
            made = EntropyRegularizer(coef=1.0, granularity=granularity, reference=reference)
            loss, stats = made(attn, theta, query_mask=mask)
            (g,) = torch.autograd.grad(loss, theta)
            assert loss.item() == 0.0
            assert not g.any()
            assert all(value.isfinite().all() for value in stats.values())


class WritesItsOwnSoftmax(nn.Module):
    def forward(self, x):
        return x.softmax(-1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EntropyRegularizer(gamma=-0.1), ConfigError, "gamma is -0.1"),
        (lambda: EntropyRegularizer(coef=math.nan), ConfigError, "coef is nan"),
        (lambda: EntropyRegularizer(eps=-1.0), ConfigError, "eps is -1"),
        (lambda: EntropyRegularizer(context_size=1), ConfigError, "context_size is 1"),
        (lambda: REG([], torch.ones(1, 1)), DataError, "no layer"),
        (lambda: REG(some_attention(0), torch.ones(3, 4)), DataError, "theta is 3x4; give 2 layers x 4 heads"),
        (lambda: REG([*some_attention(0), *some_attention(0, time=5)], torch.ones(1, 4)), DataError, "differ in shape"),
        (lambda: diagnose_heads(torch.ones(1, 2), 1), DataError, "T is 1"),
        (lambda: diagnose_heads(-torch.ones(1, 2), 8), DataError, "not negative"),
        (lambda: diagnose_heads(torch.full((1, 2), math.nan), 8), DataError, "at least one head"),
        (lambda: diagnose_heads(torch.zeros(1, 2), 8).at("log"), DataError, "no reference 'log'"),
        (lambda: CausalAttention(7, 2), ConfigError, "width 7 cannot be shared by 2 heads"),
        (lambda: TemperedAttention(4, 2, 3, t_init=0.0), ConfigError, "t_init is 0"),
        (lambda: TemperedAttention(4, 2, 0), ConfigError, "context is 0"),
        (lambda: Architecture(norm=True, feed_forward="scaled-fused"), ConfigError, "replaces normalisation"),
        (lambda: decoder("SM+X"), ConfigError, "unknown architecture 'SM\\+X'; known: SM\\+LN\\+G"),
        (lambda: decoder()(torch.zeros(1, 7, dtype=torch.long)), DataError, "7 tokens, but the decoder has 6"),
        (lambda: fuse_linear(nn.Linear(2, 3), nn.Linear(4, 2)), DataError, "3 features out, but 4 in"),
        (lambda: ScaledFusedFFN.from_linear(nn.Linear(2, 3), nn.Linear(3, 4)), DataError, "2 features in, but 4"),
        (lambda: attach_entropy_regularizer(gpt2(), REG, theta_init=2.0), ConfigError, "theta_init is 2"),
        (lambda: attach_entropy_regularizer(nn.Linear(2, 2), REG), ConfigError, "Linear has no config"),
        (lambda: collect_attention_entropy(gpt2(), {}), DataError, "give token ids"),
        (lambda: collect_attention_entropy(WritesItsOwnSoftmax(), torch.ones(2, 3)), ConfigError, "looked for"),
    ],
)  # fmt: skip
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_no_kernel_gives_is_said():
    with pytest.raises(DataError, match="attn_implementation='eager'"):
        REG([None], torch.ones(1, 4))


def test_refusals_of_the_add_on():
    model = gpt2()
    attach_entropy_regularizer(model, REG)
    with pytest.raises(ConfigError, match="detach\\(\\) it first"):
        attach_entropy_regularizer(model, REG)
    wrong = gpt2()
    attached = attach_entropy_regularizer(wrong, REG, layers=3)
    wrong(input_ids=torch.randint(0, 50, (2, 7)))
    with pytest.raises(ConfigError, match="in 2 layers with 4 heads, the thresholds are for 3 and 4"):
        attached.penalty()
    silent = WritesItsOwnSoftmax()
    attached = attach_entropy_regularizer(silent, REG, layers=1, heads=1)
    silent(torch.ones(2, 3))
    with pytest.raises(ConfigError, match="no attention was seen in WritesItsOwnSoftmax; looked for"):
        attached.penalty()
    frozen = gpt2().requires_grad_(False)
    attached = attach_entropy_regularizer(frozen, REG)
    frozen(input_ids=torch.randint(0, 50, (2, 7)))
    with pytest.raises(ConfigError, match="no gradient"):
        attached.penalty()


@pytest.mark.parametrize("option", ["reference", "granularity", "gate"])
def test_unknown_choices_are_refused(option):
    with pytest.raises((ConfigError, TypeError), match=option):
        EntropyRegularizer(**{option: "other"})
