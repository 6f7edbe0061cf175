"""Metrics of linguistic collapse against formulas written out over all pairs; numbers are the spec's exact checks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate
from torch import nn

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure import simplex_etf
from uncollapse.representation.linguistic_collapse import (
    NC4Accumulator,
    StreamingNC,
    collect_lm_features,
    uniform_log_kernel,
)


def statistics_of(mean: torch.Tensor, variance: torch.Tensor | float = 0.0, samples: int = 2) -> StreamingNC:
    """Class statistics with these means and biased variances."""
    found = StreamingNC(*mean.shape)
    found.count += samples
    found.mean += mean
    found.scatter += torch.as_tensor(variance) * samples
    return found


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(draw(width, width, seed=seed))[0]


def over_all_pairs(
    mean: torch.Tensor, variance: torch.Tensor, W: torch.Tensor, *, power: float = 1, riesz: float = 3.0
) -> dict[str, float]:
    """Every metric with C x C arrays."""
    mu, v, w = mean.numpy(), variance.numpy(), W.numpy()
    size = len(mu)
    m = mu - mu.mean(0)
    norm = np.linalg.norm(m, axis=1)
    u = m / norm[:, None]
    i, j = np.triu_indices(size, 1)
    square = ((mu[i] - mu[j]) ** 2).sum(1)
    apart = np.sqrt(((u[i] - u[j]) ** 2).sum(1))
    gram, cosines = m @ m.T, (u @ u.T)[i, j]
    frame = (np.eye(size) - 1 / size) / math.sqrt(size - 1)
    head = w / np.linalg.norm(w, axis=1, keepdims=True)
    align, product = (head * u).sum(1), (w * m).sum(1)
    kernel = -np.log(apart)
    dual = w @ m.T

    def cov(x: np.ndarray) -> float:
        return x.std() / abs(x.mean())

    return {
        "nc1/cdnv/mean": ((v[i] + v[j]) / (2 * square**power)).mean(),
        "nc1/ratio": v.mean() / square.mean(),
        "nc2/norm/cov": cov(norm),
        "nc2/log_norm/cov": cov(np.log(norm)),
        "nc2/interference/mean": gram[i, j].mean(),
        "nc2/interference/cov": cov(gram[i, j]),
        "nc2/cosine/mean": cosines.mean(),
        "nc2/cosine/std": cosines.std(),
        "nc2/etf_error": np.linalg.norm(gram / np.linalg.norm(gram) - frame),
        "gnc2/log_kernel/mean": kernel.mean(),
        "gnc2/log_kernel/var": kernel.var(),
        "gnc2/log_kernel/cov": cov(kernel),
        "gnc2/distance/mean": apart.mean(),
        "gnc2/distance/cov": cov(apart),
        "gnc2/riesz/log_mean": math.log((apart**-riesz).mean()),
        "gnc2/riesz/cov": cov(apart**-riesz),
        "nc3/cosine/mean": align.mean(),
        "nc3/distance/mean": np.linalg.norm(head - u, axis=1).mean(),
        "nc3/dual_error": np.linalg.norm(dual / np.linalg.norm(dual) - frame),
        "unc3/cosine/var": align.var(),
        "unc3/cosine/cov": cov(align),
        "unc3/product/cov": cov(product),
    }


# ---- check 7: without C x C ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "width"), [(300, 20), (7, 12), (2, 3)])
@pytest.mark.parametrize("power", [1, 2])
def test_7_closed_forms_and_tiles_are_the_formulas_over_all_pairs(classes, width, power):
    mean, W, variance = draw(classes, width), draw(classes, width, seed=1), draw(classes, seed=2).exp()
    expected = over_all_pairs(mean, variance, W, power=power)
    statistics = statistics_of(mean, variance)
    for tile in (64, 2048):
        found = statistics.compute(W, cdnv_power=power, pairs="exact", tile=tile, riesz=3)
        for name, value in expected.items():
            tolerance = (
                1e-7 if classes == 2 else 1e-10
            )  # one pair: its variance is 0, and CoV the root of rounding
            assert found[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
        assert found.pairs == classes * (classes - 1) // 2


def test_7_tiles_of_float32_stay_exact_where_directions_nearly_coincide():
    mean, W = draw(60, 8), draw(60, 8, seed=1)
    mean[30:] = mean[:30] * (1 + 1e-3) + 1e-4 * draw(30, 8, seed=3)
    variance = draw(60, seed=2).exp()
    expected = over_all_pairs(mean, variance, W)
    found = statistics_of(mean, variance).compute(W, tile=16, tile_dtype=torch.float32, riesz=3)
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def test_7_only_classes_with_enough_samples_count():
    mean, W, variance = draw(40, 6), draw(40, 6, seed=1), draw(40, seed=2).exp()
    statistics = statistics_of(mean, variance)
    statistics.count[::3] = 1
    kept = statistics.count >= 2
    expected = over_all_pairs(mean[kept], variance[kept], W[kept])
    found = statistics.compute(W, n_min=2, riesz=3)
    assert found.classes == int(kept.sum())
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-10), name


def test_7_sampled_pairs_are_unbiased_and_their_errors_are_right():
    statistics = statistics_of(draw(120, 10), draw(120, seed=2).exp())
    truth = statistics.compute(pairs="exact", riesz=2)
    runs = [statistics.compute(pairs=2000, seed=seed, riesz=2) for seed in range(60)]
    assert runs[0].pairs == 10 * 30 * 6  # rounds, groups of 4
    assert runs[0].values == statistics.compute(pairs=2000, seed=0, riesz=2).values
    of_pairs = {name for name in truth.values if "cdnv" in name or "gnc2" in name}
    assert set(runs[0].standard_errors) == of_pairs - {"gnc2/riesz/cov"}
    for name in runs[0].standard_errors:
        off = np.array([(run[name] - truth[name]) / run.standard_errors[name] for run in runs])
        assert abs(off.mean()) < 4 / math.sqrt(60), name
        assert 0.7 < off.std() < 1.4, name


def test_7_sampled_pairs_treat_classes_alike():
    """Where a kernel is a sum over its two classes, balanced rounds leave no noise at all."""
    mean = simplex_etf(60, 60, torch.Generator().manual_seed(0)).double()
    statistics = statistics_of(mean, draw(60, seed=2).exp())
    few = statistics.compute(pairs=300)
    assert few.pairs == 300
    assert few["nc1/cdnv/mean"] == pytest.approx(statistics.compute(pairs="exact")["nc1/cdnv/mean"], rel=1e-9)
    assert few.standard_errors["nc1/cdnv/mean"] < 1e-9


# ---- checks 2, 5, 6, 8: frames ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 7, 10])
def test_2_a_simplex_etf(classes):
    length = 1.7
    mean = simplex_etf(classes, 12, torch.Generator().manual_seed(0)).double()
    mean = length * mean / mean.norm(dim=1, keepdim=True) + draw(12, seed=5)
    centred = mean - mean.mean(0)
    found = statistics_of(mean).compute(2.5 * centred)
    expected = {
        "nc2/norm/cov": 0,
        "nc2/interference/mean": -(length**2) / (classes - 1),
        "nc2/cosine/mean": -1 / (classes - 1),
        "nc2/cosine/std": 0,
        "nc2/etf_error": 0,
        "gnc2/log_kernel/mean": -0.5 * math.log(2 * classes / (classes - 1)),
        "gnc2/log_kernel/var": 0,
        "nc3/cosine/mean": 1,
        "nc3/distance/mean": 0,
        "nc3/dual_error": 0,
        "unc3/cosine/var": 0,
        "nc1/cdnv/mean": 0,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-7), name


def test_2_nc4_of_an_etf_needs_means_about_zero_or_a_bias():
    centred = simplex_etf(7, 12, torch.Generator().manual_seed(0)).double()
    shift = 3 * draw(12, seed=5)
    counts, y = torch.ones(7, dtype=torch.long), torch.arange(7)

    def agreement(mean: torch.Tensor, b: torch.Tensor | None) -> float:
        return (
            NC4Accumulator(mean, counts, centred, b, dtype=torch.float64).update(mean, y).compute().full_head
        )

    assert agreement(centred, None) == 1
    assert agreement(centred + shift, -(centred @ shift)) == 1
    assert agreement(centred + shift, None) < 1


def test_5_noise_of_equal_size_around_means_at_equal_distance():
    classes, width, sigma = 6, 8, 0.3
    mean = simplex_etf(classes, width, torch.Generator().manual_seed(0)).double()
    distance = float((mean[0] - mean[1]).norm())
    found = statistics_of(mean, width * sigma**2).compute()
    assert found["nc1/cdnv/mean"] == pytest.approx(width * sigma**2 / distance**2)
    assert found["nc1/ratio"] == pytest.approx(width * sigma**2 / distance**2)


def test_5_the_unbiased_ratio_is_right_on_average_where_the_plain_one_is_not():
    classes, width, sigma = 40, 8, 1.0
    mean = draw(classes, width)
    truth = width * sigma**2 / float(torch.pdist(mean).square().mean())
    y = torch.arange(classes).repeat_interleave(3)
    runs = [
        StreamingNC(classes, width).update(mean[y] + sigma * draw(len(y), width, seed=seed), y).compute()
        for seed in range(1, 41)
    ]
    plain, unbiased = (np.mean([run[name] for run in runs]) for name in ("nc1/ratio", "nc1/ratio/unbiased"))
    assert unbiased == pytest.approx(truth, rel=0.03)
    assert plain < 0.6 * truth


@given(classes=st.integers(2, 30), width=st.integers(2, 12), seed=st.integers(0, 100))
def test_6_inner_products_of_centred_means_sum_to_minus_their_squares(classes, width, seed):
    mean = draw(classes, width, seed=seed)
    found = statistics_of(mean).compute()
    square = (mean - mean.mean(0)).square().sum(1).mean()
    assert found["nc2/interference/mean"] == pytest.approx(-float(square) / (classes - 1), rel=1e-9)


@given(classes=st.integers(6, 40), width=st.integers(2, 4), seed=st.integers(0, 100))
def test_8_least_distance_to_an_etf_in_too_few_dimensions(classes, width, seed):
    least = math.sqrt(2 - 2 * math.sqrt(width / (classes - 1)))
    ones = torch.ones(classes, 1, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones, draw(classes, width, seed=seed)], 1))[0][:, 1:]
    assert statistics_of(basis).compute()["nc2/etf_error"] == pytest.approx(least, abs=1e-9)
    assert statistics_of(draw(classes, width, seed=seed)).compute()["nc2/etf_error"] >= least - 1e-12


# ---- check 3: uniform directions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 4, 5, 20, 576])
def test_3_log_kernel_of_uniform_directions(width):
    def weight(angle: float) -> float:
        return math.sin(angle) ** (width - 2)

    def kernel(angle: float) -> float:
        return -math.log(2 * math.sin(angle / 2)) * weight(angle)

    expected = (
        integrate.quad(kernel, 0, math.pi, limit=200)[0] / integrate.quad(weight, 0, math.pi, limit=200)[0]
    )
    assert uniform_log_kernel(width) == pytest.approx(expected, abs=1e-8)


def test_3_values_of_the_uniform_log_kernel():
    assert uniform_log_kernel(2) == pytest.approx(0, abs=1e-12)
    assert uniform_log_kernel(3) == pytest.approx(0.5 - math.log(2), abs=1e-12)
    assert uniform_log_kernel(10_000) == pytest.approx(-0.5 * math.log(2), abs=1e-4)
    with pytest.raises(ConfigError, match="dim"):
        uniform_log_kernel(1)


def test_3_random_directions_reach_them():
    width, classes = 6, 1500
    u = nn.functional.normalize(draw(classes, width), dim=1)
    found = statistics_of(torch.cat([u, -u])).compute(pairs="exact")
    assert found["nc2/cosine/std"] == pytest.approx(width**-0.5, rel=0.02)
    assert found["gnc2/log_kernel/mean"] == pytest.approx(uniform_log_kernel(width), abs=2e-3)


# ---- check 4: invariances ----------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100), size=st.floats(0, 100))
def test_4_rotation_shift_scale_and_order(seed, scale, size):
    mean, W, variance = draw(20, 5, seed=seed), draw(20, 5, seed=seed + 1), draw(20, seed=seed + 2).exp()
    turn, order = (
        rotation(5, seed + 3),
        torch.randperm(20, generator=torch.Generator().manual_seed(seed)),
    )
    plain = statistics_of(mean, variance)
    moved = statistics_of(
        (scale * mean @ turn + size * draw(5, seed=seed + 4))[order], (scale**2 * variance)[order]
    )
    before, after = plain.compute(W), moved.compute((W @ turn)[order])
    for name, value in before.values.items():
        factor = scale**2 if name == "nc2/interference/mean" else 1
        if name not in ("nc2/log_norm/cov", "nc1/ratio/unbiased"):  # the logarithm of a length knows its unit
            assert after[name] == pytest.approx(factor * value, rel=1e-5, abs=1e-9), name
    old, new = plain.compute(cdnv_power=2), moved.compute(cdnv_power=2)
    assert new["nc1/cdnv/mean"] == pytest.approx(old["nc1/cdnv/mean"] / scale**2, rel=1e-5)


# ---- check 9 and the rest of NC4 -----------------------------------------------------------------------------------------


def test_9_an_unseen_class_must_not_win_short_features():
    generator = torch.Generator().manual_seed(0)
    mean = torch.nn.functional.normalize(draw(5, 4), dim=1)
    mean[4] = 0
    counts = torch.tensor([3, 3, 3, 3, 0])
    h = 0.1 * torch.nn.functional.normalize(draw(50, 4, seed=1), dim=1)
    masked = NC4Accumulator(mean, counts, mean).update(h).compute()
    unmasked = NC4Accumulator(mean, torch.ones(5, dtype=torch.long), mean).update(h).compute()
    assert masked.seen_head > 0.9
    assert unmasked.full_head < 0.1
    labels = torch.randint(4, (50,), generator=generator)
    assert NC4Accumulator(mean, counts, mean).update(h, labels).compute().centre_accuracy > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nc4_is_the_rule_written_out(dtype, monkeypatch):
    monkeypatch.setattr("uncollapse.measure.nearest_class._SCORES", 100)
    mean, W, b = draw(30, 6), draw(30, 6, seed=1), draw(30, seed=2)
    counts = torch.arange(30) % 4
    h, y = draw(500, 6, seed=3) * 2, torch.randint(30, (500,), generator=torch.Generator().manual_seed(4))
    seen = counts > 0
    logits, distance = h @ W.T + b, torch.cdist(h, mean).masked_fill(~seen, torch.inf)
    nearest, full = distance.argmin(1), logits.argmax(1)
    restricted = logits.masked_fill(~seen, -torch.inf).argmax(1)
    found = (
        NC4Accumulator(mean, counts, W, b, dtype=dtype)
        .update(h[:123], y[:123])
        .update(h[123:], y[123:])
        .compute()
    )
    assert found.full_head == float((full == nearest).double().mean())
    assert found.seen_head == float((restricted == nearest).double().mean())
    assert found.head_accuracy == float((full == y).double().mean())
    assert found.centre_accuracy == float((nearest == y).double().mean())
    unlabelled = NC4Accumulator(mean, counts, W, b, dtype=dtype).update(h).compute()
    assert (unlabelled.samples, unlabelled.labelled) == (500, 0)
    assert math.isnan(unlabelled.head_accuracy)


def test_nc4_in_float32_decides_near_ties_in_float64():
    mean = draw(40, 8) + 1e3
    mean[20:] = mean[:20] + 1e-7 * draw(20, 8, seed=2)
    h = mean.repeat(5, 1) + 1e-3 * draw(200, 8, seed=3)
    counts = torch.ones(40, dtype=torch.long)
    exact, single = (
        NC4Accumulator(mean, counts, mean - mean.mean(0), -(mean - mean.mean(0)) @ mean.mean(0), dtype=dtype)
        .update(h, torch.arange(40).repeat(5))
        .compute()
        for dtype in (torch.float64, torch.float32)
    )
    assert single == exact
    assert exact.centre_accuracy < 1


# ---- features of language models ----------------------------------------------------------------------------------------


class Bigram(nn.Module):
    """The smallest causal model: an embedding, a layer, a head, called like those of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 11)
        self.computed: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.head(self.mix(self.embed(input_ids)))
        self.computed.append(tuple(logits.shape))
        return logits


