"""What sigmaReparam adds to forward and backward passes of linear layers, against PyTorch's own spectral_norm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm

from benchmarks.harness import OURS, Case, Goal
from uncollapse.attention.sigma_reparam import apply_sigma_reparam, spectral_norms

SUMMARY = (
    "Forward and backward pass through the four matrices of transformer blocks (queries, keys and values; output; two of the "
    "MLP) on few tokens, so that what is done to the weights shows: plain layers, `apply_sigma_reparam`, the same with "
    "power steps taken together, and `torch.nn.utils.parametrizations.spectral_norm`, all on the same weights. Overhead is "
    "the time above the plain layers. Ours also learns a gamma."
)
PLAIN, PEER, TOGETHER = "plain layers", "spectral_norm", "batched"
SIZES = {"width 64": (64, 12), "width 384": (384, 4), "width 768": (768, 2)}
TOKENS = 64


class Block(nn.Module):
    """The four matrices of one block, applied to inputs of their own width; no attention between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(columns, rows, bias=False)
            for rows, columns in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
        )

    def forward(self, narrow: Tensor, wide: Tensor) -> Tensor:
        qkv, out, up, down = self.layers
        return qkv(narrow).sum() + out(narrow).sum() + up(narrow).sum() + down(wide).sum()


def peer(model: nn.Module) -> nn.Module:
    """PyTorch's parametrisation on every linear layer."""
    for layer in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        spectral_norm(layer)
    return model


def models(width: int, blocks: int) -> dict[str, nn.Module]:
    """The contestants, of equal weights; the peer begins with our exact vectors."""
    torch.manual_seed(0)
    plain = nn.ModuleList(Block(width) for _ in range(blocks))
    made = {
        PLAIN: plain,
        OURS: apply_sigma_reparam(copy.deepcopy(plain)),
        TOGETHER: apply_sigma_reparam(copy.deepcopy(plain), batched=True),
        PEER: peer(copy.deepcopy(plain)),
    }
    for mine, theirs in zip(made[OURS].modules(), made[PEER].modules(), strict=True):
        if isinstance(theirs, _SpectralNorm):
            theirs._u.copy_(mine.v.flatten())
            theirs._v.copy_(mine.u.flatten())
    return made


def passes(model: nn.Module, narrow: Tensor, wide: Tensor) -> None:
    """One forward and backward pass of every block."""
    sum(block(narrow, wide) for block in model).backward()
    for parameter in model.parameters():
        parameter.grad = None


def overhead(rows: Mapping[str, Mapping[str, Any]], name: str) -> float:
    """Time above the plain layers, over that of the peer; from each one's median ratio to ours."""
    plain, other = rows[PLAIN]["time_over_ours"], rows[PEER]["time_over_ours"]
    return (rows[name]["time_over_ours"] - plain) / (other - plain)


def case(size: str) -> Case:
    """Blocks of one width."""
    width, blocks = SIZES[size]
    generator = torch.Generator().manual_seed(1)
    narrow, wide = (torch.randn(TOKENS, n, generator=generator) for n in (width, 4 * width))
    made = models(width, blocks)
    repeats = max(1, 12 // blocks)

    def contestants(models: dict[str, nn.Module], repeats: int) -> dict[str, Callable[[], None]]:
        def call(model: nn.Module) -> Callable[[], None]:
            def several() -> None:
                for _ in range(repeats):
                    passes(model, narrow, wide)

            return several

        return {name: call(model) for name, model in models.items()}

    @torch.no_grad()
    def check() -> dict[str, float]:
        """W_hat over gamma is what the peer computes."""
        ours, theirs = copy.deepcopy(made[OURS]).eval(), copy.deepcopy(made[PEER]).eval()
        norms = spectral_norms(ours)
        worst = 0.0
        for name, layer in theirs.named_modules():
            if isinstance(layer, nn.Linear):
                mine = ours.get_submodule(name).weight / norms[f"{name}.weight"].gamma
                worst = max(worst, float((mine - layer.weight).abs().max() / layer.weight.abs().max()))
        if worst > 1e-3:
            raise RuntimeError(f"weights differ by {worst:g} of the largest")
        return {PEER: worst}

    return Case(
        size=f"{blocks} blocks of width {width}, {TOKENS} tokens, {repeats} passes",
        contestants=contestants(made, repeats),
        warm_up=contestants(made, 1),
        check=check,
        goals=(
            Goal("our overhead over that of spectral_norm", lambda rows: overhead(rows, OURS), 1.0, False),
        ),
        baseline=OURS,
    )
