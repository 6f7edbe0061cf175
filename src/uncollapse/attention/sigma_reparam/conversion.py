"""sigmaReparam for a whole model: put on, taken off, and what it refuses."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from uncollapse.attention.sigma_reparam.batch import PowerBatch
from uncollapse.attention.sigma_reparam.checkpoints import parametrised
from uncollapse.attention.sigma_reparam.estimate import Start
from uncollapse.attention.sigma_reparam.layers import INIT_STD, attach, initialise
from uncollapse.attention.sigma_reparam.parametrization import GammaInit, SigmaReparam, SigmaTracker
from uncollapse.errors import ConfigError, DataError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Weights that `nn.MultiheadAttention` holds itself."""

_ODD = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.modules.conv._ConvTransposeNd)
"""Layers with matrices that are neither linear maps nor convolutions from input to output."""

_QUANTISED = ("torch.ao.nn", "torch.nn.quantized", "torchao", "bitsandbytes")
"""Modules that bring quantised layers."""


@dataclass(frozen=True)
class _Site:
    """One weight to convert: where it is, and into how many blocks."""

    layer_name: str
    layer: nn.Module
    name: str
    blocks: int

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.layer, self.name)


def apply_sigma_reparam(
    model: nn.Module,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    gamma_init: GammaInit = "spectral",
    keep_weights: bool = True,
    init_std: float | None = None,
    blocks: Mapping[str, int] | None = None,
    u_init: Start = "svd",
    n_power_iterations: int = 1,
    update_every: int = 1,
    batched: bool = False,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Put sigmaReparam on every linear and convolutional layer of a model, in place, and return the model.

    Linear layers, convolutions (each group of one has its own norm), the projections that `nn.MultiheadAttention`
    holds itself, and the transposed linear layer `Conv1D` of GPT-2. Not embeddings and not bare parameters of other
    modules. Nothing is changed if anything is refused. Make the optimiser afterwards: there are new parameters.

    Args:
        include: patterns of layer names (`*`, `?`); one that names a module takes everything in it.
        exclude: patterns of what to leave alone, among the included.
        gamma_init: "spectral" (the function stays as it is), "one", or a number.
        keep_weights: False draws weights anew, normal with `init_std`, zero biases, as the official conversion does.
        init_std: 0.02 if not given; only for weights that are drawn anew.
        blocks: norms per layer, by pattern: `{"*.attn.qkv": 3, "*.self_attn": 3}` gives queries, keys and values their own.
        u_init, n_power_iterations, update_every: see `SigmaTracker`.
        batched: take the power steps of layers of one shape together. Pays for small layers; not for sharded weights.

    Raises:
        ConfigError: tied weights, quantised or odd layers among the included (names them), no layer to convert, a
            pattern that no layer matches, or an option out of range.
        DataError: a weight that is zero or not finite (names the layer).
    """
    if keep_weights and init_std is not None:
        raise ConfigError("apply_sigma_reparam: init_std is for new weights; give keep_weights=False with it")
    sites = _sites(model, include, exclude, blocks or {})
    if not keep_weights:
        for layer in {id(site.layer): site.layer for site in sites}.values():
            initialise(layer, INIT_STD if init_std is None else init_std, generator)

    def reparam(site: _Site) -> SigmaTracker:
        return SigmaReparam(
            site.weight,
            gamma_init=gamma_init,
            blocks=site.blocks,
            u_init=u_init,
            n_power_iterations=n_power_iterations,
            update_every=update_every,
            generator=generator,
        )

    return _converted(model, sites, reparam, batched=batched)


def track_sigma(
    model: nn.Module,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    blocks: Mapping[str, int] | None = None,
    update_every: int = 1,
    batched: bool = False,
) -> nn.Module:
    """Follow the spectral norms of a model's layers during training without changing it (official `stats_only`).

    Arguments and errors as in `apply_sigma_reparam`; read the norms with `spectral_norms`, take it off with `fuse`.
    """
    sites = _sites(model, include, exclude, blocks or {})

    def tracker(site: _Site) -> SigmaTracker:
        return SigmaTracker(site.weight, blocks=site.blocks, update_every=update_every)

    return _converted(model, sites, tracker, batched=batched)


def _converted(
    model: nn.Module, sites: Sequence[_Site], make: Callable[[_Site], SigmaTracker], *, batched: bool
) -> nn.Module:
    made = []
    for site in sites:
        try:
            made.append(make(site).train(model.training))
        except DataError as error:
            raise DataError(f"{site.layer_name or type(site.layer).__name__}.{site.name}: {error}") from error
    for site, tracker in zip(sites, made, strict=True):
        attach(site.layer, site.name, tracker)
    if batched:
        alike = defaultdict(list)
        for _, _, tracker, found in _parametrised(model):
            if any(tracker is one for one in made):
                kind = tracker.v.shape[1], tracker.u.shape[1], found.original.dtype, found.original.device
                alike[kind].append((tracker, found))
        for members in alike.values():
            if len(members) > 1:
                PowerBatch(members)
    return model


def fuse(model: nn.Module) -> nn.Module:
    """Take sigmaReparam off again, in place: plain layers whose weight is W_hat, with the same output in evaluation.

    Parameters of weights stay the same objects. Returns the model.

    Raises:
        ConfigError: nothing to take off, or another parametrisation on top.
    """
    found = list(_parametrised(model))
    if not found:
        raise ConfigError("fuse: this model has no layer with sigmaReparam; apply_sigma_reparam puts it on")
    for name, _, _, stack in found:
        if len(stack) > 1:
            raise ConfigError(f"fuse: {name} has another parametrisation too; remove that first")
    for full, layer, tracker, _ in found:
        name = full.rpartition(".")[2]
        tracker.eval()
        parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
    return model


@dataclass(frozen=True)
class SpectralNorms:
    """Norms of one weight, of each block; computed, not logged, so that none can overwrite another.

    Attributes:
        gamma: what the norm of W_hat is meant to be; None where norms are only tracked.
        sigma: estimate of the norm of W by power iteration, what W is divided by in an evaluation pass.
        raw: the norm of W, exact.
        norm: the norm of the weight that the layer computes with, exact.
    """

    gamma: Tensor | None
    sigma: Tensor
    raw: Tensor
    norm: Tensor

    @property
    def gap(self) -> Tensor:
        """norm / gamma, raw / sigma: at least 1, by how much power iteration lags behind."""
        return self.raw / self.sigma


@torch.no_grad()
def spectral_norms(model: nn.Module) -> dict[str, SpectralNorms]:
    """The norms of every converted or tracked weight, by its name; takes a singular value decomposition for each.

    Raises:
        ConfigError: a model without any.
    """
    norms = {}
    for name, _, tracker, found in _parametrised(model):
        sigma, raw = tracker.norms(found.original)
        gamma = tracker.gamma.detach().clone() if isinstance(tracker, SigmaReparam) else None
        norm = raw if gamma is None else gamma * raw / sigma
        norms[name] = SpectralNorms(gamma, sigma, raw, norm)
    if not norms:
        raise ConfigError("spectral_norms: this model has no layer with sigmaReparam or track_sigma")
    return norms


def _parametrised(model: nn.Module) -> Iterator[tuple[str, nn.Module, SigmaTracker, ParametrizationList]]:
    """Every converted weight: its name in the model, its layer, and what computes it."""
    for layer_name, layer in model.named_modules():
        for name, tracker, found in parametrised(layer):
            yield f"{layer_name}.{name}".lstrip("."), layer, tracker, found


# ---- what to convert, and what not ---------------------------------------------------------------------------------


def _sites(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str], blocks: Mapping[str, int]
) -> list[_Site]:
    layers = dict(model.named_modules())
    for pattern in (*include, *exclude, *blocks):
        if not any(_matches(name, [pattern]) for name in layers):
            raise ConfigError(f"sigma_reparam: no layer is called {pattern!r}; see model.named_modules()")
    owners = _owners(layers)
    sites: list[_Site] = []
    refused: dict[str, str] = {}
    for layer_name, layer in layers.items():
        if not _matches(layer_name, include) or _matches(layer_name, exclude):
            continue
        reason = _refusal(layer)
        if reason is None:
            here = _weights(layer_name, layer, blocks)
            reasons = [_weight_refusal(site, owners) for site in here]
            reason = next((found for found in reasons if found), None)
            sites += here
        if reason is not None:
            refused[layer_name or type(layer).__name__] = reason
    if refused:
        listed = "; ".join(f"{name} is {reason}" for name, reason in list(refused.items())[:5])
        more = f"; and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise ConfigError(f"sigma_reparam: {listed}{more}; leave out with exclude={list(refused)}")
    if not sites:
        raise ConfigError(
            "sigma_reparam: nothing to convert; looked for Linear, Conv1d, Conv2d, Conv3d, MultiheadAttention and "
            f"Conv1D (GPT-2) among {len(layers)} modules"
        )
    return sites


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits a module's name or that of a module around it."""
    parts = name.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(one, pattern) for one in around for pattern in patterns)


