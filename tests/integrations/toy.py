"""A toy language model, tokenizer, data set and reward for TRL, small enough to train in seconds."""

from __future__ import annotations

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

VOCABULARY = ["<pad>", "<eos>", *"0123456789+= "]


def tokenizer():
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def llama(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(VOCABULARY), n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, eos_token_id=1,
        bos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def prompts(count=32):
    return Dataset.from_list(
        [{"prompt": f"{i}+{i}=" if i % 3 else f"{i}=", "answer": str(i % 10)} for i in range(count)]
    )


def digit_share(prompts, completions, answer, **columns):
    """The share of a completion's characters that are the answer, in steps: rarely equal within a group."""
    return [
        sum(c == a for c in text) / 8 + 0.05 * text.count("+")
        for text, a in zip(completions, answer, strict=True)
    ]


def config(output, **changes):
    settings = {
        "output_dir": str(output), "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6,
        "learning_rate": 1e-3, "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False, "seed": 3,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return GRPOConfig(**(settings | changes))
