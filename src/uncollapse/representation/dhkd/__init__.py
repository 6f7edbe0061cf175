"""Dual-head distillation (DHKD): logit matching and cross-entropy share a backbone, but not a classifier.

Matching a teacher's logits class by class carries what the softmax throws away. On the classifier that cross-entropy
trains it is said to hurt: one loss wants the margins ever larger, the other wants the teacher's finite ones. So each loss gets
a head of its own, and the auxiliary head is dropped after training.

    student = DualHeadModel(model, "classifier", aux="mlp")
    loss = DualHeadLoss(align=student.parameters())      # gamma CE(main) + alpha BinaryKL-Norm(auxiliary), aligned
    loss(student(x), teacher(x), y).backward()
    model = student.export()                             # after training

Paper: Yang, Zong, Huang, Feng, Bo An, "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head",
2024, arXiv 2411.08937. Official code: penghui-yang/DHKD.

Differs from the paper / the official code:
- The logit-level losses are exact. The code clamps sigmoids at 1e-8: without gradient where the student is far below, and
  since 1 - 1e-8 is 1 in float32, infinite or NaN where it is far above. `clamp=1e-8` does the same.
- Alignment projects on the parameters that both losses reach (`scope="shared"`). The code takes the norm over all
  parameters, which removes a part of the conflict only and enlarges the main head's gradient: `scope="all"`.
- No gradient is flattened or copied, and parameters that no loss reaches keep `None` instead of zeros, so that weight
  decay and momentum leave them alone.
- The auxiliary head's weights and dropout come from a seed of its own.
- The code's ImageNet loop sets alpha to 0 from its 50th epoch on, counted from 1; here `auxiliary_steps` counts steps.
"""

from uncollapse.measure.gradient_conflict import GradientConflict, gradient_conflict_report
from uncollapse.representation.dhkd.alignment import (
    AlignedGradients,
    GradientAlignment,
    aligned_loss,
    project_conflicting_gradients,
)
from uncollapse.representation.dhkd.heads import DualHead, DualHeadModel, DualLogits, auxiliary_head
from uncollapse.representation.dhkd.losses import binary_kl_loss, binary_kl_norm_loss
from uncollapse.representation.dhkd.training import DualHeadLoss, DualLosses, distill

__all__ = [
    "AlignedGradients",
    "DualHead",
    "DualHeadLoss",
    "DualHeadModel",
    "DualLogits",
    "DualLosses",
    "GradientAlignment",
    "GradientConflict",
    "aligned_loss",
    "auxiliary_head",
    "binary_kl_loss",
    "binary_kl_norm_loss",
    "distill",
    "gradient_conflict_report",
    "project_conflicting_gradients",
]
