"""Attention of running models, against the matrices that eager attention shows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralModel,
)

import uncollapse
from uncollapse.errors import ConfigError
from uncollapse.inspection.attention import attention_statistics, head_table
from uncollapse.inspection.attention_calls import attention_calls

SIZE = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 40}


def llama(implementation: str, **more: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZE, num_attention_heads=4, num_key_value_heads=2, **more)
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()


def shown(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """Mean entropy per layer and head of the attention matrices that the model gives back."""
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    mask = inputs.get("attention_mask")
    rows = torch.stack([torch.special.entr(a).sum(-1) for a in attentions])  # layer, batch, head, query
    if mask is None:
        return rows.mean(dim=(1, 3))
    kept = mask.bool()[None, :, None].expand_as(rows)
    return (rows * kept).sum(dim=(1, 3)) / kept.sum(dim=(1, 3))


def watched(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), attention_statistics(model) as tally:
        model(**inputs)
    return head_table(tally.layers)["entropy"].float()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_llama_with_grouped_heads(implementation, padded):
    inputs = {"input_ids": torch.randint(0, 40, (3, 11), generator=torch.Generator().manual_seed(1))}
    if padded:
        inputs["attention_mask"] = torch.ones(3, 11, dtype=torch.long)
        inputs["attention_mask"][1, :4] = 0
        inputs["attention_mask"][2, 8:] = 0
    expected = shown(llama("eager"), **inputs)
    torch.testing.assert_close(watched(llama(implementation), **inputs), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_sliding_window_and_two_directions(implementation):
    ids = {"input_ids": torch.randint(0, 40, (2, 11), generator=torch.Generator().manual_seed(1))}
    for make, config in (
        (MistralModel, MistralConfig(**SIZE, num_attention_heads=4, num_key_value_heads=2, sliding_window=4)),
        (BertModel, BertConfig(**SIZE, num_attention_heads=4, max_position_embeddings=16)),
        (GPT2LMHeadModel, GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=40)),
    ):
        torch.manual_seed(0)
        eager = make._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
        model = make._from_config(config, attn_implementation=implementation).eval()
        model.load_state_dict(eager.state_dict())
        torch.testing.assert_close(watched(model, **ids), shown(eager, **ids), atol=2e-6, rtol=1e-5)


def test_generation_with_a_cache_counts_every_query():
    model = llama("sdpa")
    with torch.no_grad(), attention_statistics(model) as tally:
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert all(one.rows.tolist() == [6] * 4 for one in tally.layers.values())  # the last token is never fed


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_computes_again_is_seen_once(reentrant):
    seen = []
    for checkpointed in (False, True):
        model = llama("sdpa").train()
        if checkpointed:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        ids = torch.arange(22).view(2, 11)
        with uncollapse.watch(model) as watcher:
            for _ in range(2):
                model(input_ids=ids, labels=ids).loss.backward()
        seen.append(watcher.result())
    plain, again = seen
    assert all(one.rows.tolist() == [44] * 4 for one in again.heads.values())
    assert [one.rows for one in again.blocks.values()] == [44, 44]
    assert again.collapse.samples == plain.collapse.samples
    assert again.scalars() == pytest.approx(plain.scalars(), rel=1e-5)


def test_a_kernel_that_is_changed_while_the_model_is_watched():
    model, ids = llama("sdpa"), {"input_ids": torch.arange(11)[None]}
    with torch.no_grad(), attention_statistics(model) as tally:
        for kernel in ("eager", "sdpa"):
            model.set_attn_implementation(kernel)
            model(**ids)
    torch.testing.assert_close(head_table(tally.layers)["entropy"].float(), shown(llama("eager"), **ids))
    assert all(one.rows.tolist() == [22] * 4 for one in tally.layers.values())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_torch_s_own_layer(batch_first, training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    x = torch.randn((3, 5, 16) if batch_first else (5, 3, 16))
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    bare = causal == -torch.inf
    with torch.no_grad():
        plain = model(x, mask=bare, src_key_padding_mask=padding)
        with attention_statistics(model) as tally:
            same = model(x, mask=bare, src_key_padding_mask=padding)
        _, weights = model.layers[0].self_attn(
            x, x, x, key_padding_mask=padding, attn_mask=bare, average_attn_weights=False
        )
    torch.testing.assert_close(plain, same)
    assert list(tally.layers) == ["layers.0.self_attn", "layers.1.self_attn"]
    first = tally.layers["layers.0.self_attn"]
    shown = torch.special.entr(weights).sum(-1).movedim(1, -1)[~padding]
    torch.testing.assert_close(first.entropy.float(), shown.mean(dim=0))


@torch.no_grad()
def test_padding_is_left_out_however_the_mask_is_given():
    model, ids = llama("sdpa"), torch.randint(0, 40, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, :4] = 0
    with attention_statistics(model) as tally:
        model(ids, mask)
    assert all(one.rows.tolist() == [29] * 4 for one in tally.layers.values())
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2, enable_nested_tensor=False
    )
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    bias = torch.zeros(3, 5).masked_fill(padding, -torch.inf)
    for given in (padding, bias):
        with attention_statistics(encoder) as tally:
            encoder(x, src_key_padding_mask=given)
        assert all(one.rows.tolist() == [13] * 2 for one in tally.layers.values())
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    with attention_statistics(attention) as tally:
        attention(x, x, x, padding)
    assert tally.layers[""].rows.tolist() == [13] * 2
    with attention_statistics(attention) as tally:  # the keys' mask says nothing about other queries
        attention(x[:, :4], x, x, padding)
    assert tally.layers[""].rows.tolist() == [12] * 2


@torch.no_grad()
@pytest.mark.parametrize("kind", ["T5", "Bart", "torch"])
def test_a_decoder_beside_an_encoder_has_a_mask_of_its_own(kind):
    torch.manual_seed(0)
    read, written = torch.ones(3, 6, dtype=torch.long), torch.ones(3, 4, dtype=torch.long)
    read[1, 4:] = 0
    written[2, 3:] = 0
    if kind == "torch":
        model: nn.Module = nn.Transformer(16, 2, 1, 1, 24, batch_first=True).train()
        inputs: dict[str, Any] = {"src": torch.randn(3, 6, 16), "tgt": torch.randn(3, 4, 16)}
        masks = {"src_key_padding_mask": read == 0}, {"tgt_key_padding_mask": written == 0}
    else:
        sizes = {"T5": {"d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}, "Bart": {
            "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32,
        }}[kind]  # fmt: skip
        config = getattr(transformers, f"{kind}Config")(d_model=16, vocab_size=30, **sizes)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
        inputs = {
            "input_ids": torch.randint(3, 30, (3, 6)),
            "decoder_input_ids": torch.randint(3, 30, (3, 4)),
        }
        masks = {"attention_mask": read}, {"decoder_attention_mask": written}
    for given, wanted in (
        (masks[0], {"encoder": 16, "decoder": 12}),
        (masks[0] | masks[1], {"encoder": 16, "decoder": 11}),
    ):
        with attention_statistics(model) as tally:
            model(**inputs, **given)
        assert len(tally.layers) == 3
        for layer, one in tally.layers.items():
            (side,) = {"encoder", "decoder"} & set(layer.split("."))
            assert one.rows.tolist() == [wanted[side]] * 2, layer


class Own(nn.Module):
    """A model that calls the kernel itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.inner = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]


