from __future__ import annotations

from collections import defaultdict
from itertools import product

import pytest
import torch

from uncollapse.errors import ConfigError
from uncollapse.policy.batch import Clock
from uncollapse.policy.registry import recipe
from uncollapse.studies.testbeds.engine import LogitsEngine, Trainer
from uncollapse.studies.testbeds.modsum import TablePolicy
from uncollapse.studies.testbeds.walk import Walk, WalkLab, correct, look, places_of, sample

SMALL = Walk(prompts=3, places=3, limit=4)


def table(task: Walk, seed: int = 0) -> torch.Tensor:
    return task.initial_logits(torch.Generator().manual_seed(seed), torch.float64)


def responses(task: Walk):
    """Every response that the task allows: `stop` at the end, or as long as the limit."""
    for length in range(1, task.limit + 1):
        for steps in product(range(task.places), repeat=length - 1):
            yield (*steps, task.stop)
    yield from product(range(task.places), repeat=task.limit)


def test_the_exact_look_equals_the_sum_over_all_responses() -> None:
    policy = table(SMALL)
    logp = policy.log_softmax(-1)
    total: dict[str, float] = defaultdict(float)
    for prompt, tokens in product(range(3), responses(SMALL)):
        place, chance, nats = 0, 0.0, 0.0
        for token in tokens:
            chance += logp[prompt, place, token].item()
            nats -= (logp[prompt, place].exp() * logp[prompt, place]).sum().item()
            place = (place + token) % 3 if token != SMALL.stop else place
        p = torch.tensor(chance).exp().item() / 3
        right = tokens[-1] == SMALL.stop and place == 1 + prompt % 2
        for name, value in (
            ("all", 1), ("nats", nats), ("tokens", len(tokens)), ("right", right), ("right_tokens", right * len(tokens)),
        ):  # fmt: skip
            total[name] += p * value
    assert total["all"] == pytest.approx(1)
    seen = look(SMALL, policy)
    assert seen.reward == pytest.approx(total["right"])
    assert seen.entropy == pytest.approx(total["nats"] / total["tokens"])
    assert seen.length == pytest.approx(total["tokens"])
    assert seen.length_right == pytest.approx(total["right_tokens"] / total["right"])
    wrong = (total["tokens"] - total["right_tokens"]) / (1 - total["right"])
    assert seen.length_wrong == pytest.approx(wrong)


def test_samples_agree_with_the_exact_look() -> None:
    task, policy = Walk(), table(Walk())
    prompt = torch.arange(16).repeat_interleave(500)
    uniform = torch.rand(
        len(prompt), task.limit, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    ids, mask = sample(task, policy, prompt, uniform)
    right, seen = correct(task, prompt, ids, mask), look(task, policy)
    assert right.double().mean().item() == pytest.approx(seen.reward, abs=0.015)
    length = mask.sum(1).double()
    assert length[right].mean().item() == pytest.approx(seen.length_right, abs=0.8)
    assert length[~right].mean().item() == pytest.approx(seen.length_wrong, abs=0.2)
    assert 1.7 < seen.length_wrong / seen.length_right < 2.3
    assert not ids[~mask].any()
    assert ((ids == task.stop) & mask).sum(1).max() == 1


def test_a_response_depends_on_its_own_numbers_alone() -> None:
    task, policy = Walk(), table(Walk())
    prompt, uniform = torch.arange(8), torch.rand(8, 32, dtype=torch.float64)
    ids, mask = sample(task, policy, prompt, uniform)
    for row in range(8):
        alone, there = sample(task, policy, prompt[row : row + 1], uniform[row : row + 1])
        assert torch.equal(alone[0], ids[row, : alone.shape[1]])
        assert mask[row].sum() == there.sum()


def test_places_and_given_tokens() -> None:
    ids = torch.tensor([[1, 2, 0, 3], [2, 2, 3, 0]])
    assert places_of(SMALL, ids).tolist() == [[0, 1, 0, 0], [0, 2, 1, 1]]
    assert correct(SMALL, torch.tensor([1, 0]), ids, torch.ones_like(ids) > 0).tolist() == [False, True]
    given = torch.tensor([[1, 1], [3, 0]]), torch.tensor([[True, True], [True, False]])
    uniform = torch.rand(2, 4, dtype=torch.float64)
    ids, mask = sample(SMALL, table(SMALL), torch.tensor([0, 1]), uniform, given=given)
    assert ids[0, :2].tolist() == [1, 1]
    assert mask[1].tolist() == [True] + [False] * (mask.shape[1] - 1)


def test_it_is_a_lab_that_trains() -> None:
    lab, policy = WalkLab(SMALL), TablePolicy(table(SMALL))
    engine = LogitsEngine(lab, policy)
    trainer = Trainer(recipe("grpo"), engine, torch.optim.Adam(policy.parameters(), lr=0.1))
    before = look(SMALL, policy.table.detach()).reward
    for _ in range(20):
        batch, _ = trainer.step([0, 1, 2])
    assert look(SMALL, policy.table.detach()).reward > before
    assert batch.columns["finished"].any()
    assert len(lab.fresh_prompts(7, seed=0)) == 7
    assert engine.generate([0, 1], temperature=1.0, clock=Clock()).mask[:, 0].all()


def test_a_policy_that_is_always_right_has_no_failures() -> None:
    sure = torch.full((3, 3, 4), -1e4, dtype=torch.float64)
    for prompt in range(3):
        sure[prompt, 0, 1 + prompt % 2] = 0.0
        sure[prompt, 1 + prompt % 2, SMALL.stop] = 0.0
    seen = look(SMALL, sure)
    assert (seen.reward, seen.length, seen.length_right, seen.length_wrong, seen.entropy) == (
        1.0,
        2.0,
        2.0,
        0.0,
        0.0,
    )


@pytest.mark.parametrize("option", [{"prompts": 0}, {"places": 1}, {"limit": 0}])
def test_a_task_needs_something_to_do(option: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="needs at least"):
        Walk(**option)
