"""Neural-collapse metrics against naive loops, on exact frames, under transformations, and on bad input; float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure import neural_collapse as nc

seeds = st.integers(0, 10_000)
quick = settings(max_examples=15)

METRICS = [
    "nc1_pinv",
    "nc1_quotient",
    "nc2_equinorm_means",
    "nc2_equiangular_means",
    "nc2_cosine_std_means",
    "nc2_etf_means",
    "nc2_of_means",
    "nc2_equinorm_weights",
    "nc2_equiangular_weights",
    "nc2_cosine_std_weights",
    "nc2_etf_weights",
    "nc2_of_weights",
    "nc3_etf",
    "nc3_of",
    "nc3_dist",
    "nc4",
]


def data(
    seed: int, classes: int = 4, features: int = 7, most: int = 9
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random features of random class sizes (at least 1) in random order, and a classifier."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, most, (classes,), generator=g)
    counts[0] += 1
    y = torch.arange(classes).repeat_interleave(counts)
    centres = torch.randn(classes, features, generator=g, dtype=torch.float64)
    H = centres[y] + 0.4 * torch.randn(len(y), features, generator=g, dtype=torch.float64)
    order = torch.randperm(len(y), generator=g)
    W = torch.randn(classes, features, generator=g, dtype=torch.float64)
    return H[order], y[order], W, torch.randn(classes, generator=g, dtype=torch.float64)


def naive(H: Tensor, y: Tensor, W: Tensor, b: Tensor, mean: str, weights: str) -> dict[str, float]:
    """Every metric by loops over samples, classes and pairs."""
    classes = sorted({int(k) for k in y})
    K, N = len(classes), len(H)
    means = torch.stack([H[y == k].mean(0) for k in classes])
    n = [int((y == k).sum()) for k in classes]
    centre = means.mean(0) if mean == "class" else H.mean(0)
    centred = means - centre
    within, between = 0 * torch.outer(H[0], H[0]), 0 * torch.outer(H[0], H[0])
    for h, k in zip(H, y, strict=True):
        gap = h - means[classes.index(int(k))]
        within += torch.outer(gap, gap) / N
    for k, m in enumerate(centred):
        between += torch.outer(m, m) * (1 / K if weights == "uniform" else n[k] / N)
    found = {
        "nc1_pinv": float((within @ torch.linalg.pinv(between, rtol=1e-10)).trace() / K),
        "nc1_quotient": float(within.trace() / between.trace()),
    }
    W, b = W[classes], b[classes]
    etf = (torch.eye(K, dtype=H.dtype) - 1 / K) / math.sqrt(K - 1)
    of = torch.eye(K, dtype=H.dtype) / math.sqrt(K)

    def off(matrix: Tensor, target: Tensor) -> float:
        return float((matrix / matrix.norm() - target).norm())

    for name, rows, plain in (("means", centred, means), ("weights", W, W)):
        cosines = [
            torch.nn.functional.cosine_similarity(rows[i], rows[j], dim=0) for i in range(K) for j in range(i)
        ]
        lengths = rows.norm(dim=1)
        found |= {
            f"nc2_equinorm_{name}": float(lengths.std(correction=0) / lengths.mean()),
            f"nc2_equiangular_{name}": float(sum((c + 1 / (K - 1)).abs() for c in cosines) / len(cosines)),
            f"nc2_cosine_std_{name}": float(torch.stack(cosines).std(correction=0)),
            f"nc2_etf_{name}": off(rows @ rows.T, etf),
            f"nc2_of_{name}": off(plain @ plain.T, of),
        }
    wrong = 0
    for h in H:
        head = torch.stack([w @ h + c for w, c in zip(W, b, strict=True)]).argmax()
        near = torch.stack([(h - m).norm() for m in means]).argmin()
        wrong += int(head != near)
    return found | {
        "nc3_etf": off(W @ centred.T, etf),
        "nc3_of": off(W @ means.T, of),
        "nc3_dist": float((W / W.norm() - centred / centred.norm()).norm()),
        "nc4": wrong / N,
    }


# ---- against loops ---------------------------------------------------------------------------------------------------


@quick
@given(
    seed=seeds,
    classes=st.integers(2, 6),
    features=st.integers(2, 8),
    mean=st.sampled_from(["class", "sample"]),
    weights=st.sampled_from(["uniform", "sample"]),
)
def test_all_metrics_agree_with_loops(
    seed: int, classes: int, features: int, mean: str, weights: str
) -> None:
    H, y, W, b = data(seed, classes, features)
    found = nc.nc_metrics(H, y, W, b, mean=mean, weights=weights)
    expected = naive(H, y, W, b, mean, weights)
    assert set(found.metrics()) == set(expected) == set(METRICS)
    assert found.metrics() == pytest.approx(expected, rel=1e-7, abs=1e-9)


@quick
@given(seed=seeds)
def test_a_class_never_seen_is_left_out(seed: int) -> None:
    H, y, W, b = data(seed, 5)
    present = y != 2
    H, y = H[present], y[present]
    found = nc.nc_metrics(H, y, W, b)
    assert found.metrics() == pytest.approx(naive(H, y, W, b, "class", "uniform"), rel=1e-7, abs=1e-9)
    assert (found.classes, found.unseen) == (4, 1)
    assert "unseen classes" in found.degenerate


def test_each_metric_stands_alone() -> None:
    H, y, W, b = data(0)
    found = nc.nc_metrics(H, y, W, b, mean="sample", weights="sample")
    moments = nc.class_moments(H, y)
    centred = nc.between_classes(moments, mean="sample").centred
    angle, spread = nc.nc2_equiangular(centred)
    alone = {
        "nc1_pinv": nc.nc1_pinv(H, y, mean="sample", weights="sample"),
        "nc1_quotient": nc.nc1_quotient(H, y, mean="sample", weights="sample"),
        "nc2_equinorm_means": nc.nc2_equinorm(centred),
        "nc2_equiangular_means": angle,
        "nc2_cosine_std_means": spread,
        "nc2_etf_means": nc.nc2_etf(centred),
        "nc2_of_means": nc.nc2_of(moments.means),
        "nc2_etf_weights": nc.nc2_etf(W),
        "nc3_etf": nc.nc3_etf(W, centred),
        "nc3_of": nc.nc3_of(W, moments.means),
        "nc3_dist": nc.nc3_dist(W, centred),
        "nc4": nc.nc4(H, moments.means, W, b),
    }
    for name, value in alone.items():
        assert float(value) == pytest.approx(found.metrics()[name], rel=1e-12), name


def test_the_report_from_statistics_is_the_report_from_samples() -> None:
    H, y, W, b = data(3)
    moments = nc.class_moments(H, y)
    between = nc.between_classes(moments)
    residual = H - moments.means[y]
    covariance = residual.T @ residual / len(H)
    along = ((between.directions @ covariance) * between.directions).sum(-1)
    fed = nc.nc_report(moments, between, within_along=along, W=W, nc4=nc.nc4(H, moments.means, W, b))
    direct = nc.nc_metrics(H, y, W, b)
    assert fed.metrics() == pytest.approx(direct.metrics(), rel=1e-10)
    bare = nc.nc_report(moments, between)
    assert bare.nc1_pinv is None
    assert bare.nc3_etf is None
    assert bare.nc4 is None
    assert "nc1_pinv" not in bare.metrics()
    assert bare.nc1_quotient == direct.nc1_quotient


def test_scatter_within_and_between_add_up_to_the_covariance() -> None:
    H, y, _, _ = data(4)
    moments = nc.class_moments(H, y)
    between = nc.between_classes(moments, mean="sample", weights="sample")
    total = (H - H.mean(0)).square().sum() / len(H)
    torch.testing.assert_close(moments.within + between.trace, total)
    torch.testing.assert_close(between.variances.sum(), between.trace)


# ---- exact frames ----------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, classes=st.integers(2, 12), extra=st.integers(-1, 5), scale=st.floats(0.01, 100))
def test_08_simplex_etf(seed: int, classes: int, extra: int, scale: float) -> None:
    g = torch.Generator().manual_seed(seed)
    rows = nc.simplex_etf(classes, classes + extra, g)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(classes, dtype=torch.float64))
    cosines = rows @ rows.T
    expected = torch.full_like(cosines, -1 / (classes - 1)).fill_diagonal_(1)
    torch.testing.assert_close(cosines, expected, atol=1e-12, rtol=0)
    shift = torch.randn(classes + extra, generator=g, dtype=torch.float64)
    means = scale * rows + shift
    H, y = means.repeat_interleave(3, 0), torch.arange(classes).repeat_interleave(3)
    found = nc.nc_metrics(H, y, 7 * rows, -7 * rows @ shift)
    collapsed = found.metrics()
    open_ones = {"nc2_of_means", "nc2_of_weights", "nc3_of"}
    assert all(abs(collapsed[name]) < 1e-9 for name in METRICS if name not in open_ones), collapsed
    of = math.sqrt(2 - 2 * math.sqrt((classes - 1) / classes))
    assert collapsed["nc2_of_weights"] == pytest.approx(of, rel=1e-9)
    assert found.degenerate == ()
    assert found.rank == classes - 1


@quick
@given(seed=seeds, extra=st.integers(0, 4))
def test_08_general_orthogonal_frame(seed: int, extra: int) -> None:
    lengths = torch.tensor([3.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    rows = nc.gof_frame(lengths, 3 + extra, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(rows @ rows.T, lengths.square().diag(), atol=1e-12, rtol=0)
    assert float(nc.nc2_gof(5 * rows, lengths.square())) < 1e-12
    assert float(nc.nc3_gof(rows, rows / 7, lengths.square())) < 1e-12
    assert float(nc.nc2_of(nc.gof_frame(torch.ones(4, dtype=torch.float64), 4 + extra))) < 1e-12
    assert float(nc.nc2_of(rows)) == pytest.approx(math.sqrt(2 - 2 * 14 / 14 * 14 / math.sqrt(4 * 98)))


@pytest.mark.parametrize(("classes", "features"), [(9, 3), (40, 6)])
def test_more_classes_than_dimensions(classes: int, features: int) -> None:
    """Without the (class, class) matrix: the same number, and its floor sqrt(2 - 2 sqrt(d/(K-1)))."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(classes, features, generator=g, dtype=torch.float64)
    M = torch.randn(classes, features, generator=g, dtype=torch.float64)
    P = W @ M.T
    etf = (torch.eye(classes, dtype=torch.float64) - 1 / classes) / math.sqrt(classes - 1)
    of = torch.eye(classes, dtype=torch.float64) / math.sqrt(classes)
    torch.testing.assert_close(nc.nc3_etf(W, M), (P / P.norm() - etf).norm())
    torch.testing.assert_close(nc.nc3_of(W, M), (P / P.norm() - of).norm())
    assert float(nc.nc2_etf(W)) > math.sqrt(2 - 2 * math.sqrt(features / (classes - 1)))
    tight = torch.linalg.qr(W - W.mean(0))[0]
    assert float(nc.nc2_etf(tight)) == pytest.approx(math.sqrt(2 - 2 * math.sqrt(features / (classes - 1))))


