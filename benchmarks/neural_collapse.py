"""Neural-collapse metrics at the vocabulary of SmolLM2, against the formulas over all pairs of classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import OURS, Case, Goal
from uncollapse.measure import StreamingNC

C, D, TOKENS, BATCH = 49_152, 576, 1_000_000, 8192
SHORT_C, SHORT_TOKENS = 12_288, 98_304
OURS_SHORT, OURS_TILES, PAIRWISE = "ours, short", "ours, short, every pair", "pairwise, short"
SUMMARY = (
    "`StreamingNC`: class statistics of a million features over a vocabulary of 49,152 in one pass, then every metric of "
    "NC1 to NC3, GNC2 and UNC3 with the head. *pairwise* is the formulas as they stand, vectorised: a second pass for variances, "
    "and full classes x classes matrices for everything over pairs. At full size each of those has 9.7 GB, so it runs on "
    "12,288 classes and 98,304 features only, where *ours, short* does the same from a million sampled pairs and *every pair* "
    "visits all of them in tiles of float64. Labels follow Zipf's law."
)


@dataclass(frozen=True)
class Problem:
    """Features that repeat from batch to batch, so that the input needs no memory to speak of, and their labels."""

    features: Tensor
    labels: Tensor
    weight: Tensor

    @classmethod
    def make(cls, classes: int, tokens: int, width: int = D) -> Problem:
        g = torch.Generator().manual_seed(0)
        zipf = 1 / torch.arange(1, classes + 1).double()
        labels = torch.multinomial(zipf, tokens, replacement=True, generator=g)
        return cls(
            torch.randn(min(BATCH, tokens), width, generator=g),
            labels,
            torch.randn(classes, width, generator=g),
        )

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features of a batch lean towards a row of the head, so that classes differ."""
        for y in self.labels.split(len(self.features)):
            yield torch.add(self.features[: len(y)], self.weight[y], alpha=0.5), y


def ours(given: Problem, **options: Any) -> Mapping[str, float]:
    """One pass, then all metrics."""
    statistics = StreamingNC(*given.weight.shape)
    for h, y in given.batches():
        statistics.update(h, y)
    return statistics.compute(given.weight, **options).values


def pairwise(given: Problem) -> Mapping[str, float]:
    """Two passes for means and variances, then classes x classes matrices, in float32."""
    classes, width = given.weight.shape
    count, total, square = torch.zeros(classes), torch.zeros(classes, width), torch.zeros(classes)
    for h, y in given.batches():
        count += torch.bincount(y, minlength=classes)
        total.index_add_(0, y, h)
    mean = total / count.clamp(min=1)[:, None]
    for h, y in given.batches():
        square.index_add_(0, y, (h - mean[y]).square().sum(1))
    seen = count > 0
    m, v, w = mean[seen] - mean[seen].mean(0), square[seen] / count[seen], given.weight[seen]
    size, norm = len(m), m.norm(dim=1)
    u = m / norm[:, None]
    over = torch.ones(size, size, dtype=torch.bool).triu(1)
    gram, dual = m @ m.T, w @ m.T
    frame = (torch.eye(size) - 1 / size) / (size - 1) ** 0.5
    apart = torch.cdist(u, u)[over]
    kernel = -apart.log()
    inner = gram[over]
    cdnv = ((v[:, None] + v) / (2 * torch.cdist(m, m).square()))[over]
    cosine = torch.nn.functional.cosine_similarity(w, m)
    return {
        "nc1/cdnv/mean": float(cdnv.mean(dtype=torch.float64)),
        "nc2/norm/cov": float(norm.std(correction=0) / norm.mean()),
        "nc2/interference/cov": float(inner.std(correction=0) / inner.mean().abs()),
        "nc2/etf_error": float((gram / gram.norm() - frame).norm()),
        "gnc2/log_kernel/mean": float(kernel.mean(dtype=torch.float64)),
        "gnc2/log_kernel/cov": float(kernel.std(correction=0) / kernel.mean().abs()),
        "gnc2/distance/mean": float(apart.mean(dtype=torch.float64)),
        "nc3/cosine/mean": float(cosine.mean()),
        "nc3/dual_error": float((dual / dual.norm() - frame).norm()),
        "unc3/cosine/cov": float(cosine.std(correction=0) / cosine.mean()),
    }


def case() -> Case:
    """Full size, the size where the pairwise formulas run, and a tiny one to warm libraries up."""
    full, short, tiny = (
        Problem.make(C, TOKENS),
        Problem.make(SHORT_C, SHORT_TOKENS),
        Problem.make(64, 512, 16),
    )

    def check() -> dict[str, float]:
        reference, every, some = pairwise(short), ours(short, pairs="exact"), ours(short)

        def off(found: Mapping[str, float]) -> float:
            return max(abs(found[name] / reference[name] - 1) for name in reference)

        if off(every) > 1e-2 or off(some) > 5e-2:
            raise RuntimeError(f"results differ by {off(every):.1%} over all pairs, {off(some):.1%} sampled")
        return {OURS_TILES: off(every), OURS_SHORT: off(some)}

    def contestants(long: Problem, brief: Problem) -> dict[str, Callable[[], Any]]:
        return {
            OURS: lambda: ours(long),
            OURS_SHORT: lambda: ours(brief),
            OURS_TILES: lambda: ours(brief, pairs="exact"),
            PAIRWISE: lambda: pairwise(brief),
        }

    return Case(
        size=f"C={C}, d={D}, {TOKENS} features; short: C={SHORT_C}, {SHORT_TOKENS} features",
        contestants=contestants(full, short),
        warm_up=contestants(tiny, tiny),
        check=check,
        goals=(
            Goal(
                "our extra peak memory over 4 C d floats of 4 bytes",
                lambda r: r[OURS]["extra_peak_mb"] * 1e6 / (4 * C * D * 4),
                1,
                False,
            ),
            Goal(
                "time of the pairwise formulas over ours, short",
                lambda r: r[PAIRWISE]["time_over_ours"] / r[OURS_SHORT]["time_over_ours"],
                5,
                True,
            ),
        ),
    )
