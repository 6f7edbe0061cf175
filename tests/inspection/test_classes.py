"""Which features belong to which classes, for the heads of many kinds of models."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaForSequenceClassification

import uncollapse
from uncollapse.attention.entropy_guided_attention import ReducedDecoder
from uncollapse.errors import ConfigError
from uncollapse.inspection.classes import head_inputs
from uncollapse.inspection.features import head_of

SIZE = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30
}  # fmt: skip


def tokens(rows: int = 4, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 30, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model: nn.Module, classes: Any = None, **inputs: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    missed: list[str] = []
    with head_inputs(model, lambda h, y: found.append((h, y)), classes=classes, missed=missed.append):
        model(**inputs)
    assert bool(found) != bool(missed)
    return found


def bert(kind: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, f"BertFor{kind}")(transformers.BertConfig(**SIZE, **more))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("by", ["labels", "function"])
def test_a_causal_classifier_of_texts_is_read_at_the_position_that_decides(by):
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        transformers.LlamaConfig(**SIZE, num_labels=3, pad_token_id=0)
    ).eval()
    ids, mask, classes = tokens(), torch.ones(4, 7, dtype=torch.long), torch.tensor([0, 1, 2, 1])
    ids[1, 4:] = 0  # padding on the right
    ids[2, :3] = 0  # and on the left
    mask[1, 4:] = 0
    mask[2, :3] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    ((features, found),) = (
        read(model, labels=classes, **inputs) if by == "labels" else read(model, lambda: classes, **inputs)
    )
    last = model.model(**inputs).last_hidden_state[torch.arange(4), torch.tensor([6, 3, 6, 6])]
    torch.testing.assert_close(features, last)
    assert found.tolist() == classes.tolist()
    with uncollapse.watch(model, classes=lambda: classes) as seen:
        model(**inputs)
    assert seen.result().collapse.samples == 4


def test_labels_of_tokens_are_the_classes_of_models_that_are_not_causal():
    labels = torch.randint(0, 3, (4, 7), generator=torch.Generator().manual_seed(1))
    labels[:, ::2] = -100
    for model in (bert("TokenClassification", num_labels=3), bert("MaskedLM")):
        ((features, classes),) = read(model, input_ids=tokens(), labels=labels)
        assert classes.tolist() == labels[labels >= 0].tolist()
        assert features.shape == (12, 16)
        assert not read(model, input_ids=tokens())
    ((features, classes),) = read(
        bert("SequenceClassification", num_labels=3), input_ids=tokens(), labels=torch.tensor([0, 1, 2, 0])
    )
    assert classes.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_features_of_a_decoder_belong_to_tokens_of_the_decoder(kind):
    torch.manual_seed(0)
    if kind == "T5":
        config: Any = transformers.T5Config(
            d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=30, decoder_start_token_id=0
        )
    else:
        config = transformers.BartConfig(
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=30, max_position_embeddings=32,
        )  # fmt: skip
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    answer = tokens(seed=1)
    ((_, classes),) = read(model, input_ids=tokens(), labels=answer)
    assert classes.tolist() == answer.flatten().tolist()
    ((_, classes),) = read(model, input_ids=tokens(), decoder_input_ids=answer)
    assert classes.tolist() == answer[:, 1:].flatten().tolist()


@torch.no_grad()
def test_a_causal_model_that_computes_its_last_logits_only():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE)).eval()
    ids = tokens()
    ((features, classes),) = read(model, input_ids=ids, logits_to_keep=4)
    ((every, _),) = read(model, input_ids=ids)
    torch.testing.assert_close(features, every.reshape(4, 6, 16)[:, 3:].flatten(0, 1))
    assert classes.tolist() == ids[:, 4:].flatten().tolist()


@torch.no_grad()
def test_a_linear_layer_inside_a_block_is_no_head():
    decoder = ReducedDecoder("SM+LN+G", vocab=30, width=16, layers=2, heads=2, context=8)
    with pytest.raises(ConfigError, match="outside of its blocks"):
        head_of(decoder)
    with uncollapse.watch(decoder) as seen:
        decoder(tokens())
    assert "outside of its blocks" in seen.result().absent["classes"]
    parts = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)]
    assert head_of(nn.Sequential(*parts, nn.Sequential(nn.Linear(4, 3)))).out_features == 3


@torch.no_grad()
@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (None, "not known as a causal language model"),
        (torch.zeros(4, 3), "floating-point"),
        (torch.zeros(4, 2, dtype=torch.long), r"classes of shape \(4, 2\)"),
        (torch.tensor([0, 1, 2, 3]), "classes from 0 to 3, expected 0 to 2"),
    ],
)
def test_what_fits_nothing_is_told(labels, said):
    model = nn.Sequential(nn.Linear(5, 3))
    with uncollapse.watch(model, attention=False, classes=lambda: labels) as seen:
        pass
    assert "no feature with a class" in seen.result().absent["classes"]
    with seen:
        model(torch.randn(4, 5))
    assert re.search(said, seen.result().absent["classes"])


@torch.no_grad()
def test_a_custom_causal_model_says_so():
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(30, 8), nn.Linear(8, 30)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(tokens))

    model, ids = Bigram(), tokens()
    with uncollapse.watch(model, attention=False) as seen:
        model(ids)
    assert '"next_token"' in seen.result().absent["classes"]
    with uncollapse.watch(model, attention=False, classes="next_token") as seen:
        model(ids)
    assert seen.result().collapse.samples == 24
