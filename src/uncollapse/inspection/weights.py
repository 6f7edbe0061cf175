"""Spectra of a model's weights, and how large the scores of its attention heads can grow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from uncollapse.errors import DataError
from uncollapse.measure.spectra import effective_rank, stable_rank

PROJECTIONS = (("q_proj", "k_proj"), ("query", "key"), ("q_lin", "k_lin"), ("wq", "wk"), ("to_q", "to_k"))
"""Names of the query and key projections in an attention module, beside torch's own fused ones and GPT-2's `c_attn`."""


@dataclass(frozen=True)
class WeightSpectrum:
    """Singular values of one weight in a few numbers; convolutions as (out, in x kernel) matrices."""

    name: str
    shape: tuple[int, int]
    spectral_norm: float
    effective_rank: float
    stable_rank: float


@torch.no_grad()
def weight_spectra(model: nn.Module, *, least: int = 2) -> list[WeightSpectrum]:
    """Every floating-point weight with at least two axes and `least` rows and columns; tied ones once.

    Weights are the parameters that their layers call so (`weight`, `in_proj_weight`, `weight_hh_l0`), under that name and
    as the layer computes with them, parametrised or not. What else has two axes (positions, thresholds, temperatures) maps
    nothing and is left out.

    Singular values are exact: of the matrix where it is small, of its Gram matrix in float64 where one side is much
    longer (embeddings), which is precise to about 1e-8 of the largest.

    Raises:
        DataError: a weight with NaN or inf, by name.
    """
    found = []
    for name, weight in _matrices(model):
        if min(weight.shape) < least:
            continue
        if not bool(weight.isfinite().all()):
            raise DataError(f"the weight {name} contains NaN or inf")
        values = _singular_values(weight)
        rank, stable = float(effective_rank(values)), float(stable_rank(values))
        found.append(WeightSpectrum(name, (weight.shape[0], weight.shape[1]), float(values[0]), rank, stable))
    return found


def effective_weight(layer: nn.Module, name: str) -> Tensor:
    """A weight as its layer computes with it, parametrised or not; reading it changes nothing.

    In training some parametrisations go on at every access (power iteration of a spectral norm), and a layer's attribute
    may be cached for its forward pass. So they are asked themselves, in eval mode, and put back.
    """
    if not parametrize.is_parametrized(layer, name):
        return cast(Tensor, getattr(layer, name))
    found = cast(nn.ModuleDict, layer.parametrizations)[name]
    in_training = [module for module in found.modules() if module.training]
    for module in in_training:
        module.training = False
    try:
        return cast(Tensor, found())
    finally:
        for module in in_training:
            module.training = True


def _matrices(model: nn.Module) -> Iterator[tuple[str, Float[Tensor, "row column"]]]:
    seen = set()
    for layer_name, layer in model.named_modules():
        parametrised = getattr(layer, "parametrizations", {})
        kept = {name: next(found.parameters(), None) for name, found in parametrised.items()}
        for name, parameter in (layer._parameters | kept).items():
            if parameter is None or id(parameter) in seen or "weight" not in name:
                continue
            seen.add(id(parameter))
            if parameter.ndim >= 2 and parameter.is_floating_point():
                yield f"{layer_name}.{name}".lstrip("."), effective_weight(layer, name).flatten(1)


def _singular_values(weight: Float[Tensor, "row column"]) -> Float[Tensor, " value"]:
    long, short = max(weight.shape), min(weight.shape)
    if long < 8 * short:
        return torch.linalg.svdvals(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    tall = weight if weight.shape[0] == long else weight.T
    gram = torch.zeros(short, short, dtype=torch.float64, device=weight.device)
    for rows in tall.split(8192):
        gram.addmm_(rows.T.double(), rows.double())
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


@torch.no_grad()
def attention_logit_norms(model: nn.Module) -> dict[str, Float[Tensor, " head"]]:
    """Spectral norm of the map from two inputs to their score, ||W_Q W_K^T||_2 / sqrt(head size), per layer and head.

    Rotary embeddings turn queries and keys and keep the order of magnitude; norms and biases on them are left out.
    Empty if no attention module with query and key projections of a known name is there (`PROJECTIONS`).

    Source: the s of theorem 3.1 of Zhai et al. (2023), without the norm of the inputs.
    """
    found = {}
    for name, module in model.named_modules():
        pair = _projections(module)
        if pair is None:
            continue
        query, key, heads, kv_heads = pair
        width = query.shape[0] // heads
        q = query.double().reshape(heads, width, -1)
        k = key.double().reshape(kv_heads, width, -1).repeat_interleave(heads // kv_heads, dim=0)
        # The singular values of A^T B are the roots of the eigenvalues of (A A^T)(B B^T), which is as small as a head.
        root = _cholesky_like(q @ q.mT)
        values = torch.linalg.eigvalsh(root.mT @ (k @ k.mT) @ root)
        found[name] = values[:, -1].clamp(min=0).sqrt() / math.sqrt(width)
    return found


def _cholesky_like(gram: Float[Tensor, "head width width"]) -> Float[Tensor, "head width width"]:
    """R with R R^T = gram, also where the Gram matrix is singular."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt()[:, None]


def query_key_weights(module: nn.MultiheadAttention) -> tuple[Tensor, Tensor]:
    """Query and key weights of torch's own layer, as (out, in)."""
    if module._qkv_same_embed_dim:
        query, key, _ = effective_weight(module, "in_proj_weight").split(module.embed_dim)
        return query, key
    return effective_weight(module, "q_proj_weight"), effective_weight(module, "k_proj_weight")


def _projections(module: nn.Module) -> tuple[Tensor, Tensor, int, int] | None:
    """Query and key weights as (out, in), query heads and key heads; None if this is no attention module we know."""
    if isinstance(module, nn.MultiheadAttention):
        return *query_key_weights(module), module.num_heads, module.num_heads
    fused = getattr(module, "c_attn", None)
    packed = effective_weight(fused, "weight") if isinstance(fused, nn.Module) else None
    if isinstance(packed, Tensor) and hasattr(module, "num_heads") and packed.shape[1] == 3 * packed.shape[0]:
        query, key, _ = packed.T.chunk(3)  # GPT-2 keeps (in, out)
        heads = int(module.num_heads)  # type: ignore[arg-type]
        return query, key, heads, heads
    for name_q, name_k in PROJECTIONS:
        of_query, of_key = getattr(module, name_q, None), getattr(module, name_k, None)
        if isinstance(of_query, nn.Linear) and isinstance(of_key, nn.Linear):
            width = _head_width(module)
            if width is None or of_query.out_features % width or of_key.out_features % width:
                return None
            heads, kv_heads = of_query.out_features // width, of_key.out_features // width
            if heads % kv_heads:
                return None
            return effective_weight(of_query, "weight"), effective_weight(of_key, "weight"), heads, kv_heads
    return None


def _head_width(module: nn.Module) -> int | None:
    for name in ("head_dim", "attention_head_size", "head_size"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    return None
