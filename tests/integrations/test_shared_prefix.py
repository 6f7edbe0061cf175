"""Packed groups against padded rows, in float64: values, gradients, independence of completions, what is left out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from uncollapse.errors import DataError
from uncollapse.integrations.fused_forward import add_completion_stats, packed_stats, padded_stats
from uncollapse.integrations.shared_prefix import enable_packing, pack, supports_packing
from uncollapse.measure.statistics import Entropy, Logp, NucleusEntropy

sys.path.insert(0, str(Path(__file__).parent))
from toy import MODELS, SMALL, VOCABULARY, llama, rows


def ready(make):
    model = make().double()
    for parent in list(model.modules()):  # transformers' RMSNorm rounds to float32
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)
    enable_packing(model)
    add_completion_stats(model, temperature=0.7)
    return model


def loss_and_gradient(model, found, counted):
    weights = torch.linspace(-1, 2, counted.numel(), dtype=torch.float64).view(counted.shape)
    loss = sum((weights * value).sum() for value in found.values())
    model.zero_grad()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_padded_in_value_and_gradient(name, checkpointing):
    model = ready(MODELS[name]).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = rows([3, 1, 2], [5, 2, 4], [4, 1, 6, 3, 6, 2])
    counted = inputs["completion_mask"].bool()
    counted[2, 1], counted[0, 3], counted[5] = False, False, False
    statistics = [Logp(), Entropy(), NucleusEntropy(p=0.8)]
    padded = padded_stats(model, statistics, **inputs, counted=counted)
    expected = loss_and_gradient(model, padded, counted)
    packed = packed_stats(model, statistics, **inputs, counted=counted)
    found = loss_and_gradient(model, packed, counted)
    for statistic in statistics:
        torch.testing.assert_close(packed[statistic], padded[statistic], rtol=0, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shapes(data):
    model = _LLAMA
    groups = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    prompts = data.draw(st.lists(st.integers(1, 6), min_size=len(groups), max_size=len(groups)))
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=sum(groups), max_size=sum(groups)))
    inputs = rows(groups, prompts, lengths, seed=data.draw(st.integers(0, 99)), time=5)
    chance = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    counted = inputs["completion_mask"].bool() & (torch.rand(sum(groups), 5) < chance)
    with torch.no_grad():
        padded = padded_stats(model, [Logp(), Entropy()], **inputs, counted=counted)
        packed = packed_stats(model, [Logp(), Entropy()], **inputs, counted=counted)
    for statistic, value in padded.items():
        torch.testing.assert_close(packed[statistic], value, rtol=0, atol=1e-12)
        assert not packed[statistic][~counted].any()


_LLAMA = ready(llama)


def test_no_completion_sees_another():
    inputs = rows([4], [5], [6, 6, 6, 6])
    counted = inputs["completion_mask"].bool()
    before = packed_stats(_LLAMA, [Logp()], **inputs, counted=counted)[Logp()]
    inputs["completion_ids"][1] = 2 + (inputs["completion_ids"][1] - 1) % (len(VOCABULARY) - 2)
    after = packed_stats(_LLAMA, [Logp()], **inputs, counted=counted)[Logp()]
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])
    assert not torch.allclose(before[1], after[1])


def test_only_what_is_read_is_packed():
    inputs = rows([3, 2], [5, 4], [6, 2, 6, 6, 1])
    counted = inputs["completion_mask"].bool()
    counted[2], counted[3, 2:] = False, False
    packed = pack(**inputs, counted=counted)
    # Two prompts; of each completion the tokens before its last measured one: 5 + 1 + 0 (left out) + 1 + 0.
    assert packed.ids.shape == (1, 5 + 4 + 5 + 1 + 1)
    assert len(packed.token) == 6 + 2 + 2 + 1
    assert len(packed.layout.owner) == 4


def test_a_batch_with_nothing_to_measure_still_runs():
    inputs = rows([2], [3], [2, 2])
    none = torch.zeros(2, 2, dtype=torch.bool)
    found = packed_stats(_LLAMA, [Logp()], **inputs, counted=none)[Logp()]
    assert found.shape == (2, 2)
    found.sum().backward()
    assert not found.any()


def test_an_empty_prompt_is_an_error():
    inputs = rows([1], [3], [2])
    inputs["prompt_mask"] = torch.zeros_like(inputs["prompt_mask"])
    with pytest.raises(DataError, match="a prompt is empty"):
        pack(**inputs, counted=inputs["completion_mask"].bool())


def test_equal_neighbouring_prompts_are_one_whatever_their_groups_are():
    inputs = rows([2, 2], [3, 3], [2, 2, 2, 2])
    inputs["prompt_ids"][2:] = inputs["prompt_ids"][:2]
    assert len(pack(**inputs, counted=inputs["completion_mask"].bool()).layout.prompt.token) == 1


def test_without_a_layout_the_model_is_unchanged():
    torch.manual_seed(1)
    ids = torch.randint(2, len(VOCABULARY), (2, 7))
    plain, changed = llama().double(), llama().double()
    enable_packing(changed)
    assert torch.equal(plain(ids).logits, changed(ids).logits)


@pytest.mark.parametrize("base", ["eager", "sdpa"])
def test_what_is_supported(base):
    model = llama()
    model.set_attn_implementation(base)
    assert supports_packing(model) is (base == "sdpa")


def test_limited_attention_and_experts_are_not():
    sliding = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8))
    experts = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2))
    assert not supports_packing(sliding)
    assert not supports_packing(experts)
    assert supports_packing(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)))


@pytest.mark.parametrize("groups", [[4], [2, 2]])
@pytest.mark.parametrize("lengths", [[5, 5, 5, 5], [5, 2, 5, 1]])
@pytest.mark.parametrize("prompts", [3, 2])
def test_grids_with_and_without_gaps(groups, lengths, prompts):
    inputs = rows(groups, [3, prompts][: len(groups)], lengths)
    counted = inputs["completion_mask"].bool()
    padded = padded_stats(_LLAMA, [Logp()], **inputs, counted=counted)
    packed = packed_stats(_LLAMA, [Logp()], **inputs, counted=counted)
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-12)
    found, expected = (loss_and_gradient(_LLAMA, value, counted) for value in (packed, padded))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
