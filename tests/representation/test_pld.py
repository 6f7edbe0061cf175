"""PLD against a reference that follows the formula class by class, and the exact checks of its specification."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.errors import ConfigError, DataError
from uncollapse.representation import plackett_luce
from uncollapse.representation.plackett_luce import argsort_descending
from uncollapse.representation.pld import (
    ListMLELoss,
    PLDLoss,
    _checked_weights,
    _flat,
    listmle_loss,
    plackett_luce_distillation_loss,
    plackett_luce_log_prob,
    teacher_optimal_permutation,
)

INF = math.inf
double = {"dtype": torch.float64}


def problem(seed=0, rows=5, classes=6, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    s, t = scale * torch.randn(2, rows, classes, generator=g, **double)
    return s, t, torch.randint(classes, (rows,), generator=g)


def naive(s, t, y, alpha=None, tau=1.0, top_k=None):
    """The loss of one row, as the formula reads."""
    classes = len(s)
    order = [int(y), *sorted((c for c in range(classes) if c != y), key=lambda c: (-float(t[c]), c))]
    if alpha is None:
        q = torch.softmax(t / tau, 0)
        alpha = [q[c] for c in order]
    total = torch.zeros((), **double)
    for k in range(top_k or classes):
        total = total + alpha[k] * (torch.logsumexp(s[order[k:]], 0) - s[order[k]])
    return total


def gradient(loss, s):
    s = s.detach().requires_grad_()
    return torch.autograd.grad(loss(s), s)[0]


def assert_same(found, expected, atol=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(expected, **double), atol=atol, rtol=1e-12)


# ---- the reference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0, 400.0])  # plain sums, and logcumsumexp where those would overflow
@pytest.mark.parametrize("top_k", [None, 1, 3, 6])
def test_value_and_gradient_are_those_of_the_formula(top_k, scale):
    s, t, y = problem(scale=scale)
    t = t * 2 / scale
    options = {"temperature": 1.7, "top_k": top_k}
    found = plackett_luce_distillation_loss(s, t, y, reduction="none", **options)
    assert_same(
        found, torch.stack([naive(*row, tau=1.7, top_k=top_k) for row in zip(s, t, y, strict=True)]), 1e-10
    )
    own = gradient(lambda x: plackett_luce_distillation_loss(x, t, y, **options), s)
    reference = gradient(
        lambda x: torch.stack(
            [naive(*row, tau=1.7, top_k=top_k) for row in zip(x, t, y, strict=True)]
        ).mean(),
        s,
    )
    assert_same(own, reference)


@pytest.mark.parametrize("chunk", [1, 13, None])
def test_chunks_change_nothing(chunk):
    s, t, y = problem(rows=9)
    expected = plackett_luce_distillation_loss(s, t, y, reduction="none")
    assert torch.equal(plackett_luce_distillation_loss(s, t, y, reduction="none", chunk=chunk), expected)
    grads = [
        gradient(lambda x, c=c: plackett_luce_distillation_loss(x, t, y, chunk=c), s) for c in (chunk, None)
    ]
    assert torch.equal(*grads)


def test_equal_teacher_logits_are_ranked_by_class():
    t = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 0.0]])
    y = torch.tensor([4])
    for dtype in (torch.float32, torch.float64, torch.float16):
        for top_k in (1, 2, 3, 4, 5, 6):
            order = teacher_optimal_permutation(t.to(dtype), y, top_k=top_k)
            assert order.tolist() == [[4, 1, 3, 0, 2, 5][:top_k]]


@given(seed=st.integers(0, 10_000), ties=st.booleans(), top_k=st.integers(1, 8))
def test_the_fast_sort_and_the_search_order_as_a_stable_sort_does(seed, ties, top_k):
    g = torch.Generator().manual_seed(seed)
    t = torch.randn(3, 8, generator=g)
    if ties:
        t = t.round()  # also gives -0.0
    t[0, 0], t[1, 3] = INF, -INF
    expected = t.argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(argsort_descending(t), expected)
    assert torch.equal(argsort_descending(t.double()), expected)
    t[0, 0], y = 5.0, torch.randint(8, (3,), generator=g)
    whole = teacher_optimal_permutation(t, y)
    assert torch.equal(whole[:, 0], y)
    assert torch.equal(teacher_optimal_permutation(t, y, top_k=top_k), whole[:, :top_k])
    rest = t.gather(1, whole)[:, 1:]
    assert (rest[:, :-1] >= rest[:, 1:]).all()


# ---- the exact checks, by number -----------------------------------------------------------------------------------


def test_1_two_classes():
    s, t, y = problem(classes=2)
    rows = torch.arange(5)
    q = t.softmax(-1)[rows, y]
    expected = q * F.softplus(s[rows, 1 - y] - s[rows, y])
    assert_same(plackett_luce_distillation_loss(s, t, y, reduction="none"), expected)


def test_2_first_choice_alone_is_cross_entropy():
    s, t, y = problem()
    first = torch.zeros(6, **double)
    first[0] = 1
    assert_same(plackett_luce_distillation_loss(s, t, y, weights=first), F.cross_entropy(s, y))


def test_2_uniform_weights_are_listmle_over_the_classes():
    s, t, y = problem()
    expected = listmle_loss(s, t, y)
    assert_same(plackett_luce_distillation_loss(s, t, y, weights="uniform"), expected / 6)
    assert_same(expected, -plackett_luce_log_prob(s, teacher_optimal_permutation(t, y)).mean())


def test_2_teachers_that_are_sure():
    s, t, y = problem()
    sure = t.scatter(1, y[:, None], 2000.0)
    assert_same(plackett_luce_distillation_loss(s, sure, y), F.cross_entropy(s, y))
    wrong = (y + 1) % 6
    sure = t.scatter(1, wrong[:, None], 2000.0)
    left = s.scatter(1, y[:, None], -INF).logsumexp(-1) - s.gather(1, wrong[:, None])[:, 0]
    assert_same(plackett_luce_distillation_loss(s, sure, y), left.mean())


def test_3_constant_students():
    _, t, y = problem()
    s = torch.full_like(t, 3.0)
    alpha = t.softmax(-1).gather(1, teacher_optimal_permutation(t, y))
    expected = (alpha * torch.arange(6, 0, -1).double().log()).sum(-1).mean()
    assert_same(plackett_luce_distillation_loss(s, t, y), expected)
    assert_same(plackett_luce_distillation_loss(s, torch.zeros_like(t), y), math.lgamma(7) / 6)


def test_4_gradient():
    s, t, y = problem()
    rows = torch.arange(5)
    own = gradient(lambda x: plackett_luce_distillation_loss(x, t, y, reduction="sum"), s)
    assert_same(own.sum(-1), torch.zeros(5))
    q, p = (x.softmax(-1)[rows, y] for x in (t, s))
    assert_same(own[rows, y], q * (p - 1))
    order = teacher_optimal_permutation(t, y)
    for i in range(5):  # the closed form, class by class
        alpha = [float(t[i].softmax(0)[c]) for c in order[i]]
        lse = [float(s[i][order[i][k:]].logsumexp(0)) for k in range(6)]
        for r, c in enumerate(order[i]):
            total = sum(alpha[k] * math.exp(float(s[i, c]) - lse[k]) for k in range(r + 1))
            assert float(own[i, c]) == pytest.approx(total - alpha[r], abs=1e-12)


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 3}, {"weights": "uniform"}, {"weights": "exp2", "top_k": 2}, {"label_weight": "max"}],
)
def test_4_finite_differences(options):
    s, t, y = problem()
    s.requires_grad_()
    call = lambda x: plackett_luce_distillation_loss(x, t, y, reduction="none", **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, s)
    assert torch.autograd.gradcheck(lambda x: listmle_loss(x, t, y, top_k=options.get("top_k")), s)


@given(seed=st.integers(0, 1000), of_s=st.floats(-1e4, 1e4), of_t=st.floats(-1e4, 1e4))
def test_5_constants_do_not_matter(seed, of_s, of_t):
    s, t, y = problem(seed)
    expected = plackett_luce_distillation_loss(s, t, y)
    assert_same(plackett_luce_distillation_loss(s + of_s, t + of_t, y), expected, 1e-9)


def test_5_falls_towards_0_along_the_ranking():
    _, t, y = problem(rows=1)
    scores = torch.empty(6, **double)
    scores[teacher_optimal_permutation(t, y)[0]] = torch.arange(6, 0, -1).double()
    losses = [float(plackett_luce_distillation_loss(c * scores[None], t, y)) for c in range(60)]
    strict = [loss for loss in losses if loss > 1e-14]
    assert all(a > b for a, b in itertools.pairwise(strict))
    assert losses[-1] < 1e-14


def test_6_hessian():
    s, t, y = problem(rows=1)
    order = teacher_optimal_permutation(t, y)[0]
    alpha, expected = t[0].softmax(0)[order], torch.zeros(6, 6, **double)
    for k in range(6):
        p = torch.zeros(6, **double)
        p[order[k:]] = s[0][order[k:]].softmax(0)
        expected += alpha[k] * (p.diag() - p[:, None] * p)

    def slope(x):
        return gradient(lambda z: plackett_luce_distillation_loss(z, t, y), x)[0]

    step = 1e-5
    columns = [(slope(s + step * e) - slope(s - step * e)) / (2 * step) for e in torch.eye(6, **double)]
    assert_same(torch.stack(columns, 1), expected, 1e-9)
    assert torch.linalg.eigvalsh(expected)[0] > -1e-15


@pytest.mark.parametrize("classes", [2, 4, 6])
@pytest.mark.parametrize("steps", [1, 2, None])
def test_7_rankings_have_probability_1(classes, steps):
    s = problem(rows=1, classes=classes)[0]
    orders = torch.tensor(list(itertools.permutations(range(classes), steps or classes)))
    logp = plackett_luce_log_prob(s.expand(len(orders), -1), orders)
    assert_same(logp.exp().sum(), 1.0)
    assert (logp <= 0).all()
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: plackett_luce_log_prob(x, orders[:1]), s)


@given(seed=st.integers(0, 1000), top_k=st.integers(1, 6))
def test_8_names_of_classes_do_not_matter(seed, top_k):
    s, t, y = problem(seed)
    names = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    renamed = s[:, names], t[:, names], names.argsort()[y]
    grads = [
        gradient(lambda x, t=t, y=y: plackett_luce_distillation_loss(x, t, y, top_k=top_k), s)
        for s, t, y in ((s, t, y), renamed)
    ]
    assert_same(
        plackett_luce_distillation_loss(*renamed, top_k=top_k),
        plackett_luce_distillation_loss(s, t, y, top_k=top_k),
    )
    assert_same(grads[1], grads[0][:, names])


def test_8_top_k():
    s, t, y = problem()
    each = {k: plackett_luce_distillation_loss(s, t, y, top_k=k, reduction="none") for k in range(1, 7)}
    assert_same(each[6], plackett_luce_distillation_loss(s, t, y, reduction="none"))
    q = t.softmax(-1).gather(1, y[:, None])[:, 0]
    assert_same(each[1], q * F.cross_entropy(s, y, reduction="none"))
    assert all((each[k + 1] >= each[k]).all() for k in range(1, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_9_extreme_logits(dtype):
    s, t, y = (x.to(dtype) if x.is_floating_point() else x for x in problem(rows=20))
    for low, high in ((-1e4, 1e4), (1e4, -1e4)):
        s[::2, 1], s[::2, 4] = low, high
        loss = plackett_luce_distillation_loss(s, t, y, reduction="none")
        own = gradient(lambda x: plackett_luce_distillation_loss(x, t, y), s)
        assert loss.dtype == (dtype if dtype.itemsize > 2 else torch.float32)
        assert own.dtype == dtype
        assert torch.isfinite(loss).all()
        assert torch.isfinite(own).all()


def test_9_a_loss_scale_saves_small_gradients_of_float16():
    s, t, y = problem(rows=4, classes=3000, scale=4.0)
    half, scale = s.half(), 2.0**16
    found = gradient(lambda x: scale * plackett_luce_distillation_loss(x, t.half(), y), half)
    expected = gradient(
        lambda x: scale * plackett_luce_distillation_loss(x, t.half().float(), y), half.float()
    )
    lost = (4 * expected / scale).half() == 0  # of each row's gradient, if it were rounded before the scale
    assert float(lost.double().mean()) > 0.02
    torch.testing.assert_close(found, expected.half())


def test_9_a_common_offset_costs_no_precision():
    s, t, y = problem(rows=50, classes=40)
    exact = gradient(
        lambda x: plackett_luce_distillation_loss(x, t, y, reduction="sum"), (s * 64).round() / 64
    )
    moved = ((s * 64).round() / 64).float() + 1e4
    found = gradient(lambda x: plackett_luce_distillation_loss(x, t.float(), y, reduction="sum"), moved)
    torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=0)
    same = gradient(lambda x: plackett_luce_distillation_loss(x, t.float(), y, reduction="sum"), moved - 1e4)
    torch.testing.assert_close(found, same, atol=0, rtol=0)


@given(seed=st.integers(0, 1000), tau=st.floats(0.2, 5.0))
def test_10_at_least_the_weighted_cross_entropy(seed, tau):
    s, t, y = problem(seed)
    q = (t / tau).softmax(-1).gather(1, y[:, None])[:, 0]
    loss = plackett_luce_distillation_loss(s, t, y, temperature=tau, reduction="none")
    assert (loss >= q * F.cross_entropy(s, y, reduction="none") - 1e-12).all()


def minimiser(t, y, ridge, **options):
    """Of loss plus ridge over free logits, which is convex."""
    s = torch.zeros_like(t, requires_grad=True)
    optimizer = torch.optim.LBFGS([s], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = plackett_luce_distillation_loss(s, t, y, **options) + ridge * (s**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return s.detach()


@pytest.mark.parametrize("ridge", [1e-3, 1e-2, 0.1, 1.0])
def test_11_the_best_student_ranks_as_the_teacher_if_that_is_right(ridge):
    t = torch.tensor([[0.5, 3.0, 1.0, 0.0, 2.0]], **double)
    y = torch.tensor([1])
    assert torch.equal(minimiser(t, y, ridge).argsort(descending=True), teacher_optimal_permutation(t, y))


def test_11_a_surely_wrong_teacher_wins_over_the_label_where_logits_are_held_small():
    t = torch.tensor([[0.5, 1.0, 5.0, 0.0]], **double)
    y = torch.tensor([1])
    assert minimiser(t, y, 0.05).argmax() == 2
    assert minimiser(t, y, 0.05, label_weight="max").argmax() == 1
    assert minimiser(t, y, 1e-3).argmax() == 1  # free logits can afford the whole ranking


# ---- weights, masks, excluded classes ------------------------------------------------------------------------------


def test_label_weight_max():
    s, t, y = problem()
    q = t.softmax(-1).gather(1, teacher_optimal_permutation(t, y))
    raised = q.clone()
    raised[:, 0] = q.amax(-1)
    for top_k in (None, 1, 2):
        found = plackett_luce_distillation_loss(s, t, y, label_weight="max", top_k=top_k)
        assert_same(found, plackett_luce_distillation_loss(s, t, y, weights=raised, top_k=top_k))


@pytest.mark.parametrize("classes", [2, 6, 50])
def test_exp2_weights(classes):
    s, t, y = problem(classes=classes)
    alpha = torch.tensor([2 ** (classes - k) - 1 for k in range(1, classes + 1)]).double()
    alpha /= 2**classes - 1 - classes
    assert_same(alpha.sum(), 1.0)
    found = plackett_luce_distillation_loss(s, t, y, weights="exp2", reduction="none")
    assert_same(found, torch.stack([naive(*row, alpha=alpha) for row in zip(s, t, y, strict=True)]), 1e-10)
    in_float32 = plackett_luce_distillation_loss(s.float(), t.float(), y, weights="exp2", reduction="none")
    torch.testing.assert_close(in_float32.double(), found, atol=1e-5, rtol=1e-5)


def test_exp2_weights_beyond_50_classes_halve():
    s, t, y = problem(classes=60)
    halves = torch.tensor([2.0**-k for k in range(1, 61)], **double)
    found = plackett_luce_distillation_loss(s, t, y, weights="exp2")
    assert_same(found, plackett_luce_distillation_loss(s, t, y, weights=halves))


def test_sequences_and_masks():
    s, t, y = problem(rows=12)
    mask = torch.arange(12).reshape(3, 4) % 3 > 0
    kept = mask.reshape(-1)
    expected = plackett_luce_distillation_loss(s[kept], t[kept], y[kept], reduction="none")
    weights = torch.rand(3, 4, 6, **double)
    own = plackett_luce_distillation_loss(s[kept], t[kept], y[kept], weights=weights.reshape(12, 6)[kept])
    bad = s.clone()
    bad[~kept] = math.nan
    labels = torch.where(kept, y, -100).reshape(3, 4)
    given_ = bad.reshape(3, 4, 6), t.reshape(3, 4, 6), labels
    each = plackett_luce_distillation_loss(*given_, mask=mask, reduction="none")
    assert_same(each[mask], expected)
    assert not each[~mask].any()
    assert_same(plackett_luce_distillation_loss(*given_, mask=mask), expected.mean())
    assert_same(plackett_luce_distillation_loss(*given_, mask=mask, weights=weights), own)
    assert_same(listmle_loss(*given_, mask=mask), listmle_loss(s[kept], t[kept], y[kept]))
    grad = gradient(lambda x: plackett_luce_distillation_loss(x, *given_[1:], mask=mask), given_[0])
    assert not grad[~mask].any()
    assert_same(grad[mask], gradient(lambda x: plackett_luce_distillation_loss(x, t[kept], y[kept]), s[kept]))
    nothing = torch.zeros_like(mask)
    grad = gradient(lambda x: plackett_luce_distillation_loss(x, *given_[1:], mask=nothing), given_[0])
    assert not grad.any()


@pytest.mark.parametrize("weights", ["teacher", "uniform", "exp2"])
@pytest.mark.parametrize("scale", [2.0, 400.0])
def test_classes_that_both_exclude_are_as_if_they_were_not_there(weights, scale):
    s, t, y = problem(scale=scale)
    t = t * 2 / scale
    wide_s, wide_t = (torch.full((5, 9), -INF, **double) for _ in "st")
    kept = torch.tensor([1, 2, 4, 5, 7, 8])
    wide_s[:, kept], wide_t[:, kept] = s, t
    t[:, 3] = wide_t[:, kept[3]] = -INF  # the teacher alone excludes one more
    y = torch.where(y == 3, 0, y)
    for top_k in (None, 2):
        options = {"weights": weights, "top_k": top_k}
        expected = plackett_luce_distillation_loss(s, t, y, **options)
        assert_same(plackett_luce_distillation_loss(wide_s, wide_t, kept[y], **options), expected)
        grad = gradient(lambda x, o=options: plackett_luce_distillation_loss(x, wide_t, kept[y], **o), wide_s)
        own = gradient(lambda x, o=options: plackett_luce_distillation_loss(x, t, y, **o), s)
        assert_same(grad[:, kept], own)
        assert grad.sum(-1).abs().max() < 1e-12
    assert_same(listmle_loss(wide_s, wide_t, kept[y]), listmle_loss(s, t, y))


def test_a_class_that_the_student_excludes_may_be_one_that_no_choice_wants():
    s, t, y = problem()
    last = teacher_optimal_permutation(t, y)[:, -1:]
    s = s.scatter(1, last, -INF)
    found = plackett_luce_distillation_loss(s, t, y, top_k=3, reduction="none")
    assert_same(found, plackett_luce_distillation_loss(s.clamp(min=-500), t, y, top_k=3, reduction="none"))


def test_no_gradient_reaches_the_teacher_and_none_is_made_unasked():
    s, t, y = problem()
    t.requires_grad_()
    assert not plackett_luce_distillation_loss(s, t, y).requires_grad
    loss = plackett_luce_distillation_loss(s.requires_grad_(), t, y)
    loss.backward(retain_graph=True)
    once = s.grad.clone()
    loss.backward()
    assert_same(s.grad, 2 * once)
    assert t.grad is None


def test_modules():
    s, t, y = problem()
    options = {"temperature": 2.0, "weights": "exp2", "top_k": 3, "label_weight": "max"}
    assert torch.equal(PLDLoss(**options)(s, t, y), plackett_luce_distillation_loss(s, t, y, **options))
    assert torch.equal(ListMLELoss(top_k=2)(s, t, y), listmle_loss(s, t, y, top_k=2))


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0"),
        ({"weights": "linear"}, "weights is 'linear'"),
        ({"top_k": 0}, "top_k is 0; give 1 to 6"),
        ({"top_k": 7}, "top_k is 7"),
        ({"label_weight": "least"}, "label_weight is 'least'"),
        ({"reduction": "median"}, "reduction is 'median'"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_options_out_of_range(options, message):
    unchecked = getattr(plackett_luce_distillation_loss, "__wrapped__", plackett_luce_distillation_loss)
    with pytest.raises(ConfigError, match=message):
        unchecked(*problem(), **options)


def spoilt(which, value):
    s, t, y = problem()
    x = {"s": s, "t": t}[which]
    x[2, 3 if value != -INF else slice(None)] = value
    return s, t, y


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize(("which", "whose"), [("s", "student"), ("t", "teacher")])
def test_values_that_are_no_logits(which, whose, value):
    for loss in (plackett_luce_distillation_loss, listmle_loss):
        with pytest.raises(DataError, match=f"logits of the {whose} with NaN"):
            loss(*spoilt(which, value))


def test_data_that_cannot_be_ranked():
    s, t, y = problem()
    with pytest.raises(DataError, match="labels run from -100 to"):
        plackett_luce_distillation_loss(s, t, torch.where(y == y[0], -100, y))
    with pytest.raises(DataError, match="classes from 0 to 5"):
        teacher_optimal_permutation(t, y + 6)
    with pytest.raises(DataError, match="1 classes"):
        plackett_luce_distillation_loss(s[:, :1], t[:, :1], torch.zeros_like(y))
    excluded = s.scatter(1, y[:, None], -INF)
    for teacher in (t, t.scatter(1, y[:, None], -INF)):
        with pytest.raises(DataError, match="the true label"):
            plackett_luce_distillation_loss(excluded, teacher, y)
    second = teacher_optimal_permutation(t, y)[:, 1:2]
    with pytest.raises(DataError, match="exclude it from the teacher too"):
        plackett_luce_distillation_loss(s.scatter(1, second, -INF), t, y)
    with pytest.raises(DataError, match="weights must be finite"):
        plackett_luce_distillation_loss(s, t, y, weights=torch.tensor([1, 1, -1, 0, 0, 0.0]))
    with pytest.raises(DataError, match=r"weights have shape \(5,\); give \(6,\)"):
        _checked_weights(torch.ones(5), torch.Size([5]), 6)
    for order in ([[0, 0]], [[0, 6]], [[-1, 2]]):
        with pytest.raises(DataError, match="different classes from 0 to 5"):
            plackett_luce_log_prob(s[:1], torch.tensor(order))
    with pytest.raises(DataError, match=r"shapes \(5, 6\), \(5, 5\) and \(5,\)"):
        _flat(s, t[:, :5], y, None)


def test_the_span_of_plain_sums_is_safe():
    """Even the largest sums that they can meet stay finite: 50 000 choices of weight 1 from the far end."""
    for dtype, span in plackett_luce._SPAN.items():
        assert 50_000 * math.exp(span) < torch.finfo(dtype).max
        assert math.exp(-span) > torch.finfo(dtype).tiny