def test_a_model_that_calls_the_kernel_and_one_that_hides_its_softmax():
    model, x = Own(), torch.randn(2, 5, 8)
    before = torch.nn.functional.scaled_dot_product_attention
    with attention_statistics(model) as tally:
        model(x)
    assert list(tally.layers) == [""]
    assert tally.layers[""].rows.tolist() == [10]
    assert torch.nn.functional.scaled_dot_product_attention is before
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    linear = nn.Linear(8, 8)
    with pytest.raises(ConfigError, match=r"looked for .*MultiheadAttention"), attention_statistics(linear):
        linear(x)


def test_calls_keep_their_gradient_and_a_failure_leaves_nothing_behind():
    model, kept = Own(), []
    with attention_calls(model, kept.append):
        model(torch.randn(2, 5, 8))
        with pytest.raises(RuntimeError, match="shape"):
            model(torch.randn(2, 5, 9))
        model(torch.randn(2, 5, 8))
    assert [call.layer for call in kept] == ["", ""]
    assert kept[0].query.requires_grad
    assert kept[0].causal
    assert not model.qkv._forward_hooks
    assert not model.qkv._forward_pre_hooks


def test_sinks_are_not_called_collapsed():
    model = Own()
    with torch.no_grad():
        model.qkv.weight.zero_()
        model.qkv.bias.copy_(torch.cat([torch.full((8,), 30.0), torch.zeros(8), torch.zeros(8)]))
        uniform = torch.zeros(1, 6, 8)
        with attention_statistics(model) as flat:
            model(uniform)
        model.qkv.weight[8:16] = torch.eye(8)
        first, last = torch.zeros(1, 6, 8), torch.arange(6.0)[None, :, None].expand(1, 6, 8)
        first[:, 0] = 1
        with attention_statistics(model) as sink:
            model(first)
        with attention_statistics(model) as sharp:
            model(last.contiguous())
    assert flat.layers[""].uniform.all()
    assert not flat.layers[""].collapsed.any()
    assert sink.layers[""].sink.all()
    assert not sink.layers[""].collapsed.any()
    assert sharp.layers[""].collapsed.all()
    assert not sharp.layers[""].sink.any()
