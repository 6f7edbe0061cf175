"""Lp-Reg in a recipe: the statistics it reads, the surrogate, and the tracker of sparks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.measure import min_p
from uncollapse.measure.min_p import check_threshold, min_p_proxy, passes_min_p
from uncollapse.policy.batch import Batch, Columns, Stat, TokenMap, TokenMask
from uncollapse.policy.lp_reg.loss import KNEE, capped_surrogate, lowest, proxy_kl, sampled_kl
from uncollapse.policy.protocols import Metrics, Needs, Scope
from uncollapse.policy.stages.surrogates import log_ratio, ratio_of
from uncollapse.policy.stats import Entropy, LogKeptMass, Logp, MaxLogp, Measured

# ---- statistics --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogMassAbove(Measured):
    """log of the mass of the tokens that pass a fixed threshold, p_v > tau."""

    tau: float = 0.02
    keep_equal: bool = False

    @property
    def statistic(self) -> min_p.LogMassAbove:
        """The instrument."""
        return min_p.LogMassAbove(self.tau, self.keep_equal)


@dataclass(frozen=True)
class ProxyKL(Stat):
    """KL(q || pi) over the whole vocabulary, q the min-p proxy of the policy named by `against`, without gradient."""

    kappa: float | None = 0.02
    tau: float | None = None
    keep_equal: bool = False

    def of(
        self,
        logits: Float[Tensor, "n vocab"],
        token: Int[Tensor, " n"],
        other: Float[Tensor, "n vocab"] | None = None,
    ) -> Float[Tensor, " n"]:
        """The divergence; needs `other`."""
        if other is None:
            raise ValueError("an exact divergence needs the other policy's logits")
        log_q, _, _ = min_p_proxy(other.detach(), kappa=self.kappa, tau=self.tau, keep_equal=self.keep_equal)
        return proxy_kl(logits, log_q)


# ---- stages and recipes ------------------------------------------------------------------------------------------

_READS: Needs = frozenset({"old_logp", "advantage", Logp("now")})


@dataclass(frozen=True)
class LpReg:
    """The capped surrogate with the pull towards the proxy at the selected tokens.

    Selection: the fraction `rho` of the `pool` with the lowest log-probability, of the old policy (`scope="rollout"`,
    free) or the current one (`minibatch`, exact; `microbatch`, depends on the split); `at_least` and `skip_below` as in
    `lowest`. Noise: `kappa` (share of the largest probability) or a fixed `tau`, then with `kappa=None`; `keep_equal` keeps
    the threshold itself. `rho_positive`: regularise tokens with A > 0 as well (ablation).

    Loss: `beta` per nat, ratios capped at `upper`, those with A < 0 if `cap_negative`; `kl`, `only_below` and
    `official_clamp` as in `lp_reg_loss`. With `beta=0`, or both fractions 0, it is the bare capped surrogate and costs nothing
    more; else two numbers per token of the old policy, measured in the pass that gives the old log-probabilities.
    Defaults: the paper's for Qwen3-14B (32B: rho 0.005).
    """

    rho: float = 0.01
    kappa: float | None = 0.02
    tau: float | None = None
    beta: float = 1.0
    upper: float = 10.0
    kl: Literal["sampled", "full"] = "sampled"
    pool: Literal["all", "negative"] = "all"
    scope: Scope = "rollout"
    keep_equal: bool = False
    cap_negative: bool = True
    only_below: bool = False
    official_clamp: bool = False
    at_least: int = 0
    skip_below: int = 0
    rho_positive: float = 0.0

    def __post_init__(self) -> None:
        check_threshold("lp-reg", self.kappa, self.tau)
        if self.kappa == 1:
            raise ConfigError("lp-reg: kappa=1 keeps the most probable token alone; give less than 1")
        if not 0 <= self.rho <= 1 or not 0 <= self.rho_positive <= 1:
            raise ConfigError(
                f"lp-reg: rho and rho_positive are shares from 0 to 1, 1 % is 0.01; got {self.rho}, {self.rho_positive}"
            )
        if self.beta < 0 or self.upper <= 1 or self.at_least < 0 or self.skip_below < 0:
            raise ConfigError(f"lp-reg: needs beta >= 0, upper > 1, at_least and skip_below >= 0; got {self}")
        if self.kl not in ("sampled", "full") or self.pool not in ("all", "negative"):
            raise ConfigError(
                f"lp-reg: kl is sampled or full, pool is all or negative; got {self.kl!r}, {self.pool!r}"
            )
        if self.kl == "full" and (self.only_below or self.official_clamp):
            raise ConfigError("lp-reg: only_below and official_clamp belong to kl: sampled; leave them out")

    @property
    def active(self) -> bool:
        """Whether anything is regularised at all."""
        return self.beta > 0 and max(self.rho, self.rho_positive, self.at_least) > 0

    @property
    def _kept_mass(self) -> Measured:
        if self.kappa is not None:
            return LogKeptMass("old", kappa=self.kappa, keep_equal=self.keep_equal)
        assert self.tau is not None
        return LogMassAbove("old", tau=self.tau, keep_equal=self.keep_equal)

    @property
    def _divergence(self) -> ProxyKL:
        return ProxyKL("now", "old", self.kappa, self.tau, self.keep_equal)

    @property
    def needs(self) -> Needs:
        """Of the old policy the sampled, the largest and the kept probability; for `full` the divergence itself."""
        if not self.active:
            return _READS
        full: Needs = frozenset({self._divergence}) if self.kl == "full" else frozenset()
        return _READS | {Logp("old"), MaxLogp("old"), self._kept_mass} | full

    def _log_q(self, batch: Batch) -> TokenMap:
        """log q of the sampled tokens, -inf at noise."""
        logp = batch.stats[Logp("old")]
        kept = passes_min_p(
            logp, batch.stats[MaxLogp("old")], kappa=self.kappa, tau=self.tau, keep_equal=self.keep_equal
        )
        return torch.where(kept, logp - batch.stats[self._kept_mass], -math.inf)

    def decide(self, batch: Batch) -> Columns:
        """`low` (under the quantile), `selected`, and `quantile`, the largest low log-probability."""
        if not self.active:
            return {}
        logp, log_q = batch.stats[Logp("now")], self._log_q(batch)
        uniform = batch.clock.uniform(batch.uid, batch.mask.shape[1], "lp-reg")
        negative, positive = (batch.mask & (sign * batch.advantage > 0) for sign in (-1, 1))

        def low_of(pool: TokenMask, rho: float, least: int) -> TokenMask:
            pool = batch.mask if self.pool == "all" else pool
            return lowest(logp, pool, rho, at_least=least, skip_below=self.skip_below, uniform=uniform)

        low = low_of(negative, self.rho, self.at_least)
        selected = low & negative
        if self.rho_positive:
            selected = selected | (low_of(positive, self.rho_positive, 0) & positive)
        quantile = torch.where(low, logp, -math.inf).flatten()
        return {
            "low": low,
            "selected": selected & (log_q > -math.inf),
            "quantile": quantile.max() if len(quantile) else quantile.new_tensor(-math.inf),
        }

    def _regularised(self, batch: Batch, own: Columns) -> TokenMask:
        """The selected tokens that the gate, if there is one, lets through."""
        selected: Tensor = own["selected"]
        if not self.only_below:
            return selected
        return selected & (batch.stats[Logp("now")].detach() < self._log_q(batch))

    def _gap(self, batch: Batch, where: TokenMask) -> TokenMap:
        """log q - log pi of the sampled token, 0 outside `where`."""
        return torch.where(where, self._log_q(batch) - batch.stats[Logp("now")], 0.0)

    def _kl(self, batch: Batch, where: TokenMask) -> TokenMap:
        if self.kl == "full":
            return torch.where(where, batch.stats[self._divergence], 0.0)
        return sampled_kl(self._gap(batch, where), official_clamp=self.official_clamp)

    def __call__(self, batch: Batch, own: Columns) -> TokenMap:
        """Unreduced loss."""
        loss = capped_surrogate(log_ratio(batch), batch.advantage, self.upper, cap_negative=self.cap_negative)
        if not self.active:
            return loss
        regularised = self._regularised(batch, own)
        return torch.where(regularised, loss + self.beta * self._kl(batch, regularised), loss)

    def clipped(self, batch: Batch, own: Columns) -> TokenMask:
        """Tokens that the cap has silenced and nothing pulls at."""
        silenced = log_ratio(batch) > math.log(self.upper)
        if not self.cap_negative:
            silenced = silenced & (batch.advantage > 0)
        return silenced & ~own["selected"] if self.active else silenced

    def metrics(self, batch: Batch, own: Columns) -> Metrics:
        """What was selected and filtered, and how hard it is pulled."""
        if not self.active:
            return {}
        mask, low = batch.mask, own["low"]
        regularised, noise = self._regularised(batch, own), torch.isneginf(self._log_q(batch))
        ratio = ratio_of(batch)

        def mean(values: Tensor, where: TokenMask) -> tuple[Tensor, Tensor]:
            return values.double()[where].sum(), where.double().sum()

        found = {
            "lp_reg/selected/frac": mean(regularised, mask),
            "lp_reg/filtered/frac": mean(noise, mask),
            "lp_reg/low/kept_frac": mean(~noise, low),
            "lp_reg/low/quantile": mean(own["quantile"].exp().expand_as(mask), mask),
            "lp_reg/kept_mass/mean": mean(batch.stats[self._kept_mass].exp(), mask),
            "lp_reg/kl/mean": mean(self._kl(batch, regularised), regularised),
        }
        if self.kl == "sampled":
            pull = self.beta * self._pull(self._gap(batch, regularised))
            found["lp_reg/force/ratio"] = mean(pull / (batch.advantage.abs() * ratio), regularised)
        return found

    def _pull(self, gap: TokenMap) -> TokenMap:
        """q/pi - 1: how hard k3 lifts log pi of the sampled token."""
        if self.official_clamp:
            return torch.where(gap < KNEE, gap.expm1(), 0.0)
        return gap.clamp(max=KNEE).expm1()


@dataclass(frozen=True)
class SparkTracker:
    """Follows tokens of your choice through training, in any recipe: writes nothing, only reports.

    For each token id of `tokens` ("wait", "perhaps"): the mean probability with which it was sampled, the entropy there,
    and its share of all tokens; by the old policy. Source: the paper's statistics of reasoning sparks.
    """

    tokens: tuple[int, ...] = ()
    scope: Scope = "rollout"
    needs: Needs = frozenset({"ids", Logp("old"), Entropy("old")})
    gives: frozenset[str] = frozenset()

    def __call__(self, batch: Batch) -> Columns:
        """Nothing."""
        return {}

    def metrics(self, batch: Batch, own: Columns) -> Metrics:
        """Probability, entropy (nats) and share of each token."""
        p, entropy = batch.stats[Logp("old")].double().exp(), batch.stats[Entropy("old")].double()
        tokens = batch.mask.double().sum()
        found = {}
        for token in self.tokens:
            here = batch.mask & (batch.ids == token)
            count = here.double().sum()
            found[f"spark/{token}/prob"] = (p[here].sum(), count)
            found[f"spark/{token}/entropy"] = (entropy[here].sum(), count)
            found[f"spark/{token}/frac"] = (count, tokens)
        return found
