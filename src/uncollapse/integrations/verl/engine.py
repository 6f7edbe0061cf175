"""Level `engine`: verl's FSDP engine, which also measures statistics beyond log-probability and entropy.

Registered for the strategies `uncollapse_fsdp` and `uncollapse_fsdp2`: a second class under verl's own names would be
refused (verl 0.9.1 asserts; older ones kept the first in silence). Also registered for the device `cpu`, for which
verl 0.9.1 has no engine, so that the real engine runs in tests.

Logits must be whole: fused linear-head kernels and vocabulary-parallel logits (Megatron) are refused, as is a
temperature per row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp import FSDPEngineWithLMHead

from uncollapse.errors import ConfigError
from uncollapse.integrations.verl.names import STATISTICS, output_name
from uncollapse.measure.statistics import Entropy, Logp, Statistic
from uncollapse.measure.token_stats import token_stats_from_logits

STRATEGIES = {"fsdp": "uncollapse_fsdp", "fsdp2": "uncollapse_fsdp2"}
"""verl's strategies and ours in their place."""


@EngineRegistry.register(
    model_type="language_model", backend=list(STRATEGIES.values()), device=["cuda", "npu", "cpu"]
)
class RecipeEngine(FSDPEngineWithLMHead):
    """verl's engine; with statistics asked for, all of them come from one pass over the logits."""

    def __init__(self, model_config: Any, engine_config: Any, *more: Any, **options: Any) -> None:
        theirs = {ours: name for name, ours in STRATEGIES.items()}
        config = copy.copy(engine_config)
        # verl chooses FSDP's version by the strategy, which it freezes.
        object.__setattr__(config, "strategy", theirs.get(config.strategy, config.strategy))
        super().__init__(model_config, config, *more, **options)

    def prepare_model_outputs(
        self, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, Any]:
        """verl's outputs, or all that are asked for by our own pass if there is one beyond verl's."""
        asked: Sequence[Statistic] = tuple(tu.get_non_tensor_data(micro_batch, STATISTICS, ()))
        if not asked:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        if tu.get_non_tensor_data(micro_batch, "use_fused_kernels", False):
            raise ConfigError("fused linear-head kernels give no logits; set model.use_fused_kernels=false")
        temperature = micro_batch["temperature"]
        if isinstance(temperature, Tensor):
            raise ConfigError("a temperature per row is not supported at level 'engine'")
        wanted = [Logp(), *asked]
        if tu.get_non_tensor_data(micro_batch, "calculate_entropy", False):
            wanted.append(Entropy())
        found = token_stats_from_logits(
            _packed(output.logits, micro_batch), output_args["input_ids_rmpad_rolled"],
            temperature=float(temperature), stats=wanted,
        )  # fmt: skip
        offsets = micro_batch["input_ids"].offsets()
        pad = output_args.get("pad_size")
        whole = {s: v if pad is None else self._gather_and_unpad_packed(v, pad) for s, v in found.items()}
        return {
            output_name(s): torch.nested.nested_tensor_from_jagged(value, offsets)
            for s, value in whole.items()
        }


def _packed(logits: Any, micro_batch: Any) -> Tensor:
    """The logits of all real tokens, one row after the other, from either of verl's layouts."""
    whole: Tensor = logits.full_tensor() if isinstance(logits, DTensor) else logits
    if tu.get_non_tensor_data(micro_batch, "use_remove_padding", True):
        return whole.squeeze(0)
    lengths = micro_batch["input_ids"].offsets().diff()
    inside = torch.arange(whole.shape[1], device=whole.device) < lengths[:, None]
    return whole[inside]
