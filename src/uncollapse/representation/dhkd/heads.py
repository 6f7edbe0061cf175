"""Two heads on one backbone: the main one is kept, the auxiliary one only serves training.

The auxiliary head draws its weights and its dropout from seeds of its own and so changes no other random number: a model with
it and a model without it, from the same seed, are the same model.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from uncollapse.errors import ConfigError, DataError
from uncollapse.inspection.recomputation import recomputing

Auxiliary: TypeAlias = Literal["linear", "mlp"]


class DualLogits(NamedTuple):
    """Logits of both heads."""

    main: Float[Tensor, "*position class"]
    auxiliary: Float[Tensor, "*position class"]


class DualHead(nn.Module):
    """Main head and auxiliary head on the same features h.

    Returns `DualLogits` in training and the main logits alone, a tensor, in evaluation. `aux="linear"` is W' h + b';
    "mlp" is Linear(d, 200), dropout 0.1, batch normalisation, ReLU, Linear(200, C), which needs two rows at least.
    To put a second head on a model that has one, use `DualHeadModel`.

    Raises:
        ConfigError: another `aux`.
    """

    def __init__(
        self, in_features: int, num_classes: int, aux: Auxiliary = "linear", *, seed: int = 0
    ) -> None:
        super().__init__()
        self.main = nn.Linear(in_features, num_classes)
        self.auxiliary = auxiliary_head(in_features, num_classes, aux, seed=seed)

    def forward(self, features: Float[Tensor, "*position feature"]) -> DualLogits | Tensor:
        """Logits of both heads in training, of the main head in evaluation."""
        if not self.training:
            return self.main(features)
        return DualLogits(self.main(features), self.auxiliary(features))

    def export(self) -> nn.Linear:
        """The main head alone, for use after training; the same object, not a copy."""
        return self.main


class DualHeadModel(nn.Module):
    """Any classifier or language model with an auxiliary head on the features that its own head reads.

    In training it returns `DualLogits`, in evaluation whatever the model returns; `export()` gives the model back as it
    was, trained. `head` is the path of the last linear layer: "classifier" or "score" of a Hugging Face classifier,
    "classifier.out_proj" of a RoBERTa, "lm_head" of a language model, "fc" of a ResNet, "2" in an `nn.Sequential`.
    Models that read the answer off one position after their head (GPT-2, Llama for sequence classification) are followed
    to that position.

    Raises:
        ConfigError: no linear layer of that name, or another `aux`.
    """

    def __init__(self, model: nn.Module, head: str, aux: Auxiliary = "linear", *, seed: int = 0) -> None:
        super().__init__()
        self.model, self.head = model, head
        main = dict(model.named_modules()).get(head)
        if not isinstance(main, nn.Linear):
            known = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            raise ConfigError(
                f"no linear layer {head!r} in this {type(model).__name__}; the last ones are: {', '.join(known[-5:]) or 'none'}"
            )
        made = auxiliary_head(main.in_features, main.out_features, aux, seed=seed)
        self.auxiliary = made.to(device=main.weight.device, dtype=main.weight.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`DualLogits` in training; the model's own output in evaluation."""
        if not self.training:
            return self.model(*args, **kwargs)
        seen: list[tuple[Tensor, Tensor]] = []
        hook = self.model.get_submodule(self.head).register_forward_hook(
            lambda _, inputs, output: seen.append((inputs[0], output))
        )
        try:
            output = self.model(*args, **kwargs)
        finally:
            hook.remove()
        if len(seen) != 1:
            raise ConfigError(
                f"the model called its head {self.head!r} {len(seen)} times in one pass; expected once"
            )
        main = output if isinstance(output, Tensor) else output.logits
        return DualLogits(main, self.auxiliary(_read(*seen[0], main)))

    def export(self) -> nn.Module:
        """The model without the auxiliary head; the same object, not a copy."""
        return self.model

    def get_base_model(self) -> nn.Module:
        """The same, under the name by which trainers ask for the model below an adapter."""
        return self.model


