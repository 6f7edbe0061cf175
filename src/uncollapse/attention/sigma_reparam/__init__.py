"""sigmaReparam: weights of a learned spectral norm, so that attention keeps its entropy.

Training of a transformer becomes unstable when rows of its attention grow sharp. Their entropy is bounded below by a
function of the spectral norm of the logits (`uncollapse.measure.attention`), and an adaptive optimiser makes that norm
grow with the square root of the width at every step. So every weight is written W_hat = (gamma / sigma) W: sigma is the
spectral norm of W, one step of power iteration per training step, and gamma is learned, one number per weight, which an
optimiser moves by its learning rate, whatever the width.

Paper: Zhai, Likhomanenko, Littwin, Busbridge, Ramapuram, Zhang, Gu, Susskind, "Stabilizing Transformer Training by
Preventing Attention Entropy Collapse", ICML 2023, arXiv 2303.06296. Official code: apple/ml-sigma-reparam,
`vision/layers.py` (PyTorch), `speech/layers.py` (JAX).

Differs from the paper / the official code:
- `gamma_init="spectral"` as in the official PyTorch code, so that a model converts without changing its function. The paper
  and the official JAX code begin with 1: `gamma_init="one"`.
- `u_init="svd"` as in the official code, exact at the first step; the paper's pseudo-code draws it: "random".
- A parametrisation of `torch.nn.utils.parametrize`, not new layer classes, so that a model keeps its own; weights are kept
  (the official conversion draws them anew without saying so: `keep_weights=False`).
- sigma comes out of the power step itself (two products with W instead of three) and the gradient is written out: one
  dot product and one rank-one update. Both are the formulas of the paper, not approximations.
- A grouped convolution is as many maps as it has groups, each with its own sigma and gamma. The official one does not
  build such layers. `blocks` gives the same to queries, keys and values that share a matrix.
- Buffers are written in place and what a graph keeps is never written, so two forward passes before one backward
  pass, data-parallel wrappers, `torch.compile` and `deepcopy` work.
- Checkpointed activations see the weight of their own forward pass: no power step while a gradient is computed.
- sigma and gamma are different tensors (in the official code the logged sigma is the tensor that is overwritten with gamma),
  and `spectral_norms` also gives the exact norm and the gap to it.
- `stats_only` of the official layer is `track_sigma`, a class of its own.
"""

from __future__ import annotations

from uncollapse.attention.sigma_reparam.checkpoints import plain_state_dict
from uncollapse.attention.sigma_reparam.conversion import (
    SpectralNorms,
    apply_sigma_reparam,
    fuse,
    spectral_norms,
    track_sigma,
)
from uncollapse.attention.sigma_reparam.layers import SigmaReparamConv2d, SigmaReparamLinear
from uncollapse.attention.sigma_reparam.monitor import AttentionEntropyMonitor, EntropyCollapse
from uncollapse.attention.sigma_reparam.norm_layers import NoNorm, remove_norms
from uncollapse.attention.sigma_reparam.parametrization import SigmaReparam, SigmaTracker
from uncollapse.measure.attention import attention_entropy, attention_entropy_lower_bound

__all__ = [
    "AttentionEntropyMonitor",
    "EntropyCollapse",
    "NoNorm",
    "SigmaReparam",
    "SigmaReparamConv2d",
    "SigmaReparamLinear",
    "SigmaTracker",
    "SpectralNorms",
    "apply_sigma_reparam",
    "attention_entropy",
    "attention_entropy_lower_bound",
    "fuse",
    "plain_state_dict",
    "remove_norms",
    "spectral_norms",
    "track_sigma",
]