def test_features_are_what_the_head_reads_with_the_next_token():
    model = Bigram().eval()
    ids = torch.arange(12).reshape(2, 6) % 11
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    (plain, after), (padded, kept) = collect_lm_features(
        model, [ids, {"input_ids": ids, "attention_mask": mask}]
    )
    hidden = model.mix(model.embed(ids)).detach()
    torch.testing.assert_close(plain, hidden[:, :-1].reshape(-1, 5))
    assert after.tolist() == ids[:, 1:].flatten().tolist()
    torch.testing.assert_close(padded, torch.cat([hidden[0, 2:-1], hidden[1, :-2]]))
    assert kept.tolist() == [*ids[0, 3:].tolist(), *ids[1, 1:5].tolist()]
    assert model.computed[0] == (2, 1, 11)  # no logits of all positions
    assert not plain.requires_grad
    assert model(ids).shape == (2, 6, 11)  # the hooks are gone


def test_features_of_a_transformers_model_give_its_logits():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(
        vocab_size=29, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.GPTNeoXForCausalLM(config).eval()
    ids = torch.randint(29, (3, 7), generator=torch.Generator().manual_seed(0))
    ((h, y),) = collect_lm_features(model, [ids])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, :-1].reshape(-1, 29)
    torch.testing.assert_close(model.get_output_embeddings()(h), expected)
    W = model.get_output_embeddings().weight
    report = StreamingNC(*W.shape).update(h, y).compute(W)
    assert report.samples == 18


