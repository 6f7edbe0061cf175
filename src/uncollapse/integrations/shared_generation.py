"""Generate groups without repeating their prompt: its keys and values are computed once, and finished rows leave.

The sampling itself is `generate` of transformers, in one or more rounds over a cache that it continues: a round ends
when a quarter of its rows have ended, and the next goes on with the others. Greedy output is that of a plain call; a
sampled one has the same distribution, but not the same random numbers once rows have left.
"""

from __future__ import annotations

import copy
import inspect
import types
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from uncollapse.integrations.packed_weights import packed_weights
from uncollapse.integrations.shared_prefix import distinct

LEAVE_AT = 0.25
"""Share of rows that have to have ended before a round ends: fewer would copy the cache too often."""

_BY_LENGTH = (
    "begin_suppress_tokens", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "min_length", "min_new_tokens", "sequence_bias", "watermarking_config",
)  # fmt: skip
"""Options that count tokens from the start of a call: all rows then stay to the end of it."""

_ELSEWHERE = (
    "cache_implementation", "guidance_scale", "prompt_lookup_num_tokens", "return_dict_in_generate", "stop_strings",
)  # fmt: skip
"""Options for which a call goes to the model's own `generate`."""


class _RowsLeave(StoppingCriteria):
    """Ends a call of `generate` once enough of its rows have sampled an end token."""

    def __init__(self, ends: Int[Tensor, " end"], rows: int) -> None:
        self.ends = ends
        self.ended = torch.zeros(rows, dtype=torch.bool, device=ends.device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Bool[Tensor, " row"]:
        self.ended |= torch.isin(input_ids[:, -1], self.ends)
        return (self.ended.sum() >= LEAVE_AT * len(self.ended)).expand(len(self.ended))


class _RoomyLayer(DynamicLayer):
    """Keys and values with room for what is still to come: a new token is written behind the others, none is moved."""

    keys: Tensor
    values: Tensor

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._key_room: Tensor | None = None
        self._value_room: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self._key_room = _appended(self.keys, key_states, self._key_room, self.room)
        self.values, self._value_room = _appended(self.values, value_states, self._value_room, self.room)
        return self.keys, self.values


def _appended(kept: Tensor, new: Tensor, store: Tensor | None, room: int) -> tuple[Tensor, Tensor]:
    """`kept` with `new` behind it, and the store that both are in: the same, unless `kept` is not or no longer in it."""
    start = kept.shape[-2] if kept.numel() else 0
    end = start + new.shape[-2]
    if (
        store is None
        or store.data_ptr() != kept.data_ptr()
        or len(store) != len(new)
        or store.shape[-2] < end
    ):
        store = new.new_empty(*new.shape[:-2], max(end, room), new.shape[-1])
        if start:
            store[..., :start, :] = kept
    store[..., start:end, :] = new
    return store[..., :end, :], store


def share_generation(model: nn.Module) -> None:
    """Let `model.generate(input_ids=..., attention_mask=..., generation_config=...)` share prompts between rows.

    `model` is a decoder that `supports_packing`. Neighbouring rows with equal prompts share one. Calls with other
    arguments or with options of another kind of generation, and calls under parameter sharding, where all processes
    have to step together until the longest completion of any has ended, go to the model's own `generate`.
    """
    original: Any = model.generate

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config")
        if _sharded(self):
            # By itself it sees what its own loader has sharded, not what accelerate has.
            return original(*args, **{"synced_gpus": True, **kwargs})
        known = not args and set(kwargs) == {"input_ids", "attention_mask", "generation_config"}
        if known and config is not None and _can_share(self, config):
            return generate_shared(self, original, **kwargs)
        return original(*args, **kwargs)

    model.generate = types.MethodType(generate, model)  # type: ignore[assignment]


@torch.no_grad()
def generate_shared(
    model: Any,
    generate: Any,
    input_ids: Int[Tensor, "row prompt_time"],
    attention_mask: Tensor,
    generation_config: GenerationConfig,
) -> Int[Tensor, "row all_time"]:
    """Prompts (left-padded) with their completions (padded on the right), as the model's own `generate` gives them.

    `generate` is that of transformers, bound to `model`.
    """
    rows, width = input_ids.shape
    ends = torch.tensor(_tokens(model, generation_config, "eos_token_id"), device=input_ids.device)
    pad = (_tokens(model, generation_config, "pad_token_id") or ends.tolist() or [0])[0]
    limit = width + generation_config.max_new_tokens
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    cache = _prefilled(model, input_ids, attention_mask, name, room=limit)
    done = input_ids.new_full((rows, limit), pad)
    live = torch.arange(rows, device=input_ids.device)
    stay = _asks(model, generation_config, _BY_LENGTH)
    ids, mask, reached = input_ids, attention_mask, width
    with packed_weights(model, rows):
        while len(live) and reached < limit:
            config = copy.copy(generation_config)
            config.max_new_tokens = limit - reached
            leave = _RowsLeave(ends, len(live))
            criteria = StoppingCriteriaList([] if stay else [leave])
            sources = {"input_ids": ids, "attention_mask": mask, name: cache}
            ids = generate(**sources, generation_config=config, stopping_criteria=criteria)
            reached = ids.shape[1]
            done[live, :reached] = ids
            if stay:
                break
            going = (~leave.ended).nonzero()[:, 0]
            mask = nn.functional.pad(mask, (0, reached - mask.shape[1]), value=1)
            live, ids, mask = live[going], ids[going], mask[going]
            if len(going) < len(leave.ended):
                cache.batch_select_indices(going)
    return done[:, :reached]


def _prefilled(
    model: Any, input_ids: Tensor, attention_mask: Tensor, name: str, *, room: int
) -> DynamicCache:
    """Keys and values of all prompt tokens but the last, computed once for neighbouring rows with equal prompts.

    The last token is left for each row's first forward pass, which has to give that row's logits. There is `room` for
    so many tokens.
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [_RoomyLayer(room) for _ in cache.layers]
    if input_ids.shape[1] < 2:
        return cache
    first, owner = distinct(input_ids.masked_fill(attention_mask == 0, -1))
    ids, mask = input_ids[first, :-1], attention_mask[first, :-1]
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    options = {name: cache, "use_cache": True}
    model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, **options)
    cache.batch_select_indices(owner)
    return cache


def _can_share(model: Any, config: GenerationConfig) -> bool:
    if not config.max_new_tokens:
        return False
    single = (config.num_beams or 1) == 1 and (config.num_return_sequences or 1) == 1
    return single and config.use_cache is not False and not _asks(model, config, _ELSEWHERE)


def _sharded(model: nn.Module) -> bool:
    """Whether a forward pass of the model is work of several processes, each of which holds a part of its parameters."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    parts = (FSDPModule, FullyShardedDataParallel)
    return is_deepspeed_zero3_enabled() or any(isinstance(module, parts) for module in model.modules())


def _asks(model: Any, config: GenerationConfig, names: tuple[str, ...]) -> bool:
    """Whether the call or the model's defaults set any of these options."""
    return any(
        getattr(settings, name, None) for settings in (config, model.generation_config) for name in names
    )


def _tokens(model: Any, config: GenerationConfig, name: str) -> list[int]:
    found = getattr(config, name, None)
    if found is None:
        found = getattr(model.generation_config, name, None)
    return [] if found is None else [found] if isinstance(found, int) else list(found)
