"""The names that stages and schedules go by in YAML, each in its slot: a kebab-case name is one class.

The generic stages are listed here. A paper's module names its own where it defines them:

    register_stage("weights", "clip-cov", ClipCov)
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from uncollapse.catalogue import papers
from uncollapse.errors import ConfigError, UnknownName
from uncollapse.policy.schedules import Cosine, Linear
from uncollapse.policy.stages.advantages import BatchAdvantage, GroupAdvantage, LeaveOneOut
from uncollapse.policy.stages.filters import DropDeadGroups, DropUnfinished
from uncollapse.policy.stages.regularizers import AdaptiveEntropy, EntropyBonus, KLPenalty
from uncollapse.policy.stages.rewards import SoftOverlong
from uncollapse.policy.stages.samplers import DynamicSampler, PlainSampler
from uncollapse.policy.stages.surrogates import ClippedWeight, PPOClip, SequenceClip, Unclipped
from uncollapse.policy.stages.weights import TopEntropyTokens

SLOTS = (
    "sampler",
    "rewards",
    "filters",
    "advantage",
    "weights",
    "surrogate",
    "regularizers",
    "replay",
    "schedule",
)
"""Where a name can stand; `schedule` is any number that may change with training."""

_NAMES: dict[str, dict[str, type]] = {slot: {} for slot in SLOTS}


def register_stage(slot: str, name: str, kind: type) -> None:
    """Let a class be called by this name in this slot.

    Raises `ConfigError` if the name is taken there or the class has a name already, `UnknownName` for a slot that
    does not exist. Registering the same pair again changes nothing.
    """
    if slot not in _NAMES:
        raise UnknownName("slot", slot, SLOTS)
    taken = _NAMES[slot].get(name)
    if taken is kind:
        return
    if taken is not None:
        raise ConfigError(
            f"{slot}: the name {name!r} is registered already, for {taken.__name__}; choose another"
        )
    for other, known in _NAMES[slot].items():
        if known is kind:
            raise ConfigError(f"{slot}: {kind.__name__} is registered already, as {other!r}")
    _NAMES[slot][name] = kind


def stages(slot: str) -> Mapping[str, type]:
    """All names of a slot with their classes, those of the papers' modules included."""
    for entry in papers().values():
        if entry.room == "policy" and entry.implemented:
            importlib.import_module(entry.module)
    if slot not in _NAMES:
        raise UnknownName("slot", slot, SLOTS)
    return dict(sorted(_NAMES[slot].items()))


def slots_of(name: str) -> list[str]:
    """The slots in which this name means something."""
    return [slot for slot in SLOTS if name in stages(slot)]


def name_of(slot: str, stage: object) -> str:
    """The name of a stage's class in a slot. Raises `ConfigError` if it has none."""
    for name, kind in stages(slot).items():
        if type(stage) is kind:
            return name
    kind_name = type(stage).__name__
    raise ConfigError(
        f"{slot}: {kind_name} has no name, so it cannot be written as YAML; "
        f'give it one with register_stage("{slot}", "...", {kind_name})'
    )


_GENERIC: dict[str, dict[str, type]] = {
    "sampler": {"plain-sampler": PlainSampler, "dynamic-sampler": DynamicSampler},
    "rewards": {"soft-overlong": SoftOverlong},
    "filters": {"drop-dead-groups": DropDeadGroups, "drop-unfinished": DropUnfinished},
    "advantage": {
        "group-advantage": GroupAdvantage,
        "batch-advantage": BatchAdvantage,
        "leave-one-out": LeaveOneOut,
    },
    "weights": {"top-entropy-tokens": TopEntropyTokens},
    "surrogate": {
        "ppo-clip": PPOClip,
        "sequence-clip": SequenceClip,
        "clipped-weight": ClippedWeight,
        "unclipped": Unclipped,
    },
    "regularizers": {
        "entropy-bonus": EntropyBonus,
        "adaptive-entropy": AdaptiveEntropy,
        "kl-penalty": KLPenalty,
    },
    "schedule": {"linear": Linear, "cosine": Cosine},
}
for _slot, _names in _GENERIC.items():
    for _name, _kind in _names.items():
        register_stage(_slot, _name, _kind)
