"""Streaming class statistics: equal to two passes whatever the batches, and what is refused."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure import NC4Accumulator, StreamingNC, nc_metrics
from uncollapse.measure.class_statistics import CollapseReport


def samples(seed: int = 0, *, rows: int = 200, classes: int = 30, seen: int = 25, width: int = 6):
    """Unbalanced, with classes never seen and classes of one sample."""
    generator = torch.Generator().manual_seed(seed)
    weight = 1 / torch.arange(1, seen + 1).double()
    y = torch.multinomial(weight, rows, replacement=True, generator=generator)
    centres = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    return centres[y] + torch.randn(rows, width, generator=generator, dtype=torch.float64), y


def two_pass(h: torch.Tensor, y: torch.Tensor, classes: int):
    h, y = h.numpy(), y.numpy()
    count = np.array([(y == c).sum() for c in range(classes)])
    mean = np.stack([h[y == c].mean(0) if n else np.zeros(h.shape[1]) for c, n in enumerate(count)])
    scatter = np.array([((h[y == c] - mean[c]) ** 2).sum() for c in range(classes)])
    within = sum(np.outer(x - mean[c], x - mean[c]) for x, c in zip(h, y, strict=True))
    return count, mean, scatter, within


@given(
    cuts=st.lists(st.integers(0, 200), max_size=6),
    seed=st.integers(0, 20),
    shards=st.integers(1, 3),
    block=st.sampled_from([6, 50, 10_000]),
)
def test_any_order_split_and_merge_is_two_passes(cuts, seed, shards, block):
    h, y = samples()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
    pieces = torch.tensor_split(order, sorted(cuts))
    parts = [StreamingNC(30, 6, pooled_cov=True) for _ in range(shards)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uncollapse.measure._blocks.BLOCK_ELEMENTS", block)
        for i, piece in enumerate(pieces):
            parts[i % shards].update(h[piece], y[piece])
        merged = parts[0]
        for part in parts[1:]:
            merged.merge(part)
    for mine, reference in zip(
        (merged.count, merged.mean, merged.scatter, merged.within), two_pass(h, y, 30), strict=True
    ):
        np.testing.assert_allclose(mine.numpy(), reference, atol=1e-10)
    assert (merged.scatter[merged.count == 1] == 0).all()


def test_a_large_common_offset_changes_nothing_centred():
    h, y = samples()
    W = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain, moved = (
        StreamingNC(30, 6, pooled_cov=True).update(x, y).compute(W, riesz=2.0) for x in (h, h + 1e4)
    )
    assert plain.values.keys() == moved.values.keys()
    for name, value in plain.values.items():
        assert moved[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


def test_masked_positions_do_not_exist_whatever_they_hold():
    h, y = samples()
    keep = torch.arange(200) % 3 > 0
    spoilt, labels = h.clone(), y.clone()
    spoilt[~keep], labels[~keep] = torch.nan, -100
    masked = StreamingNC(30, 6).update(
        spoilt.reshape(10, 20, 6), labels.reshape(10, 20), keep.reshape(10, 20)
    )
    plain = StreamingNC(30, 6).update(h[keep], y[keep])
    assert torch.equal(masked.count, plain.count)
    torch.testing.assert_close(masked.mean, plain.mean)
    nothing = StreamingNC(30, 6).update(h, y, torch.zeros(200, dtype=torch.bool))
    assert int(nothing.count.sum()) == 0


def test_numpy_half_precision_and_a_small_state():
    h, y = samples()
    exact = StreamingNC(30, 6).update(h, y)
    from_numpy = StreamingNC(30, 6).update(h.numpy(), y.int().numpy())
    torch.testing.assert_close(from_numpy.mean, exact.mean)
    half = StreamingNC(30, 6).update(h.bfloat16(), y)
    torch.testing.assert_close(half.mean, StreamingNC(30, 6).update(h.bfloat16().double(), y).mean)
    small = StreamingNC(30, 6, dtype=torch.float32).update(h, y)
    assert small.mean.dtype == torch.float32
    torch.testing.assert_close(small.mean.double(), exact.mean, atol=1e-6, rtol=1e-6)


def test_the_classical_metrics_agree_with_those_of_arrays_in_memory():
    h, y = samples(rows=400)
    W = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    classical = nc_metrics(h, y, W)
    ours = StreamingNC(30, 6, pooled_cov=True).update(h, y).compute(W)
    assert ours["nc1/pinv"] == pytest.approx(classical.nc1_pinv, rel=1e-9)
    assert ours["nc2/norm/cov"] == pytest.approx(classical.nc2_equinorm_means, rel=1e-9)
    assert ours["nc2/cosine/std"] == pytest.approx(classical.nc2_cosine_std_means, rel=1e-9)
    assert ours["nc2/etf_error"] == pytest.approx(classical.nc2_etf_means, rel=1e-9)
    assert ours["nc3/dual_error"] == pytest.approx(classical.nc3_etf, rel=1e-9)
    few = samples(rows=400, classes=4, seen=4)
    pooled = StreamingNC(4, 6, pooled_cov=True).update(*few).compute()
    assert pooled["nc1/pinv"] == pytest.approx(nc_metrics(*few).nc1_pinv, rel=1e-9)


def test_counts_of_the_report():
    y = torch.tensor([0, 0, 0, 1, 1, 2, 4])
    h = torch.arange(14).double().reshape(7, 2)
    statistics = StreamingNC(6, 2).update(h, y)
    report = statistics.compute()
    assert (report.classes, report.seen, report.singletons, report.samples, report.pairs) == (4, 4, 2, 7, 6)
    pairs = statistics.compute(n_min=2)
    assert (pairs.classes, pairs.seen, pairs.singletons, pairs.samples, pairs.pairs) == (2, 4, 0, 5, 1)


def test_equal_means_are_flagged_and_left_out():
    h = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0], [5, 1], [5, 3]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    report = StreamingNC(3, 2).update(h, y).compute()
    assert report.coincident == 1
    assert report["nc1/cdnv/mean"] == pytest.approx((1 + 1) / (2 * (25 + 4)))
    assert report["gnc2/log_kernel/mean"] < 7  # the coincident directions count with the clamp, (ln 1e12) / 2


def test_a_class_at_the_centre_has_no_direction_but_a_distance():
    h = torch.tensor([[1.0, 0], [-1, 0], [0, 0]], dtype=torch.float64)
    report = StreamingNC(3, 2).update(h, torch.arange(3)).compute(riesz=1.0)
    assert report["gnc2/distance/mean"] == pytest.approx(2)
    assert report["nc2/cosine/mean"] == pytest.approx(-1)
    assert report["nc1/cdnv/mean"] == 0
    assert report.coincident == 0


@pytest.mark.parametrize("offset", [0.0, 3.7])
def test_total_collapse_and_single_classes_are_nan_without_warnings(offset):
    h = torch.full((6, 3), offset, dtype=torch.float64)
    W = torch.ones(3, 3, dtype=torch.float64)
    for y in (torch.tensor([0, 0, 1, 1, 2, 2]), torch.zeros(6, dtype=torch.long)):
        report = StreamingNC(3, 3, pooled_cov=True).update(h, y).compute(W)
        for name in ("nc1/cdnv/mean", "nc1/ratio", "nc1/pinv", "nc2/etf_error", "nc3/cosine/mean"):
            assert math.isnan(report[name]), name


def test_what_is_refused_and_leaves_the_statistics_alone():
    h, y = samples()
    statistics = StreamingNC(30, 6).update(h, y)
    before = statistics.mean.clone()
    with pytest.raises(DataError, match="1 of 200 feature rows"):
        statistics.update(h.index_fill(0, torch.tensor([150]), torch.nan), y)
    with pytest.raises(DataError, match="inf"):
        statistics.update(h.index_fill(0, torch.tensor([3]), torch.inf), y)
    for label in (-100, 30):
        with pytest.raises(DataError, match=f"{label}.*mask"):
            statistics.update(h, y.index_fill(0, torch.tensor([7]), label))
    with pytest.raises(DataError, match="width 5"):
        statistics.update(h[:, :5], y)
    assert torch.equal(statistics.mean, before)
    with pytest.raises(DataError, match="merge"):
        statistics.merge(StreamingNC(31, 6))
    with pytest.raises(DataError, match="W has shape"):
        statistics.compute(torch.ones(30, 5))
    with pytest.raises(DataError, match="W contains"):
        statistics.compute(torch.full((30, 6), torch.nan))
    with pytest.raises(DataError, match="no class has 1"):
        StreamingNC(30, 6).compute()
    with pytest.raises(DataError, match="no class has 500"):
        statistics.compute(n_min=500)
    for options in ({"n_min": 0}, {"tile": 0}, {"pairs": 0}, {"cdnv_power": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            statistics.compute(**options)
    with pytest.raises(ConfigError, match="pairs is 'all'; give 'exact'"):
        inspect.unwrap(StreamingNC.compute)(statistics, pairs="all")
    with pytest.raises(TypeError, match="positional"):  # a bias would be taken for n_min
        inspect.unwrap(StreamingNC.compute)(statistics, None, torch.ones(30))
    with pytest.raises(ConfigError, match="dtype"):
        StreamingNC(3, 2, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="0 classes"):
        StreamingNC(0, 2)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.int32, torch.uint8])
def test_an_attention_mask_of_numbers_is_a_mask_and_no_list_of_rows(kind):
    h, y = samples(rows=60)
    inside = (torch.arange(60) % 4 > 0).reshape(6, 10)
    h, y = h.reshape(6, 10, 6), y.reshape(6, 10)
    given = StreamingNC(30, 6).update(h, y, inside.to(kind))
    numpy = StreamingNC(30, 6).update(h.numpy(), y.numpy(), inside.to(kind).numpy())
    expected = StreamingNC(30, 6).update(h[inside], y[inside])
    assert int(given.count.sum()) == 45
    assert torch.equal(given.count, expected.count)
    assert torch.equal(numpy.count, expected.count)
    torch.testing.assert_close(given.mean, expected.mean)
    decided = NC4Accumulator(expected.mean, expected.count, torch.ones(30, 6))
    found = decided.update(h, y, inside.to(kind)).compute()
    assert (found.samples, found.labelled) == (45, 45)


@pytest.mark.parametrize("kind", [StreamingNC, NC4Accumulator])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(7, dtype=torch.bool)}, "mask \\(7,\\)"),
        ({"mask": torch.ones(4, 5, dtype=torch.long)}, "mask \\(4, 5\\)"),
        ({"mask": torch.ones(20)}, "mask of torch.float32"),
        ({"y": torch.arange(20) / 10}, "classes of torch.float32"),
        ({"y": torch.ones(20, dtype=torch.bool)}, "classes of torch.bool"),
        ({"y": torch.zeros(5, 4, dtype=torch.long)}, "classes \\(5, 4\\)"),
        ({"y": torch.full((20,), -100)}, "from -100.*mask"),
        ({"y": torch.full((20,), 3)}, "from 3 to 3.*mask"),
        ({"h": torch.tensor(1.0)}, "width none, expected 2"),
        ({"h": torch.full((20, 2), torch.inf)}, "20 of 20"),
    ],
)
def test_both_refuse_the_same_samples(kind, change, message):
    """Called below the checks of shapes that only tests have."""
    ones = torch.ones(3, 2)
    taker = StreamingNC(3, 2) if kind is StreamingNC else NC4Accumulator(ones, torch.ones(3).long(), ones)
    given = {"h": torch.ones(20, 2), "y": torch.zeros(20, dtype=torch.long), "mask": None} | change
    with pytest.raises(DataError, match=f"^{kind.__name__}: .*{message}"):
        inspect.unwrap(kind.update)(taker, given["h"], given["y"], given["mask"])


def test_reading_a_report():
    report = CollapseReport({"nc1/ratio": 2.0}, {}, 1, 1, 0, 5, 0, 0)
    assert report["nc1/ratio"] == 2


def test_rows_of_classes_that_do_not_count_may_hold_anything():
    h, y = samples()
    statistics = StreamingNC(30, 6).update(h, y)
    W = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    unseen = statistics.count == 0
    assert unseen.sum() >= 5
    spoilt, means = W.masked_fill(unseen[:, None], torch.nan), statistics.mean.clone()
    means[unseen] = torch.nan
    assert statistics.compute(spoilt).values == statistics.compute(W).values
    found, expected = (
        NC4Accumulator(given, statistics.count, W).update(h, y).compute()
        for given in (means, statistics.mean)
    )
    assert found == expected
    once = statistics.count == 1
    assert once.any()
    with pytest.raises(DataError, match="W contains"):
        statistics.compute(W.masked_fill(once[:, None], torch.inf))
    assert statistics.compute(W.masked_fill(once[:, None], torch.inf), n_min=2).classes < 30
    with pytest.raises(DataError, match="means contains"):
        NC4Accumulator(means.masked_fill(once[:, None], torch.nan), statistics.count, W)


def test_nearest_class_refuses_what_does_not_fit():
    ones, counts = torch.ones(3, 2), torch.ones(3, dtype=torch.long)
    with pytest.raises(DataError, match="one row of each per class"):
        NC4Accumulator(ones, counts, torch.ones(4, 2))
    with pytest.raises(DataError, match="b contains"):
        NC4Accumulator(ones, counts, ones, torch.full((3,), torch.inf))
    with pytest.raises(DataError, match="no class"):
        NC4Accumulator(ones, counts * 0, ones)
    with pytest.raises(ConfigError, match="n_min"):
        NC4Accumulator(ones, counts, ones, n_min=0)
    decided = NC4Accumulator(ones, counts, ones)
    with pytest.raises(DataError, match="NaN"):
        decided.update(torch.full((1, 2), torch.nan))
    with pytest.raises(DataError, match="width 3"):
        decided.update(torch.ones(1, 3))
    assert math.isnan(decided.compute().full_head)
    assert decided.update(torch.ones(2, 2), mask=torch.tensor([True, False])).compute().samples == 1
