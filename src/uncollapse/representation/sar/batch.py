"""One batch as it is handed to a model: which rows it has, how to take some of them, which positions are padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from uncollapse.errors import DataError


@dataclass(frozen=True)
class ModelInputs:
    """Positional and keyword arguments of a model; the first axis of the first tensor counts the rows."""

    args: tuple[Any, ...]
    keywords: Mapping[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> ModelInputs:
        """Inputs that can take part in a backward pass: tensors made in inference mode are copied.

        Raises:
            DataError: no tensor among them.
        """

        def usable(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

        made = cls(tuple(map(usable, args)), {name: usable(value) for name, value in keywords.items()})
        if not made.tensors or not made.tensors[0].ndim:
            raise DataError("test-time adaptation: the model got no batch of inputs; call it with a tensor")
        return made

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return [value for value in (*self.args, *self.keywords.values()) if isinstance(value, Tensor)]

    @property
    def size(self) -> int:
        """Rows."""
        return len(self.tensors[0])

    @property
    def row_wise(self) -> bool:
        """Whether rows can be taken out: every tensor has one entry per row, and nothing else may hold any."""
        plain = (bool, int, float, str, type(None))
        return all(
            (value.ndim > 0 and len(value) == self.size)
            if isinstance(value, Tensor)
            else isinstance(value, plain)
            for value in (*self.args, *self.keywords.values())
        )

    def rows(self, which: Bool[Tensor, " row"]) -> ModelInputs:
        """The same inputs for some of the rows."""

        def take(value: Any) -> Any:
            return value[which] if isinstance(value, Tensor) else value

        return ModelInputs(
            tuple(map(take, self.args)), {name: take(value) for name, value in self.keywords.items()}
        )

    def valid(self, like: Tensor) -> Bool[Tensor, "..."]:
        """Positions that are no padding: a keyword `attention_mask` of the shape of `like`, else all."""
        mask = self.keywords.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == like.shape:
            return mask.bool()
        return torch.ones_like(like, dtype=torch.bool)
