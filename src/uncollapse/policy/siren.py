"""SIREN, selective entropy regularisation: likely tokens only, peak positions only, back to the entropy of the start.

A plain entropy bonus over a large vocabulary mostly lifts the tail, and over a long answer it lifts positions that ought
to be certain. SIREN takes the entropy of the policy renormalised on its nucleus, averages it over the positions of
each answer where it is highest, and pulls that average by a squared error to what it was at the start of training.

Paper: Jiang, Li, Chen, Liu, Cheng, Shao, "Rethinking Entropy Regularization in Large Reasoning Models", 2025, arXiv
2509.25133. Official code: Linn3a/siren, `verl/workers/actor/dp_actor.py` (both masks, loss),
`verl/trainer/ppo/ray_trainer.py` (anchor), `verl/trainer/ppo/core_algos.py` (aggregation). Not to be confused with
sinusoidal networks of the same name.

Differs from the paper / the official code:
- The square is taken of the mean over the whole optimiser step, as the formula reads. The code squares the mean of each
  micro-batch, which also penalises sampling noise: `scope="microbatch"`, which `siren-released` does not take, so that
  its loss does not depend on the split.
- `nucleus="standard"` keeps the token that crosses p, the usual top-p set. The code drops it ("released"): where
  one token alone reaches p nothing is left, entropy 0 and no gradient. The recipe `siren-released` reads it so, looks at the
  10 000 most probable tokens only and divides the policy loss by the token limit but not by the number of rows, all as the
  code does (but for the square); its additions of 1e-12 inside logarithms are left out.
- The anchor is the mean over the whole first rollout batch, that is, over its rows that the recipe's filters have left, as
  every later mean (with the base `dapo`: rows of live groups alone). The first release took its first micro-batch.
- The peak mask is and-ed with the token mask; the code relies on zeros in padded places. It is applied once; twice, as
  in the code, gives the same.
- The peaks of a row are a weight on its tokens rather than the set `where` of the mean: then rows without a peak count
  as 0, as in the code since December 2025, and value and gradient are exact for them too.
- p = 1 reads the full entropy, `quantile=None` all positions: the paper's ablations. Without anchor: `PeakEntropyBonus`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.measure import statistics
from uncollapse.measure.token_stats import token_stats_from_logits
from uncollapse.policy.baselines import dr_grpo
from uncollapse.policy.batch import Batch, Columns, Stat, TokenMap, TokenMask
from uncollapse.policy.config.names import register_stage
from uncollapse.policy.protocols import Metrics, Needs, Scope
from uncollapse.policy.reach import UpperTarget
from uncollapse.policy.recipe import Weighted, register
from uncollapse.policy.reduction import Mean, Sum
from uncollapse.policy.stages.surrogates import PPOClip
from uncollapse.policy.stats import Entropy, NucleusEntropy

__all__ = [
    "EntropyAnchor",
    "LagrangianEntropy",
    "PeakEntropyBonus",
    "Siren",
    "nucleus_entropy",
    "peak_entropy_mask",
    "peak_entropy_mean",
    "siren_regularizer",
]

Nucleus = Literal["standard", "released"]


def nucleus_entropy(
    logits: Float[Tensor, "*position vocab"],
    p: float = 0.8,
    mode: Nucleus = "standard",
    top_k: int | None = None,
    chunk: int | None = None,
    *,
    mask: Bool[Tensor, "*position"] | None = None,
) -> Float[Tensor, "*position"]:
    """Entropy of softmax(logits) renormalised on its nucleus S: -sum_{v in S} q_v log q_v, q = pi / pi(S); in nats.

    0 <= H^p <= min(H + log pi(S), log |S|). The gradient with respect to the logits is -q_v (log q_v + H^p) in S and exactly
    0 outside; S itself is a constant. Divide the logits by the temperature before.

    Args:
        logits: any floating dtype; -inf excludes a token.
        p: mass of the nucleus, in (0, 1]; 1 keeps all tokens. Default 0.8, the official configuration.
        mode: "standard": the smallest set of most probable tokens with mass at least p. "released": only tokens whose
            cumulative mass stays below p; possibly none, with entropy 0.
        top_k: look at so many of the most probable tokens only (released code: 10 000); None at all.
        chunk: elements of logits worked on at once; None takes a size that suits the device.
        mask: True where a position counts; elsewhere the result is 0 and NaN does no harm.

    Raises `ConfigError` for p, mode, top_k or chunk out of range. Cost: a few passes over the logits in blocks of rows;
    nothing of their size is kept, the backward pass allocates their gradient.

    Source: arXiv 2509.25133, top-p mask; official `dp_actor.py`.
    """
    stat = statistics.NucleusEntropy(p, mode, top_k)
    token = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return token_stats_from_logits(logits, token, mask=mask, stats=(stat,), chunk=chunk)[stat]


@torch.no_grad()
def peak_entropy_mask(
    entropy: Float[Tensor, "row time"], mask: Bool[Tensor, "row time"], quantile: float | None = 0.8
) -> Bool[Tensor, "row time"]:
    """Valid positions whose entropy is above the `quantile` of their own row; None keeps every valid position.

    Strictly above: with n different values the n - 1 - floor(quantile (n - 1)) largest, none if all are equal. The
    set depends on the order of the values only. Default 0.8: about the top fifth (official `mask_ratio`). Raises
    `ConfigError` for a quantile outside [0, 1]. Cost: one sort per row.

    The quantile with linear interpolation lies in [a_k, a_k+1), k = floor(quantile (n - 1)), a sorted ascending, so
    being above it is being above a_k: no interpolation, hence no rounding, and no limit of size.

    Source: arXiv 2509.25133, equation 9.
    """
    if quantile is None:
        return mask
    if not 0 <= quantile <= 1:
        raise ConfigError(f"peak mask: quantile is {quantile:g}; give a share in [0, 1], or None for no mask")
    if not mask.numel():
        return mask
    ascending = torch.where(mask, entropy, torch.inf).sort(dim=1).values
    place = (quantile * (mask.sum(1) - 1).clamp(min=0).double()).long()
    return mask & (entropy > ascending.gather(1, place[:, None]))


def peak_entropy_mean(
    entropy: Float[Tensor, "row time"], peaks: Bool[Tensor, "row time"], mask: Bool[Tensor, "row time"]
) -> Float[Tensor, ""]:
    """Mean over rows of the mean entropy at their peaks, in nats; differentiable in `entropy`.

    Every row with a valid position counts; one without a peak as 0. 0 if no row counts.

    Source: arXiv 2509.25133; official aggregation "seq-mean-token-mean", with the correction of December 2025.
    """
    return _row_means(entropy, peaks).sum() / mask.any(1).sum().clamp(min=1)


def _row_means(entropy: Tensor, peaks: Tensor) -> Float[Tensor, " row"]:
    return torch.where(peaks, entropy, 0.0).sum(1) / peaks.sum(1).clamp(min=1)


@dataclass
class EntropyAnchor:
    """The first value that it is shown, kept for good: `value` (nats) and the `step` (rollout batches) it is of."""

    value: float | None = None
    step: int | None = None

    def observe(self, entropy: Float[Tensor, ""], step: int) -> None:
        """Keep the value unless there is one."""
        if self.value is None:
            self.value, self.step = float(entropy.detach()), step

    def target(self, entropy: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The anchor; as long as there is none, what it would be made from, without gradient."""
        return entropy.detach() if self.value is None else entropy.new_tensor(self.value)

    def state_dict(self) -> dict[str, Any]:
        """Value and step."""
        return {"value": self.value, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore value and step."""
        self.value, self.step = state["value"], state["step"]


def siren_regularizer(
    logits: Float[Tensor, "row time vocab"],
    mask: Bool[Tensor, "row time"],
    anchor: EntropyAnchor,
    p: float = 0.8,
    quantile: float | None = 0.8,
    beta: float = 0.005,
    *,
    mode: Nucleus = "standard",
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """beta (Hbar - H_anchor)^2, to be added to a policy loss, and its metrics.

    Hbar is `peak_entropy_mean` of `nucleus_entropy` over all rows given, so give those of one optimiser step. `anchor` is read,
    not written: show it `siren/peak_entropy/mean` of the first rollout batch (`anchor.observe`). Until then the loss and
    its gradient are 0. Logits as in `nucleus_entropy`; what they hold outside `mask` never matters.

    Source: arXiv 2509.25133; beta from the official script.
    """
    entropy = nucleus_entropy(logits, p, mode, mask=mask)
    peaks = peak_entropy_mask(entropy.detach(), mask, quantile)
    mean = peak_entropy_mean(entropy, peaks, mask)
    gap = mean - anchor.target(mean)
    return beta * gap**2, {
        "siren/peak_entropy/mean": mean.detach(),
        "siren/anchor/value": anchor.target(mean),
        "siren/gap/mean": gap.detach(),
        "siren/peaks/frac": peaks.sum() / mask.sum().clamp(min=1),
    }


# ---- stages --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PeakEntropy:
    """Nucleus entropy at the peaks of each row: what the stages of this module share."""

    p: float = 0.8
    quantile: float | None = 0.8
    nucleus: Nucleus = "standard"
    peak_on: Literal["nucleus", "full"] = "nucleus"
    top_k: int | None = None
    mean: ClassVar[Mean] = Mean(("row",), rows="all")

    def __post_init__(self) -> None:
        statistics.NucleusEntropy(self.p, self.nucleus, self.top_k)  # refuses what it cannot measure
        if self.quantile is not None and not 0 <= self.quantile <= 1:
            raise ConfigError(f"quantile is {self.quantile:g}; give a share in [0, 1], or null for no mask")
        if self.peak_on not in ("nucleus", "full"):
            raise ConfigError(f"peak_on is {self.peak_on!r}; give 'nucleus' or 'full'")

    @property
    def entropy(self) -> Stat:
        """What is averaged. p = 1 is the full entropy, which costs no search for a nucleus."""
        if self.p == 1 and self.top_k is None:
            return Entropy("now")
        return NucleusEntropy("now", p=self.p, nucleus=self.nucleus, top_k=self.top_k)

    @property
    def ranked(self) -> Stat:
        """What decides where the peaks are."""
        return self.entropy if self.peak_on == "nucleus" else Entropy("now")

    @property
    def needs(self) -> Needs:
        """Both entropies, now."""
        return frozenset({self.entropy, self.ranked})

    def peaks(self, batch: Batch) -> TokenMask:
        """Positions that count; row-local, so the same in any split."""
        return peak_entropy_mask(batch.stats[self.ranked].detach(), batch.mask, self.quantile)

    def aggregate(self, batch: Batch) -> Float[Tensor, ""]:
        """Mean peak entropy of the rows."""
        return peak_entropy_mean(batch.stats[self.entropy].detach(), self.peaks(batch), batch.mask)

    def spread(self, batch: Batch) -> TokenMap:
        """The entropy at the peaks, 0 elsewhere, scaled so that the mean over a row's tokens is that over its peaks."""
        peaks = self.peaks(batch)
        scale = batch.mask.sum(1, keepdim=True) / peaks.sum(1, keepdim=True).clamp(min=1)
        return torch.where(peaks, batch.stats[self.entropy] * scale, 0.0)

    def report(self, batch: Batch, area: str) -> Metrics:
        """Mean peak entropy, share of tokens that are peaks, share of rows without one."""
        peaks, rows = self.peaks(batch), batch.mask.any(1)
        entropy, count = batch.stats[self.entropy].detach(), rows.double().sum()
        return {
            f"{area}/peak_entropy/mean": (_row_means(entropy, peaks).double().sum(), count),
            f"{area}/peaks/frac": (peaks.double().sum(), batch.mask.double().sum()),
            f"{area}/empty_rows/frac": ((rows & ~peaks.any(1)).double().sum(), count),
        }


def _over_rows(value: Float[Tensor, "row 1"], batch: Batch) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    rows = batch.mask.any(1).double()
    return (value[:, 0] * rows).sum(), rows.sum()


@dataclass(frozen=True)
class PeakEntropyBonus(_PeakEntropy):
    """`-Hbar`, a bonus on the mean peak entropy: SIREN without its anchor. Options as in `Siren`."""

    scope: None = None

    def decide(self, batch: Batch) -> Columns:
        """Nothing."""
        return {}

    def __call__(self, batch: Batch, own: Columns) -> TokenMap:
        """Unreduced loss (nats)."""
        return -self.spread(batch)

    def metrics(self, batch: Batch, own: Columns) -> Metrics:
        """Where the bonus acts."""
        return self.report(batch, "peak_bonus")


@dataclass(frozen=True)
class Siren(_PeakEntropy):
    """`(Hbar - H_anchor)^2`: the mean peak entropy is pulled to what it was on the first rollout batch, after its filters.

    Options: `p` in (0, 1], mass of the nucleus; `nucleus` and `top_k` as in `nucleus_entropy`; `quantile` in [0, 1] of a
    row's entropies above which a position is a peak, None for all positions; `peak_on`: rank by nucleus or full
    entropy; `target` (nats) instead of the first batch's value, for a run that continues from elsewhere. A `target` that the
    policy never had and does not approach within `patience` rollouts is given up as `UpperTarget` says: SIREN warns, holds
    the highest level seen, and pushes no further; 0 never gives up. One above ln(tokens) is refused, where
    `top_k` or the engine tells how many there are. The first batch's value was reached by definition and is never given up.

    The square of a batch mean is no sum over tokens, so it is linearised around the mean that `decide` finds:
    2 gap (h - sg(h)) + gap^2 has exactly its value and gradient. `scope="microbatch"` finds the mean per micro-batch, as the
    released code does. `rollout` is refused: from the old policy's mean the regulariser could not see itself act.
    """

    target: float | None = None
    scope: Scope = "minibatch"
    patience: int = 50
    memory: EntropyAnchor = field(default_factory=EntropyAnchor, init=False, compare=False, repr=False)
    reach: UpperTarget = field(default_factory=UpperTarget, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in ("minibatch", "microbatch"):
            raise ConfigError(
                f"siren: scope {self.scope!r} would hold the mean of the old policy fixed while the current one moves; "
                "give 'minibatch', or 'microbatch' for parity with the released code"
            )
        if self.target is not None and not 0 <= self.target < float("inf"):
            raise ConfigError(f"siren: target is {self.target:g}; give an entropy in nats, at least 0")
        if self.patience < 0 or self.patience == 1:
            raise ConfigError(
                f"siren: patience is {self.patience}; give 0 (never give a target up) or at least 2"
            )
        self.reach.patience = self.patience
        if self.top_k is not None:
            self.check_vocabulary(self.top_k)

    def check_vocabulary(self, size: int) -> None:
        """Refuse a target that no distribution over `size` tokens has."""
        if self.target is not None and self.target > math.log(size):
            raise ConfigError(
                f"siren: target is {self.target:g} nats, but the entropy over {size} tokens is at most "
                f"{math.log(size):.4g}; choose a lower target"
            )

    @property
    def needs(self) -> Needs:
        """Both entropies, now, and as they were before the step, for the anchor."""
        now = super().needs
        return now | {stat.by("old") for stat in now if isinstance(stat, Stat)}

    def decide_rollout(self, batch: Batch) -> Columns:
        """The anchor, from the whole of the filtered first rollout batch or from memory; above it up to `ceiling` nothing is pulled."""
        mean = self.aggregate(batch)
        if self.target is None:
            anchor = self.memory.target(mean)
            return {"anchor": anchor, "ceiling": anchor}
        low, high = self.reach.band(self.target)
        return {"anchor": mean.new_tensor(low), "ceiling": mean.new_tensor(high)}

    def decide(self, batch: Batch) -> Columns:
        """The mean that the square is linearised around."""
        return {"mean": self.aggregate(batch)}

    def __call__(self, batch: Batch, own: Columns) -> TokenMap:
        """Unreduced loss (nats squared)."""
        gap, entropy = self._gap(own), self.spread(batch)
        return 2 * gap * (entropy - entropy.detach()) + gap**2

    def _gap(self, own: Columns) -> Float[Tensor, "row 1"]:
        """How far the step's mean is from the anchor, or from the band above it while a target is given up."""
        gap: Tensor = own["mean"] - own["mean"].clamp(own["anchor"], own["ceiling"])
        return gap

    def metrics(self, batch: Batch, own: Columns) -> Metrics:
        """Where it acts, the anchor, how far the step's mean is from it, and whether a target is given up."""
        given_up = (own["ceiling"] > own["anchor"]).to(own["anchor"].dtype)
        return {
            **self.report(batch, "siren"),
            "siren/anchor/value": _over_rows(own["anchor"], batch),
            "siren/gap/mean": _over_rows(self._gap(own), batch),
            "siren/saturated/frac": _over_rows(given_up, batch),
        }

    def observe(self, batch: Batch) -> None:
        """Keep the anchor if this is the first batch that has a token; watch whether a target comes nearer."""
        if not bool(batch.mask.any()):
            return
        mean = self.aggregate(batch)
        if self.target is None:
            self.memory.observe(mean, batch.clock.step)
        else:
            self.reach.observe(float(mean), self.target)

    def state_dict(self) -> dict[str, Any]:
        """The anchor, and what is known of the target's reach."""
        return {**self.memory.state_dict(), "reach": self.reach.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore both."""
        self.memory.load_state_dict(state)
        self.reach.load_state_dict(state["reach"])


@dataclass
class LagrangianEntropy:
    """An entropy bonus over all tokens whose coefficient is the multiplier of H >= H_anchor, by dual ascent.

    After each rollout batch c <- min(max(0, c + rate (H_anchor - H)), limit), with H (nats per token) of the old policy and
    H_anchor of the first batch: the baseline that SAC's automatic temperature (arXiv 1812.05905) becomes in the SIREN
    paper's comparison. `rate` and `limit` (coefficients per nat, and coefficient) are ours; the limit keeps it from growing for
    ever, and a warning says, once, when it is reached with the entropy still below the anchor.
    """

    rate: float = 0.005
    start: float = 0.0
    limit: float = 1.0
    scope: Scope = "rollout"
    needs: Needs = frozenset({Entropy("now"), Entropy("old")})
    coefficient: float | None = field(default=None, init=False, compare=False, repr=False)
    memory: EntropyAnchor = field(default_factory=EntropyAnchor, init=False, compare=False, repr=False)
    warned: bool = field(default=False, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.rate <= 0 or not 0 <= self.start <= self.limit or self.scope != "rollout":
            raise ConfigError(
                f"lagrangian-entropy: needs rate > 0, 0 <= start <= limit, scope rollout; got {self}"
            )

    def _current(self) -> float:
        return self.start if self.coefficient is None else self.coefficient

    def decide(self, batch: Batch) -> Columns:
        """The coefficient of this step."""
        return {"coefficient": batch.stats[Entropy("old")].new_tensor(self._current())}

    def __call__(self, batch: Batch, own: Columns) -> TokenMap:
        """Unreduced loss (nats times coefficient)."""
        return -own["coefficient"] * batch.stats[Entropy("now")]

    def metrics(self, batch: Batch, own: Columns) -> Metrics:
        """The coefficient."""
        return {"lagrangian/coefficient/value": _over_rows(own["coefficient"], batch)}

    def observe(self, batch: Batch) -> None:
        """One step of dual ascent."""
        if bool(batch.mask.any()):
            entropy = batch.stats[Entropy("old")][batch.mask].mean()
            self.memory.observe(entropy, batch.clock.step)
            gap = float(self.memory.target(entropy) - entropy)
            self.coefficient = min(max(self._current() + self.rate * gap, 0.0), self.limit)
            if gap > 0 and self.coefficient == self.limit:
                self._say_that_it_is_at_its_limit(gap)

    def _say_that_it_is_at_its_limit(self, gap: float) -> None:
        if self.warned:
            return
        self.warned = True
        warnings.warn(
            f"lagrangian-entropy: the coefficient is at its limit of {self.limit:g} and entropy still {gap:.3g} nats below "
            f"the anchor of {self.memory.value:.3g}; it pushes no harder from here. Raise the limit, or accept the level",
            stacklevel=3,
        )

    def state_dict(self) -> dict[str, Any]:
        """Coefficient, anchor, and whether the limit was told of."""
        return {"coefficient": self.coefficient, "warned": self.warned, **self.memory.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore all of that."""
        self.coefficient, self.warned = state["coefficient"], state["warned"]
        self.memory.load_state_dict(state)


# ---- recipes -------------------------------------------------------------------------------------------------

siren = register(
    replace(
        dr_grpo,
        name="siren",
        paper="2509.25133",
        summary="Pulls the entropy of likely tokens at peak positions back to what it was at the start.",
        surrogate=PPOClip(low=0.2, high=0.2, dual=3.0),
        regularizers=(Weighted(Siren(), coef=0.005, mean=Siren.mean),),
    )
)
"""The script's clip_ratio of 0.28 never takes effect: the configuration's 0.2 on both sides wins."""

siren_released = register(
    replace(
        siren,
        name="siren-released",
        summary="SIREN as its code but for the square, of the whole step: no token that crosses p, sum over rows.",
        mean=Sum(per_row=False),
        regularizers=(Weighted(Siren(nucleus="released", top_k=10_000), coef=0.005, mean=Siren.mean),),
    )
)
"""The code also squares the mean per micro-batch, which depends on the split: add `scope="microbatch"` for that."""

register_stage("regularizers", "siren", Siren)
register_stage("regularizers", "peak-entropy-bonus", PeakEntropyBonus)
register_stage("regularizers", "lagrangian-entropy", LagrangianEntropy)
