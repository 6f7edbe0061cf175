"""Adapted layers of a half-precision model compute in float32: small steps would be rounded away in their own dtype.

A weight of 1 in bfloat16 has its neighbours 2^-8 below and 2^-7 above, far more than a step of a usual learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


class FullPrecision:
    """Layers that own any of `adapted` hold float32 tensors, and casts around them: what is around them stays as it was.

    Nothing happens to layers without a tensor in half precision. Parameters stay the same objects.

    Args:
        model: looked through for owners of the parameters, several for one where it is shared.
        adapted: parameters of the model.
    """

    def __init__(self, model: nn.Module, adapted: Iterable[nn.Parameter]) -> None:
        wanted = {id(p) for p in adapted}
        self._before: list[tuple[Tensor, torch.dtype]] = []
        self._hooks = []
        for module in model.modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if not wanted.intersection(map(id, own)):
                continue
            # a shared tensor may be float32 already, for the sake of its other owner
            held = [dtype for known, dtype in self._before if any(known is tensor for tensor in own)]
            half = [tensor for tensor in own if tensor.dtype in HALF]
            for tensor in half:
                held.append(tensor.dtype)
                self._before.append((tensor, tensor.dtype))
                tensor.data, tensor.grad = tensor.data.float(), None
            if held:
                self._hooks += [
                    module.register_forward_pre_hook(_up, with_kwargs=True),
                    module.register_forward_hook(partial(_down, dtype=held[0])),
                ]

    def undo(self) -> None:
        """Round the tensors to what they were kept in, and take the casts away."""
        for hook in self._hooks:
            hook.remove()
        for tensor, dtype in self._before:
            tensor.data, tensor.grad = tensor.data.to(dtype), None
        self._hooks, self._before = [], []


def _up(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return _cast(args, HALF, torch.float32), {
        name: _cast(value, HALF, torch.float32) for name, value in keywords.items()
    }


def _down(module: nn.Module, args: tuple[Any, ...], output: Any, *, dtype: torch.dtype) -> Any:
    return _cast(output, (torch.float32,), dtype)


def _cast(value: Any, old: tuple[torch.dtype, ...], new: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(new) if value.dtype in old else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, old, new) for item in value)
    return value
