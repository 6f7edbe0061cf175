"""Which normalisation layers of a model are adapted: found by type or class name, the deepest ones left alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from uncollapse.errors import ConfigError

KINDS = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm")
_KIND = re.compile("|".join(KINDS))
_SHARE = 0.75
"""A child with more of the norm layers than this is where the blocks are."""


def norm_layers(model: nn.Module) -> list[str]:
    """Names of normalisation layers with a weight or bias of their own, in the order of definition.

    A layer is one if its class or a class it derives from has one of `KINDS` in its name, so `LlamaRMSNorm` and
    `SyncBatchNorm` are found too.
    """
    return [
        name
        for name, module in model.named_modules()
        if any(_KIND.search(kind.__name__) for kind in type(module).__mro__) and _affine(module)
    ]


def _affine(module: nn.Module) -> dict[str, nn.Parameter]:
    own = dict(module.named_parameters(recurse=False))
    return {part: own[part] for part in ("weight", "bias") if part in own}


def blocks_of(names: Sequence[str]) -> list[list[str]]:
    """Norm layers grouped by the blocks of the network, read from their dotted names.

    From the root into the child that holds more than three quarters of the norm layers, as long as there is one; norm layers
    that are children themselves do not count. The children of the module where that ends are the blocks: `layer1` ...
    `layer4` of a ResNet, `blocks.0` ... `blocks.11` of a ViT, `model.layers.*` of a language model; in a module whose children
    are all norm layers, those.
    """
    inside, depth = list(names), 1
    while True:
        groups: dict[str, list[str]] = {}
        for name in inside:
            groups.setdefault(".".join(name.split(".")[:depth]), []).append(name)
        nested = [group for child, group in groups.items() if group != [child]]
        if not nested:
            return list(groups.values())
        largest = max(nested, key=len)
        if len(largest) <= _SHARE * sum(map(len, nested)):
            return nested
        inside, depth = largest, depth + 1


def collect_norm_params(
    model: nn.Module, *, skip_last: float = 0.25, skip: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Weights and biases of the normalisation layers to adapt, by name.

    Left out: the last floor(`skip_last` n) of the n blocks and all that is defined after them, such as the final norm of a
    transformer, because a change there moves the predictions themselves rather than the features; and layers whose name a
    pattern in `skip` fits. This rule gives the official choice for ResNets (without `layer4`) and for ViT-B (without
    `blocks.9` to `blocks.11` and `norm`).

    Args:
        model: any module; "after" means the order in which modules are defined.
        skip_last: share of blocks, 0 (adapt all layers) to below 1.
        skip: shell patterns for names of layers, such as "layer4*" or "*.input_layernorm".

    Raises:
        ConfigError: no normalisation layers, none left, a pattern that fits none, skip_last outside [0, 1).
    """
    if not 0 <= skip_last < 1:
        raise ConfigError(f"collect_norm_params: skip_last is {skip_last}; give a share from 0 to below 1")
    names = norm_layers(model)
    if not names:
        raise ConfigError(
            f"{type(model).__name__} has no normalisation layer to adapt: looked for weight and bias in modules whose "
            f"class is named *{'*, *'.join(KINDS)}*; give optimizer= over other parameters to adapt those"
        )
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"skip: no normalisation layer fits {pattern!r}; there are {_some(names)}")
    kept = [
        name
        for name in _without_last(names, skip_last)
        if not any(fnmatchcase(name, pattern) for pattern in skip)
    ]
    if not kept:
        raise ConfigError(f"skip_last={skip_last} and skip={list(skip)} leave no layer of {_some(names)}")
    found: dict[str, nn.Parameter] = {}
    for name in kept:
        for part, parameter in _affine(model.get_submodule(name)).items():
            if all(parameter is not other for other in found.values()):
                found[f"{name}.{part}".lstrip(".")] = parameter
    return found


def _without_last(names: list[str], skip_last: float) -> list[str]:
    if skip_last == 0:
        return names
    blocks = blocks_of(names)
    # a hair more, so that 0.1 of 30 blocks is 3 in spite of rounding
    skipped = min(math.floor(skip_last * len(blocks) + 1e-9), len(blocks) - 1)
    kept = blocks[: len(blocks) - skipped]
    return names[: names.index(kept[-1][-1]) + 1]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
