"""Fused token statistics against full log-softmax autograd in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.min_p import LogMassAbove
from uncollapse.measure.statistics import (
    Collision,
    Entropy,
    LogKeptMass,
    Logp,
    MaxLogp,
    NucleusEntropy,
    NucleusMass,
    Statistic,
    TemperedLogp,
    TopKMass,
    Varentropy,
)
from uncollapse.measure.token_stats import _check_shapes, token_stats, token_stats_from_logits

ALL = (
    Logp(),
    Entropy(),
    Collision(),
    Varentropy(),
    MaxLogp(),
    TemperedLogp(0.7),
    NucleusMass(0.8),
    NucleusMass(0.8, "released"),
    NucleusEntropy(0.8),
    NucleusEntropy(0.8, "released"),
    TopKMass(5),
    LogKeptMass(0.1),
    LogMassAbove(0.02),
)
LEAN = (Logp(), Entropy())


def nucleus(p, share, mode):
    """Membership by a plain loop over the sorted row."""
    keep = torch.zeros_like(p, dtype=torch.bool)
    for row, inside in zip(p, keep, strict=True):
        mass = 0.0
        for v in row.argsort(descending=True, stable=True).tolist():
            after = mass + row[v].item()
            if (mass < share) if mode == "standard" else (after < share):
                inside[v] = True
            mass = after
    return keep


def naive(stat, logits, token):
    """The definition, with autograd doing the derivative."""
    logp = logits.log_softmax(-1)
    p = logp.exp()
    plogp = torch.where(p > 0, p * torch.where(p > 0, logp, 0), 0)
    entropy = -plogp.sum(-1)
    picked = logp.gather(-1, token[:, None])[:, 0]
    match stat:
        case Logp():
            return picked
        case Entropy():
            return entropy
        case Collision():
            return (p * plogp).sum(-1) + entropy * (p * p).sum(-1)
        case Varentropy():
            return (plogp * torch.where(p > 0, logp, 0)).sum(-1) - entropy**2
        case MaxLogp():
            return logp.max(-1).values
        case TemperedLogp(temperature=tau):
            return (logits / tau).log_softmax(-1).gather(-1, token[:, None])[:, 0]
        case NucleusMass(p=share, nucleus=mode):
            return (p * nucleus(p.detach(), share, mode)).sum(-1)
        case NucleusEntropy(p=share, nucleus=mode):
            keep = nucleus(p.detach(), share, mode)
            q = p * keep / (p * keep).sum(-1, keepdim=True).clamp(min=1e-300)
            return -(torch.where(q > 0, q, 1).log() * q).sum(-1)
        case TopKMass(k=k):
            return p.topk(k, -1).values.sum(-1)
        case LogKeptMass(kappa=kappa):
            return (p * (p > kappa * p.max(-1, keepdim=True).values)).sum(-1).log()
        case LogMassAbove(tau=tau):
            return (p * ((p > tau) | (p >= p.max(-1, keepdim=True).values))).sum(-1).log()
    raise AssertionError(stat)


def problem(n=7, d=5, v=31, *, seed=0, dtype=torch.float64, scale=1.5, bias=True):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=dtype).mul_(scale).requires_grad_()
    weight = torch.randn(v, d, generator=g, dtype=dtype).requires_grad_()
    shift = torch.randn(v, generator=g, dtype=dtype).requires_grad_() if bias else None
    token = torch.randint(0, v, (n,), generator=g)
    return hidden, weight, shift, token


def grads(loss, *inputs):
    return torch.autograd.grad(loss, [x for x in inputs if x is not None])


def weighted(values):
    """A scalar in which every statistic of every token has a weight of its own."""
    total = 0
    for i, value in enumerate(values):
        n = value.numel()
        total = total + (value.reshape(-1) * torch.linspace(0.3 + i, -1.1, n, dtype=value.dtype)).sum()
    return total


@pytest.mark.parametrize("stats", [LEAN, (Logp(),), (Entropy(),), ALL, *[(s,) for s in ALL[2:]]], ids=str)
@pytest.mark.parametrize(("n", "d", "v"), [(3, 47, 31), (47, 31, 13), (1, 3, 257)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("bias", [True, False])
def test_head_matches_full_softmax(stats, n, d, v, temperature, bias):
    hidden, weight, shift, token = problem(n, d, v, bias=bias, scale=2 / math.sqrt(d))
    logits = (hidden @ weight.T + (0 if shift is None else shift)) / temperature
    expected = [naive(s, logits, token) for s in stats]
    out = token_stats(
        hidden, token, weight=weight, bias=shift, temperature=temperature, stats=stats, chunk=64
    )
    torch.testing.assert_close([out[s] for s in stats], expected, rtol=1e-10, atol=1e-10)
    ours = grads(weighted(out.values()), hidden, weight, shift)
    theirs = grads(weighted(expected), hidden, weight, shift)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("stats", [LEAN, (Logp(),), (Entropy(),), ALL], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_logits_match_full_softmax(stats, temperature):
    logits = torch.randn(11, 47, generator=torch.Generator().manual_seed(3), dtype=torch.float64).mul_(3)
    logits.requires_grad_()
    token = torch.arange(11)
    expected = [naive(s, logits / temperature, token) for s in stats]
    out = token_stats_from_logits(logits, token, temperature=temperature, stats=stats, chunk=100)
    torch.testing.assert_close(list(out.values()), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        grads(weighted(out.values()), logits), grads(weighted(expected), logits), rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("stats", [LEAN, ALL], ids=["lean", "all"])
def test_gradcheck(stats):
    hidden, weight, shift, token = problem(3, 4, 7)

    def head(h, w, b):
        return tuple(token_stats(h, token, weight=w, bias=b, temperature=0.9, stats=stats, chunk=5).values())

    def given_logits(z):
        return tuple(token_stats_from_logits(z, token, temperature=0.9, stats=stats, chunk=5).values())

    assert torch.autograd.gradcheck(head, (hidden, weight, shift))
    assert torch.autograd.gradcheck(given_logits, ((hidden @ weight.T).detach().requires_grad_(),))


@pytest.mark.parametrize("stats", [LEAN, ALL], ids=["lean", "all"])
def test_more_rows_than_one_block(stats):
    hidden, weight, shift, token = problem(4099, 3, 11)
    out = token_stats(hidden, token, weight=weight, bias=shift, stats=stats)
    expected = [naive(s, hidden @ weight.T + shift, token) for s in stats]
    torch.testing.assert_close(list(out.values()), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        grads(weighted(out.values()), hidden, weight, shift),
        grads(weighted(expected), hidden, weight, shift),
        rtol=1e-9,
        atol=1e-9,
    )


@settings(max_examples=25, deadline=None)
@given(chunk=st.integers(1, 900), stats=st.sampled_from([LEAN, ALL]), seed=st.integers(0, 99))
def test_chunk_changes_nothing(chunk, stats, seed):
    hidden, weight, shift, token = problem(seed=seed)
    whole = token_stats(hidden, token, weight=weight, bias=shift, stats=stats)
    parts = token_stats(hidden, token, weight=weight, bias=shift, stats=stats, chunk=chunk)
    torch.testing.assert_close(list(parts.values()), list(whole.values()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        grads(weighted(parts.values()), hidden, weight, shift),
        grads(weighted(whole.values()), hidden, weight, shift),
        rtol=1e-11,
        atol=1e-11,
    )


@settings(max_examples=25, deadline=None)
@given(data=st.data(), stats=st.sampled_from([LEAN, ALL]))
def test_masked_positions_do_not_exist(data, stats):
    hidden, weight, shift, token = problem(6, 5, 31)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=6, max_size=6)))
    with torch.no_grad():
        hidden[~mask] = data.draw(st.sampled_from([math.nan, math.inf, 1e300]))
    padded = torch.where(mask, token, -100)
    out = token_stats(
        hidden.view(2, 3, 5), padded.view(2, 3), weight=weight, bias=shift, mask=mask.view(2, 3), stats=stats
    )
    assert all(value.shape == (2, 3) for value in out.values())
    got = [value.reshape(-1) for value in out.values()]
    alone = list(token_stats(hidden[mask], token[mask], weight=weight, bias=shift, stats=stats).values())
    torch.testing.assert_close([g[mask] for g in got], alone, rtol=1e-12, atol=1e-12)
    assert all((g[~mask] == 0).all() for g in got)
    of_hidden, of_weight, _ = grads(sum(g.sum() for g in got), hidden, weight, shift)
    assert (of_hidden[~mask] == 0).all()
    torch.testing.assert_close(
        (of_hidden, of_weight), grads(sum(a.sum() for a in alone), hidden, weight), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("stats", [LEAN, ALL], ids=["lean", "all"])
@pytest.mark.parametrize("how", ["empty", "all masked"])
def test_nothing_to_measure(stats, how):
    hidden, weight, shift, token = problem(0 if how == "empty" else 4)
    mask = torch.zeros(len(token), dtype=torch.bool) if how == "all masked" else None
    out = token_stats(hidden, token, weight=weight, bias=shift, mask=mask, stats=stats)
    assert all(value.shape == token.shape and (value == 0).all() for value in out.values())
    for grad in grads(sum(v.sum() for v in out.values()), hidden, weight, shift):
        assert (grad == 0).all()


@pytest.mark.parametrize("stats", [LEAN, ALL], ids=["lean", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_excluded_tokens(stats, dtype):
    """-inf logits (padded vocabulary) give no 0 * -inf, neither forward nor backward."""
    hidden, weight, _, token = problem(5, 4, 13, dtype=dtype)
    shift = torch.zeros(13, dtype=dtype)
    shift[[0, 7, 12]] = -math.inf
    token = token.clamp(1, 6)
    out = token_stats(hidden, token, weight=weight, bias=shift, stats=stats, chunk=20)
    kept = shift > -math.inf
    inside = kept.cumsum(0)[token] - 1
    expected = token_stats(hidden, inside, weight=weight[kept], stats=stats)
    torch.testing.assert_close(out, expected)
    of_hidden, of_weight = grads(sum(v.sum() for v in out.values()), hidden, weight)
    assert of_hidden.isfinite().all()
    assert (of_weight[~kept] == 0).all()
    logits = (hidden @ weight.T + shift).detach().requires_grad_()
    out = token_stats_from_logits(logits, token, stats=stats)
    assert all(v.isfinite().all() for v in out.values())
    (of_logits,) = grads(sum(v.sum() for v in out.values()), logits)
    assert of_logits.isfinite().all()
    assert (of_logits[:, ~kept] == 0).all()


def test_sampled_token_excluded():
    logits = torch.tensor([[0.0, 1.0, -math.inf], [5.0, 1.0, 0.0]], requires_grad=True)
    out = token_stats_from_logits(logits, torch.tensor([2, 0]))
    assert out[Logp()][0] == -math.inf
    torch.testing.assert_close(out[Entropy()], naive(Entropy(), logits, torch.tensor([1, 0])))
    (grad,) = grads(out[Entropy()].sum(), logits)
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_improbable_token_is_no_overflow(dtype):
    """The streamed sums are relative to the sampled token; 500 nats below the best must still work."""
    logits = torch.zeros(3, 9, dtype=dtype)
    logits[:, 3], logits[1, 4], logits[2, 3] = 900, 900, 60
    logits.requires_grad_()
    token = torch.tensor([0, 0, 1])
    out = token_stats_from_logits(logits, token)
    torch.testing.assert_close(out[Logp()], naive(Logp(), logits, token))
    torch.testing.assert_close(out[Entropy()], naive(Entropy(), logits, token), rtol=1e-5, atol=1e-5)
    eye = torch.eye(9, dtype=dtype)
    head = token_stats(logits, token, weight=eye, chunk=9)
    torch.testing.assert_close(head, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        grads(weighted(head.values()), logits), grads(weighted(out.values()), logits), rtol=1e-5, atol=1e-5
    )


def test_certain_token():
    logits = torch.tensor([[100.0, 0.0, 0.0]], requires_grad=True)
    out = token_stats_from_logits(logits, torch.tensor([0]), stats=ALL)
    assert out[Logp()].item() == 0
    assert 0 <= out[Entropy()].item() < 1e-30
    assert out[NucleusEntropy(0.8, "released")].item() == 0


@settings(max_examples=40, deadline=None)
@given(
    v=st.integers(1, 60),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_ranges(v, scale, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(5, v, generator=g) * scale).to(dtype)
    out = token_stats_from_logits(logits, torch.randint(0, v, (5,), generator=g), stats=ALL)
    slack = 1e-5
    assert (out[Entropy()] >= 0).all()
    assert (out[Entropy()] <= math.log(v) + slack).all()
    assert (out[Logp()] <= 0).all()
    assert (out[Varentropy()] >= 0).all()
    mass, inside = out[NucleusMass(0.8)], out[NucleusEntropy(0.8)]
    assert (mass >= 0.8 - slack).all()
    assert (inside <= out[Entropy()] + mass.log() + slack).all()
    assert (out[NucleusMass(0.8, "released")] < 0.8 + slack).all()
    assert (out[LogKeptMass(0.1)] <= slack).all()
    streamed = token_stats_from_logits(logits, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(streamed[Entropy()], out[Entropy()], rtol=1e-4, atol=1e-4)


def test_bfloat16_accumulates_in_float32():
    hidden, weight, _, token = problem(17, 31, 47, dtype=torch.float32, bias=False, scale=0.4)
    half, head = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    for stats in (LEAN, ALL):
        out = token_stats(half, token, weight=head, stats=stats)
        assert all(v.dtype == torch.float32 for v in out.values())
        exact = token_stats(half.double(), token, weight=head.double(), stats=stats)
        torch.testing.assert_close(
            [v.double() for v in out.values()], list(exact.values()), rtol=1e-4, atol=1e-5
        )
        ours = grads(weighted(out.values()), half, head)
        theirs = grads(weighted(exact.values()), half, head)
        assert ours[0].dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_half_precision_logits_keep_small_gradients():
    """Near p = 1 the one-hot part and p cancel; rounding them one by one would leave noise of a thousandth."""
    logits = torch.zeros(4, 9, dtype=torch.bfloat16)
    logits[:, 2] = torch.tensor([4.0, 6.0, 8.0, 12.0])
    logits.requires_grad_()
    token = torch.full((4,), 2)
    exact = logits.detach().double().requires_grad_()
    for stats in ((Logp(),), LEAN, (Logp(), MaxLogp())):
        ours = grads(weighted(token_stats_from_logits(logits, token, stats=stats).values()), logits)[0]
        theirs = grads(weighted(token_stats_from_logits(exact, token, stats=stats).values()), exact)[0]
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-7, atol=1e-6)


def test_autocast_does_not_round():
    hidden, weight, shift, token = problem(dtype=torch.float32)
    plain = token_stats(hidden, token, weight=weight, bias=shift)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = token_stats(hidden, token, weight=weight, bias=shift)
        inside = grads(weighted(cast.values()), hidden, weight)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)
    torch.testing.assert_close(inside, grads(weighted(plain.values()), hidden, weight), rtol=0, atol=0)


def test_graph_only_where_needed():
    hidden, weight, _, token = problem()
    with torch.no_grad():
        assert not any(v.requires_grad for v in token_stats(hidden, token, weight=weight).values())
    frozen = token_stats(hidden, token, weight=weight.detach())[Logp()]
    frozen.sum().backward()
    assert weight.grad is None
    only_head = token_stats(hidden.detach(), token, weight=weight)[Entropy()]
    only_head.sum().backward()
    assert weight.grad is not None


def test_nucleus_readings():
    """The two readings on the distributions of SIREN's section 3.1."""
    for p, standard, released in [((0.6, 0.3, 0.1), 0.6365, 0.0), ((0.45, 0.3, 0.15, 0.1), 1.0114, 0.6730)]:
        logits = torch.tensor([p], dtype=torch.float64).log().requires_grad_()
        stats = NucleusEntropy(0.8), NucleusEntropy(0.8, "released")
        out = token_stats_from_logits(logits, torch.tensor([0]), stats=stats)
        assert out[stats[0]].item() == pytest.approx(standard, abs=5e-5)
        assert out[stats[1]].item() == pytest.approx(released, abs=5e-5)
        (grad,) = grads(out[stats[0]].sum(), logits)
        assert grad[0, -1] == 0
        assert grad.sum().item() == pytest.approx(0, abs=1e-15)
    uniform = torch.zeros(1, 51, dtype=torch.float64)
    out = token_stats_from_logits(uniform, torch.tensor([0]), stats=(NucleusEntropy(0.8),))
    assert out[NucleusEntropy(0.8)].item() == pytest.approx(math.log(41), abs=1e-12)


