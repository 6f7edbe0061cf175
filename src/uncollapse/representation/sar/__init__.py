"""SAR, sharpness-aware and reliable entropy minimisation at test time, beside Tent and no adaptation.

A classifier that meets shifted data can adapt to it without labels by lowering the entropy of its own predictions (Tent). On
mixed, tiny or class-ordered batches that collapses: every input gets the same class. SAR leaves out samples of high
entropy, whose gradients are large and noisy, looks for a flat minimum (SAM), and goes back to the start when the entropy
becomes suspiciously small. Only weights and biases of normalisation layers change.

Paper: Niu, Wu, Zhang, Wen, Chen, Zhao, Tan, "Towards Stable Test-Time Adaptation in Dynamic Wild World", ICLR 2023, arXiv
2302.12400. Official code: mr-eggplant/SAR, `sar.py` (method), `sam.py` (SAM, from davda54/sam), `main.py` (settings).

Differs from the paper / the official code:
- After a reset the code assigns the stale m again, so it may reset many batches in a row. Here m is forgotten; the authors
  say that this was meant.
- After a reset the code keeps the momentum: its SAM wrapper saves and loads its own, empty state, not that of the SGD inside.
  So the first step from the source weights goes where the collapsed model was heading. Here the optimiser's state is reset.
- e_reset is 0.2 nats in the code, whatever its argument says. Here it is 0.029 ln C, the same at C = 1000.
- If no sample is reliable the code still takes a step on momentum alone. Here nothing changes.
  `compat="official"` does all four as the code does; that was compared once, to 1e-14, and no test repeats it.
- One NaN in a batch makes the code's weights NaN for good. Here samples that are not finite are left out and counted.
- Which layers: a rule on blocks that names no architecture (`collect_norm_params`); the code lists names of ResNet and ViT.
  InstanceNorm and RMSNorm count as well.
- The second pass runs on reliable rows alone where rows do not see each other; the code computes all and drops some.
- The model stays in evaluation mode (no dropout), BatchNorm on statistics of the batch; the code uses training mode.
- The default learning rate is the one for ResNets at batches of 64, whatever the model and the batch; the code takes four times that for
  ViTs, and both in proportion to the batch.
- `reset` copies back adapted tensors and optimiser state; the code keeps a second copy of the model.
- Half-precision models: adapted layers hold and compute in float32, else most of a step is rounded away; the code does nothing about it.
- Language models: each token is a sample, with its full next-token entropy; not in the paper.
"""

from uncollapse.measure.prediction_collapse import CollapseDetector, PredictionSpread
from uncollapse.representation.sar.adaptation import Adaptation, AdaptationStats, NoAdaptation
from uncollapse.representation.sar.norms import collect_norm_params
from uncollapse.representation.sar.sam import SAM
from uncollapse.representation.sar.sar import SAR
from uncollapse.representation.sar.tent import Tent

__all__ = [
    "SAM",
    "SAR",
    "Adaptation",
    "AdaptationStats",
    "CollapseDetector",
    "NoAdaptation",
    "PredictionSpread",
    "Tent",
    "collect_norm_params",
]
