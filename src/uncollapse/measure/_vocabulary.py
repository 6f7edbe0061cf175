"""Where tiles of logits come from and where their gradients go: an LM head, or logits in hand.

Both answer the same questions (`blocks`, `tile`, `sampled`, then `open`, `add`, `close`), so that the statistics are
written once. Tiles are scaled by 1/temperature and are at least float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from uncollapse.measure.statistics import row_dot

# Elements of logits held at once unless the caller says. On a CPU a streamed tile and its exponential should stay in the caches,
# and a block of whole rows be high enough for an efficient product; elsewhere kernel launches count.
STREAM_CPU, ROWS_CPU, ACCELERATOR = 2**20, 2**22, 2**25
BLOCK_ROWS = 2048

# Elements of logits that may be left from the forward pass for the backward pass, which then recomputes the rest.
KEPT_CPU, KEPT_ACCELERATOR = 24 * 2**20, 2**26

Grads: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
Where: TypeAlias = slice | Tensor
Sampled: TypeAlias = tuple[Tensor, Tensor] | None


def tile_size(chunk: int | None, device: torch.device) -> int:
    """Elements of a streamed tile: what was asked for, or what suits the device."""
    return chunk or (STREAM_CPU if device.type == "cpu" else ACCELERATOR)


def row_count(chunk: int | None, device: torch.device, vocab: int) -> int:
    """Whole rows to hold at once, at least one."""
    return max(1, (chunk or (ROWS_CPU if device.type == "cpu" else ACCELERATOR)) // vocab)


def spans(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover `range(total)`."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


class Kept:
    """Tiles of logits, or of log-probabilities, that the forward pass leaves for the backward pass, up to a budget; each is handed out once.

    A second backward pass through the same graph finds none and recomputes them.
    """

    def __init__(self, elements: int) -> None:
        self._left, self._tiles = elements, {}  # type: int, dict[tuple[int, int], Tensor]

    def offer(self, rows: slice, cols: slice, tile: Tensor) -> None:
        """Keep a copy of a scratch tile if the budget allows."""
        if tile.numel() <= self._left:
            self.give(rows, cols, tile.clone())

    def give(self, rows: slice, cols: slice, tile: Tensor) -> None:
        """Keep a tile that nobody will overwrite, if the budget allows."""
        if tile.numel() <= self._left:
            self._left -= tile.numel()
            self._tiles[rows.start, cols.start] = tile

    def take(self, rows: slice, cols: slice) -> Tensor | None:
        """The tile, now the caller's to overwrite; None if it was not kept."""
        return self._tiles.pop((rows.start, cols.start), None)