def test_10_isotropic_noise_on_an_etf() -> None:
    classes, features, r, sigma, n = 5, 12, 2.0, 0.1, 4000
    g = torch.Generator().manual_seed(0)
    means = math.sqrt(r) * nc.simplex_etf(classes, features, g)
    y = torch.arange(classes).repeat_interleave(n)
    H = means[y] + sigma * torch.randn(classes * n, features, generator=g, dtype=torch.float64)
    expected = sigma**2 * (classes - 1) ** 2 / (classes * r)
    assert expected == pytest.approx(0.016)
    assert float(nc.nc1_pinv(H, y)) == pytest.approx(expected, rel=0.03)
    assert float(nc.nc1_quotient(H, y)) == pytest.approx(features * sigma**2 / r, rel=0.03)
    moments = nc.class_moments(H, y)
    variances = nc.between_classes(moments).variances
    torch.testing.assert_close(variances, torch.full_like(variances, r / (classes - 1)), rtol=0.03, atol=0)


# ---- invariances -----------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, scale=st.floats(0.01, 100))
def test_09_invariances(seed: int, scale: float) -> None:
    H, y, W, b = data(seed)
    g = torch.Generator().manual_seed(seed + 1)
    before = nc.nc_metrics(H, y, W, b).metrics()

    turn = torch.linalg.qr(torch.randn(7, 7, generator=g, dtype=torch.float64))[0]
    rotated = nc.nc_metrics(H @ turn, y, W @ turn, b).metrics()
    assert rotated == pytest.approx(before, rel=1e-7, abs=1e-9)

    scaled = nc.nc_metrics(scale * H, y, W / scale, b).metrics()
    assert scaled == pytest.approx(before, rel=1e-7, abs=1e-9)

    shift = torch.randn(7, generator=g, dtype=torch.float64)
    moved = nc.nc_metrics(H + shift, y, W, b - W @ shift).metrics()
    for name in METRICS:
        if name not in ("nc2_of_means", "nc3_of"):
            assert moved[name] == pytest.approx(before[name], rel=1e-7, abs=1e-9), name

    order = torch.randperm(4, generator=g)
    renamed = nc.nc_metrics(H, order.argsort()[y], W[order], b[order]).metrics()
    assert renamed == pytest.approx(before, rel=1e-7, abs=1e-9)

    shuffle = torch.randperm(len(y), generator=g).repeat(3)
    doubled = nc.nc_metrics(H[shuffle], y[shuffle], W, b).metrics()
    assert doubled == pytest.approx(before, rel=1e-7, abs=1e-9)


