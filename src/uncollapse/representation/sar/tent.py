"""Tent: entropy minimisation on every batch, and what every method that adapts has to do to a model."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.entropy import shannon_entropy_from_logits
from uncollapse.representation.sar.adaptation import Adaptation, LogitsOf
from uncollapse.representation.sar.batch import ModelInputs
from uncollapse.representation.sar.norms import collect_norm_params
from uncollapse.representation.sar.precision import FullPrecision
from uncollapse.representation.sar.sam import grad_norm

LEARNING_RATE = 2.5e-4
"""The paper's for ResNets at batch size 64; it takes 1e-3 for ViTs. Both grow in proportion to the batch."""


class Tent(Adaptation):
    """Entropy minimisation on every sample of every batch (Wang et al. 2021, arXiv 2006.10726): no filter, no SAM, no reset.

    One step of the optimiser on the mean entropy of the batch, after its logits were computed: a prediction precedes the
    update that it causes. Samples that are not finite are left out. Of a language model each token is a
    sample; where `attention_mask` is 0 there is none.

    BatchNorm layers use the statistics of the batch, as in the official code, so a batch of one is refused there. Adapted layers of a
    half-precision model compute in float32 until `release()`, which rounds their weights (see `FullPrecision`).

    Args:
        model: see `Adaptation`. It is adapted in place and everything else in it is frozen, until `release()`.
        optimizer: over the parameters to adapt, if not SGD with momentum 0.9 over those that `skip_last` and `skip` choose.
        lr: of that SGD; default 2.5e-4.
        skip_last, skip: see `collect_norm_params`. Tent adapts all layers by default.
        steps: updates per batch; the logits returned are those before the last one.
        episodic: forget everything before each batch.
        row_wise: names of the inputs that have an entry per row of logits, for methods that compute some rows again; the others go
            to the model whole. None: all tensors, if all are as long as the first. Empty: rows are never taken out.
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
        row_wise: Collection[str] | None = None,
        logits_of: LogitsOf | None = None,
    ) -> None:
        super().__init__(model, logits_of=logits_of)
        if steps < 1:
            raise ConfigError(f"{self.name}: steps is {steps}; give at least 1")
        if isinstance(row_wise, str):
            raise ConfigError(f"{self.name}: row_wise is {row_wise!r}; give a list of names")
        self.steps, self.episodic, self.row_wise = steps, episodic, row_wise
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
        self._precision = FullPrecision(model, self.adapted.values())
        if optimizer.state:  # momentum of before, in the dtype that the parameters have now
            optimizer.load_state_dict(optimizer.state_dict())
        self._weights = {name: p.detach().clone() for name, p in self.adapted.items()}
        self._optimizer_state = copy.deepcopy(optimizer.state_dict()["state"])

    def forward(self, *args: Any, **keywords: Any) -> Float[Tensor, "*sample class"]:
        """Logits of a batch, detached, and an update after them. Works under `torch.no_grad` and `inference_mode`."""
        if self.episodic:
            self.reset()
        with torch.inference_mode(False), torch.enable_grad():
            inputs = ModelInputs.of(args, keywords, self.model.forward, self.row_wise)
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
        """Back to the weights and the optimiser's state at construction; its options, so a scheduled rate, and counts go on."""
        with torch.no_grad():
            for name, p in self.adapted.items():
                p.copy_(self._weights[name])
        self.optimizer.load_state_dict(
            self.optimizer.state_dict() | {"state": copy.deepcopy(self._optimizer_state)}
        )

    def get_extra_state(self) -> dict[str, Any]:
        """What a `state_dict` holds beside the model: the optimiser, and what `reset` goes back to."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "source_weights": dict(self._weights),
            "source_optimizer": self._optimizer_state,
        }

    def set_extra_state(self, state: Any) -> None:
        """Go on with such a state.

        Raises:
            DataError: it is that of other parameters.
        """
        source = state["source_weights"]
        if {name: p.shape for name, p in source.items()} != {
            name: p.shape for name, p in self._weights.items()
        }:
            raise DataError(
                f"{self.name}: the state is of parameters {_first(source)}, these are {_first(self._weights)}; build it with "
                "the same options"
            )
        for name, p in self._weights.items():
            p.copy_(source[name])
        self._optimizer_state = copy.deepcopy(state["source_optimizer"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

    def release(self) -> nn.Module:
        """The wrapped model with its present weights; frozen parameters, dtypes, BatchNorm and training mode as they were."""
        self._precision.undo()
        for p, trainable in self._trainable:
            p.requires_grad_(trainable)
        for _, module, before in self._batch_norms:
            module.running_mean, module.running_var, module.track_running_stats = before
        return super().release()

    # ---- one step ------------------------------------------------------------------------------------------------

    def _step(self, inputs: ModelInputs) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        logits = self._logits(inputs)
        if not logits.numel():
            return logits
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
        self.stats.grad_norm = float(grad_norm(list(self.adapted.values())))
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


def _held_by(optimizer: Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of an optimiser by their names in the model."""
    names = {id(p): name for name, p in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if not all(id(p) in names for p in held):
        raise ConfigError(
            "optimizer: it holds parameters that the model does not have; make it from this model's"
        )
    return {names[id(p)]: p for p in held}


def _first(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:4]) + (", ..." if len(every) > 4 else "")