def auxiliary_head(
    in_features: int, num_classes: int, kind: Auxiliary = "linear", *, seed: int = 0
) -> nn.Module:
    """A head whose weights (and dropout) follow from `seed`, leaving the global random numbers as they were.

    Raises:
        ConfigError: another kind.
    """
    if kind not in ("linear", "mlp"):
        raise ConfigError(f"auxiliary head: kind is {kind!r}; give 'linear' or 'mlp'")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "linear":
            return nn.Linear(in_features, num_classes)
        return AuxiliaryMLP(in_features, num_classes, seed=seed)


class AuxiliaryMLP(nn.Module):
    """The non-linear auxiliary head: Linear(d, 200), dropout 0.1, batch normalisation, ReLU, Linear(200, C).

    Source: official `models/classifier.py`.
    """

    def __init__(
        self, in_features: int, num_classes: int, *, hidden: int = 200, dropout: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(in_features, hidden), nn.Linear(hidden, num_classes)
        self.norm, self.drop = nn.BatchNorm1d(hidden), SeededDropout(dropout, seed)

    def forward(self, features: Float[Tensor, "*position feature"]) -> Float[Tensor, "*position class"]:
        """Logits; batch statistics run over all positions.

        Raises:
            DataError: a single row in training, which has no batch statistics.
        """
        rows = features.reshape(-1, features.shape[-1])
        if self.training and len(rows) < 2:
            raise DataError("auxiliary head: batch normalisation needs 2 rows at least; use aux='linear'")
        hidden = self.norm(self.drop(self.first(rows))).relu()
        return self.last(hidden).reshape(*features.shape[:-1], -1)


class SeededDropout(nn.Module):
    """Dropout whose masks depend on `seed` and the number of the call alone, and consume no global random number.

    The number of calls is part of the `state_dict`. A pass that activation checkpointing recomputes gets the mask of the call that it
    repeats, which is known by its input among the last 64.

    Raises:
        DataError: in a backward pass: an input that none of those calls had.
    """

    def __init__(self, p: float, seed: int) -> None:
        super().__init__()
        self.p, self.seed, self.calls = p, seed, 0
        self._recent: deque[tuple[int, Tensor]] = deque(maxlen=64)

    def forward(self, x: Tensor) -> Tensor:
        """Zero entries with probability p and divide the others by 1 - p; the identity in evaluation."""
        if not self.training or not self.p:
            return x
        if recomputing():
            call = self._repeated(_signature(x))
        else:
            call = self.calls
            self.calls += 1
            self._recent.append((call, _signature(x)))
        generator = torch.Generator(device=x.device).manual_seed(self.seed * 1_000_003 + call)
        return x * torch.empty_like(x).bernoulli_(1 - self.p, generator=generator) / (1 - self.p)

    def get_extra_state(self) -> Tensor:
        """The number of calls, as a tensor: files of weights take nothing else."""
        return torch.tensor(self.calls)

    def set_extra_state(self, state: Any) -> None:
        """Go on from such a number."""
        self.calls = int(state)
        self._recent.clear()

    def _repeated(self, signature: Tensor) -> int:
        for call, known in reversed(self._recent):
            if torch.equal(known, signature):
                return call
        raise DataError(
            "dropout of the auxiliary head: a recomputed pass has an input of no recent call; leave the head out of the "
            "checkpointed part, or take aux='linear'"
        )


def _signature(x: Tensor) -> Tensor:
    """Numbers that tell inputs apart; they stay on the device."""
    values = x.detach().double()
    return torch.stack([values.sum(), values.square().sum(), values.new_tensor(x.numel())])


def _read(features: Tensor, logits: Tensor, main: Tensor) -> Tensor:
    """The features behind the logits that the model returned: all, or those of the position that it chose per row."""
    if logits.shape == main.shape:
        return features
    if logits.ndim != main.ndim + 1 or logits.shape[::2] != main.shape:
        raise ConfigError(
            f"the head gave logits of shape {tuple(logits.shape)} and the model {tuple(main.shape)}; expected the same, or one "
            "position of each row"
        )
    chosen = (logits.detach().to(main.dtype) == main.detach()[:, None]).all(-1)
    return features[torch.arange(len(features), device=features.device), chosen.int().argmax(1)]
