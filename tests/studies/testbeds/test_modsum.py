from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.errors import ConfigError
from uncollapse.measure.covariance import token_covariance
from uncollapse.policy.entropy_mechanism import entropy_change_first_order
from uncollapse.policy.registry import recipe
from uncollapse.studies.testbeds.modsum import (
    ModSum,
    correct,
    distinct_correct,
    exact_entropy,
    exact_reward,
    logits_of,
    running_sums,
    sample,
    state_distribution,
)
from uncollapse.studies.testbeds.training import train_modsum

SMALL = ModSum(prompts=3, length=3, vocab=4)


def table(task: ModSum, seed: int = 0) -> torch.Tensor:
    return task.initial_logits(torch.Generator().manual_seed(seed), torch.float64)


def every_answer(task: ModSum) -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(task.vocab), repeat=task.length)))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_exact_reward_and_entropy_equal_enumeration(seed: int) -> None:
    z, ids = table(SMALL, seed), every_answer(SMALL)
    reward, entropy = exact_reward(SMALL, z), exact_entropy(SMALL, z)
    for i in range(SMALL.prompts):
        prompt = torch.full((len(ids),), i)
        logp = logits_of(SMALL, z, prompt, ids).log_softmax(-1).gather(-1, ids[..., None])[..., 0].sum(1)
        p = logp.exp()
        assert p.sum().item() == pytest.approx(1)
        assert reward[i].item() == pytest.approx(p[correct(SMALL, prompt, ids)].sum().item())
        # chain rule: the entropy of the whole answer is the sum of the expected entropies per token
        assert entropy[i].item() == pytest.approx(-(p * logp).sum().item() / SMALL.length)


def test_state_distribution_is_one() -> None:
    visits = state_distribution(SMALL, table(SMALL))
    torch.testing.assert_close(visits.sum(-1), torch.ones(3, 4, dtype=torch.float64))


def test_maximum_entropy_optimum_exists() -> None:
    task = ModSum()
    z = torch.zeros(16, 6, 16, 16, dtype=torch.float64)
    state = torch.arange(16)
    for prompt in range(16):
        z[prompt, 5, state, (prompt - state) % 16] = 200.0
    torch.testing.assert_close(exact_reward(task, z), torch.ones(16, dtype=torch.float64))
    assert exact_entropy(task, z).mean().item() == pytest.approx(task.max_entropy_optimum)
    assert task.max_entropy_optimum == pytest.approx(2.310, abs=5e-4)


def test_exact_reward_is_differentiable() -> None:
    z = table(ModSum(prompts=2, length=2, vocab=3)).requires_grad_()
    task = ModSum(prompts=2, length=2, vocab=3)
    assert torch.autograd.gradcheck(lambda t: exact_reward(task, t), z)
    assert torch.autograd.gradcheck(lambda t: exact_entropy(task, t), z)


def test_samples_follow_the_policy() -> None:
    z, n = table(SMALL, 3), 40_000
    prompt = torch.arange(3).repeat_interleave(n)
    uniform = torch.rand(3 * n, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids = sample(SMALL, z, prompt, uniform)
    share = correct(SMALL, prompt, ids).view(3, n).double().mean(1)
    spread = 5 * (exact_reward(SMALL, z) * (1 - exact_reward(SMALL, z)) / n).sqrt()
    assert ((share - exact_reward(SMALL, z)).abs() < spread).all()
    first = ids.view(3, n, 3)[:, :, 0]
    expected = z[:, 0, 0].softmax(-1)
    for i in range(3):
        torch.testing.assert_close(
            torch.bincount(first[i], minlength=4) / n, expected[i].float(), atol=0.02, rtol=0
        )


def test_samples_belong_to_their_numbers() -> None:
    z, prompt = table(SMALL), torch.tensor([0, 1, 2, 0])
    uniform = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    ids, order = sample(SMALL, z, prompt, uniform), torch.tensor([2, 0, 3, 1])
    assert torch.equal(sample(SMALL, z, prompt[order], uniform[order]), ids[order])
    edge = sample(SMALL, z, prompt, torch.full((4, 3), 1 - 1e-9, dtype=torch.float64))
    assert int(edge.max()) <= 3
    cold = sample(SMALL, z, prompt, uniform, temperature=1e-3)
    greedy = logits_of(SMALL, z, prompt, cold).argmax(-1)
    assert torch.equal(cold, greedy)


def test_running_sums() -> None:
    ids = torch.tensor([[3, 2, 1]])
    assert running_sums(SMALL, ids).tolist() == [[0, 3, 1]]


def test_distinct_correct_counts_different_right_answers() -> None:
    task = ModSum(prompts=2, length=2, vocab=3)
    one_way = torch.zeros(2, 2, 3, 3)
    one_way[..., 1] = 100.0  # always 1, 1: sum 2; the targets are 0 and 1
    assert distinct_correct(task, one_way, torch.Generator().manual_seed(0)).tolist() == [0, 0]
    uniform = distinct_correct(task, torch.zeros(2, 2, 3, 3), torch.Generator().manual_seed(0), samples=200)
    assert uniform.tolist() == [3, 3]


def test_entropy_change_splits_into_fixed_states_and_shift_of_visits() -> None:
    z, step = table(SMALL), 1e-5
    dz = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    after = z + step * dz
    visits = state_distribution(SMALL, z)[:, :-1]
    fixed = (visits * entropy_change_first_order(z, step * dz)).sum((1, 2)) / SMALL.length
    before = exact_entropy(SMALL, z)
    measured = exact_entropy(SMALL, after, visited_by=z) - before
    torch.testing.assert_close(measured, fixed, rtol=1e-3, atol=1e-10)
    shift = exact_entropy(SMALL, after) - exact_entropy(SMALL, after, visited_by=z)
    assert (shift.abs() > 1e-8).any()


def test_covariance_of_sampled_tokens_is_finite_here() -> None:
    z, prompt = table(SMALL), torch.arange(3)
    ids = sample(SMALL, z, prompt, torch.full((3, 3), 0.4))
    logp = logits_of(SMALL, z, prompt, ids).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    c = token_covariance(logp, torch.ones_like(logp), torch.ones(3, 3, dtype=torch.bool))
    assert (c == 0).all()


def test_impossible_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match="vocabulary of 2"):
        ModSum(vocab=1)
    assert math.isclose(ModSum(length=1).max_entropy_optimum, 0.0)


def test_runs_from_one_recipe_share_no_memory() -> None:
    task, shared = ModSum(prompts=2, length=2, vocab=3), recipe("siren")
    runs = [train_modsum(shared, seed, 4, task=task) for seed in (0, 1)]
    fresh = [train_modsum(recipe("siren"), seed, 4, task=task) for seed in (0, 1)]
    assert runs == fresh
    assert recipe("siren").regularizers[0].term.memory.value is None