class Head:
    """Logits = (hidden W^T + b) / temperature, computed tile by tile."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> None:
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.scale = 1 / temperature
        self.hidden = hidden.to(self.dtype)
        if temperature != 1:
            self.hidden = self.hidden * self.scale
        self.weight, self.bias = weight, bias
        self.count, self.vocab = len(hidden), len(weight)
        self.source = hidden
        self._buffer = self.hidden.new_empty(0)

    @property
    def worth_keeping(self) -> int:
        """Elements of logits that it pays to leave for the backward pass: each saves its share of a product."""
        return KEPT_CPU if self.hidden.device.type == "cpu" else KEPT_ACCELERATOR

    def blocks(self, chunk: int) -> Iterator[tuple[slice, int]]:
        """Row slices and the width of their streamed tiles."""
        for rows in spans(self.count, BLOCK_ROWS):
            yield rows, max(1, chunk // (rows.stop - rows.start))

    def _weights(self, cols: slice) -> Tensor:
        return self.weight[cols].to(self.dtype)

    def tile(self, rows: Where, cols: slice) -> Tensor:
        """A scratch tile of logits; it is overwritten by the next call."""
        hidden, weight = self.hidden[rows], self._weights(cols)
        need = len(hidden) * len(weight)
        if self._buffer.numel() < need:
            self._buffer = self.hidden.new_empty(need)
        out = torch.mm(hidden, weight.t(), out=self._buffer[:need].view(len(hidden), len(weight)))
        return out if self.bias is None else out.add_(self.bias[cols].to(self.dtype), alpha=self.scale)

    def sampled(self, rows: slice, token: Tensor) -> Tensor:
        """Logits of the sampled tokens, without the rest of their rows."""
        logit = row_dot(self.hidden[rows], self.weight[token].to(self.dtype))
        return logit if self.bias is None else logit.add_(self.bias[token].to(self.dtype), alpha=self.scale)

    def open(self, wanted: tuple[bool, bool, bool]) -> None:
        """Allocate the gradients that are wanted: of hidden states, weight, bias."""
        of_hidden, of_weight, of_bias = wanted
        self._grad_hidden = torch.zeros_like(self.hidden) if of_hidden else None
        self._grad_weight = self.weight.new_empty(self.weight.shape, dtype=self.dtype) if of_weight else None
        self._grad_bias = self.weight.new_zeros(self.vocab, dtype=self.dtype) if of_bias else None
        if self._grad_weight is not None and not self.count:
            self._grad_weight.zero_()

    def add(self, rows: slice, cols: slice, grad: Tensor, sampled: Sampled = None) -> None:
        """Take the gradient of one tile with respect to its scaled logits.

        `sampled`: token ids and what their logits get on top, given with the last tile of these rows.
        """
        if self._grad_hidden is not None:
            self._grad_hidden[rows].addmm_(grad, self._weights(cols))
        if self._grad_weight is not None:  # the first block of rows finds it uninitialised
            self._grad_weight[cols].addmm_(grad.t(), self.hidden[rows], beta=float(rows.start > 0))
        if self._grad_bias is not None:
            self._grad_bias[cols] += grad.sum(0)
        if sampled is not None:
            self._add_sampled(rows, *sampled)

    def _add_sampled(self, rows: slice, token: Tensor, grad: Tensor) -> None:
        column = grad.unsqueeze(-1)
        if self._grad_hidden is not None:
            self._grad_hidden[rows] += self.weight[token].to(self.dtype).mul_(column)
        if self._grad_weight is not None:
            self._grad_weight.index_add_(0, token, self.hidden[rows] * column)
        if self._grad_bias is not None:
            self._grad_bias.index_add_(0, token, grad)

    def close(self) -> Grads:
        """The gradients, in the dtypes of the inputs."""
        hidden, weight, bias = self._grad_hidden, self._grad_weight, self._grad_bias
        return (
            None if hidden is None else hidden.mul_(self.scale).to(self.source.dtype),
            None if weight is None else weight.to(self.weight.dtype),
            None if bias is None or self.bias is None else bias.mul_(self.scale).to(self.bias.dtype),
        )


class Given:
    """Logits that exist already, read in blocks of whole rows."""

    def __init__(self, logits: Tensor, temperature: float) -> None:
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        self.scale = 1 / temperature
        self.logits = logits
        self.count, self.vocab = logits.shape

    @property
    def worth_keeping(self) -> int:
        """Nothing: the logits are there."""
        return 0

    def blocks(self, chunk: int) -> Iterator[tuple[slice, int]]:
        """Row slices and the width of their streamed tiles: whole rows."""
        for rows in spans(self.count, max(1, chunk // self.vocab)):
            yield rows, self.vocab

    def tile(self, rows: Where, cols: slice) -> Tensor:
        """A copy of some rows, scaled."""
        return self.logits[rows, cols].to(self.dtype, copy=True).mul_(self.scale)

    def sampled(self, rows: slice, token: Tensor) -> Tensor:
        """Logits of the sampled tokens."""
        return self.logits[rows].gather(-1, token.unsqueeze(-1)).squeeze(-1).to(self.dtype) * self.scale

    def open(self, wanted: tuple[bool, bool, bool]) -> None:
        """Allocate the gradient."""
        self._grad = torch.empty_like(self.logits)

    def add(self, rows: slice, cols: slice, grad: Tensor, sampled: Sampled = None) -> None:
        """Take the gradient of one tile, whole rows here, with respect to its scaled logits; see `Head.add`."""
        if sampled is not None:  # before rounding to the dtype of the logits: near p = 1 the two parts cancel
            token, extra = sampled
            grad.scatter_add_(-1, token.unsqueeze(-1), extra.unsqueeze(-1))
        self._grad[rows, cols] = grad.mul_(self.scale)

    def close(self) -> Grads:
        """The gradient, in the dtype of the logits."""
        return self._grad, None, None
