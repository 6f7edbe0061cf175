"""Which heads have collapsed and which are overloaded: the paper's four bins of head entropies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from uncollapse.errors import DataError
from uncollapse.inspection.attention import SINK, attention_statistics, head_table
from uncollapse.measure.attention import uniform_causal_entropy


@dataclass(frozen=True)
class HeadDiagnosis:
    """Shares of heads in four bins of equal width between 0 and a reference entropy.

    The paper bins by the largest entropy observed in the model, which says little where all heads are alike: a model whose
    heads are all uniform has all of them on top, and so has one whose heads all have half a nat. So every reference is
    given, and a head is judged against a fixed one by `at("log_T")` or `at("causal")`.

    Attributes:
        bins: shares of heads by reference, lowest bin first; they sum to 1. "max_observed" (the paper), "log_T" (ln T) and
            "causal" ((ln T!)/T, what a uniform causal head has).
        references: the entropies (nats) behind those names.
        sink_frac: share of all heads that are in the lowest bin of "max_observed" and rest on the first key, mean probability
            at least 0.5: attention sinks, no pathology by themselves. NaN if the mass on the first key was not given.
    """

    bins: Mapping[str, tuple[float, float, float, float]]
    references: Mapping[str, float]
    sink_frac: float

    @property
    def hist(self) -> tuple[float, float, float, float]:
        """The paper's histogram, by the largest entropy observed."""
        return self.bins["max_observed"]

    @property
    def collapse_frac(self) -> float:
        """Share of heads in the lowest bin of the paper's histogram. Look at `sink_frac` beside it."""
        return self.hist[0]

    @property
    def overload_frac(self) -> float:
        """Share of heads in the highest bin of the paper's histogram."""
        return self.hist[3]

    def at(self, reference: str) -> tuple[float, float, float, float]:
        """The histogram by another reference: "max_observed", "log_T" or "causal"."""
        if reference not in self.bins:
            raise DataError(f"no reference {reference!r}; there are {', '.join(self.bins)}")
        return self.bins[reference]


def diagnose_heads(
    entropies: Float[Tensor, "layer head"],
    T: int,
    first: Float[Tensor, "layer head"] | None = None,
) -> HeadDiagnosis:
    """Bin the mean entropies of heads (nats) over `T` keys; NaN marks heads that do not exist.

    Bins are [0, r/4), [r/4, r/2), [r/2, 3r/4), [3r/4, infinity) for each reference r. If every entropy is 0 all heads are in
    the lowest. `first` is the mean probability of the first key, for `sink_frac`. A well-behaved GPT-2 has about nine
    heads in ten in the middle two bins.

    Source: arXiv 2501.03489, section 3.

    Raises:
        DataError: no head, a negative or infinite entropy, T below 2, or `first` of another shape.
    """
    if T < 2:
        raise DataError(f"diagnose_heads: T is {T}; rows that see one key have no entropy to judge")
    known = ~entropies.isnan()
    found = entropies[known].double()
    if not len(found) or not bool((found.isfinite() & (found >= 0)).all()):
        raise DataError("diagnose_heads: needs the entropy of at least one head, finite and not negative")
    if first is not None and first.shape != entropies.shape:
        raise DataError(f"diagnose_heads: first has shape {tuple(first.shape)}, not {tuple(entropies.shape)}")
    references = {
        "max_observed": float(found.max()),
        "log_T": math.log(T),
        "causal": uniform_causal_entropy(T),
    }
    places = {name: _bin(found, reference) for name, reference in references.items()}
    bins = {name: _shares(place) for name, place in places.items()}
    sink = math.nan
    if first is not None:
        sink = float(((places["max_observed"] == 0) & (first[known] >= SINK)).double().mean())
    return HeadDiagnosis(bins, references, sink)


def _bin(entropies: Float[Tensor, " head"], reference: float) -> Tensor:
    if reference == 0:
        return torch.zeros_like(entropies, dtype=torch.long)
    return (4 * entropies / reference).floor().clamp(max=3).long()


def _shares(place: Tensor) -> tuple[float, float, float, float]:
    a, b, c, d = (torch.bincount(place, minlength=4).double() / len(place)).tolist()
    return a, b, c, d


@dataclass(frozen=True)
class HeadEntropies:
    """Mean entropy (nats) of every head and its mean probability of the first key, over `T` keys.

    Rows are layers in the order in which they attend; NaN where a layer has fewer heads than others.
    """

    layers: tuple[str, ...]
    entropy: Float[Tensor, "layer head"]
    first: Float[Tensor, "layer head"]
    T: int

    def diagnose(self) -> HeadDiagnosis:
        """`diagnose_heads` of these."""
        return diagnose_heads(self.entropy, self.T, self.first)


@torch.no_grad()
def collect_attention_entropy(model: nn.Module, batch: Mapping[str, Any] | Tensor) -> HeadEntropies:
    """One forward pass of `batch` through `model`, in its present mode, and the entropy of each head.

    Any kernel: entropies come from queries and keys. `batch` holds keyword arguments (`input_ids`, `attention_mask`, whose
    zeros are left out) or is the one argument.

    Raises:
        ConfigError: a model in which no attention was seen; says what was looked for.
        DataError: a batch without tokens, or attention that contains NaN or inf.
    """
    tokens = batch if isinstance(batch, Tensor) else batch.get("input_ids", batch.get("inputs_embeds"))
    if tokens is None or tokens.ndim < 2 or not tokens.numel():
        raise DataError("collect_attention_entropy: give token ids, a tensor (batch, time) or as input_ids")
    with attention_statistics(model) as tally:
        if isinstance(batch, Tensor):
            model(batch)
        else:
            model(**batch)
    table = head_table(tally.layers)
    if bool(table["nonfinite"].nansum() > 0):
        raise DataError("collect_attention_entropy: queries, keys or probabilities contain NaN or inf")
    return HeadEntropies(tuple(tally.layers), table["entropy"], table["first"], tokens.shape[1])
