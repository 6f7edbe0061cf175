"""Adapting a classifier while it predicts, behind one interface: not at all, by Tent, by SAR."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.entropy import shannon_entropy_from_logits
from uncollapse.representation.sar.batch import ModelInputs
from uncollapse.representation.sar.norms import collect_norm_params
from uncollapse.representation.sar.sam import SAM

NAN = math.nan
LEARNING_RATE = 2.5e-4
"""The paper's for ResNets at batch size 64; it takes 1e-3 for ViTs. Both grow in proportion to the batch."""
MARGIN = 0.4
"""E0 as a share of ln C: samples with less entropy are reliable."""
RESET = 0.029
"""e_reset as a share of ln C, which is the paper's 0.2 nats at its C = 1000."""
OFFICIAL_RESET = 0.2
"""e_reset in nats, whatever C is: hard-coded in the official code."""

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
            inputs = ModelInputs.of(args, keywords)
            logits = self._logits(inputs)
            entropy = shannon_entropy_from_logits(logits)
            valid = inputs.valid(entropy)
            self._note(logits, entropy, valid, torch.zeros_like(valid))
            self.stats.batches += 1
        return logits


class Tent(Adaptation):
    """Entropy minimisation on every sample of every batch (Wang et al. 2021, arXiv 2006.10726): no filter, no SAM, no reset.

    One step of the optimiser on the mean entropy of the batch, after its logits were computed: a prediction precedes the
    update that it causes. Samples that are not finite are left out. Of a language model each token is a
    sample; where `attention_mask` is 0 there is none.

    BatchNorm layers use the statistics of the batch, as in the official code, so a batch of one is refused there.

    Args:
        model: see `Adaptation`. It is adapted in place and everything else in it is frozen, until `release()`.
        optimizer: over the parameters to adapt, if not SGD with momentum 0.9 over those that `skip_last` and `skip` choose.
        lr: of that SGD; default 2.5e-4.
        skip_last, skip: see `collect_norm_params`. Tent adapts all layers by default.
        steps: updates per batch; the logits returned are those before the last one.
        episodic: forget everything before each batch.
        logits_of: see `Adaptation`.

    Raises:
        ConfigError: no normalisation layers; steps below 1; an optimiser together with what it replaces, or over parameters
            that the model does not have.
        DataError: from a call: a batch of one with BatchNorm, logits that are none.
    """

    name = "Tent"
    _skip_last = 0.0

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        lr: float | None = None,
        skip_last: float | None = None,
        skip: Sequence[str] | None = None,
        steps: int = 1,
        episodic: bool = False,
        logits_of: LogitsOf | None = None,
    ) -> None:
        super().__init__(model, logits_of=logits_of)
        if steps < 1:
            raise ConfigError(f"{self.name}: steps is {steps}; give at least 1")
        self.steps, self.episodic = steps, episodic
        if optimizer is None:
            share = self._skip_last if skip_last is None else skip_last
            self.adapted = collect_norm_params(model, skip_last=share, skip=skip or ())
            rate = LEARNING_RATE if lr is None else lr
            if not 0 < rate < math.inf:
                raise ConfigError(f"{self.name}: lr is {lr}; give a number above 0")
            optimizer = torch.optim.SGD(list(self.adapted.values()), lr=rate, momentum=0.9)
        else:
            if any(option is not None for option in (lr, skip_last, skip)):
                raise ConfigError(f"{self.name}: optimizer= already says what lr, skip_last and skip would")
            self.adapted = _held_by(optimizer, model)
        self.optimizer = optimizer
        self._configure()
        self._weights = {name: p.detach().clone() for name, p in self.adapted.items()}
        self._optimizer_state = copy.deepcopy(optimizer.state_dict())

    def forward(self, *args: Any, **keywords: Any) -> Float[Tensor, "*sample class"]:
        """Logits of a batch, detached, and an update after them. Works under `torch.no_grad` and `inference_mode`."""
        if self.episodic:
            self.reset()
        with torch.inference_mode(False), torch.enable_grad():
            inputs = ModelInputs.of(args, keywords)
            if self._batch_norms and inputs.size == 1:
                raise DataError(
                    f"{self.name}: a batch of one, but {self._batch_norms[0][0]} is a BatchNorm layer, whose statistics of one "
                    "sample mean nothing; give larger batches, or a model with LayerNorm or GroupNorm"
                )
            for _ in range(self.steps):
                logits = self._step(inputs)
        self.stats.batches += 1
        return logits.detach()

    def reset(self) -> None:
        """Back to the weights and the optimiser state at construction; counts go on."""
        with torch.no_grad():
            for name, p in self.adapted.items():
                p.copy_(self._weights[name])
        self.optimizer.load_state_dict(copy.deepcopy(self._optimizer_state))

    def release(self) -> nn.Module:
        """The wrapped model with its present weights; frozen parameters, BatchNorm and training mode as they were."""
        for p, trainable in self._trainable:
            p.requires_grad_(trainable)
        for _, module, before in self._batch_norms:
            module.running_mean, module.running_var, module.track_running_stats = before
        return super().release()

    # ---- one step ------------------------------------------------------------------------------------------------

    def _step(self, inputs: ModelInputs) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        logits = self._logits(inputs)
        entropy = shannon_entropy_from_logits(logits)
        valid = inputs.valid(entropy)
        kept = valid & (entropy < self._margin(logits.shape[-1]))  # strict; NaN is not below anything
        samples, n_kept, n_lost = self._note(logits, entropy, valid, kept)
        if not n_kept:
            self._nothing_kept()
        elif not n_lost:
            self._update(inputs, entropy, kept, samples)
        elif not self._row_wise(inputs):
            self.stats.skipped_nonfinite += 1
        else:  # a NaN spoils every gradient that it meets, even with weight 0: once more without those rows
            good = (entropy.isfinite() | ~valid).reshape(len(entropy), -1).all(-1)
            if bool(kept[good].any()):
                clean = inputs.rows(good)
                self._update(clean, shannon_entropy_from_logits(self._logits(clean)), kept[good], samples)
            else:
                self._nothing_kept()
        return logits

    def _margin(self, classes: int) -> float:
        return math.inf

    def _update(self, inputs: ModelInputs, entropy: Tensor, kept: Bool[Tensor, "..."], samples: int) -> None:
        entropy[kept].mean().backward()
        self.stats.grad_norm = float(SAM(self.optimizer, rho=0.0).grad_norm())
        self._take_step(self.stats.grad_norm)

    def _take_step(self, norm: float) -> None:
        """A step of the optimiser, unless the gradient is not finite."""
        if math.isfinite(norm):
            self.optimizer.step()
            self.stats.updates += 1
        else:
            self.stats.skipped_nonfinite += 1

    def _nothing_kept(self) -> None:
        self.stats.skipped_empty += 1

    # ---- the model -----------------------------------------------------------------------------------------------

    def _row_wise(self, inputs: ModelInputs) -> bool:
        """Whether a forward pass on some of the rows gives what the whole batch gives for them."""
        return inputs.row_wise and not self._batch_norms

    def _configure(self) -> None:
        self._trainable = [(p, p.requires_grad) for p in self.model.parameters()]
        for p, _ in self._trainable:
            p.requires_grad_(False)
        for p in self.adapted.values():
            p.requires_grad_(True)
        self._batch_norms: list[tuple[str, _BatchNorm, tuple[Any, ...]]] = []
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm):
                before = module.running_mean, module.running_var, module.track_running_stats
                self._batch_norms.append((name, module, before))
                # without running statistics evaluation mode takes those of the batch
                module.running_mean = module.running_var = None
                module.track_running_stats = False


