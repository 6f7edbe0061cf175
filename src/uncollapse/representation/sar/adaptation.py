"""A classifier that may change while it predicts: the interface that all methods share, and the one that changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from uncollapse.errors import DataError
from uncollapse.measure.entropy import shannon_entropy_from_logits
from uncollapse.representation.sar.batch import ModelInputs

NAN = math.nan
LogitsOf = Callable[[Any], Tensor]


@dataclass
class AdaptationStats:
    """Figures of the last batch, and counts since the construction; NaN where there was nothing to measure.

    A sample is a row of logits: an image, or one token of a language model.
    """

    batches: int = 0
    """Batches seen."""
    updates: int = 0
    """Optimiser steps taken."""
    resets: int = 0
    """Times the model recovered by itself (`SAR` only)."""
    skipped_empty: int = 0
    """Steps in which no reliable sample was left."""
    skipped_nonfinite: int = 0
    """Steps whose loss or gradient was NaN or infinite."""
    nonfinite_samples: int = 0
    """Samples whose logits were NaN or +inf; they take no part in any update."""
    kept: float = NAN
    """|S1| / B: share of samples below the margin."""
    kept_twice: float = NAN
    """|S2| / B: share still below it at the perturbed weights (`SAR` only)."""
    entropy: float = NAN
    """Mean entropy of the predictions (nats)."""
    prediction_entropy: float = NAN
    """Entropy of the histogram of predicted classes in the batch (nats); 0 if all are the same."""
    grad_norm: float = NAN
    """||g||: norm of the gradient over all adapted parameters."""
    sharp_grad_norm: float = NAN
    """||g2||: the same at the perturbed weights (`SAR` only)."""
    moving_loss: float = NAN
    """m: moving average of the loss at the perturbed weights (nats; `SAR` only)."""


class Adaptation(nn.Module):
    """A model that may change while it predicts: `adapted(x)` gives logits, `reset()` the model as it was handed in.

    The wrapped model is put into evaluation mode and stays there, so that dropout is off.

    Args:
        model: any module that returns logits (..., classes), or an object with `.logits`.
        logits_of: takes the logits out of any other output.
    """

    name = "no adaptation"

    def __init__(self, model: nn.Module, *, logits_of: LogitsOf | None = None) -> None:
        super().__init__()
        self._training = [(module, module.training) for module in model.modules()]
        self.model = model.eval()
        self.stats = AdaptationStats()
        self._logits_of = logits_of or _logits_of

    def forward(self, *args: Any, **keywords: Any) -> Float[Tensor, "*sample class"]:
        """Logits of a batch, detached; arguments are those of the model."""
        raise NotImplementedError

    def reset(self) -> None:
        """Back to the weights at construction; counts go on."""

    def release(self) -> nn.Module:
        """The wrapped model with its present weights, everything else about it as it was handed in."""
        for module, mode in self._training:
            module.training = mode
        return self.model

    def train(self, mode: bool = True) -> Adaptation:
        """Change nothing in the wrapped model: adapting needs its evaluation mode."""
        self.training = mode
        return self

    def _logits(self, inputs: ModelInputs) -> Tensor:
        logits = self._logits_of(self.model(*inputs.args, **inputs.keywords))
        if logits.ndim < 2 or logits.shape[-1] < 2:
            raise DataError(
                f"{self.name}: logits of shape {tuple(logits.shape)}; expected (samples, classes) with two or more classes"
            )
        return logits

    def _note(self, logits: Tensor, entropy: Tensor, valid: Tensor, kept: Tensor) -> tuple[int, int, int]:
        """Write down the batch; returns how many samples there are, how many are kept, and how many are not finite.

        This is the one synchronisation of a pass: whether there is anything to update has to be known on the host.
        """
        good = valid & entropy.isfinite()
        votes = torch.zeros_like(logits.detach().reshape(-1, logits.shape[-1])[0], dtype=entropy.dtype)
        votes.index_add_(0, logits.argmax(-1).reshape(-1), good.reshape(-1).to(votes.dtype))
        count = good.sum()
        histogram = torch.special.entr(votes / count).sum()
        mean = torch.where(good, entropy, 0).sum() / count
        n_valid, n_good, n_kept = valid.sum(), count, kept.sum()
        values = torch.stack([x.to(votes) for x in (n_valid, n_good, n_kept, mean, histogram)])
        *counts, self.stats.entropy, self.stats.prediction_entropy = values.tolist()
        samples, finite, chosen = map(round, counts)
        self.stats.kept = chosen / samples if samples else NAN
        self.stats.nonfinite_samples += samples - finite
        return samples, chosen, samples - finite


class NoAdaptation(Adaptation):
    """The model as it is, with the same figures: the baseline of every comparison."""

    def forward(self, *args: Any, **keywords: Any) -> Float[Tensor, "*sample class"]:
        """Logits of a batch."""
        with torch.no_grad():
            inputs = ModelInputs.of(args, keywords, self.model.forward)
            logits = self._logits(inputs)
            if logits.numel():
                entropy = shannon_entropy_from_logits(logits)
                valid = inputs.valid(entropy)
                self._note(logits, entropy, valid, torch.zeros_like(valid))
            self.stats.batches += 1
        return logits


def _logits_of(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise DataError(
            f"the model returned {type(output).__name__}, neither a tensor nor an object with .logits; "
            "give logits_of= a function that takes the logits out of it"
        )
    return logits
