"""What was seen of a model, and its numbers for a logger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from uncollapse.inspection.attention import HeadStatistics, head_table, marked_heads
from uncollapse.inspection.features import FeatureSpread
from uncollapse.inspection.weights import WeightSpectrum
from uncollapse.measure.class_statistics import CollapseReport
from uncollapse.measure.nearest_class import NC4Report
from uncollapse.measure.neural_collapse import NCReport


@dataclass(frozen=True)
class Inspection:
    """What was seen of a model. Empty or None where there was nothing; `absent` says why.

    Attributes:
        model: class name.
        parameters: how many.
        heads: statistics of the attention heads by layer.
        logit_norms: ||W_Q W_K^T||_2 / sqrt(head size) by layer and head.
        blocks: spread of the output of each block, in order.
        collapse: neural-collapse metrics of the features at the head, by class (the next token of a language model).
        frames: the classical metrics with simplex and orthogonal frames, where there are no more classes than features + 1.
        decisions: NC4, whether the head decides as the nearest class mean does; only after a second pass (`Watcher.deciding`).
        weights: spectra of the weights.
        nonfinite: rows of "attention", of "features" of the blocks and of features at the head ("classes") that were left
            out because they contain NaN or inf; 0 is told too.
        absent: part of the inspection -> reason.
    """

    model: str
    parameters: int
    heads: Mapping[str, HeadStatistics] = field(default_factory=dict)
    logit_norms: Mapping[str, Float[Tensor, " head"]] = field(default_factory=dict)
    blocks: Mapping[str, FeatureSpread] = field(default_factory=dict)
    collapse: CollapseReport | None = None
    frames: NCReport | None = None
    decisions: NC4Report | None = None
    weights: tuple[WeightSpectrum, ...] = ()
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    def scalars(self, *, by_layer: bool = False) -> dict[str, float]:
        """Numbers for a logger, `area/name/statistic`; `by_layer` adds those of each layer, block and weight."""
        found: dict[str, float] = {}
        if self.heads:
            table = head_table(self.heads)
            normalized = table["normalized"]
            found |= {
                "attention/entropy/mean": float(table["entropy"].nanmean()),
                "attention/normalized/mean": float(normalized.nanmean()),
                "attention/normalized/lowest_head": _least(normalized),
                "attention/peak/mean": float(table["peak"].nanmean()),
                "attention/first_key/mean": float(table["first"].nanmean()),
            }
            for kind, heads in marked_heads(self.heads).items():
                found[f"attention/{kind}_heads/frac"] = float(heads.double().mean())
        if self.logit_norms:
            found["attention/logit_norm/max"] = max(float(norm.amax()) for norm in self.logit_norms.values())
        if self.blocks:
            ranks = [block.effective_rank for block in self.blocks.values()]
            found |= {"features/effective_rank/last": ranks[-1], "features/effective_rank/min": min(ranks)}
        if self.collapse is not None:
            found |= self.collapse.values
            found["nc/classes"] = float(self.collapse.classes)
        if self.frames is not None:
            found |= {f"nc/{name}": value for name, value in self.frames.metrics().items()}
        if self.decisions is not None:
            shares = ("full_head", "seen_head", "head_accuracy", "centre_accuracy")
            found |= {f"nc4/{name}": float(getattr(self.decisions, name)) for name in shares}
        if self.weights:
            found["weights/spectral_norm/max"] = max(one.spectral_norm for one in self.weights)
            ranks = [one.effective_rank / min(one.shape) for one in self.weights]
            found["weights/effective_rank/share"] = sum(ranks) / len(ranks)
        for part, rows in self.nonfinite.items():
            found[f"{'nc' if part == 'classes' else part}/nonfinite/rows"] = float(rows)
        if by_layer:
            for layer, one in self.heads.items():
                found[f"attention/normalized/{layer}"] = float(one.normalized.nanmean())
            for layer, norm in self.logit_norms.items():
                found[f"attention/logit_norm/{layer}"] = float(norm.amax())
            for name, block in self.blocks.items():
                found[f"features/effective_rank/{name}"] = block.effective_rank
            for weight in self.weights:
                found[f"weights/spectral_norm/{weight.name}"] = weight.spectral_norm
                found[f"weights/effective_rank/{weight.name}"] = weight.effective_rank
        return found


def _least(values: Tensor) -> float:
    kept = values[~values.isnan()]
    return float(kept.amin()) if len(kept) else float("nan")
