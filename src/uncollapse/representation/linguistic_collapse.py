"""Linguistic collapse: neural collapse of language models, over vocabularies that outnumber the features.

Next-token prediction is classification with tens of thousands of unbalanced, ambiguous classes and far fewer features, so
that a simplex ETF cannot exist. What is measured instead: variability over distance within pairs of classes (NC1, CDNV),
hyperspherical uniformity of the class means (GNC2), evenness rather than size of the alignment of head and means (UNC3),
and agreement of the head with the nearest class mean on text that the means were not made of (NC4).

Paper: Wu and Papyan, "Linguistic Collapse: Neural Collapse in (Large) Language Models", 2024, arXiv 2405.17767. Official
code: rhubarbwu/linguistic-collapse and rhubarbwu/neural-collapse.

    W = model.get_output_embeddings().weight
    statistics = StreamingNC(*W.shape)
    for h, y in collect_lm_features(model, batches):
        statistics.update(h, y)
    report = statistics.compute(W)

Differs from the paper / the official code:
- One pass and O(B d) per batch (Chan's merge of segment moments in float64), where the code takes a pass for means, one for
  variances and one for decisions, with B x C one-hot products, and skips the last partial batch.
- CDNV with p = 1, which has no scale; the released table has p = 2 (`cdnv_power=2`).
- Inner products over all pairs exactly from d x d moments; the other pairwise metrics from a million random pairs with
  standard errors, or from tiles that visit every pair (`pairs="exact"`). The code allocates C x C.
- Variances are divided by their number as in the code; `nc1/ratio/unbiased` is ours.
- Only classes that were seen can be the nearest mean, and NC4 is given for the whole head and for its rows of seen classes;
  in the code an unseen class has mean 0 and is the nearest of all to short features.
- The Riesz kernel is averaged in logarithms; the head's bias, if there is one, takes part in NC4.
- The head is compared with means about mu_G but is not centred itself, as in the code.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from uncollapse.errors import DataError
from uncollapse.inspection.classes import head_inputs
from uncollapse.inspection.features import head_of
from uncollapse.measure.class_pairs import uniform_log_kernel
from uncollapse.measure.class_statistics import CollapseReport, StreamingNC
from uncollapse.measure.nearest_class import NC4Accumulator, NC4Report

__all__ = [
    "CollapseReport",
    "NC4Accumulator",
    "NC4Report",
    "StreamingNC",
    "collect_lm_features",
    "uniform_log_kernel",
]

TokenBatch: TypeAlias = Int[Tensor, "row time"] | Mapping[str, Tensor]


@torch.no_grad()
def collect_lm_features(
    model: nn.Module, token_batches: Iterable[TokenBatch]
) -> Iterator[tuple[Float[Tensor, "position feature"], Int[Tensor, " position"]]]:
    """What the head of a causal language model reads at each position, and the token that comes next there.

    One pair of arrays per batch, in the dtype of the model: features of the last position of a row and of padding are left out,
    and so are those whose next token is padding. No logits are computed: the head gets one position per row. Call
    `model.eval()` before, since dropout blurs features.

    Args:
        model: a Hugging Face causal language model, or any module called with `input_ids` whose head `head_of` finds.
        token_batches: token ids (row, time), or mappings with `input_ids` and, where rows are padded, `attention_mask`. Other
            tensors in them that `forward` takes (position_ids, token_type_ids) go there too, but labels do not: there are no
            logits for a loss. Where a row begins with padding and `forward` takes position_ids, they count from the first
            token unless they are given.

    Raises:
        DataError: a batch without `input_ids` or with other than two axes, or a model whose head does not see one
            feature per token.
    """
    head, accepted = head_of(model), _accepted(model)
    device = next(model.parameters()).device
    for batch in token_batches:
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        ids = inputs.get("input_ids")
        if ids is None or ids.ndim != 2:
            shape = "missing" if ids is None else f"of shape {tuple(ids.shape)}"
            raise DataError(f"collect_lm_features: input_ids is {shape}; give token ids (row, time)")
        taken = {
            key: value.to(device) for key, value in inputs.items() if key in accepted and key != "labels"
        }
        yield _read(model, head, _with_positions(taken) if "position_ids" in accepted else taken)


def _accepted(model: nn.Module) -> set[str]:
    """Names of the inputs of a model, below an adapter too."""
    found = {"input_ids", "attention_mask"}
    found.update(inspect.signature(model.forward).parameters)
    below: Any = getattr(model, "get_base_model", None)
    return found if below is None else found | set(inspect.signature(below().forward).parameters)


def _with_positions(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Positions count from the first token, not from the padding before it, which absolute ones would see."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != inputs["input_ids"].shape or "position_ids" in inputs:
        return inputs
    if bool(mask[:, :1].all()):
        return inputs
    return inputs | {"position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}


def _read(model: nn.Module, head: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    found: list[tuple[Tensor, Tensor]] = []
    with head_inputs(model, lambda h, y: found.append((h, y)), classes="next_token", head=head):
        narrowed = head.register_forward_pre_hook(_first_position)
        try:
            model(**inputs)
        finally:
            narrowed.remove()
    if len(found) != 1:
        raise DataError(
            f"collect_lm_features: the head of {type(model).__name__} read one feature per token {len(found)} times "
            "instead of once; give a causal language model"
        )
    return found[0]


def _first_position(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Leave the head one position to work on: its input has been read, and its output is not wanted."""
    return (args[0][:, :1], *args[1:])
