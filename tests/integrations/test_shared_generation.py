"""Generation from a shared prompt against the model's own, and the CPU's packed weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from uncollapse.integrations.packed_weights import packed_weights
from uncollapse.integrations.shared_generation import generate_shared, share_generation

sys.path.insert(0, str(Path(__file__).parent))
from toy import MODELS, VOCABULARY, llama, rows

_ROWS = rows([3, 2, 1], [5, 3, 4], [1] * 6)
PROMPTS = {"input_ids": _ROWS["prompt_ids"], "attention_mask": _ROWS["prompt_mask"]}


def options(**changes):
    return GenerationConfig(
        **({"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": [1, 5, 7]} | changes)
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(4))
def test_greedy_output_is_that_of_a_plain_call(name, seed):
    model = MODELS[name]().double().eval()
    torch.manual_seed(seed)
    for parameter in model.parameters():  # other weights, so that rows end at different times
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    plain = model.generate(**PROMPTS, generation_config=options(do_sample=False))
    shared = generate_shared(model, model.generate, **PROMPTS, generation_config=options(do_sample=False))
    assert torch.equal(plain, shared)


def test_sampled_output_is_that_of_a_plain_call_while_nobody_leaves():
    model = llama().double().eval()
    sampled = options(do_sample=True, temperature=2.0, top_k=0, min_new_tokens=12)
    torch.manual_seed(0)
    plain = model.generate(**PROMPTS, generation_config=sampled)
    torch.manual_seed(0)
    assert torch.equal(plain, generate_shared(model, model.generate, **PROMPTS, generation_config=sampled))


def test_rows_that_have_ended_leave():
    model = llama().double().eval()
    seen, forward = [], model.forward

    def counting(*args, **kwargs):
        seen.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    model.forward = counting
    torch.manual_seed(3)
    config = options(do_sample=True, temperature=3.0, top_k=0, eos_token_id=[1, 5, 7, 9, 11])
    output = generate_shared(model, model.generate, **PROMPTS, generation_config=config)
    sizes = [shape[0] for shape in seen]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 6
    assert sizes[-1] < 6
    assert all(shape[1] == 1 for shape in seen)  # the prompt went through the base model, once for each group
    ends = torch.isin(output[:, 5:], torch.tensor([1, 5, 7, 9, 11]))
    after = ends.cumsum(1) - ends.long() > 0
    assert not output[:, 5:][after].any()


def test_the_frequencies_of_samples_are_the_models():
    model = llama().double().eval()
    prompts = {name: value[:1].repeat(4000, 1) for name, value in PROMPTS.items()}
    config = options(max_new_tokens=2, do_sample=True, temperature=1.5, top_k=0, eos_token_id=[3])
    torch.manual_seed(0)
    output = generate_shared(model, model.generate, **prompts, generation_config=config)
    with torch.no_grad():
        first = torch.softmax(model(PROMPTS["input_ids"][:1]).logits[0, -1] / 1.5, -1)
    counts = torch.bincount(output[:, 5], minlength=len(VOCABULARY)).double() / len(output)
    torch.testing.assert_close(counts, first, rtol=0, atol=4 * 0.5 / len(output) ** 0.5)


def test_other_calls_go_to_the_models_own_generate():
    model = llama().eval()
    share_generation(model)
    beams = model.generate(**PROMPTS, generation_config=options(num_beams=2, do_sample=False))
    bare = model.generate(PROMPTS["input_ids"], max_new_tokens=3, do_sample=False)
    whole = model.generate(
        **PROMPTS,
        generation_config=options(return_dict_in_generate=True, output_scores=True, do_sample=False),
    )
    assert len(beams) == len(bare) == 6
    assert len(whole.scores) > 0


def test_a_prompt_of_one_token():
    model = llama().double().eval()
    one = {name: value[:, -1:] for name, value in PROMPTS.items()}
    plain = model.generate(**one, generation_config=options(do_sample=False))
    assert torch.equal(
        plain, generate_shared(model, model.generate, **one, generation_config=options(do_sample=False))
    )


@pytest.mark.parametrize("rows_", [1, 8, 64, 65])
def test_packed_weights_give_the_same_products(rows_):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 17), nn.ReLU(), nn.Linear(17, 5, bias=False))
    x = torch.randn(rows_, 33)
    with torch.no_grad(), packed_weights(model, rows_):
        found = model(x)
    torch.testing.assert_close(found, model(x).detach(), rtol=1e-5, atol=1e-5)


def test_packed_weights_leave_no_trace_and_touch_no_patched_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4).double())
    patched = model[1].forward = lambda x: x
    with packed_weights(model, 2):
        assert "forward" in vars(model[0])
        assert model[1].forward is patched
        assert "forward" not in vars(model[2])
    assert "forward" not in vars(model[0])


def test_gradients_pass_while_weights_are_packed():
    layer = nn.Linear(4, 4)
    with packed_weights(layer, 2):
        layer(torch.ones(2, 4)).sum().backward()
    assert layer.weight.grad is not None
