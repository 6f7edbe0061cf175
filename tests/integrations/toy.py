"""A toy language model, tokenizer, data set and reward for TRL, small enough to train in seconds."""

from __future__ import annotations

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl import GRPOConfig

VOCABULARY = ["<pad>", "<eos>", *"0123456789+= "]
SMALL = {
    "vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def tokenizer():
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def llama(seed=0, dtype=torch.float32, tied=True):
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SMALL, pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(VOCABULARY), n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, eos_token_id=1,
        bos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def qwen2():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SMALL))


MODELS = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2}


def rows(groups, prompt_lengths, lengths, seed=0, time=None):
    """Left-padded prompts, each repeated by the size of its group, and right-padded completions."""
    generator = torch.Generator().manual_seed(seed)
    width, time = max(prompt_lengths), time or max(lengths)
    prompt = torch.randint(2, len(VOCABULARY), (len(groups), width), generator=generator)
    present = torch.arange(width) >= width - torch.tensor(prompt_lengths)[:, None]
    times = torch.tensor(groups)
    completion = torch.randint(2, len(VOCABULARY), (sum(groups), time), generator=generator)
    mask = torch.arange(time) < torch.tensor(lengths)[:, None]
    return {
        "prompt_ids": (prompt * present).repeat_interleave(times, 0),
        "prompt_mask": present.long().repeat_interleave(times, 0),
        "completion_ids": completion,
        "completion_mask": mask.long(),
    }


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


def odd_prompts_are_dead(prompts, completions, **columns):
    """The length of a completion where the prompt's number is even; elsewhere a group's rewards are all equal."""
    return [
        0.0 if int(p.split("=")[0].split("+")[0]) % 2 else float(len(c))
        for p, c in zip(prompts, completions, strict=True)
    ]


def config(output, **changes):
    settings = {
        "output_dir": str(output), "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6,
        "learning_rate": 1e-3, "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False, "seed": 3,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return GRPOConfig(**(settings | changes))


def scripted(trainer):
    """The trainer, with completions that depend on the prompt's tokens and the place among equal prompts alone."""

    def single_turn(prompt_ids, *_args, **_options):
        seen: dict[tuple[int, ...], int] = {}
        completions = []
        for prompt in map(tuple, prompt_ids):
            place = seen[prompt] = seen.get(prompt, -1) + 1
            seed = sum((at + 1) * token for at, token in enumerate(prompt)) * 31 + place
            generator = torch.Generator().manual_seed(seed)
            length = int(torch.randint(1, 7, (1,), generator=generator))
            tokens = torch.randint(2, len(VOCABULARY), (length,), generator=generator).tolist()
            completions.append(tokens if length == 6 else [*tokens[:-1], 1])
        return completions, None

    trainer._generate_single_turn = single_turn
    return trainer
