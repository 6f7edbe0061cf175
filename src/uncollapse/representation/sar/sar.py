"""SAR: a sample filter, sharpness-aware minimisation and recovery from collapse on top of Tent."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import Optimizer

from uncollapse.errors import ConfigError
from uncollapse.measure.entropy import shannon_entropy_from_logits
from uncollapse.representation.sar.adaptation import NAN, LogitsOf
from uncollapse.representation.sar.batch import ModelInputs
from uncollapse.representation.sar.sam import SAM, grad_norm
from uncollapse.representation.sar.tent import Tent

MARGIN = 0.4
"""E0 as a share of ln C: samples with less entropy are reliable."""
RESET = 0.029
"""e_reset as a share of ln C, which is the paper's 0.2 nats at its C = 1000."""
OFFICIAL_RESET = 0.2
"""e_reset in nats, whatever C is: hard-coded in the official code."""


class SAR(Tent):
    """Sharpness-aware and reliable entropy minimisation: a sample filter, SAM, and recovery from collapse.

    On a batch with entropies e_i (nats), theta the adapted parameters:

        S1 = {i: e_i < E0},  g = grad mean_S1 e,  eps = rho g / (||g|| + 1e-12)
        S2 = {i in S1: e_i(theta + eps) < E0},  L2 = mean_S2 e at theta + eps,  g2 its gradient there
        SGD step from theta with g2;  m <- L2 at first, then 0.9 m + 0.1 L2;  m < e_reset: reset(), m forgotten

    The second pass runs on the rows of S1 alone where that is exact: not with BatchNorm, nor where an input has no axis
    of rows (`row_wise` says which have one). Arguments and errors beyond those of `Tent`:

    Args:
        rho: radius of SAM, >= 0.
        margin: E0 in nats; None takes 0.4 ln C. `math.inf` keeps every sample.
        reset_threshold: e_reset in nats; None takes 0.029 ln C. `-math.inf` never resets.
        ema_decay: weight of the old m, 0 to below 1.
        skip_last: as in `Tent`, but the last quarter of the blocks is left alone by default.
        empty: what happens if S1 or S2 is empty: "skip" leaves everything as it is, "momentum" lets the optimiser step
            with gradient 0, as the official code does. None: as `compat` has it.
        compat: "official" does as the released code does: e_reset = 0.2 nats for every C, a reset keeps m and
            the optimiser's momentum, empty="momentum". "fixed" is what the paper describes.

    Raises:
        ConfigError: an option out of its range.
    """

    name = "SAR"
    _skip_last = 0.25

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        lr: float | None = None,
        rho: float = 0.05,
        margin: float | None = None,
        reset_threshold: float | None = None,
        ema_decay: float = 0.9,
        steps: int = 1,
        episodic: bool = False,
        skip_last: float | None = None,
        skip: Sequence[str] | None = None,
        empty: Literal["skip", "momentum"] | None = None,
        compat: Literal["fixed", "official"] = "fixed",
        row_wise: Collection[str] | None = None,
        logits_of: LogitsOf | None = None,
    ) -> None:
        _check(margin, reset_threshold, ema_decay, empty, compat)
        super().__init__(
            model,
            optimizer,
            lr=lr,
            skip_last=skip_last,
            skip=skip,
            steps=steps,
            episodic=episodic,
            row_wise=row_wise,
            logits_of=logits_of,
        )
        self.sam = SAM(self.optimizer, rho=rho)
        self.margin, self.reset_threshold, self.ema_decay = margin, reset_threshold, ema_decay
        self.official = compat == "official"
        self.empty = empty or ("momentum" if self.official else "skip")
        self._m: float | None = None
        self._classes = 0

    def reset(self) -> None:
        """Back to the weights at construction, m forgotten; the optimiser's state too unless `compat` is "official"."""
        kept = copy.deepcopy(self.optimizer.state_dict()) if self.official else None
        super().reset()
        if kept is not None:
            self.optimizer.load_state_dict(kept)
        self._remember(None)

    def get_extra_state(self) -> dict[str, Any]:
        """As that of `Tent`, and m."""
        return super().get_extra_state() | {"moving_loss": self._m}

    def set_extra_state(self, state: Any) -> None:
        """Go on with such a state.

        Raises:
            DataError: it is that of other parameters.
        """
        super().set_extra_state(state)
        self._remember(state["moving_loss"])

    def _margin(self, classes: int) -> float:
        self._classes = classes
        return MARGIN * math.log(classes) if self.margin is None else self.margin

    def _update(self, inputs: ModelInputs, entropy: Tensor, kept: Bool[Tensor, "..."], samples: int) -> None:
        entropy[kept].mean().backward()
        rows = kept.reshape(len(kept), -1).any(-1)
        if self._row_wise(inputs):
            inputs, kept = inputs.rows(rows), kept[rows]
        with self.sam.perturbed() as norm:
            again = shannon_entropy_from_logits(self._logits(inputs))
            sure = kept & (again < self._margin(self._classes))
            loss = again[sure].sum() / sure.sum().clamp(min=1)
            loss.backward()
        values = torch.stack(
            [x.detach().to(loss) for x in (sure.sum(), loss, norm, grad_norm(self.sam.params))]
        )
        n_sure, second, self.stats.grad_norm, self.stats.sharp_grad_norm = values.tolist()
        self.stats.kept_twice = n_sure / samples
        if math.isfinite(self.stats.grad_norm) and not n_sure:
            self._nothing_kept()
            return
        self._take_step(self.stats.grad_norm + self.stats.sharp_grad_norm)
        if n_sure and math.isfinite(second):
            old = self._m
            self._remember(second if old is None else self.ema_decay * old + (1 - self.ema_decay) * second)
        self._recover()

    def _nothing_kept(self) -> None:
        super()._nothing_kept()
        if self.empty == "momentum":
            for p in self.adapted.values():
                p.grad = torch.zeros_like(p)
            self._take_step(0.0)
            self._recover()

    def _recover(self) -> None:
        """Reset if m is below the threshold."""
        threshold = self.reset_threshold
        if threshold is None:
            threshold = OFFICIAL_RESET if self.official else RESET * math.log(self._classes)
        m = self._m
        if m is not None and m < threshold:
            self.reset()
            self.stats.resets += 1
            if self.official:  # the code assigns the old average again after the reset
                self._remember(m)

    def _remember(self, m: float | None) -> None:
        self._m = m
        self.stats.moving_loss = NAN if m is None else m


def _check(
    margin: float | None, threshold: float | None, decay: float, empty: str | None, compat: str
) -> None:
    if margin is not None and not margin > 0:
        raise ConfigError(f"SAR: margin is {margin}; give an entropy above 0 (nats), or None for 0.4 ln C")
    if threshold is not None and math.isnan(threshold):
        raise ConfigError("SAR: reset_threshold is NaN; give nats, -inf for never, or None for 0.029 ln C")
    if not 0 <= decay < 1:
        raise ConfigError(f"SAR: ema_decay is {decay}; give a weight from 0 to below 1")
    if empty not in (None, "skip", "momentum"):
        raise ConfigError(f"SAR: empty is {empty!r}; give 'skip' or 'momentum'")
    if compat not in ("fixed", "official"):
        raise ConfigError(f"SAR: compat is {compat!r}; give 'fixed' or 'official'")
