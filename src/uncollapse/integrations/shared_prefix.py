"""Score groups without repeating their prompt: one packed row for a micro-batch instead of one padded row per completion.

The completions of a group share a prompt of P tokens. Padded, G completions of T tokens cost G (P + T) tokens in every
matrix product; packed they cost P + G T, and less where completions end early: padding, completions that nothing is
asked of, and tokens behind the last one that is measured are left out. Inside attention, and only there, the packed
tokens are laid out again: prompts attend causally to themselves, every completion to its prompt's keys and values and
causally to itself. So no completion sees another, and attention costs what it costs for padded rows.

Works for dense decoders of transformers whose attention goes through its `AttentionInterface` and looks at the whole
past (Llama, Qwen2, GPT-2 and their like); `supports_packing` tells.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from uncollapse.errors import DataError

KEYWORD = "shared_prefix"
"""Keyword argument that carries the `Layout` through a model's forward to its attention."""

_BASES = ("sdpa", "flash_attention_2", "flash_attention_3")
_PREFIX = "shared_prefix|"


class Grid(NamedTuple):
    """Consecutive packed tokens as rows of slots, padded on the right.

    `token` is the number of each slot's token among these, 0 where there is none; `slot` the flat slot of each token.
    """

    token: Int[Tensor, "row slot"]
    slot: Int[Tensor, " token"]

    def lay_out(self, tokens: Float[Tensor, "token head dim"]) -> Float[Tensor, "row head slot dim"]:
        """States of the tokens in their slots; anything in the slots that hold none."""
        laid = tokens if self._dense else tokens.index_select(0, self.token.reshape(-1))
        return laid.unflatten(0, self.token.shape).transpose(1, 2)

    def collect(self, x: Float[Tensor, "row head slot dim"]) -> Float[Tensor, "token head dim"]:
        """States of the slots that hold a token."""
        flat = x.transpose(1, 2).flatten(0, 1)
        return flat if self._dense else flat.index_select(0, self.slot)

    @property
    def _dense(self) -> bool:
        return self.token.numel() == self.slot.numel()


class Layout(NamedTuple):
    """How packed tokens lie in prompts and completions; tuples and tensors, so that data parallelism can carry it."""

    prompt: Grid
    completion: Grid
    owner: Int[Tensor, " row"]
    """The prompt of each completion."""
    visible: Bool[Tensor, "#row 1 slot key"]
    """Which keys (the prompt's, then the completion's own) each slot of a completion attends to."""

    def shared(self, x: Float[Tensor, "prompt head place dim"]) -> Float[Tensor, "row head place dim"]:
        """A prompt's states for each of its completions."""
        return x.expand(len(self.owner), -1, -1, -1) if len(x) == 1 else x.index_select(0, self.owner)


class Packed(NamedTuple):
    """A micro-batch as one row of tokens, and where the measured tokens are.

    `source[i]` is the packed token whose hidden state predicts the i-th measured token, which stands at flat index
    `target[i]` of the (row, time) grid of completions and has the id `token[i]`.
    """

    ids: Int[Tensor, "1 token"]
    position_ids: Int[Tensor, "1 token"]
    layout: Layout
    source: Int[Tensor, " measured"]
    target: Int[Tensor, " measured"]
    token: Int[Tensor, " measured"]


def pack(
    prompt_ids: Int[Tensor, "row prompt_time"],
    prompt_mask: Tensor,
    completion_ids: Int[Tensor, "row time"],
    completion_mask: Tensor,
    counted: Bool[Tensor, "row time"],
) -> Packed:
    """Pack completions with left-padded prompts; neighbouring rows with equal prompts share one.

    `counted` says which completion tokens will be measured; each needs a non-empty prompt. Rows without any are left
    out, but for one if there is no other: data parallel processes have to run a forward pass together.
    """
    present, counted = prompt_mask.bool(), counted & completion_mask.bool()
    rows = _rows_to_run(counted)
    prompts, owner = distinct(prompt_ids[rows].masked_fill(~present[rows], -1))
    present = present[rows][prompts]
    # The last measured token of a row is predicted, never read.
    time = torch.arange(completion_ids.shape[1], device=completion_ids.device)
    last = torch.where(counted[rows], time, -1).amax(dim=1)
    read = completion_mask[rows].bool() & (time < last[:, None])
    width = int(last.amax().clamp(min=0))

    first = torch.cat([prompt_ids[rows][prompts][present], completion_ids[rows][read]])
    lengths = present.sum(dim=1)
    if int(lengths.amin()) == 0:
        raise DataError(
            "a prompt is empty, and nothing predicts the first token after it; begin prompts with a token"
        )
    starts = lengths.cumsum(0) - lengths
    prompt_position = (present.cumsum(dim=1) - 1)[present]
    read_position = (read.cumsum(dim=1) - 1 + lengths[owner][:, None])[read]
    total = int(lengths.sum())
    places = torch.arange(int(lengths.amax()), device=lengths.device)
    layout = Layout(
        prompt=_grid(places < lengths[:, None]),
        completion=_grid(read[:, :width]),
        owner=owner,
        visible=_visible(lengths, owner, width),
    )
    # What predicts the first token of a completion is the last of its prompt; any other, the token before it.
    number = torch.full(read.shape, -1, dtype=torch.long, device=read.device)
    number[read] = torch.arange(total, len(first), device=read.device)
    before = torch.cat([(starts + lengths - 1)[owner][:, None], number[:, :-1]], dim=1)
    target = (rows[:, None] * len(time) + time)[counted[rows]]
    return Packed(
        ids=first[None],
        position_ids=torch.cat([prompt_position, read_position])[None],
        layout=layout,
        source=before[counted[rows]],
        target=target,
        token=completion_ids.reshape(-1)[target],
    )


