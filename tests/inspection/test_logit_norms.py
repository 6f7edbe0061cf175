"""Norms of the map from two inputs to their score, against queries and keys that models compute in their own forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import uncollapse
from uncollapse.attention.entropy_guided_attention import ReducedDecoder
from uncollapse.attention.sigma_reparam import remove_norms
from uncollapse.inspection.weights import attention_logit_norms

HEADS, WIDTH, VOCABULARY = 4, 8, 60
HIDDEN = HEADS * WIDTH
SIZES = {
    "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": 2, "vocab_size": VOCABULARY,
    "attn_implementation": "eager",
}  # fmt: skip
MLP = {"intermediate_size": 32, "pad_token_id": 0}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt_neox": lambda: make("GPTNeoX", **SIZES, **MLP),
    "gpt_neox_japanese": lambda: make("GPTNeoXJapanese", **SIZES),
    "bloom": lambda: make("Bloom", **SIZES),
    "persimmon": lambda: make("Persimmon", **SIZES, **MLP),
    "falcon": lambda: make("Falcon", **SIZES, multi_query=False),
    "falcon, one key head": lambda: make("Falcon", **SIZES, multi_query=True),
    "falcon, key heads": lambda: make("Falcon", **SIZES, new_decoder_architecture=True, num_kv_heads=2),
    "phi3": lambda: make("Phi3", **SIZES, **MLP, num_key_value_heads=2),
    "mpt": lambda: make("Mpt", d_model=HIDDEN, n_heads=HEADS, n_layers=2, vocab_size=VOCABULARY),
    "dbrx": lambda: make(
        "Dbrx", d_model=HIDDEN, n_heads=HEADS, n_layers=2, vocab_size=VOCABULARY, attn_implementation="eager",
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 1e6},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1},
    ),
    "modernbert": lambda: make("ModernBert", **SIZES, **MLP),
    "mpnet": lambda: make("MPNet", **SIZES, **MLP),
    "gpt2": lambda: make(
        "GPT2", n_embd=HIDDEN, n_head=HEADS, n_layer=2, vocab_size=VOCABULARY, attn_implementation="eager"
    ),
    "llama": lambda: make("Llama", **SIZES, **MLP, num_key_value_heads=2),
    "t5": lambda: make(
        "T5", d_model=HIDDEN, d_kv=WIDTH, num_heads=HEADS, d_ff=32, num_layers=2, vocab_size=VOCABULARY,
        decoder_start_token_id=0, attn_implementation="eager",
    ).encoder,
    "our own": lambda: ReducedDecoder("SM+LN+G", vocab=VOCABULARY, width=HIDDEN, layers=2, heads=HEADS, context=4),
}  # fmt: skip


def make(family: str, **sizes: Any) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**sizes)
    return getattr(transformers, f"{family}Model")(config)


class Scores(TorchFunctionMode):
    """Catches what is multiplied to scores, or given to the kernel."""

    kernels = ("matmul", "bmm", "baddbmm", "scaled_dot_product_attention")

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in self.kernels:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            query, key = tensors[1:3] if function.__name__ == "baddbmm" else tensors[:2]
            if key.ndim > 2:  # a weight has two axes
                self.pairs.append((query, key if "dot" in function.__name__ else key.mT))
        return function(*args, **kwargs)


@torch.no_grad()
def by_regression(model: nn.Module, layer: str) -> Tensor:
    """||W_Q W_K^T|| / sqrt(width) of each head, from the queries and keys of sequences of one token."""
    attention, inputs, caught = model.get_submodule(layer), [], Scores()
    for module in attention.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    attention.register_forward_pre_hook(lambda *rest: caught.__enter__() and None)
    attention.register_forward_hook(lambda *rest: caught.__exit__(None, None, None))
    model(torch.arange(VOCABULARY)[:, None])
    x = inputs[0].reshape(VOCABULARY, HIDDEN)
    query, key = (part.reshape(VOCABULARY, -1, WIDTH) for part in caught.pairs[0])
    query, key = (torch.linalg.lstsq(x, part.flatten(1)).solution.T for part in (query, key))
    q, k = (part.reshape(-1, WIDTH, HIDDEN) for part in (query, key))
    k = k.repeat_interleave(len(q) // len(k), dim=0)
    return torch.linalg.matrix_norm(q.mT @ k, 2) / math.sqrt(WIDTH)


@pytest.mark.parametrize("family", MODELS)
def test_the_norms_are_those_of_the_forward_pass(family):
    torch.manual_seed(0)
    model = remove_norms(MODELS[family]()).double().eval()  # what leaves a norm does not span the inputs
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2 and parameter.shape[0] != VOCABULARY:
            nn.init.normal_(parameter, std=0.3)
    found = attention_logit_norms(model)
    assert len(found) == 2
    name, norms = list(found.items())[1]
    assert norms.shape == (HEADS,)
    torch.testing.assert_close(norms, by_regression(model, name))


def test_why_there_are_none():
    torch.manual_seed(0)
    codegen = make("CodeGen", n_embd=32, n_head=4, n_layer=2, vocab_size=VOCABULARY, rotary_dim=4, n_ctx=8)
    assert attention_logit_norms(codegen) == {}  # its fused projection is laid out for eight accelerators

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.all(x)[:, None].chunk(3, dim=-1)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    model = Own()
    with uncollapse.watch(model, features=False) as seen:
        model(torch.randn(2, 5, 8))
    assert "query_key_value" in seen.result().absent["logit_norms"]
