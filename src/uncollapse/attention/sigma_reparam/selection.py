"""Which weights of a model sigmaReparam can take, and which layers it refuses by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from uncollapse.errors import ConfigError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Weights that `nn.MultiheadAttention` holds itself."""

_ODD = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.modules.conv._ConvTransposeNd)
"""Layers with matrices that are neither linear maps nor convolutions from input to output."""

_QUANTISED = ("torch.ao.nn", "torch.nn.quantized", "torchao", "bitsandbytes")
"""Modules that bring quantised layers."""


@dataclass(frozen=True)
class Site:
    """One weight to convert: where it is, and into how many blocks."""

    layer_name: str
    layer: nn.Module
    name: str
    blocks: int

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself."""
        return getattr(self.layer, self.name)


def sites_of(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str], blocks: Mapping[str, int]
) -> list[Site]:
    """The weights that patterns choose; arguments and errors as in `apply_sigma_reparam`."""
    layers = dict(model.named_modules())
    for pattern in (*include, *exclude, *blocks):
        if not any(matches(name, [pattern]) for name in layers):
            raise ConfigError(f"sigma_reparam: no layer is called {pattern!r}; see model.named_modules()")
    owners = _owners(layers)
    sites: list[Site] = []
    refused: dict[str, str] = {}
    for layer_name, layer in layers.items():
        if not matches(layer_name, include) or matches(layer_name, exclude):
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


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits a module's name or that of a module around it."""
    parts = name.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(one, pattern) for one in around for pattern in patterns)


def _weights(layer_name: str, layer: nn.Module, blocks: Mapping[str, int]) -> list[Site]:
    asked = next((count for pattern, count in blocks.items() if fnmatchcase(layer_name, pattern)), None)
    if isinstance(layer, nn.MultiheadAttention):
        return [
            Site(layer_name, layer, name, (asked or 1) if name == "in_proj_weight" else 1)
            for name in _PROJECTIONS
            if getattr(layer, name, None) is not None
        ]
    if isinstance(layer, _CONVOLUTIONS):
        return [Site(layer_name, layer, "weight", asked or layer.groups)]
    if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D":
        return [Site(layer_name, layer, "weight", asked or 1)]
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


def _weight_refusal(site: Site, owners: Mapping[int, Sequence[str]]) -> str | None:
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
    if site.blocks > 1 and type(site.layer).__name__ == "Conv1D":
        return f"transposed: {site.blocks} blocks would cut its input; leave it out of blocks"
    if weight.ndim < 2 or weight.shape[0] % site.blocks or site.blocks < 1:
        return f"of shape {tuple(weight.shape)}, which {site.blocks} blocks do not divide"
    return None
