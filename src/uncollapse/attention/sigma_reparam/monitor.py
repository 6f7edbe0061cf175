"""Attention entropy during training: means and minima per layer and head, and which heads collapse."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from uncollapse.errors import ConfigError
from uncollapse.inspection.attention import (
    COLLAPSED,
    AttentionTally,
    HeadStatistics,
    PaddingMask,
    no_attention,
)
from uncollapse.inspection.attention_calls import AttentionCall, attention_calls
from uncollapse.inspection.recomputation import recomputing


@dataclass(frozen=True)
class EntropyCollapse:
    """One head that collapses.

    Attributes:
        reason: "low", normalised entropy below the threshold now, or "drop", fallen within the window.
        normalized: mean normalised entropy of the last pass, 0 to 1.
        highest: the largest such mean within the window.
        first: mean probability of the first key; near 1 the head rests there, an attention sink.
    """

    layer: str
    head: int
    reason: Literal["low", "drop"]
    normalized: float
    highest: float
    first: float


class AttentionEntropyMonitor:
    """Watches the attention of a model while it trains, with forward hooks; holds a few numbers per head and pass.

    `with AttentionEntropyMonitor(model) as monitor:` or `monitor.close()` takes the hooks off. A pass is a forward pass
    of the model that attends; what activation checkpointing computes again belongs to none. Entropies in nats, normalised
    ones over the logarithm of the keys that a query may see.

    Args:
        threshold: normalised entropy below which a head has collapsed.
        drop: share of its largest normalised entropy within the window that a head may lose.
        window: passes that a drop is looked for in.
        every: look at each so-manieth pass only.

    Raises:
        ConfigError: an option out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        threshold: float = COLLAPSED,
        drop: float = 0.5,
        window: int = 100,
        every: int = 1,
    ) -> None:
        if not 0 <= threshold <= 1 or not 0 < drop <= 1 or window < 2 or every < 1:
            raise ConfigError(
                f"AttentionEntropyMonitor: threshold {threshold:g} and drop {drop:g} are shares, window {window} needs "
                f"at least 2 passes, every {every} at least 1"
            )
        self.model, self.threshold, self.drop, self.every = model, threshold, drop, every
        self.passes = 0
        self._history: dict[str, deque[HeadStatistics]] = {}
        self._window = window
        self._sums: dict[str, Float[Tensor, "statistic head"]] = {}
        self._known: dict[str, Int[Tensor, "statistic head"]] = {}  # passes in which a head has it
        self._lowest: dict[str, Float[Tensor, " head"]] = {}
        self._now, self._padding = AttentionTally(), PaddingMask(model)
        self._hooks = ExitStack()
        # In this order, for a model that is an attention itself: a pass begins before it attends.
        self._hooks.callback(model.register_forward_pre_hook(self._begins, with_kwargs=True).remove)
        self._hooks.enter_context(attention_calls(model, self._attends))
        self._hooks.callback(model.register_forward_hook(self._ends).remove)

    def __enter__(self) -> AttentionEntropyMonitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks off; what was seen stays."""
        self._hooks.close()

    @property
    def entropy(self) -> Mapping[str, Float[Tensor, " head"]]:
        """Mean entropy per layer and head over the passes looked at, nats; NaN for a head without a row."""
        return {layer: total[0] / self._known[layer][0] for layer, total in self._looked().items()}

    @property
    def normalized(self) -> Mapping[str, Float[Tensor, " head"]]:
        """Mean normalised entropy per layer and head over the passes looked at, 0 to 1; NaN without a row of two keys."""
        return {layer: total[1] / self._known[layer][1] for layer, total in self._looked().items()}

    @property
    def lowest(self) -> Mapping[str, Float[Tensor, " head"]]:
        """Least mean normalised entropy of a pass, per layer and head."""
        self._looked()
        return dict(self._lowest)

    def collapsed(self) -> list[EntropyCollapse]:
        """Heads that are below the threshold in the last pass, or fell by more than `drop` within the window."""
        found = []
        self._looked()
        for layer, history in self._history.items():
            now = history[-1]
            highest = history[0].normalized
            for one in history:
                highest = torch.fmax(highest, one.normalized)  # NaN: no row of two keys in that pass
            low, fell = now.normalized < self.threshold, now.normalized < (1 - self.drop) * highest
            for head in (low | fell).nonzero().flatten().tolist():
                values = (float(each[head]) for each in (now.normalized, highest, now.first))
                found.append(EntropyCollapse(layer, head, "low" if bool(low[head]) else "drop", *values))
        return found

    def scalars(self) -> dict[str, float]:
        """Numbers of the last pass for a log: over all heads, and the share of heads that collapse."""
        self._looked()
        last = [history[-1] for history in self._history.values()]
        normalized = torch.cat([one.normalized for one in last])
        known = normalized[~normalized.isnan()]
        nonfinite, rows = (
            sum(float(getattr(one, name).sum()) for one in last) for name in ("nonfinite", "rows")
        )
        heads = {(flag.layer, flag.head) for flag in self.collapsed()}
        return {
            "attention/entropy/mean": float(torch.cat([one.entropy for one in last]).nanmean()),
            "attention/normalized_entropy/mean": float(normalized.nanmean()),
            "attention/normalized_entropy/min": float(known.min()) if len(known) else math.nan,
            "attention/collapsed/frac": len(heads) / len(normalized),
            "attention/nonfinite/frac": nonfinite / max(nonfinite + rows, 1),
        }

    def _looked(self) -> Mapping[str, Float[Tensor, "statistic head"]]:
        if not self._sums:
            raise no_attention(self.model)
        return self._sums

    def _begins(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if recomputing():
            return
        self._padding.read(module, args, kwargs)
        self._now.clear()  # what a pass that failed has left

    def _attends(self, call: AttentionCall) -> None:
        if self.passes % self.every == 0:
            self._now.add_call(call, self._padding.queries(call))

    def _ends(self, module: nn.Module, args: object, output: Any) -> None:
        if recomputing():
            return
        self.passes += 1
        for layer, one in self._now.layers.items():
            self._history.setdefault(layer, deque(maxlen=self._window)).append(one)
            both = torch.stack([one.entropy, one.normalized])
            self._sums[layer] = self._sums.get(layer, 0) + both.nan_to_num(0)
            self._known[layer] = self._known.get(layer, 0) + ~both.isnan()
            self._lowest[layer] = torch.fmin(self._lowest.get(layer, one.normalized), one.normalized)
        self._now.clear()