class SAR(Tent):
    """Sharpness-aware and reliable entropy minimisation: a sample filter, SAM, and recovery from collapse.

    On a batch with entropies e_i (nats), theta the adapted parameters:

        S1 = {i: e_i < E0},  g = grad mean_S1 e,  eps = rho g / (||g|| + 1e-12)
        S2 = {i in S1: e_i(theta + eps) < E0},  L2 = mean_S2 e at theta + eps,  g2 its gradient there
        SGD step from theta with g2;  m <- L2 at first, then 0.9 m + 0.1 L2;  m < e_reset: reset(), m forgotten

    The second pass runs on the rows of S1 alone where that is exact: not with BatchNorm, nor where an input has no axis
    of rows. Arguments and errors beyond those of `Tent`:

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
        values = torch.stack([x.detach().to(loss) for x in (sure.sum(), loss, norm, self.sam.grad_norm())])
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


def _logits_of(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise DataError(
            f"the model returned {type(output).__name__}, neither a tensor nor an object with .logits; "
            "give logits_of= a function that takes the logits out of it"
        )
    return logits


def _held_by(optimizer: Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of an optimiser by their names in the model."""
    names = {id(p): name for name, p in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if not all(id(p) in names for p in held):
        raise ConfigError(
            "optimizer: it holds parameters that the model does not have; make it from this model's"
        )
    return {names[id(p)]: p for p in held}
