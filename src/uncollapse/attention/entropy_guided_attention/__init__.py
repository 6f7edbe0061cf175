"""Entropy-guided attention: temperatures of each head and position, and a penalty on heads that stray from their entropy.

Normalisation and activations are what costs most when a language model runs on encrypted data. Without them a decoder fails in
two opposite ways: rows of attention in deep layers become one-hot (entropy collapse, up to NaN), and many heads of early
layers stay near uniform (entropic overload). The paper keeps softmax as the only nonlinearity: a linear feed-forward layer
with learnable scales holds off the collapse, learnable temperatures and an entropy penalty with a dead zone the overload.

Paper: Jha, Reagen, "Entropy-Guided Attention for Private LLMs", 2025, arXiv 2501.03489. Official code:
Nandan91/entropy-guided-attention-llm (`entropy_regularization.py`, `usage_example.py`; the penalty only, no architecture).

Differs from the paper / the official code:
- What is penalised: Algorithm 1 has one number per head, its entropy averaged over batch and queries (`granularity="head"`, the
  default). The code penalises every row by itself and *sums* over batch and queries (`"row_sum"`), so its coefficient weighs
  batch x length times as much and changes with the batch size. `"row_mean"` is that without the factor.
- The entropy comes from scores, without the 1e-9 that the code adds inside the logarithm; `eps=1e-9` brings it back where
  probabilities are given.
- Thresholds belong to each layer and head, as in Algorithm 1. The code's example takes the first layer's for all; a `theta` of
  one layer does the same.
- The reference is ln T, as in both. A causal row i can reach ln(i + 1) only, so a uniform causal head lies at (ln T!)/T, a nat
  below; `reference="causal"` takes what each row can reach.
- The gate is hard, as in both: the penalty jumps from 0 to (gamma E_max)^2 at the edge. `gate="smooth"` subtracts the jump.
- Where thresholds start is not stated; 0.5 here. The temperature's start is printed as 1e-2 and 1e-1; 1 here, `t_init`. How it is
  kept positive is not stated: cut off at 1e-3, or `"softplus"`.
- The printed formula of the block does not say which branch is scaled by alpha, which by beta; the text does, and is followed. Both
  start at 1. The decoder without normalisation has none before its output either.
- The penalty of a Hugging Face model is computed from queries and keys, whatever kernel attends; the code needs eager
  attention. In eval mode there is none.
"""

from __future__ import annotations

from uncollapse.attention.entropy_guided_attention.architecture import (
    ARCHITECTURES,
    Architecture,
    ReducedDecoder,
)
from uncollapse.attention.entropy_guided_attention.attachment import (
    AttachedRegularizer,
    attach_entropy_regularizer,
)
from uncollapse.attention.entropy_guided_attention.diagnosis import (
    HeadDiagnosis,
    HeadEntropies,
    collect_attention_entropy,
    diagnose_heads,
)
from uncollapse.attention.entropy_guided_attention.layers import (
    CausalAttention,
    ScaledFusedFFN,
    SoftmaxOnlyBlock,
    TemperedAttention,
    fuse_linear,
)
from uncollapse.attention.entropy_guided_attention.regularizer import EntropyRegularizer

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "AttachedRegularizer",
    "CausalAttention",
    "EntropyRegularizer",
    "HeadDiagnosis",
    "HeadEntropies",
    "ReducedDecoder",
    "ScaledFusedFFN",
    "SoftmaxOnlyBlock",
    "TemperedAttention",
    "attach_entropy_regularizer",
    "collect_attention_entropy",
    "diagnose_heads",
    "fuse_linear",
]
