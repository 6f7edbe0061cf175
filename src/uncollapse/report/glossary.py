"""What every metric in a report means, in which unit, and how to read it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """One entry: the metric (or pattern of metrics) as logged, its plain name, its unit, how to read it."""

    key: str
    name: str
    unit: str
    reading: str

    def explains(self, metric: str) -> bool:
        """Whether this entry is about `metric`; a key that ends in `*` stands for all that begin so."""
        return metric.startswith(self.key[:-1]) if self.key.endswith("*") else metric == self.key


TERMS = (
    # Names stay under 24 characters: they title the small panels on a phone.
    Term("entropy/token/mean", "Token entropy", "nats",
         "How undecided the model is at a token, averaged over all sampled tokens: 0 is certain, ln 2 = 0.69 is a coin "
         "toss, e to the entropy is the number of equally likely choices. Falling to zero early is collapse: the model "
         "has stopped exploring, and what it does not yet do it will not find."),
    Term("entropy/token/p10", "Entropy, 10th percentile", "nats", "A tenth of the tokens has less entropy than this."),
    Term("entropy/token/p90", "Entropy, 90th percentile", "nats",
         "A tenth of the tokens has more. These are the forks of the text, where a run that goes well stays undecided."),
    Term("entropy/position/*", "Entropy by position", "nats", "Mean entropy at the i-th token of the answers, counted from 0."),
    Term("reward/mean", "Reward", "reward", "Mean reward of the sampled answers of a step. Noisy: every step sees other prompts."),
    Term("reward/std", "Spread of rewards", "reward", "Standard deviation over the answers of a step."),
    Term("reward/zero_variance_groups", "Dead groups", "share of groups",
         "Prompts whose answers all got the same reward. They teach nothing; the more of them, the smaller the useful batch."),
    Term("reward/unscorable", "Unscorable answers", "share of answers", "Answers to which no reward could be given; they are left out."),
    Term("rows/kept", "Kept answers", "share of answers",
         "Answers that the filters left for training. At zero the step taught nothing."),
    Term("sampler/tokens/per_useful", "Tokens per useful row", "tokens",
         "Tokens generated for each answer that taught something: in the loss, with an advantage other than zero. What a sampler "
         "that draws more than once costs, and what it buys."),
    Term("eval/reward", "Validation reward", "reward", "Reward on held-out prompts, the one to compare recipes by."),
    Term("eval/pass@*", "pass@k", "share of prompts",
         "Chance that at least one of k answers to a prompt is right. When pass@1 rises and pass@8 stands still or falls, "
         "the model has grown surer, not more able."),
    Term("eval/maj@*", "maj@k", "share of prompts", "Chance that the most frequent of k answers is right."),
    Term("eval/distinct", "Distinct correct answers", "per prompt",
         "Different correct answers among the samples of a prompt. It falls when one way of being right crowds out the others."),
    Term("covariance/token/mean", "Token covariance", "advantage \u00d7 nats",
         "How strongly probable tokens are also the rewarded ones: (advantage \u2212 mean)(log-probability \u2212 mean), averaged "
         "over tokens. To first order, a step lowers entropy in proportion to it."),
    Term("covariance/top/*", "Covariance of the top tokens", "advantage \u00d7 nats",
         "The same, averaged over the fraction of tokens with the largest values (at least one token, so that in a small "
         "batch the smallest fractions coincide). A steep profile means that few tokens drive the loss of entropy."),
    Term("clip/low/frac", "Clipped below", "share of tokens", "Tokens whose probability fell beyond the lower clip bound."),
    Term("clip/high/frac", "Clipped above", "share of tokens",
         "Tokens whose probability rose beyond the upper bound. These are often rare tokens about to be learned."),
    Term("clip/ppo/frac", "Clipped", "share of tokens", "Tokens without gradient because their probability ratio left the clip range."),
    Term("clip_cov/dropped/frac", "Dropped by Clip-Cov", "share of tokens",
         "Tokens with high covariance whose gradient Clip-Cov removed."),
    Term("kl_cov/penalised/frac", "Penalised by KL-Cov", "share of tokens", "Tokens with the largest covariance, held back by KL-Cov."),
    Term("kl_cov/penalty/mean", "Penalty of KL-Cov", "nats", "Mean distance from the old policy at the penalised tokens."),
    Term("steer/weight/mean", "Mean weight (STEER)", "", "Mean factor that STEER puts on a token's loss; 1 holds nothing back."),
    Term("steer/damped/frac", "Held back by STEER", "share of tokens",
         "Tokens whose weight is more than 1 % below the largest possible. Near zero means that a few outliers set the scale."),
    Term("steer/change/mean", "Predicted change", "advantage \u00d7 nats",
         "What a small step on one token is predicted to do to the entropy of its state, averaged over tokens; negative: it falls. "
         "STEER's released estimator has not the scale of a real change: compare signs and trends."),
    Term("steer/change/abs", "Predicted change (size)", "advantage \u00d7 nats", "The same without its sign: how much tokens move entropy at all."),
    Term("siren/peak_entropy/mean", "Entropy at the peaks", "nats",
         "Entropy within the nucleus at the positions that SIREN regularises, mean over answers."),
    Term("siren/anchor/value", "Anchor", "nats", "What SIREN pulls that entropy to: its value in the first rollout batch, or a target."),
    Term("siren/gap/mean", "Gap to the anchor", "nats",
         "Entropy at the peaks minus the anchor. Negative: it is being pushed up; settling below zero is usual."),
    Term("siren/saturated/frac", "Anchor given up", "", "One while a target out of reach is given up and the highest level seen is held instead."),
    Term("siren/peaks/frac", "Peaks", "share of tokens",
         "Tokens that SIREN regularises, about a fifth. Much less means entropies that are mostly equal, as after a collapse."),
    Term("siren/empty_rows/frac", "Answers without peaks", "share of answers", "Answers in which no token counts as a peak."),
    Term("peak_bonus/peak_entropy/mean", "Entropy at the peaks", "nats",
         "Entropy within the nucleus at the positions that get a bonus, mean over answers. Nothing stops it from rising."),
    Term("peak_bonus/peaks/frac", "Peaks with a bonus", "share of tokens", "Tokens whose entropy gets a bonus, about a fifth."),
    Term("peak_bonus/empty_rows/frac", "Answers without peaks", "share of answers", "Answers in which no token gets the bonus."),
    Term("lagrangian/coefficient/value", "Bonus coefficient", "per nat",
         "How hard entropy is pushed up. It rises while entropy is below that of the start; at its limit it pushes no harder."),
    Term("cure/branch/frac", "Branches", "share of answers", "Answers that continue another one from an undecided token (CURE)."),
    Term("cure/cut/mean", "Kept by a branch", "tokens", "How many tokens of its parent a branch keeps."),
    Term("cure/cut/entropy", "Entropy at the cuts", "nats",
         "Entropy where branches begin. It should be several times the mean; where it is not, too many candidates are allowed."),
    Term("cure/reward/within", "Variance in families", "reward\u00b2", "Variance of the reward among an answer and its branches."),
    Term("cure/reward/between", "Variance of families", "reward\u00b2", "Variance of the mean reward between families of one prompt."),
    Term("bapo/low/mean", "Lower clip bound", "ratio", "The bound that BAPO's search found; 0.6 if it never started, 0.9 if it ran to its end."),
    Term("bapo/high/mean", "Upper clip bound", "ratio", "The bound that BAPO's search found; 1.2 if it never started, 3 if it ran to its end."),
    Term("bapo/share_before/mean", "Positive share before", "share", "What tokens of good answers carry of the update under the first bounds."),
    Term("bapo/share_after/mean", "Positive share after", "share",
         "The same under the bounds that were found. Below the share before, the search has done harm by its own measure."),
    Term("bapo/steps/mean", "Steps of the search", "steps", "Moves of both clip bounds in an update."),
    Term("bapo/satisfied/frac", "Target reached", "share of updates", "Updates in which the positive share reached its target."),
    Term("conflict/amplified/frac", "Conflicts amplified", "share of tokens", "Tokens of good answers that bad ones share at the same place (GTPO)."),
    Term("conflict/suppressed/frac", "Conflicts suppressed", "share of tokens", "Tokens of bad answers that good ones share; they are not pushed down (GTPO)."),
    Term("entropy_filter/kept/frac", "Kept by the filter", "share of answers", "Answers that GTPO's entropy filter left. At zero the step taught nothing."),
    Term("entropy/trajectory/mean", "Entropy of an answer", "nats", "Mean over answers of each one's mean entropy: short answers count as much as long ones."),
    Term("lp_reg/selected/frac", "Protected (Lp-Reg)", "share of tokens", "Unlikely tokens above the noise threshold that Lp-Reg holds up."),
    Term("lp_reg/low/quantile", "Low probability", "probability", "Largest probability among the tokens that count as unlikely; it falls as the policy sharpens."),
    Term("lp_reg/low/kept_frac", "Unlikely but no noise", "share of unlikely tokens", "How many of the unlikely tokens pass the filter."),
    Term("lp_reg/filtered/frac", "Noise sampled", "share of tokens", "Sampled tokens below the noise threshold."),
    Term("lp_reg/kept_mass/mean", "Mass above noise", "probability", "Probability that the filter leaves, mean over tokens."),
    Term("lp_reg/kl/mean", "Distance to the proxy", "nats", "Divergence from the filtered policy at the protected tokens."),
    Term("lp_reg/force/ratio", "Pull over push", "", "How strongly protected tokens are held up against the update that lowers them; below 1 they still fall."),
    Term("tempered/temperature/mean", "Hot temperature", "", "Temperature of the tempered answers of this step, relative to the policy's (AEPO)."),
    Term("tempered/entropy_gap/mean", "Gap to the target", "nats", "Entropy asked for minus the entropy that there is."),
    Term("tempered/hot/frac", "Hot steps", "share of steps", "Steps that heat among the last 50. Near one for long: the target is out of reach."),
    Term("tempered/saturated/frac", "Target given up", "", "One while the target is given up and the level reached is held instead."),
    Term("tempered/rows/frac", "Tempered answers", "share of answers", "Answers sampled at another temperature: what AEPO adds to generation."),
    Term("tempered/positive/frac", "Right tempered answers", "share", "Right answers among the tempered ones."),
    Term("tempered/tokens/per_positive", "Tokens per right answer", "tokens", "Tokens generated at the other temperature for each right answer found."),
    Term("kl/old/k3", "Distance of a step", "nats",
         "KL divergence from the policy that sampled to the one being trained, estimated without bias and never negative (k3)."),
    Term("kl/ref/mean", "Distance from the start", "nats",
         "KL divergence from the reference policy, per token. It grows as the model learns; growing faster and faster is a "
         "run that gets away."),
    Term("mismatch/*", "Trainer against sampler", "nats",
         "How differently trainer and sampler score the same tokens. Rounding gives 0.005 to 0.02 nats; more means that two "
         "different policies are at work."),
    Term("diversity/distinct", "Distinct answers", "share of answers",
         "Different answers among those to one prompt. At one over the group size all of them are the same."),
    Term("length/mean", "Answer length", "tokens", "Mean number of tokens in an answer."),
    Term("length/truncated", "Cut answers", "share of answers", "Answers that ran into the length limit."),
    Term("loss/*", "Loss terms", "", "The parts of the training loss. Their level means little; sudden jumps mean something."),
    Term("grad/norm", "Gradient norm", "", "Size of the gradient before clipping. Spikes come before instability."),
    Term("lr", "Learning rate", "", "Step size of the optimiser."),
    Term("law/ceiling", "Forecast ceiling", "reward", "The entropy law, fitted to the run so far, read at zero entropy."),
    Term("time/step", "Time per step", "s", "Wall time of one rollout step, sampling and training together."),
)  # fmt: skip

CONCEPTS = (
    Term("", "Start and end values", "",
         "Every \u201cfrom\u201d and \u201cto\u201d is the mean of the first or last twentieth of the logged steps (at least one step), so "
         "that a single lucky step does not make the headline."),
    Term("", "95 % interval", "",
         "Student interval of the mean over seeds. It says how well the mean is known, not how much single runs scatter."),
    Term("", "Entropy law", "",
         "R = b \u2212 a\u00b7exp(H): reward R bought with entropy H (Cui et al. 2025, arXiv 2505.22617). Its value at H = 0 is the "
         "ceiling b \u2212 a. It is an empirical regularity of runs without entropy control, not a theorem."),
    Term("", "R\u00b2 and AIC", "",
         "R\u00b2 is the share of the variation of reward that a law accounts for. Of two laws with equally many parameters the "
         "one with the lower AIC fits better; differences below 2 decide nothing."),
    Term("", "Entropy change of a token", "",
         "The same text is scored again during training: the change is that of the model, not that of the text."),
    Term("", "Predicted entropy change of a token", "",
         "What a small step would do to the entropy of the token's own state if its logit alone moved: "
         "\u2212A\u00b7p\u00b7(1 \u2212 p)\u00b7(log p + H), in advantage \u00d7 nats (Hao et al. 2025, arXiv 2510.10150). Probable means a surprisal below "
         "the entropy H of that state."),
)  # fmt: skip


def title_and_unit(metric: str) -> tuple[str, str]:
    """Plain name and unit of a metric; its own name where the entry stands for many, or there is none."""
    found = next((term for term in TERMS if term.explains(metric)), None)
    if found is None:
        return metric, ""
    return (metric if found.key.endswith("*") else found.name), found.unit


def explain(metrics: Iterable[str]) -> list[Term]:
    """The entries that the given metrics need, in the order of the glossary, and then the concepts."""
    names = list(metrics)
    return [term for term in TERMS if any(term.explains(name) for name in names)] + list(CONCEPTS)
