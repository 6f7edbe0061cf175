"""Spectra of a model's weights, and how large the scores of its attention heads can grow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from uncollapse.errors import DataError
from uncollapse.measure.precision import at_least_float32
from uncollapse.measure.spectra import effective_rank, stable_rank

Heads: TypeAlias = Float[Tensor, "_ width _"]
"""A projection cut into its heads: (head, width, input), other numbers of heads and inputs for queries and keys."""

PROJECTIONS = (
    ("q_proj", "k_proj"), ("query", "key"), ("query_proj", "key_proj"), ("q_lin", "k_lin"), ("wq", "wk"),
    ("to_q", "to_k"), ("q", "k"),
)  # fmt: skip
"""Names of the query and key projections in an attention module, where each is a linear layer of its own."""

FUSED: Mapping[str, tuple[Literal["blocks", "groups"], tuple[str, ...]]] = {
    "qkv": ("blocks", ()),
    "qkv_proj": ("blocks", ("phi3", "phi4_multimodal")),
    "Wqkv": ("blocks", ("dbrx", "modernbert", "mpt")),
    "query_key_value": ("groups", ("bloom", "falcon", "gpt_neox", "gpt_neox_japanese", "persimmon")),
}
"""Linear layers that hold queries, keys and values: how, and the model types where that is so (none given: any).

"blocks": all queries, then all keys, then all values. "groups": for each key head its queries, its key and its value.
"""

NO_PROJECTIONS = (
    "no attention module whose query and key weights can be told apart; looked for torch.nn.MultiheadAttention, c_attn of "
    f"GPT-2, {', '.join('/'.join(pair) for pair in PROJECTIONS)}, "
    + ", ".join(name + (f" of {', '.join(types)}" if types else "") for name, (_, types) in FUSED.items())
)
"""What to say of a model without logit norms."""


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
        return torch.linalg.svdvals(at_least_float32(weight))
    tall = weight if weight.shape[0] == long else weight.T
    gram = torch.zeros(short, short, dtype=torch.float64, device=weight.device)
    for rows in tall.split(8192):
        gram.addmm_(rows.T.double(), rows.double())
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


@torch.no_grad()
def attention_logit_norms(model: nn.Module) -> dict[str, Float[Tensor, " head"]]:
    """Spectral norm of the map from two inputs to their score, ||W_Q W_K^T||_2 / sqrt(head size), per layer and head.

    Rotary embeddings turn queries and keys and keep the order of magnitude; norms and biases on them are left out.
    The scale that a model gives its scores (T5 none) is left out too. Empty if query and key weights are nowhere to be told
    apart (`NO_PROJECTIONS`).

    Source: the s of theorem 3.1 of Zhai et al. (2023), without the norm of the inputs.
    """
    found, configs = {}, {"": getattr(model, "config", None)}
    for name, module in model.named_modules():
        configs[name] = getattr(module, "config", configs[name.rpartition(".")[0]])
        pair = _projections(module, configs[name])
        if pair is None:
            continue
        query, key = (weight.double() for weight in pair)
        heads, width, _ = query.shape
        q, k = query, key.repeat_interleave(heads // len(key), dim=0)
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


def _projections(module: nn.Module, config: Any) -> tuple[Heads, Heads] | None:
    """Weights of queries and keys by head; None if this is no attention module we know. `config` is the nearest one."""
    if isinstance(module, nn.MultiheadAttention):
        query, key = query_key_weights(module)
        return query.unflatten(0, (module.num_heads, -1)), key.unflatten(0, (module.num_heads, -1))
    packed = getattr(module, "c_attn", None)
    if isinstance(packed, nn.Module) and isinstance(getattr(module, "num_heads", None), int):
        weight = effective_weight(packed, "weight").T  # GPT-2 keeps (in, out)
        if weight.shape[0] != 3 * weight.shape[1]:
            return None
        query, key, _ = weight.unflatten(0, (3, module.num_heads, -1))
        return query, key
    for name_q, name_k in PROJECTIONS:
        of_query, of_key = getattr(module, name_q, None), getattr(module, name_k, None)
        if isinstance(of_query, nn.Linear) and isinstance(of_key, nn.Linear):
            width = _first_int(module, _WIDTHS)
            if width is None or of_query.out_features % width or of_key.out_features % width:
                return None
            query, key = (
                effective_weight(one, "weight").unflatten(0, (-1, width)) for one in (of_query, of_key)
            )
            return None if len(query) % len(key) else (query, key)
    return _fused_projections(module, config)


def _fused_projections(module: nn.Module, config: Any) -> tuple[Heads, Heads] | None:
    """The same of a module that holds queries, keys and values in one linear layer."""
    for name, (layout, types) in FUSED.items():
        fused = getattr(module, name, None)
        if not isinstance(fused, nn.Linear):
            continue
        heads = _first_int(module, _HEADS) or _first_int(config, _HEADS)
        if heads is None or (types and getattr(config, "model_type", None) not in types):
            return None
        width = _first_int(module, _WIDTHS) or fused.out_features // (3 * heads)
        kv_heads, rest = divmod(fused.out_features - heads * width, 2 * width)
        if rest or kv_heads < 1 or heads % kv_heads:
            return None
        by_head = effective_weight(fused, "weight").unflatten(0, (-1, width))
        if layout == "blocks":
            query, key, _ = by_head.split([heads, kv_heads, kv_heads])
            return query, key
        groups = by_head.unflatten(0, (kv_heads, -1))
        return groups[:, :-2].flatten(0, 1), groups[:, -2]
    return None


_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
_WIDTHS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")


def _first_int(owner: Any, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(owner, name, None), int)), None)