@pytest.fixture
def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=29, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def test_left_padding_gives_the_features_of_right_padding_with_absolute_positions(gpt2):
    ids = torch.randint(29, (3, 9), generator=torch.Generator().manual_seed(0))
    lengths, place = torch.tensor([[9], [4], [6]]), torch.arange(9)
    right = {"input_ids": ids, "attention_mask": (place < lengths).long()}
    turned = (place + lengths) % 9
    left = {"input_ids": ids.gather(1, turned), "attention_mask": (place >= 9 - lengths).long()}
    (expected, after), (found, y) = collect_lm_features(gpt2, [right, left])
    assert y.tolist() == after.tolist()
    torch.testing.assert_close(found, expected)


def test_other_inputs_of_the_model_reach_it(gpt2):
    ids = torch.randint(29, (2, 5), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(5, 10)[None]
    given = {"input_ids": ids, "position_ids": positions, "labels": ids, "length": torch.tensor([5, 5])}
    (plain, _), (moved, _) = collect_lm_features(gpt2, [ids, given])
    with torch.no_grad():
        hidden = gpt2.transformer(input_ids=ids, position_ids=positions).last_hidden_state
    torch.testing.assert_close(moved, hidden[:, :-1].reshape(-1, 16))
    assert not torch.equal(moved, plain)


def test_what_cannot_be_collected():
    model = Bigram()
    with pytest.raises(DataError, match="missing"):
        next(collect_lm_features(model, [{"labels": torch.zeros(1, 2, dtype=torch.long)}]))
    with pytest.raises(DataError, match="shape"):
        next(collect_lm_features(model, [{"input_ids": torch.zeros(2, dtype=torch.long)}]))

    class Pooled(Bigram):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(input_ids).mean(1, keepdim=True))

    with pytest.raises(DataError, match="0 times"):
        next(collect_lm_features(Pooled(), [torch.zeros(2, 5, dtype=torch.long)]))
