from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from uncollapse.errors import ConfigError
from uncollapse.policy.recipe import Weighted
from uncollapse.policy.registry import recipe
from uncollapse.policy.siren import Siren
from uncollapse.studies.testbeds.engine import Lab, LogitsEngine, Trainer
from uncollapse.studies.testbeds.long_tail import LongTail, LongTailLab, examine, make

SMALL = LongTail(prompts=2, length=3, vocab=5, rank=3, keys=1, accepted=2, candidates=3, nucleus=0.8)


def world(task: LongTail, seed: int = 0) -> tuple:
    return make(task, torch.Generator().manual_seed(seed), torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_exam_equals_enumeration(seed: int) -> None:
    made, policy = world(SMALL, seed)
    ids = torch.tensor(list(itertools.product(range(5), repeat=3)))
    lab, found = LongTailLab(made), examine(made, policy)
    accuracy = entropy = right_entropy = 0.0
    for prompt in range(2):
        prompts = [prompt] * len(ids)
        logp = lab.logits(policy, prompts, ids).log_softmax(-1).gather(-1, ids[..., None])[..., 0].sum(1)
        p, right = logp.exp().detach(), lab.reward(prompts, ids, torch.ones_like(ids).bool()) == 1
        q = p[right] / p[right].sum()
        accuracy += p[right].sum().item() / 2
        entropy -= (p * p.log()).sum().item() / 2 / 3
        right_entropy -= (q * q.log()).sum().item() / 2 / 3
    assert found.accuracy == pytest.approx(accuracy, abs=1e-12)
    assert found.entropy == pytest.approx(entropy, abs=1e-12)
    assert found.right_entropy == pytest.approx(right_entropy, abs=1e-12)
    outside = (policy().softmax(-1) * ~made.nucleus).sum(-1).mean().item()
    assert found.tail == pytest.approx(outside, abs=1e-12)


def test_the_world_is_as_described() -> None:
    task = LongTail()
    made, policy = world(task)
    p = policy().softmax(-1)
    mass = (p * made.nucleus).sum(-1)
    assert (mass >= 0.98).all()
    assert ((mass - torch.where(made.nucleus, p, 1.0).amin(-1)) < 0.98).all()
    key = (made.accepted != made.nucleus).any(-1)
    assert (key.sum(1) == 3).all()
    assert (made.accepted.sum(-1)[key] == 5).all()
    top = torch.zeros_like(made.nucleus).scatter_(-1, p.topk(10).indices, True)
    assert not (made.accepted & ~top)[key].any()
    start = examine(made, policy)
    assert 0.015 < start.tail < 0.02
    assert 0.01 < start.accuracy < 0.1


def test_samples_follow_the_policy_and_continue_what_is_given() -> None:
    made, policy = world(SMALL)
    lab = LongTailLab(made)
    assert isinstance(lab, Lab)
    ids, mask = lab.sample(policy, [1] * 20_000, temperature=0.7, seed=0)
    assert mask.all()
    share = torch.nn.functional.one_hot(ids, 5).double().mean(0)
    torch.testing.assert_close(share, (policy()[1] / 0.7).softmax(-1).detach(), atol=0.015, rtol=0)
    start, there = torch.full((20_000, 2), 4), torch.tensor([True, False]).expand(20_000, 2)
    given, _ = lab.sample(policy, [1] * 20_000, temperature=0.7, seed=0, given=(start, there))
    assert (given[:, 0] == 4).all()
    assert torch.equal(given[:, 1:], ids[:, 1:])
    assert lab.fresh_prompts(7, seed=1) == lab.fresh_prompts(7, seed=1)


def test_the_engine_trains_it() -> None:
    made, policy = world(SMALL)
    term = Weighted(Siren(), coef=0.1, mean=Siren.mean)
    chosen = replace(recipe("grpo"), name="some", regularizers=(term,))
    before = examine(made, policy).accuracy
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    trainer = Trainer(chosen, LogitsEngine(LongTailLab(made), policy), optimizer, minibatches=2)
    for _ in range(15):
        trainer.step([0, 1])
    assert examine(made, policy).accuracy > before + 0.1


@pytest.mark.parametrize(
    "options", [{"prompts": 0}, {"keys": 21}, {"accepted": 11}, {"candidates": 301}, {"nucleus": 1.0}]
)
def test_impossible_tasks_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match="needs"):
        LongTail(**options)
