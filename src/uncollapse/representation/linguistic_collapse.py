"""Linguistic collapse: neural collapse of language models, over vocabularies that outnumber the features.

Next-token prediction is classification with tens of thousands of unbalanced, ambiguous classes and far fewer features, so
that a simplex ETF cannot exist. What is measured instead: variability over distance within pairs of classes (NC1, CDNV),
hyperspherical uniformity of the class means (GNC2), evenness rather than size of the alignment of head and means (UNC3),
and agreement of the head with the nearest class mean on text that the means were not made of (NC4).

Paper: Wu and Papyan, "Linguistic Collapse: Neural Collapse in (Large) Language Models", 2024, arXiv 2405.17767. Official
code: rhubarbwu/linguistic-collapse and rhubarbwu/neural-collapse.

    statistics = StreamingNC(vocabulary, width)
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

from uncollapse.measure.class_statistics import CollapseReport, StreamingNC
from uncollapse.measure.nearest_class import NC4Accumulator, NC4Report

__all__ = ["CollapseReport", "NC4Accumulator", "NC4Report", "StreamingNC"]
