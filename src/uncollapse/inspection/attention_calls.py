"""What goes into every attention kernel of a model: queries, keys, scale and mask of each call, by layer.

Three doors are watched, and together they cover eager, SDPA and flash attention alike: the attention interface of
transformers (every model whose config names an implementation), `torch.nn.MultiheadAttention`, and calls of
`torch.nn.functional.scaled_dot_product_attention` from any other module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from uncollapse.errors import ConfigError
from uncollapse.inspection.recomputation import recomputing
from uncollapse.inspection.weights import query_key_weights
from uncollapse.measure.attention import AttentionRows, KeyMask, attention_rows, attention_rows_of_matrix

LOOKED_FOR = (
    "transformers models whose config names an attention implementation (eager, sdpa, flash_attention_2 ...)",
    "torch.nn.MultiheadAttention",
    "calls of torch.nn.functional.scaled_dot_product_attention",
)
"""Where attention can be seen; an attention that writes out its own softmax cannot."""


@dataclass(frozen=True)
class AttentionCall:
    """One call: what the softmax is taken of is scale * query @ key^T, plus or under the mask.

    Attributes:
        layer: qualified name of the module that attends.
        mask: True where a key may be seen, or numbers added to the scores; None for all keys.
        causal: the last query sees all keys, each one before it a key less.
        softcap: scores are softcap * tanh(scores / softcap), or None.
        weights: the probabilities, where the kernel shows them (eager attention) at full precision and without dropout.
    """

    layer: str
    query: Float[Tensor, "batch head query feature"]
    key: Float[Tensor, "batch kv_head key feature"]
    scale: float | None = None
    mask: Shaped[Tensor, "#batch #head #query key"] | None = None
    causal: bool = False
    softcap: float | None = None
    weights: Float[Tensor, "batch head query key"] | None = None

    def key_mask(self) -> KeyMask:
        """The mask as it is read once for all layers that share it."""
        queries, keys = self.query.shape[-2], self.key.shape[-2]
        return KeyMask.of(self.mask, queries, keys, causal=self.causal, device=self.query.device)

    def rows(self, mask: KeyMask | None = None) -> AttentionRows:
        """Statistics of its rows, without gradient and without the whole matrix; `mask` if it has been read already."""
        read = self.key_mask() if mask is None else mask
        if self.weights is not None:
            return attention_rows_of_matrix(self.weights, read)
        return attention_rows(self.query, self.key, scale=self.scale, mask=read, softcap=self.softcap)


class KeyMasks:
    """Reads masks, the very same tensor once: layers of a forward pass share one, or one for each kind of layer."""

    kept = 2

    def __init__(self) -> None:
        self._read: list[tuple[Tensor | None, tuple[int, int, bool], KeyMask]] = []

    def read(self, call: AttentionCall) -> KeyMask:
        """The call's mask, from the last few that were read if it is among them."""
        size = (call.query.shape[-2], call.key.shape[-2], call.causal)
        for mask, of_size, found in self._read:
            if mask is call.mask and of_size == size:
                return found
        found = call.key_mask()
        self._read = [(call.mask, size, found), *self._read[: self.kept - 1]]
        return found


@contextmanager
def attention_calls(
    model: nn.Module,
    seen: Callable[[AttentionCall], Any],
    *,
    refused: Callable[[str, str], Any] | None = None,
) -> Iterator[None]:
    """Within the context, call `seen` for every attention of a forward pass of `model`.

    The tensors are the kernel's own, with their gradient; keep none of them longer than the forward pass. What the model
    computes is not changed. What activation checkpointing computes again for the backward pass is told of once, when it
    was computed first.

    Args:
        refused: is told the layer and the reason where an attention is not understood.

    Raises:
        ConfigError: within the forward pass, where an attention is not understood and no `refused` is given.
    """
    names = {id(module): name for name, module in model.named_modules()}
    doors = _Doors(names, seen, refused)
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                stack.enter_context(_hooked(module, doors.multi_head, doors.leave))
            else:
                stack.enter_context(_hooked(module, doors.enter, doors.leave))
        for implementation in _implementations(model):
            stack.enter_context(_interface(implementation, doors))
        stack.enter_context(_kernel(doors))
        yield


