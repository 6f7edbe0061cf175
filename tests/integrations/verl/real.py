"""verl's real training worker and FSDP engine on the CPU, single process or one of several, over a tiny Llama."""

from __future__ import annotations

import os
from itertools import chain
from unittest.mock import patch

import platforms  # noqa: F401  (before verl's engines, which ask for the device)
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, StableLmConfig
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig

import uncollapse.integrations.verl.engine  # noqa: F401  (registers the engine)
from uncollapse.integrations.verl.workers import RecipeTrainingWorker

VOCABULARY = ["<pad>", "<eos>", *"0123456789+= "]


MODELS = {
    "llama": LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=True, initializer_range=0.2,
    ),
    "stablelm": StableLmConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=True, initializer_range=0.2,
    ),
}  # fmt: skip
"""Llama computes its norms in float32 whatever its weights; StableLM is float64 throughout."""


def save_model(folder, kind):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS[kind]).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        folder
    )


def join(store, rank=0, ranks=1):
    """The process group, without a port on the network, and what verl's workers read of their launcher."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # read, never connected to
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def settings(folder, *, strategy="uncollapse_fsdp2", micro=2, rate=0.5, warmup=0, packed=False):
    """Of verl's worker: plain SGD without clipping shows the gradient."""
    model = HFModelConfig(
        path=str(folder), use_remove_padding=packed, enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa"},
    )  # fmt: skip
    engine = FSDPEngineConfig(
        model_dtype="fp64", use_torch_compile=False,
        mixed_precision={"param_dtype": "fp64", "reduce_dtype": "fp64", "buffer_dtype": "fp64"},
    )  # fmt: skip
    object.__setattr__(engine, "strategy", strategy)
    engine.use_dynamic_bsz = False
    engine.micro_batch_size_per_gpu, engine.infer_micro_batch_size_per_gpu = micro, micro
    optimizer = FSDPOptimizerConfig(
        optimizer="SGD", lr=rate, weight_decay=0.0, clip_grad=1e9, total_training_steps=10, lr_warmup_steps=warmup,
        lr_scheduler_type="constant", override_optimizer_config={},
    )  # fmt: skip
    return TrainingWorkerConfig(
        model_type="language_model", model_config=model, engine_config=engine, optimizer_config=optimizer,
        checkpoint_config=CheckpointConfig(),
    )  # fmt: skip


def double():
    """verl's table of precisions with float64, which it lacks."""
    plain = PrecisionType.to_dtype
    return patch.object(
        PrecisionType, "to_dtype", lambda name: torch.float64 if name == "fp64" else plain(name)
    )


def worker(folder, **options):
    """verl's worker in this process, its model built."""
    with double():
        made = RecipeTrainingWorker(settings(folder, **options))
        made.reset()
    return made


class RayWorker(RecipeTrainingWorker):
    """The same as a process of Ray. verl would join the group with a backend per device, of which a CPU has one."""

    def __init__(self, config):
        dist.init_process_group("gloo")
        super().__init__(config)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reset(self):
        with double():
            super().reset()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def weights(self):
        return parameters(self)


class RayGroup:
    """A group of such processes under the names by which the driver calls verl's actor workers."""

    def __init__(self, group, ranks):
        self.group, self.ranks = group, ranks
        self.set_loss_fn = group.set_loss_fn

    def compute_log_prob(self, data):
        return self.group.infer_batch(data).get()

    def update_actor(self, data):
        return self.group.train_mini_batch(data).get()


class Group:
    """A worker group as the driver sees it, every process its own share."""

    def __init__(self, training_worker, ranks=1, rank=0):
        self.worker, self.ranks, self.rank = training_worker, ranks, rank
        self.rates = []

    def set_loss_fn(self, loss_fn):
        self.worker.set_loss_fn(loss_fn)

    def compute_log_prob(self, data):
        output = self.worker.infer_batch(tu.chunk_tensordict(data, self.ranks)[self.rank])
        shares = [None] * self.ranks
        names = [name for name in output.keys() if name != "metrics"]  # noqa: SIM118
        dist.all_gather_object(shares, {name: list(output[name].unbind()) for name in names})
        whole = {
            name: torch.nested.as_nested_tensor(
                list(chain.from_iterable(share[name] for share in shares)), layout=torch.jagged
            )
            for name in names
        }
        return tu.get_tensordict(whole, {"metrics": tu.get(output, "metrics")})

    def update_actor(self, data):
        output = self.worker.train_mini_batch(tu.chunk_tensordict(data, self.ranks)[self.rank])
        self.rates.append(self.worker.engine.optimizer.param_groups[0]["lr"])
        return output


def parameters(training_worker):
    found = {}
    for name, value in training_worker.engine.module.state_dict().items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        found[name] = whole.detach().clone()
    return found
