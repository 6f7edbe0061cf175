"""The arguments of a forward pass by name, however they were given, and which tokens they call padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `module(*args, **kwargs)` by the names that its forward pass gives them; unnamed ones are left out."""
    named = dict(kwargs)
    try:
        places = positional(module.forward)
    except (TypeError, ValueError):  # a forward written in C has no signature
        return named
    return dict(zip(places, args, strict=False)) | named


def positional(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters that can be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(forward).parameters.values() if p.kind in kinds)


def real_tokens(arguments: Mapping[str, Any]) -> Bool[Tensor, "batch token"] | None:
    """True where a token is no padding, or None if no mask of two axes says so.

    `attention_mask` (transformers) marks real tokens; `src_key_padding_mask` and `key_padding_mask` (torch) mark padding
    with True or -inf. Of cross-attention the mask of the keys says nothing about the queries.
    """
    if arguments.get("query") is not arguments.get("key"):
        return _real(arguments, "attention_mask")
    return _real(arguments, "attention_mask", "src_key_padding_mask", "key_padding_mask")


def real_decoder_tokens(arguments: Mapping[str, Any]) -> Bool[Tensor, "batch token"] | None:
    """`real_tokens` of what the decoder of an encoder-decoder model reads.

    From `decoder_attention_mask` (transformers) or `tgt_key_padding_mask` (torch).
    """
    return _real(arguments, "decoder_attention_mask", "tgt_key_padding_mask")


def _real(arguments: Mapping[str, Any], real: str, *padding: str) -> Bool[Tensor, "batch token"] | None:
    """Real tokens from the mask named `real`, which marks them, or else the first of those that mark padding."""
    for name in (real, *padding):
        mask = arguments.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return mask.bool() if name == real else mask == 0
    return None
