"""Whether a stream of predictions has folded into few classes: entropy of the mean prediction beside that of each.

Let p_i be the predicted distribution of sample i in a window of n. With the marginal p = mean_i p_i, the entropies

    H(p) >= mean_i H(p_i),   their difference is the mutual information of sample and prediction.

A collapsed classifier is sure of itself and always says the same: both are near 0. A useless one that has not collapsed says
nothing (both near log C), a good one on a mixed stream has a large marginal and small sample entropies.

Differs from the paper: nothing published; the two thresholds are ours.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.precision import at_least_float32


@dataclass(frozen=True)
class PredictionSpread:
    """What a window of predictions spreads over.

    `samples` predictions, without those that are not finite; `marginal_entropy` of their mean and `sample_entropy`, the mean
    of their own (nats; NaN with no sample); `largest_share` of samples whose most probable class is the same, 1/C to
    1; `classes` C; `collapsed`, the detector's word.
    """

    samples: int
    marginal_entropy: float
    sample_entropy: float
    largest_share: float
    classes: int
    collapsed: bool

    @property
    def mutual_information(self) -> float:
        """How much the samples tell apart, marginal minus sample entropy (nats, >= 0)."""
        return self.marginal_entropy - self.sample_entropy


class CollapseDetector:
    """Watches predictions over a sliding window and says when they have collapsed.

    Collapsed: marginal entropy below `marginal` log C *and* mean sample entropy below `sample` log C, over a full window. A
    stream ordered by class has a small marginal legitimately, and a model that is sure of itself small sample entropies. Where a
    sure model meets an ordered stream both hold without collapse, and no statistic of the predictions alone can
    tell: take a window that is longer than one class lasts.

    Keeps one vector of C numbers per batch of the window; nothing is copied to the host before `spread`.

    Args:
        window: samples looked back on; the oldest batch goes when the rest still fills the window.
        marginal: threshold on the marginal entropy, share of log C.
        sample: threshold on the mean sample entropy, share of log C.

    Raises:
        ConfigError: window below 2, a threshold outside (0, 1].
    """

    def __init__(self, *, window: int = 512, marginal: float = 0.3, sample: float = 0.1) -> None:
        if window < 2:
            raise ConfigError(f"CollapseDetector: window is {window}; give at least 2 samples")
        for name, share in (("marginal", marginal), ("sample", sample)):
            if not 0 < share <= 1:
                raise ConfigError(
                    f"CollapseDetector: {name} is {share}; give a share of log C above 0, at most 1"
                )
        self.window, self.marginal, self.sample = window, marginal, sample
        self._batches: deque[tuple[int, Tensor, Tensor]] = deque()

    def update(self, logits: Float[Tensor, "*sample class"]) -> None:
        """Take the logits of one more batch; rows with NaN or +inf do not count.

        Raises:
            DataError: another number of classes than before, or fewer than two.
        """
        rows = logits.detach().reshape(-1, logits.shape[-1])
        if rows.shape[1] < 2 or (self._batches and self._batches[0][1].shape[1] != rows.shape[1]):
            raise DataError(
                f"CollapseDetector: logits of shape {tuple(logits.shape)}; the last axis must be the same two or "
                "more classes in every batch"
            )
        if not len(rows):
            return
        logp = at_least_float32(rows).log_softmax(-1)
        p = logp.exp()
        entropy = torch.special.entr(p).sum(-1)
        good = entropy.isfinite()
        p = torch.where(good.unsqueeze(-1), p, 0)
        votes = torch.zeros_like(p[0]).index_add_(0, p.argmax(-1), good.to(p.dtype))
        scalars = torch.stack([good.sum().to(p.dtype), torch.where(good, entropy, 0).sum()])
        self._batches.append((len(rows), torch.stack([p.sum(0), votes]), scalars))
        while sum(size for size, _, _ in self._batches) - self._batches[0][0] >= self.window:
            self._batches.popleft()

    def spread(self) -> PredictionSpread:
        """The window so far.

        Raises:
            DataError: nothing seen yet.
        """
        if not self._batches:
            raise DataError("CollapseDetector: no predictions yet; call update(logits) first")
        total, votes = torch.stack([table for _, table, _ in self._batches]).sum(0)
        count, entropy = torch.stack([scalars for _, _, scalars in self._batches]).sum(0)
        marginal = torch.special.entr(total / count).sum()
        n, mixed, own, share = torch.stack([count, marginal, entropy / count, votes.max() / count]).tolist()
        limit = math.log(len(total))
        collapsed = n >= self.window and mixed < self.marginal * limit and own < self.sample * limit
        return PredictionSpread(round(n), mixed, own, share, len(total), collapsed)

    def reset(self) -> None:
        """Forget the window."""
        self._batches.clear()