def _weights(layer_name: str, layer: nn.Module, blocks: Mapping[str, int]) -> list[_Site]:
    asked = next((count for pattern, count in blocks.items() if fnmatchcase(layer_name, pattern)), None)
    if isinstance(layer, nn.MultiheadAttention):
        return [
            _Site(layer_name, layer, name, (asked or 1) if name == "in_proj_weight" else 1)
            for name in _PROJECTIONS
            if getattr(layer, name, None) is not None
        ]
    if isinstance(layer, _CONVOLUTIONS):
        return [_Site(layer_name, layer, "weight", asked or layer.groups)]
    if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D":
        return [_Site(layer_name, layer, "weight", asked or 1)]
    return []


def _owners(layers: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """Names of every parameter by its identity; two names mean tied weights."""
    owners = defaultdict(list)
    for layer_name, layer in layers.items():
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append(f"{layer_name}.{name}".lstrip("."))
    return owners


def _refusal(layer: nn.Module) -> str | None:
    """Why this kind of layer cannot be converted."""
    kind = type(layer)
    if kind.__name__ != "NonDynamicallyQuantizableLinear" and (
        kind.__module__.startswith(_QUANTISED)
        or "quant" in kind.__name__.lower()
        or hasattr(layer, "qweight")
    ):
        return f"quantised ({kind.__name__})"
    if isinstance(layer, _ODD):
        return f"a layer of another kind ({kind.__name__})"
    return None


def _weight_refusal(site: _Site, owners: Mapping[int, Sequence[str]]) -> str | None:
    """Why this weight cannot be converted."""
    if parametrize.is_parametrized(site.layer, site.name):
        kinds = ", ".join(type(p).__name__ for p in site.layer.parametrizations[site.name])  # type: ignore[index]
        return f"parametrised already ({kinds})"
    weight = site.layer._parameters.get(site.name)
    if weight is None:
        return "without a weight of its own (an older weight or spectral norm computes it)"
    if isinstance(weight, nn.UninitializedParameter):
        return "not initialised; run one batch through it first"
    if weight.is_meta:
        return "on the meta device; load its weights first"
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.element_size() < 2:
        return f"quantised ({type(weight).__name__} of {weight.dtype})"
    names = owners[id(weight)]
    if len(names) > 1:
        mine = f"{site.layer_name}.{site.name}".lstrip(".")
        return f"tied to {', '.join(name for name in names if name != mine)}"
    if weight.ndim < 2 or weight.shape[0] % site.blocks or site.blocks < 1:
        return f"of shape {tuple(weight.shape)}, which {site.blocks} blocks do not divide"
    return None


# ---- norm layers ----------------------------------------------------------------------------------------------------

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


class NoNorm(nn.Identity):
    """What is left of a norm layer: nothing.

    `eps` differs from itself, so that `nn.TransformerEncoderLayer` does not take its fused path, which reads norm weights.
    """

    eps = math.nan


def remove_norms(model: nn.Module, *, exclude: Sequence[str] = ()) -> nn.Module:
    """Replace layer, RMS, group, batch and instance norms by nothing, in place; for nets that train without them.

    Norm classes of other libraries are known by their names (`LlamaRMSNorm`). Returns the model.

    Raises:
        ConfigError: a model without any.
    """
    found = [
        name
        for name, layer in model.named_modules()
        if name
        and not _matches(name, exclude)
        and (isinstance(layer, _NORMS) or type(layer).__name__.endswith(("RMSNorm", "LayerNorm")))
    ]
    if not found:
        raise ConfigError("remove_norms: found no layer, RMS, group, batch or instance norm in this model")
    for name in found:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, NoNorm())
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoder):
            layer.use_nested_tensor = False  # that path reads norm weights as well
    return model
