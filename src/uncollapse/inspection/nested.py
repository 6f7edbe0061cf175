"""Keep padding in place inside torch's TransformerEncoder, which drops it on its way of nested tensors (evaluation, no gradient)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from uncollapse.inspection.arguments import arguments_of


@contextmanager
def padded_layers(model: nn.Module) -> Iterator[None]:
    """Within the context, layers of a TransformerEncoder that would get nested tensors get padded ones and their mask.

    A layer with hooks takes its slow path, which cannot attend over nested tensors. What it gives back is nested
    again, so that the encoder still fills padding with 0.
    """
    with ExitStack() as stack:
        for encoder in model.modules():
            if isinstance(encoder, nn.TransformerEncoder) and getattr(encoder, "use_nested_tensor", False):
                length = _Length()
                stack.callback(encoder.register_forward_pre_hook(length.read, with_kwargs=True).remove)
                for layer in encoder.layers:
                    padded = _Padded(length)
                    stack.callback(layer.register_forward_pre_hook(padded.pad, with_kwargs=True).remove)
                    stack.callback(layer.register_forward_hook(padded.nest).remove)
        yield


class _Length:
    """How many tokens the encoder was given, padding included."""

    def __init__(self) -> None:
        self.tokens = 0

    def read(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        source = arguments_of(encoder, args, kwargs).get("src")
        self.tokens = source.shape[1] if isinstance(source, Tensor) and source.ndim == 3 else 0


class _Padded:
    """The hooks of one layer: padded on the way in, nested on the way out."""

    def __init__(self, length: _Length) -> None:
        self._length = length
        self._real: Bool[Tensor, "batch token"] | None = None

    def pad(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._real = None
        source = args[0] if args else None
        if not isinstance(source, Tensor) or not source.is_nested:
            return None
        rows = source.unbind()
        counts = torch.tensor([len(row) for row in rows], device=source.device)
        self._real = torch.arange(self._length.tokens, device=source.device) < counts[:, None]
        whole = source.to_padded_tensor(0.0, (len(rows), self._length.tokens, rows[0].shape[-1]))
        return (whole, *args[1:]), kwargs | {"src_key_padding_mask": ~self._real}

    def nest(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self._real is None:
            return output
        nested: Tensor = torch._nested_tensor_from_mask(output, self._real, mask_check=False)
        return nested
