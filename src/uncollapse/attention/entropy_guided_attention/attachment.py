"""The penalty as an add-on: attach it to a model, and after each forward pass ask for what that pass costs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from uncollapse.attention.entropy_guided_attention.regularizer import EntropyRegularizer, Stats
from uncollapse.errors import ConfigError, DataError
from uncollapse.inspection.attention import PaddingMask, no_attention
from uncollapse.inspection.attention_calls import AttentionCall, KeyMasks, attention_calls
from uncollapse.measure.attention_gradient import attention_rows_with_gradient

NAME = "entropy_thresholds"
"""The submodule under which the thresholds train, move and are saved with the model."""


def attach_entropy_regularizer(
    model: nn.Module,
    regularizer: EntropyRegularizer,
    *,
    theta_init: float = 0.5,
    freeze_theta: bool = False,
    layers: int | None = None,
    heads: int | None = None,
) -> AttachedRegularizer:
    """Add thresholds to `model` and watch its attention in every forward pass in training mode.

    Works with any kernel (eager, SDPA, flash attention): the penalty is computed from queries and keys, a few query rows at
    a time, forward and backward, so that no matrix of attention is ever kept. The thresholds are the submodule
    `entropy_thresholds` of the model: an optimizer over `model.parameters()` trains them, checkpoints hold them. Attach before
    `load_state_dict`; `from_pretrained` drops them, since it makes a model without.

    Args:
        theta_init: thresholds at the start, as a share of the reference entropy, 0 to 1.
        freeze_theta: keep them there.
        layers: attention layers, and `heads` in each; read from `model.config` if not given.

    Raises:
        ConfigError: a regulariser is attached already, numbers of layers and heads that no config names, or
            `theta_init` outside [0, 1].
    """
    if hasattr(model, NAME):
        raise ConfigError(f"{type(model).__name__} has an entropy regulariser; detach() it first")
    if not 0 <= theta_init <= 1:
        raise ConfigError(f"theta_init is {theta_init:g}; give a share of the largest entropy, 0 to 1")
    layers = layers or _from_config(model, "num_hidden_layers", "layers")
    heads = heads or _from_config(model, "num_attention_heads", "heads")
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    theta = torch.full((layers, heads), theta_init, dtype=dtype, device=weight.device)
    attached = AttachedRegularizer(regularizer, nn.Parameter(theta, requires_grad=not freeze_theta))
    attached.watch(model)
    return attached


class AttachedRegularizer(nn.Module):
    """Thresholds of a model, and the penalty of its last forward pass in training mode."""

    def __init__(self, regularizer: EntropyRegularizer, theta: Float[nn.Parameter, "layer head"]) -> None:
        super().__init__()
        self.regularizer, self.theta = regularizer, theta
        self.stats: Stats = {}
        self._calls: list[AttentionCall] = []
        self._open = ExitStack()
        self._model: list[nn.Module] = []  # in a list, lest the model become a submodule of its own submodule
        self._handles: list[Any] = []
        self._passed = False

    def watch(self, model: nn.Module) -> None:
        """Become a submodule of `model` and see its forward passes."""
        self._model, self._padding = [model], PaddingMask(model)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        model.add_module(NAME, self)

    def detach(self) -> None:
        """Leave the model as it was before."""
        for handle in self._handles:
            handle.remove()
        for model in self._model:
            delattr(model, NAME)
        self._model, self._handles, self._calls = [], [], []

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls, self._passed = [], model.training
        self._padding.read(model, args, kwargs)
        if model.training:
            self._open.enter_context(attention_calls(model, self._seen))

    def _seen(self, call: AttentionCall) -> None:
        self._calls.append(replace(call, weights=None))  # queries and keys will do

    def _after(self, *rest: Any) -> None:
        self._open.close()

    def penalty(self) -> Float[Tensor, ""]:
        """The penalty of the last forward pass, to be added to its loss; 0 after a pass in eval mode. Once per pass.

        Its figures are in `stats` afterwards, detached.

        Raises:
            ConfigError: no forward pass before, no attention seen, other numbers of layers or heads than thresholds, or
                queries and keys without a gradient while the model trains.
        """
        if not self._passed:
            return self.theta.new_zeros(())
        calls, self._calls, self._passed = self._calls, [], False
        (model,) = self._model
        if not calls:
            raise no_attention(model)
        if torch.is_grad_enabled() and not any(call.query.requires_grad for call in calls):
            raise ConfigError(
                "the attention of this pass has no gradient, so the penalty would do nothing; with gradient "
                "checkpointing set use_reentrant=False, with a frozen model detach the regulariser"
            )
        found = (len(calls), calls[0].query.shape[1])
        if found != tuple(self.theta.shape):
            raise ConfigError(
                f"the model attended in {found[0]} layers with {found[1]} heads, the thresholds are for "
                f"{len(self.theta)} and {self.theta.shape[1]}; give attach_entropy_regularizer layers and heads"
            )
        masks = KeyMasks()
        rows = [
            attention_rows_with_gradient(
                call.query, call.key, scale=call.scale, mask=masks.read(call), softcap=call.softcap
            )
            for call in calls
        ]
        mask = self._padding.queries(calls[0])
        loss, self.stats = self.regularizer.from_rows(rows, calls[0].key.shape[2], self.theta, mask)
        return loss

    def parameter_groups(self, lr: float, theta_lr_scale: float = 1.0) -> list[dict[str, Any]]:
        """Two groups for an optimizer: the model's parameters at `lr`, the thresholds at `theta_lr_scale` times that.

        The thresholds have no weight decay, which would pull them to entropy 0.

        Raises:
            DataError: detached from its model.
        """
        if not self._model:
            raise DataError("parameter_groups: the regulariser is attached to no model")
        own = [p for p in self._model[0].parameters() if p is not self.theta and p.requires_grad]
        thresholds = [self.theta] if self.theta.requires_grad else []
        return [
            {"params": own, "lr": lr},
            {"params": thresholds, "lr": lr * theta_lr_scale, "weight_decay": 0.0},
        ]


def _from_config(model: nn.Module, name: str, argument: str) -> int:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise ConfigError(
            f"{type(model).__name__} has no config that names {name}; give attach_entropy_regularizer {argument}="
        )
    return value
