"""One run of the sigma-reparam study: a net, an arm, a learning rate and a seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from uncollapse.attention.sigma_reparam import SigmaReparam, apply_sigma_reparam, spectral_norms
from uncollapse.studies.sigma_reparam.transformer import Task, Transformer, Trunk, loss_of


def _sigma(net: Transformer) -> None:
    apply_sigma_reparam(net)


def _sigma_one(net: Transformer) -> None:
    apply_sigma_reparam(net, gamma_init="one")


def _spectral(net: Transformer) -> None:
    for layer in [module for module in net.modules() if isinstance(module, nn.Linear)]:
        spectral_norm(layer)


def _nothing(net: Transformer) -> None:
    """Leave the net as it is."""


@dataclass(frozen=True)
class Arm:
    """What differs from the plain net: its trunk, a conversion after the draw, a share of the steps as linear warm-up."""

    trunk: Trunk = field(default_factory=Trunk)
    convert: Callable[[Transformer], None] = _nothing
    warm_up: float = 0.0


ARMS = {
    "plain": Arm(),
    "warm-up": Arm(warm_up=0.2),
    "pre-ln": Arm(Trunk(pre_norm=True)),
    "qk-norm": Arm(Trunk(qk_norm=True)),
    "softcap": Arm(Trunk(softcap=50.0)),
    "spectral-norm": Arm(convert=_spectral),
    "sigma": Arm(convert=_sigma),
    "sigma-one": Arm(convert=_sigma_one),
}


def train(task: Task, arm: Arm, lr: float, seed: int, steps: int, *, every: int = 10) -> dict[str, Any]:
    """Train with Adam (betas 0.9, 0.999; no decay, no clipping); the seed decides weights and batches, alike in all arms.

    Returns `loss` and `accuracy` on the held-out data at the end (an infinite loss if it is not finite), `lowest`, the least
    mean attention entropy seen at any `every`-th step on the batch of that step, `entropy`, that curve (nats), and `train`, the
    training loss at the same steps. `gap` is the largest true norm of a weight over its gamma at the end, None without gamma.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # spectral_norm draws its vectors from the global generator
        net = task.build(arm.trunk)
        net.draw(generator)
        arm.convert(net)
    batches = torch.Generator().manual_seed(10_000 + seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=lr, foreach=True)
    ramp = max(1, round(arm.warm_up * steps))
    entropy, losses = [], []
    for step in range(steps):
        inputs, targets = task.batch(batches)
        if step % every == 0:
            entropy.append(net.entropy(inputs))
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / ramp)
        loss = loss_of(net(inputs), targets)
        optimiser.zero_grad()
        loss.backward()
        if step % every == 0:
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
        optimiser.step()
    inputs, targets = task.held_out
    with torch.no_grad():
        logits = net.eval()(inputs)
        final = loss_of(logits, targets).item()
        right = (logits.argmax(-1) == targets).float().mean().item()
    if not math.isfinite(final):
        final, right = math.inf, 0.0
    finite = [value for value in entropy if math.isfinite(value)]
    return {
        "loss": final,
        "accuracy": right,
        "lowest": min(finite),
        "entropy": entropy,
        "train": losses,
        "gap": _gap(net),
    }


def _gap(net: nn.Module) -> float | None:
    if not any(isinstance(module, SigmaReparam) for module in net.modules()):
        return None
    try:
        norms = spectral_norms(net)
    except RuntimeError:  # weights that are not finite any more
        return math.nan
    return max(float(one.gap.max()) for one in norms.values())