def test_a_large_common_offset_does_not_drown_the_spread() -> None:
    H, y, _, _ = data(1)
    before, after = nc.nc_metrics(H, y), nc.nc_metrics(H + 1e4, y)
    assert after.nc1_pinv == pytest.approx(before.nc1_pinv, rel=1e-6)
    assert after.nc2_etf_means == pytest.approx(before.nc2_etf_means, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_measured_in_float64(dtype: torch.dtype) -> None:
    H, y, W, b = (x.to(dtype) if x.is_floating_point() else x for x in data(2))
    low = nc.nc_metrics(H, y, W, b)
    high = nc.nc_metrics(H.double(), y, W.double(), b.double())
    assert low == high


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    H, y, W, b = data(2)
    assert nc.nc_metrics(H, y.to(dtype), W, b) == nc.nc_metrics(H, y, W, b)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:

    H, y, W, b = data(5)
    whole = nc.nc_metrics(H, y, W, b)
    monkeypatch.setattr("uncollapse.measure._blocks.BLOCK_ELEMENTS", 9)
    assert nc.nc_metrics(H, y, W, b).metrics() == pytest.approx(whole.metrics(), rel=1e-10, abs=1e-12)


# ---- degenerate input ------------------------------------------------------------------------------------------------


def test_total_collapse_is_nan_with_a_reason() -> None:
    y = torch.arange(3).repeat_interleave(2)
    H = torch.full((6, 4), 0.1, dtype=torch.float64)
    found = nc.nc_metrics(H, y, torch.zeros(3, 4, dtype=torch.float64))
    assert found.degenerate == ("equal means", "zero weights")
    assert found.rank == 0
    for name in ("nc1_pinv", "nc1_quotient", "nc2_etf_means", "nc2_etf_weights", "nc3_etf", "nc3_dist"):
        assert math.isnan(found.metrics()[name]), name


def test_classes_with_one_sample() -> None:
    y = torch.tensor([0, 0, 1, 2])
    H = torch.tensor([[1.0, 0, 0], [3, 0, 0], [0, 2, 0], [0, 0, 2]], dtype=torch.float64)
    found = nc.nc_metrics(H, y)
    assert found.singletons == 2
    assert found.degenerate == ("single samples",)
    assert found.nc1_quotient == pytest.approx((2 / 4) / (8 / 3))
    alone = nc.nc_metrics(H[1:], y[1:])
    assert alone.degenerate == ("no within-class scatter",)
    assert math.isnan(alone.nc1_quotient)
    assert alone.nc1_pinv is not None
    assert math.isnan(alone.nc1_pinv)
    assert math.isfinite(alone.nc2_etf_means)


def test_one_class_and_a_class_in_the_middle() -> None:
    found = nc.nc_metrics(torch.eye(3), torch.zeros(3, dtype=torch.long))
    assert found.degenerate == ("one class",)
    assert math.isnan(found.nc1_quotient)
    assert math.isnan(found.nc2_etf_means)
    line = torch.tensor([[-1.0], [0.0], [1.0]]).repeat_interleave(2, 0)
    middle = nc.nc_metrics(line, torch.arange(3).repeat_interleave(2))
    assert middle.degenerate == ("zero means",)
    assert math.isnan(middle.nc2_equiangular_means)
    assert middle.rank == 1


def test_bad_input_is_refused_with_a_reason() -> None:
    H, y, W, b = data(6)
    broken = H.clone()
    broken[1, 2] = torch.nan
    with pytest.raises(DataError, match=r"1 of .* contain NaN"):
        nc.nc_metrics(broken, y)
    with pytest.raises(DataError, match="labels from"):
        nc.nc_metrics(H, y, num_classes=2)
    with pytest.raises(DataError, match="labels from"):
        nc.nc_metrics(H, y - 1)
    with pytest.raises((DataError, TypeCheckError), match=r"one each|i64\[14\]"):
        nc.class_moments(H, y[:-1])
    with pytest.raises(DataError, match="at least one"):
        nc.class_moments(H[:0], y[:0])
    with pytest.raises(DataError, match=r"torch\.nn\.Linear"):
        nc.nc_metrics(H, y, W[:3], num_classes=4)
    with pytest.raises(DataError, match="classifier contains NaN"):
        nc.nc_metrics(H, y, W * torch.nan)
    with pytest.raises(ConfigError, match="give W too"):
        nc.nc_metrics(H, y, b=b)
    with pytest.raises(ConfigError, match="mean is"):
        nc.nc_metrics(H, y, mean="median")
    with pytest.raises(ConfigError, match="weights is"):
        nc.nc_metrics(H, y, weights="n")
    with pytest.raises(ConfigError, match="simplex_etf"):
        nc.simplex_etf(5, 3)
    with pytest.raises(ConfigError, match="gof_frame"):
        nc.gof_frame(torch.ones(3), 2)
    empty = nc.ClassMoments(torch.zeros(2, dtype=torch.long), torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(DataError, match="empty"):
        nc.nc_report(empty, nc.between_classes(nc.class_moments(H, y)))


def test_gradients_flow() -> None:
    H, y, W, _ = data(7)
    H = H.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: nc.nc1_quotient(h, y), (H,))
    W = W.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: nc.nc2_etf(w), (W,))
