"""What the design has to carry: a function of a batch mean, replayed rows, exact divergences, guarded stages."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from lab import TableLab, loss_and_gradient, moved_on, prepared

from uncollapse.errors import ConfigError
from uncollapse.integrations.offers import TRL
from uncollapse.policy.batch import Clock, UndeclaredRead, join
from uncollapse.policy.recipe import Recipe, Weighted, register
from uncollapse.policy.reduction import Mean
from uncollapse.policy.registry import recipe
from uncollapse.policy.stages.regularizers import EntropyBonus, KLPenalty
from uncollapse.policy.stages.weights import TopEntropyTokens
from uncollapse.policy.stats import Entropy, Logp

WHOLE = [torch.arange(40)]
PIECES = [torch.arange(0, 7), torch.arange(7, 8), torch.arange(8, 33), torch.arange(33, 40)]


@dataclass(frozen=True)
class SquaredGap:
    """(mean entropy - anchor)**2: not row-local, so it is linearised around the mean that was decided."""

    anchor: float = 0.7
    needs: frozenset = field(default=frozenset({Entropy("now")}))
    scope: str = "minibatch"

    def decide(self, batch):
        return {"mean": batch.stats[Entropy("now")][batch.mask].mean()}

    def __call__(self, batch, own):
        gap = own["mean"] - self.anchor
        entropy = batch.stats[Entropy("now")]
        return 2 * gap * (entropy - entropy.detach()) + gap**2


def test_a_function_of_a_batch_mean_keeps_value_and_gradient_under_any_split():
    method = replace(recipe("grpo"), name="gap", regularizers=(Weighted(SquaredGap(), coef=3.0),))
    engine, batch = prepared(method)
    moved_on(engine.policy)
    plain = recipe("grpo")
    base, base_gradient = loss_and_gradient(engine, plain, batch, WHOLE)
    engine.policy.zero_grad()
    now = engine.measure(batch, frozenset({Entropy("now")}), grad=True)
    undivided = 3.0 * (now.stats[Entropy("now")][batch.mask].mean() - 0.7) ** 2
    undivided.backward()
    expected = base_gradient + engine.policy.table.grad
    for splits in (WHOLE, PIECES):
        loss, gradient = loss_and_gradient(engine, method, batch, splits)
        assert loss == pytest.approx(base + undivided.item(), abs=1e-12)
        torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


def test_replayed_rows_add_with_their_scale_and_leave_on_policy_decisions_alone():
    method = replace(recipe("clip-cov"), name="with-replay", regularizers=(Weighted(SquaredGap()),))
    engine, fresh = prepared(method, seed=1)
    _, stored = prepared(method, policy=engine.policy, seed=2)
    stored = replace(stored, uid=stored.uid + 1000, clock=fresh.clock)
    moved_on(engine.policy)
    ones = torch.ones(40, dtype=torch.float64)
    fresh = fresh.with_columns(part=torch.zeros(40, dtype=torch.long), scale=ones)
    stored = stored.with_columns(part=torch.full((40,), 2), scale=0.25 * ones)
    alone, alone_gradient = loss_and_gradient(engine, method, fresh, WHOLE)
    replayed, replayed_gradient = loss_and_gradient(engine, method, stored, WHOLE)
    both = join([fresh, stored])
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    loss, gradient = loss_and_gradient(engine, method, both[order], torch.arange(80).chunk(7))
    assert loss == pytest.approx(alone + replayed, abs=1e-12)
    torch.testing.assert_close(gradient, alone_gradient + replayed_gradient, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "extra",
    [
        {"regularizers": (Weighted(KLPenalty("ref", "exact"), coef=0.3),)},
        {"regularizers": (Weighted(KLPenalty("ref", "k3"), coef=0.3), Weighted(KLPenalty("old", "k2")))},
        {
            "weights": (TopEntropyTokens(0.3),),
            "regularizers": (Weighted(EntropyBonus(), mean=Mean(("row",))),),
        },
    ],
)
def test_penalties_and_masks_do_not_depend_on_the_split(extra):
    method = replace(recipe("dapo"), name="extended", **extra)
    engine, batch = prepared(method)
    moved_on(engine.policy)
    rows = torch.arange(len(batch))
    loss, gradient = loss_and_gradient(engine, method, batch, [rows])
    again, regained = loss_and_gradient(engine, method, batch[rows.flip(0)], rows.chunk(9))
    assert again == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(regained, gradient, atol=1e-12, rtol=0)


def test_the_exact_divergence_is_the_mean_of_its_estimators():
    """k1 and k3 are unbiased under the current policy; over all tokens their mean is the exact value."""
    logits, other = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stat = next(iter(KLPenalty("ref", "exact").needs))
    exact = stat.of(logits[None], torch.tensor([0]), other[None])
    logp, logq = logits.log_softmax(-1), other.log_softmax(-1)
    k3 = (logq - logp).exp() - 1 - (logq - logp)
    assert exact.item() == pytest.approx((logp.exp() * k3).sum().item(), abs=1e-14)
    assert exact.item() == pytest.approx((logp.exp() * (logp - logq)).sum().item(), abs=1e-14)


def test_a_coefficient_of_zero_costs_nothing():
    method = replace(recipe("grpo"), name="free", regularizers=(Weighted(EntropyBonus(), coef=0.0),))
    assert Entropy("now") not in method.stats("loss")
    assert method.stats("loss") == recipe("grpo").stats("loss")


@dataclass(frozen=True)
class Sneaky:
    """Reads what it does not declare."""

    needs: frozenset = frozenset()
    gives: frozenset = frozenset({"weight"})
    scope: str = "rollout"

    def __call__(self, batch):
        return {"weight": batch.advantage * 0}


@dataclass(frozen=True)
class Overwriting(Sneaky):
    """Writes over the advantage without reading it."""

    gives: frozenset = frozenset({"advantage"})

    def __call__(self, batch):
        return {"advantage": batch.mask.double()}


@pytest.mark.parametrize(
    ("stage", "error", "message"),
    [
        (Sneaky(), UndeclaredRead, "weights: Sneaky reads 'advantage' without declaring it"),
        (Overwriting(), ConfigError, "overwrites the column 'advantage' of an earlier stage"),
    ],
)
def test_reads_and_writes_that_were_not_declared_are_refused(stage, error, message):
    with pytest.raises(error, match=message):
        prepared(replace(recipe("grpo"), name="bad", weights=(stage,)))


def test_an_engine_that_lacks_a_need_refuses_before_the_first_step():
    method: Recipe = replace(recipe("grpo"), name="kl", regularizers=(Weighted(KLPenalty("ref", "exact")),))
    with pytest.raises(ConfigError, match=r"recipe 'kl' cannot run on TRL: .*KL"):
        method.check("TRL", TRL)


def test_registering_a_name_twice_raises():
    with pytest.raises(ConfigError, match="'grpo' is registered already"):
        register(recipe("grpo"))


def test_recipes_from_the_registry_share_no_memory():
    first, second = recipe("adaptive-entropy"), recipe("adaptive-entropy")
    first.regularizers[0].term.coefficient = 0.5
    assert second.regularizers[0].term.coefficient is None


def test_a_microbatch_scope_is_marked_and_does_depend_on_the_split():
    weights = (replace(recipe("clip-cov").weights[0], scope="microbatch", fraction=0.1, low=0.0, high=99.0),)
    method = replace(recipe("clip-cov"), name="released", weights=weights)
    assert method.split_dependent
    engine, batch = prepared(method)
    moved_on(engine.policy)
    whole, _ = loss_and_gradient(engine, method, batch, WHOLE)
    split, _ = loss_and_gradient(engine, method, batch, PIECES)
    assert whole != split
    assert Logp("now") in method.stats("loss")


@dataclass(frozen=True)
class Halved:
    """Weight 0.5, and says so in the log."""

    needs: frozenset = frozenset({Entropy("old")})
    gives: frozenset = frozenset({"weight", "halved"})
    scope: str = "rollout"

    def __call__(self, batch):
        return {"weight": 0.5 * batch.mask.double(), "halved": torch.ones(len(batch))}

    def metrics(self, batch, own):
        total = (batch.columns["halved"][:, None] * batch.mask).sum()
        return {"halved/token/frac": (total, batch.mask.sum())}


def test_what_a_stage_reports_adds_up_over_pieces():
    method = replace(recipe("grpo"), name="halved", weights=(Halved(),))
    engine, batch = prepared(method)
    plan = method.plan(batch)
    whole = method.loss(engine.measure(plan, method.stats("loss"))).metrics["halved/token/frac"]
    pieces = [
        method.loss(engine.measure(plan[rows], method.stats("loss"))).metrics["halved/token/frac"]
        for rows in PIECES
    ]
    assert whole[0] == whole[1] == batch.mask.sum()
    assert sum(total for total, _ in pieces) == whole[0]


def test_a_term_reports_and_remembers_only_rows_of_its_parts():
    seen = []

    class Counting(EntropyBonus):
        def metrics(self, batch, own):
            return {"counting/rows/sum": (torch.tensor(float(len(batch))), torch.tensor(1.0))}

        def observe(self, batch):
            seen.append(len(batch))

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    counting = Counting()
    method = replace(recipe("grpo"), name="counting", regularizers=(Weighted(counting),))
    engine, batch = prepared(method)
    part = torch.zeros(40, dtype=torch.long)
    part[:15] = 1
    batch = batch.with_columns(part=part, scale=torch.ones(40, dtype=torch.float64))
    plan = method.plan(batch)
    report = method.loss(engine.measure(plan, method.stats("loss")))
    method.observe(batch)
    assert report.metrics["counting/rows/sum"][0] == 25
    assert seen == [25]


def test_rows_continue_their_prefix_which_is_outside_the_mask():
    engine, _ = prepared(recipe("grpo"))
    prefixes = [[], [3], [1, 2, 6], [5, 4]]
    batch = engine.score(engine.generate([0, 1, 2, 3], temperature=1.0, clock=Clock(), prefixes=prefixes))
    for row, prefix in enumerate(prefixes):
        assert batch.ids[row, : len(prefix)].tolist() == prefix
        assert not batch.mask[row, : len(prefix)].any()
        assert batch.mask[row, len(prefix)]
    assert torch.equal(batch.columns["length"], batch.mask.sum(dim=1))
    present = batch.mask | (torch.arange(6) < batch.columns["prefix"][:, None])
    expected = TableLab().reward([0, 1, 2, 3], batch.ids, present)
    assert torch.equal(batch.reward, expected)


def test_a_transform_remembers_only_what_the_policy_itself_did():
    method = replace(recipe("gtpo"), name="gtpo-with-more-rows")
    _, batch = prepared(method)
    half = torch.arange(40) < 20
    batch = batch.with_columns(part=half.long(), scale=torch.ones(40, dtype=torch.float64))
    alone = recipe("gtpo")
    method.observe(batch)
    alone.observe(batch[~half])
    assert method.weights[1].initial_entropy == alone.weights[1].initial_entropy is not None
