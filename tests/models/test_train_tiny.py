import random

import pytest
import torch

from uncollapse.models.characters import character_tokenizer
from uncollapse.models.train_tiny import IGNORED, SHARES, Settings, demonstrations, encode, measure, train
from uncollapse.tasks import task

SMALL = Settings(hidden=16, layers=1, heads=2, batch=4, learn_steps=1, roughen_steps=1)


def test_targets_leave_out_the_prompt_and_the_padding():
    tokenizer = character_tokenizer()
    tokens, targets = encode(tokenizer, ["ab:", "c:"], ["12", "345"])
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert tokens[0].tolist() == [*tokenizer.encode("ab:12"), end]
    assert targets[0].tolist() == [IGNORED] * 3 + [*tokenizer.encode("12"), end]
    assert targets[1].tolist() == [IGNORED] * 2 + [*tokenizer.encode("345"), end]
    tokens, targets = encode(tokenizer, ["ab:", "c:"], ["12", ""])
    assert tokens[1].tolist() == [*tokenizer.encode("c:"), end, pad, pad, pad]
    assert targets[1].tolist() == [IGNORED, IGNORED, end, IGNORED, IGNORED, IGNORED]


@pytest.mark.parametrize("rough", [False, True])
def test_every_task_is_demonstrated(rough):
    draw = random.Random(0)
    batches = [demonstrations(draw, SMALL, rough=rough) for _ in range(30)]
    assert {name for name, _, _ in batches} == set(SHARES)
    assert all(len(prompts) == len(completions) == SMALL.batch for _, prompts, completions in batches)


def test_training_repeats_and_is_measured():
    first, tokenizer = train(SMALL, print)
    again, _ = train(SMALL, print)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    measured = measure(first, tokenizer, task("modsum"), prompts=2, group=8)
    assert 0 <= measured["accuracy"] <= measured["pass@8"] <= 1
    assert 4 < measured["entropy"] < 4.61  # an untrained model is close to uniform over 100 tokens: ln 100
    assert 1 <= measured["length"] <= 48