def test_statistics_are_keys():
    assert len({Logp(), Logp(), NucleusEntropy(0.8), NucleusEntropy(p=0.8), NucleusEntropy(0.9)}) == 3
    hidden, weight, _, token = problem()
    out = token_stats(hidden, token, weight=weight, stats=[Entropy(), Entropy()])
    assert list(out) == [Entropy()]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, ConfigError, "temperature is 0.0"),
        ({"temperature": math.nan}, ConfigError, "temperature is nan"),
        ({"stats": ()}, ConfigError, "stats is empty"),
        ({"chunk": 0}, ConfigError, "chunk is 0"),
        ({"token": torch.full((7,), 31)}, DataError, "from 31 to 31, the vocabulary from 0 to 30"),
        ({"token": torch.full((7,), -100)}, DataError, "mask padding with mask="),
    ],
)
def test_refusals(options, error, message):
    hidden, weight, _, token = problem()
    token = options.pop("token", token)
    with pytest.raises(error, match=message):
        token_stats(hidden, token, weight=weight, **options)


def test_shapes_that_do_not_belong_together():
    x, token = torch.zeros(2, 4, 5), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(DataError, match=r"\(2, 4, 5\) and \(2, 3\); each position needs one token"):
        _check_shapes(x, token, None)
    with pytest.raises(DataError, match=r"mask \(2, 3\)"):
        _check_shapes(x, torch.zeros(2, 4, dtype=torch.long), token.bool())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NucleusMass(0.0), "NucleusMass: p is 0.0"),
        (lambda: NucleusEntropy(1.5), "NucleusEntropy: p is 1.5"),
        (lambda: NucleusEntropy(0.5, "nope"), "nucleus is 'nope'"),
        (lambda: TopKMass(0), "k is 0"),
        (lambda: TemperedLogp(-1.0), "temperature is -1.0"),
        (lambda: LogKeptMass(1.0), "kappa is 1.0"),
    ],
)
def test_statistics_refuse(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_every_statistic_is_tested():
    def leaves(cls):
        below = [leaf for sub in cls.__subclasses__() for leaf in leaves(sub)]
        return below or [cls]

    assert {type(s) for s in ALL} == {c for c in leaves(Statistic) if c.__module__.startswith("uncollapse")}


@pytest.mark.parametrize("budget", [0, 200, 10**9])
def test_what_is_kept_from_the_forward_pass_changes_nothing(monkeypatch, budget):
    """Nothing, a part or all of the logits; a second backward pass finds them gone and recomputes."""
    from uncollapse.measure import _vocabulary

    monkeypatch.setattr(_vocabulary, "KEPT_CPU", budget)
    monkeypatch.setattr(_vocabulary, "STREAM_CPU", 64)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(11, 5, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(31, 5, generator=generator, dtype=torch.float64).requires_grad_()
    token = torch.randint(31, (11,), generator=generator)
    logp = (hidden @ weight.t()).log_softmax(-1)
    expected = torch.autograd.grad(
        logp.gather(-1, token[:, None]).sum() - 0.3 * (logp.exp() * logp).sum(), (hidden, weight)
    )
    found = token_stats(hidden, token, weight=weight)
    loss = found[Logp()].sum() + 0.3 * found[Entropy()].sum()
    for retain in (True, False):
        grads = torch.autograd.grad(loss, (hidden, weight), retain_graph=retain)
        for ours, reference in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours, reference)