def _rows_to_run(counted: Tensor) -> Tensor:
    rows = counted.any(dim=1).nonzero()[:, 0]
    return rows if len(rows) else rows.new_zeros(1)


def distinct(ids: Int[Tensor, "row time"]) -> tuple[Int[Tensor, " prompt"], Int[Tensor, " row"]]:
    """First row of each run of equal rows, and for each row the number of its run."""
    fresh = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    fresh[1:] = (ids[1:] != ids[:-1]).any(dim=1)
    return fresh.nonzero()[:, 0], fresh.long().cumsum(0) - 1


def _grid(where: Tensor) -> Grid:
    token = torch.zeros(where.shape, dtype=torch.long, device=where.device)
    slot = where.reshape(-1).nonzero()[:, 0]
    token.view(-1)[slot] = torch.arange(len(slot), device=where.device)
    return Grid(token, slot)


def _visible(lengths: Tensor, owner: Tensor, width: int) -> Tensor:
    device, most = lengths.device, int(lengths.amax())
    own = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    # Completions are padded on the right, where causality hides the padding: rows differ in their prompts alone.
    alike = bool((lengths == most).all())
    known = lengths[:1] if alike else lengths[owner]
    prompt = (torch.arange(most, device=device) < known[:, None])[:, None, None]
    return torch.cat([prompt.expand(-1, 1, width, most), own.expand(len(known), 1, width, width)], dim=3)


# ---- attention ---------------------------------------------------------------------------------------------


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float | None, dropout: float
) -> Tensor:
    """Attention of packed tokens; `query` (1, head, token, dim), `key` and `value` with as many or fewer heads.

    Returns (1, token, head, dim).
    """
    prompt, completion = layout.prompt, layout.completion
    counts = [len(prompt.slot), len(completion.slot)]
    # One split of all tokens: its backward pass joins both gradients, where that of two slices would add two whole ones.
    first, rest = zip(*(x[0].transpose(0, 1).split(counts) for x in (query, key, value)), strict=True)
    shared_query, shared_key, shared_value = map(prompt.lay_out, first)
    output = _sdpa(shared_query, shared_key, shared_value, None, scale=scale, dropout=dropout)
    outputs = [prompt.collect(output)]
    if completion.token.numel():
        own_query, own_key, own_value = map(completion.lay_out, rest)
        keys, values = (
            torch.cat([layout.shared(shared), own], dim=2)
            for shared, own in ((shared_key, own_key), (shared_value, own_value))
        )
        output = _sdpa(own_query, keys, values, layout.visible, scale=scale, dropout=dropout)
        outputs.append(completion.collect(output))
    return torch.cat(outputs)[None]


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float | None, dropout: float
) -> Tensor:
    copies = query.shape[1] // key.shape[1]
    # With a mask only the CPU kernel reads grouped heads; elsewhere PyTorch would fall back to holding all scores.
    grouped = copies > 1 and (mask is None or query.device.type == "cpu")
    if copies > 1 and not grouped:
        key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    return nn.functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, mask is None, scale=scale, enable_gqa=grouped
    )


def _dispatch(
    base: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **options: Any,
) -> tuple[Tensor, None]:
    layout = options.pop(KEYWORD, None)
    if layout is None:
        return base(module, query, key, value, attention_mask, **options)
    dropout, scale = options.get("dropout", 0.0), options.get("scaling")
    return attend(query, key, value, layout, scale=scale, dropout=dropout), None


def takes_position_ids(model: nn.Module) -> bool:
    """Whether the model's own forward has an argument `position_ids`."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


def supports_packing(model: nn.Module) -> bool:
    """Whether `enable_packing` can serve this causal language model of transformers.

    False for attention that does not go through the `AttentionInterface`, looks back only so far, or does more than a
    scaled dot product (caps, sinks); for mixtures of experts, encoders and recurrent layers; and for models without
    `position_ids`.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    implementation = str(config._attn_implementation).removeprefix(_PREFIX)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        implementation in _BASES
        and bool(getattr(model, "_supports_attention_backend", False))
        and bool(model._can_set_attn_implementation())  # type: ignore[operator]
        and takes_position_ids(model)
        and kinds == {"full_attention"}
        and (hasattr(config, "layer_types") or not getattr(config, "sliding_window", None))
        and not getattr(config, "is_encoder_decoder", False)
        and not any(getattr(config, name, None) for name in ("attn_logit_softcapping", "num_local_experts", "num_experts"))
        and not any(hasattr(module, "sinks") for module in model.modules())
    )  # fmt: skip


def enable_packing(model: nn.Module) -> None:
    """Let the model's attention understand a `Layout`; calls without one go where they went before."""
    base = str(model.config._attn_implementation)  # type: ignore[union-attr]
    if base.startswith(_PREFIX):
        return
    name = _PREFIX + base
    AttentionInterface.register(name, functools.partial(_dispatch, ALL_ATTENTION_FUNCTIONS[base]))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.set_attn_implementation(name)  # type: ignore[operator]


def packed_inputs(packed: Packed) -> dict[str, Any]:
    """Keyword arguments of a model's forward pass over the packed row."""
    return {
        "input_ids": packed.ids,
        "position_ids": packed.position_ids,
        # Four dimensions tell transformers that the mask is made already; ours is in the layout.
        "attention_mask": packed.ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
        KEYWORD: packed.layout,
    }
