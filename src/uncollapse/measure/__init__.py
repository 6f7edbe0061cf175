"""Instruments: pure functions on arrays and tensors; no training, no I/O.

Names load on first use, so that importing this package needs no torch. The function `token_stats` is imported from
its module, `from uncollapse.measure.token_stats import token_stats`: here the name means the module.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "attention": (
        "AttentionRows",
        "KeyMask",
        "attention_entropy",
        "attention_entropy_lower_bound",
        "attention_rows",
        "attention_rows_of_matrix",
        "bound_from_logits",
        "bound_from_weights",
        "uniform_causal_entropy",
    ),
    "attention_gradient": ("attention_rows_with_gradient",),
    "class_pairs": ("uniform_log_kernel",),
    "class_statistics": ("CollapseReport", "StreamingNC"),
    "covariance": ("CovarianceProfile", "covariance_profile", "token_covariance"),
    "entropy_change": (
        "EntropyQuadrants",
        "collision_term",
        "compare_estimators",
        "entropy_quadrants",
        "exact_entropy_change",
        "token_entropy_change",
    ),
    "entropy_law": ("EntropyLaw", "compare_laws", "fit_entropy_law", "fit_straight_line"),
    "gradient_conflict": ("GradientConflict", "gradient_conflict_report"),
    "neural_collapse": (
        "BetweenClasses",
        "ClassMoments",
        "NCReport",
        "between_classes",
        "class_moments",
        "gof_frame",
        "nc1_pinv",
        "nc1_quotient",
        "nc2_equiangular",
        "nc2_equinorm",
        "nc2_etf",
        "nc2_gof",
        "nc2_of",
        "nc3_dist",
        "nc3_etf",
        "nc3_gof",
        "nc3_of",
        "nc4",
        "nc_metrics",
        "nc_report",
        "simplex_etf",
        "variance_along",
    ),
    "nearest_class": ("NC4Accumulator", "NC4Report"),
    "token_stats": ("token_stats_from_logits",),
    "statistics": (
        "Collision",
        "Entropy",
        "LogKeptMass",
        "Logp",
        "MaxLogp",
        "NucleusEntropy",
        "NucleusMass",
        "Statistic",
        "TemperedLogp",
        "TopKMass",
        "Varentropy",
    ),
    "entropy": (
        "collision_probability",
        "entropy_from_counts",
        "gaussian_entropy",
        "knn_entropy",
        "renyi_entropy",
        "renyi_entropy_from_logits",
        "shannon_entropy",
        "shannon_entropy_from_logits",
        "tsallis_entropy",
        "tsallis_entropy_from_logits",
        "von_neumann_entropy",
    ),
    "diversity": (
        "answer_ids",
        "cosine_similarity",
        "distinct_answers",
        "distinct_n",
        "expected_distinct",
        "jaccard_similarity",
        "majority_at_k",
        "pass_at_k",
        "self_similarity",
    ),
    "prediction_collapse": ("CollapseDetector", "PredictionSpread"),
    "spectra": (
        "SecondMoment",
        "condition_number",
        "effective_rank",
        "numerical_rank",
        "participation_ratio",
        "singular_values",
        "spectral_norm",
        "stable_rank",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"uncollapse.measure.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'uncollapse.measure' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
