"""One batch as it is handed to a model: which rows it has, how to take some of them, which positions are padding."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from uncollapse.errors import DataError
from uncollapse.inspection.arguments import positional


@dataclass(frozen=True)
class ModelInputs:
    """Positional and keyword arguments of a model; the first axis of the first tensor counts the rows.

    Attributes:
        args: positional arguments.
        keywords: keyword arguments.
        names: parameters of `forward` that the positional arguments are, as far as they have names.
        by_row: names of the arguments with one entry per row; None where it shows in their lengths.
    """

    args: tuple[Any, ...]
    keywords: Mapping[str, Any]
    names: tuple[str, ...] = ()
    by_row: frozenset[str] | None = None

    @classmethod
    def of(
        cls,
        args: tuple[Any, ...],
        keywords: Mapping[str, Any],
        forward: Callable[..., Any],
        row_wise: Collection[str] | None = None,
    ) -> ModelInputs:
        """Inputs that can take part in a backward pass: tensors made in inference mode are copied.

        Args:
            forward: of the model, whose signature says which positional argument is which.
            row_wise: names of the arguments with one entry per row.

        Raises:
            DataError: no tensor among them, or one of `row_wise` that is missing or has another length than the first tensor.
        """

        def usable(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

        made = cls(
            tuple(map(usable, args)),
            {name: usable(value) for name, value in keywords.items()},
            positional(forward)[: len(args)],
            None if row_wise is None else frozenset(row_wise),
        )
        if not made.tensors or not made.tensors[0].ndim:
            raise DataError("test-time adaptation: the model got no batch of inputs; call it with a tensor")
        for name in made.by_row or ():
            found = made.named(name)
            if not isinstance(found, Tensor) or not found.ndim or len(found) != made.size:
                raise DataError(
                    f"test-time adaptation: row_wise names {name!r}, which is no tensor of {made.size} rows in this call"
                )
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
        """Whether rows can be taken out: some arguments are said to have an entry per row, or all tensors have as many."""
        if self.by_row is not None:
            return bool(self.by_row)
        plain = (bool, int, float, str, type(None))
        return all(
            (value.ndim > 0 and len(value) == self.size)
            if isinstance(value, Tensor)
            else isinstance(value, plain)
            for value in (*self.args, *self.keywords.values())
        )

    def named(self, name: str) -> Any:
        """The argument of that name, wherever it stands; None without one."""
        if name in self.names:
            return self.args[self.names.index(name)]
        return self.keywords.get(name)

    def rows(self, which: Bool[Tensor, " row"]) -> ModelInputs:
        """The same inputs for some of the rows."""

        def take(name: str, value: Any) -> Any:
            here = isinstance(value, Tensor) and (self.by_row is None or name in self.by_row)
            return value[which] if here else value

        names = (*self.names, *[""] * (len(self.args) - len(self.names)))
        return replace(
            self,
            args=tuple(map(take, names, self.args)),
            keywords={name: take(name, value) for name, value in self.keywords.items()},
        )

    def valid(self, like: Tensor) -> Bool[Tensor, "..."]:
        """Positions that are no padding: an argument `attention_mask` of the shape of `like`, else all."""
        mask = self.named("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == like.shape:
            return mask.bool()
        return torch.ones_like(like, dtype=torch.bool)