class _Doors:
    """Who attends just now, and whether somebody has told of it already."""

    def __init__(
        self,
        names: dict[int, str],
        seen: Callable[[AttentionCall], Any],
        refused: Callable[[str, str], Any] | None,
    ) -> None:
        self._names, self._seen, self._refused = names, seen, refused
        self._inside: list[str] = []
        self._told = 0

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside.append(self._names[id(module)])

    def leave(self, module: nn.Module, *rest: Any) -> None:
        if not self._inside:
            return  # the context was entered from a hook of this module, when its own had been gathered already
        self._inside.pop()
        if isinstance(module, nn.MultiheadAttention):
            self._told -= 1

    def multi_head(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside.append(self._names[id(module)])
        self._told += 1
        assert isinstance(module, nn.MultiheadAttention)
        layer, attention = self._inside[-1], module
        call = self.understood(layer, lambda: _multi_head_call(layer, attention, args, kwargs))
        if call is not None and not recomputing():  # only now: checkpointing wants the same graph both times
            self._seen(call)

    def understood(self, layer: str, read: Callable[[], AttentionCall]) -> AttentionCall | None:
        """What `read` gives, or None once its ConfigError has been told."""
        try:
            return read()
        except ConfigError as error:
            if self._refused is None:
                raise
            self._refused(layer, str(error))
            return None

    def name(self, module: nn.Module) -> str | None:
        """The name of a module of the model that is watched."""
        return self._names.get(id(module))

    def tell(self, call: AttentionCall) -> None:
        """A call through transformers' interface."""
        self._seen(call)

    @contextmanager
    def told(self) -> Iterator[None]:
        """While a kernel runs whose call is told of elsewhere."""
        self._told += 1
        try:
            yield
        finally:
            self._told -= 1

    def kernel(
        self, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> None:
        if not self._inside or self._told or query.ndim != 4 or recomputing():
            return
        if causal and query.shape[-2] != key.shape[-2]:  # torch lines the triangle up at the top left
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
            causal = False
        if mask is not None:
            mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
        self._seen(AttentionCall(self._inside[-1], query, key, scale, mask, causal))


@contextmanager
def _hooked(module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> Iterator[None]:
    handles = (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _kernel(doors: _Doors) -> Iterator[None]:
    """Watch the function by its name in torch.nn.functional, where modules and libraries look it up."""
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        doors.kernel(query, key, attn_mask, is_causal, scale)
        return original(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    torch.nn.functional.scaled_dot_product_attention = watched
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original


def _implementations(model: nn.Module) -> list[str]:
    """Attention implementations of transformers, if it is at work in `model`: all, since a model can change its own."""
    configs = (getattr(module, "config", None) for module in model.modules())
    if not any(isinstance(getattr(config, "_attn_implementation", None), str) for config in configs):
        return []
    return sorted({"eager", *sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS})


@contextmanager
def _interface(implementation: str, doors: _Doors) -> Iterator[None]:
    """Watch one implementation in transformers' table of attention functions."""
    table = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    before = table._local_mapping.get(implementation)
    original = table.get(implementation)

    def watched(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        attend = original or sys.modules[type(module).__module__].eager_attention_forward

        with doors.told():
            result = attend(module, query, key, value, attention_mask, *args, **kwargs)
        layer = doors.name(module)
        if layer is not None and not recomputing():
            call = doors.understood(
                layer,
                lambda: _interface_call(layer, implementation, module, query, key, attention_mask, kwargs),
            )
            if call is not None:
                doors.tell(replace(call, weights=_shown(result, module, kwargs)))
        return result

    table[implementation] = watched
    try:
        yield
    finally:
        if before is None:
            del table[implementation]
        else:
            table[implementation] = before


def _shown(result: Any, module: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
    """Probabilities that the kernel gave back, if they are those that the softmax gave."""
    weights = result[1] if isinstance(result, tuple) and len(result) > 1 else None
    if (
        not isinstance(weights, Tensor)
        or weights.ndim != 4
        or weights.dtype not in (torch.float32, torch.float64)
    ):
        return None
    return None if module.training and kwargs.get("dropout") else weights


def _interface_call(
    layer: str,
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> AttentionCall:
    """As the implementation will read its arguments: masks of four axes are complete, others leave causality to it."""
    if kwargs.get("s_aux") is not None:
        raise ConfigError(f"{layer}: attention with sink logits of its own (s_aux) is not understood yet")
    if mask is not None and not isinstance(mask, Tensor):
        raise ConfigError(
            f"{layer}: a {type(mask).__name__} is no mask that can be read; load the model with sdpa attention"
        )
    is_causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    complete = mask is not None and mask.ndim == 4
    causal = causal and not complete and not implementation.endswith("eager") and query.shape[-2] > 1
    if mask is not None and mask.ndim == 2:
        mask = mask.bool()[:, None, None, -key.shape[-2] :]
    window = kwargs.get("sliding_window")
    if window is not None and not complete:
        mask = _windowed(mask, query, key, int(window))
    bias = kwargs.get("position_bias")
    if bias is not None:
        mask = bias if mask is None else _added(bias, mask)
    return AttentionCall(layer, query, key, kwargs.get("scaling"), mask, causal, kwargs.get("softcap"))


def _windowed(mask: Tensor | None, query: Tensor, key: Tensor, window: int) -> Tensor:
    """Each query sees the last `window` keys up to its own."""
    queries, keys = query.shape[-2], key.shape[-2]
    near = torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(keys - queries - window + 1)
    return near[None, None] if mask is None else near & mask


def _added(bias: Tensor, mask: Tensor) -> Tensor:
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _multi_head_call(
    layer: str, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AttentionCall:
    """Queries and keys of torch's own layer, projected once more: it shows them to nobody."""
    if module.bias_k is not None or module.add_zero_attn:
        raise ConfigError(f"{layer}: MultiheadAttention with add_bias_kv or add_zero_attn is not understood")
    given = dict(
        zip(("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"), args, strict=False)
    )
    given |= kwargs
    query, key = given["query"], given["key"]
    width, heads = module.embed_dim, module.num_heads
    weight_q, weight_k = query_key_weights(module)
    bias_q = bias_k = None
    if module.in_proj_bias is not None:
        bias_q, bias_k, _ = module.in_proj_bias.split(width)

    def projected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.ndim == 2:
            x = x[None]
        elif not module.batch_first:
            x = x.transpose(0, 1)
        y = torch.nn.functional.linear(x, weight, bias)
        return y.reshape(*y.shape[:2], heads, -1).transpose(1, 2)

    q, k = projected(query, weight_q, bias_q), projected(key, weight_k, bias_k)
    mask = given.get("attn_mask")
    if mask is not None:
        mask = _torch_mask(mask).reshape(-1, *([1] if mask.ndim == 2 else [heads]), *mask.shape[-2:])
    padding = given.get("key_padding_mask")
    if padding is not None:
        padding = _torch_mask(padding).reshape(-1, 1, 1, padding.shape[-1])
        mask = padding if mask is None else _both(mask, padding)
    return AttentionCall(layer, q, k, None, mask, False)


def _torch_mask(mask: Tensor) -> Tensor:
    """MultiheadAttention marks with True what may not be seen."""
    return ~mask if mask.dtype == torch.bool else mask


def _both(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == b.dtype == torch.bool:
        return a & b
    return _added(b, a) if b.dtype != torch.bool else _added(a, b)
