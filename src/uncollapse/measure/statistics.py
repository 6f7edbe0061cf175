"""Statistics of one next-token distribution: a number per position, with its exact gradient.

A statistic is a frozen dataclass: hashable, so a set of them says what a method needs, and the key under
which `uncollapse.measure.token_stats` returns its values. All are in nats (masses: probability in [0, 1]) and
all refer to the distribution after division of the logits by the temperature.

Differs from the literature: memberships (nucleus, top k, kept set, argmax) are constants for the gradient;
at a tie the gradient is that of the member that `torch.sort` or `torch.argmax` names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.errors import ConfigError

FLOOR = -1e4  # exp(FLOOR) is 0 in every float type, while its square stays finite: no 0 * inf
FRONT = 128  # tokens that are looked at first for a nucleus; it rarely has more, and a sort takes twenty times as long


class Rows:
    """Log-probabilities of n positions, with what several statistics share computed at most once."""

    def __init__(self, logp: Float[Tensor, "row vocab"], token: Int[Tensor, " row"]) -> None:
        self.logp, self.token = logp, token

    @cached_property
    def finite(self) -> Float[Tensor, "row vocab"]:
        """Log-probabilities with -inf replaced by a number whose exponential is still exactly 0."""
        return self.logp.clamp(min=FLOOR)

    @cached_property
    def p(self) -> Float[Tensor, "row vocab"]:
        """Probabilities."""
        return self.logp.exp()

    @cached_property
    def entropy(self) -> Float[Tensor, " row"]:
        """Shannon entropy in nats."""
        return row_dot(self.p, self.finite).neg_().clamp_(min=0)

    @cached_property
    def sampled(self) -> Float[Tensor, " row"]:
        """Log-probability of the sampled token."""
        return pick(self.logp, self.token)


def pick(table: Float[Tensor, "row vocab"], token: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """Take one entry of each row."""
    return table.gather(-1, token.unsqueeze(-1)).squeeze(-1)


def row_dot(left: Float[Tensor, "row vocab"], right: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
    """Sum the products along each row, in one pass."""
    out: Tensor = torch.linalg.vecdot(left, right)
    return out


def _add_at(table: Tensor, token: Tensor, amount: float) -> Tensor:
    """Add a constant to one entry of each row, in place."""
    return table.scatter_add_(-1, token.unsqueeze(-1), table.new_full((len(token), 1), amount))


@dataclass(frozen=True)
class Statistic:
    """A number per position from its next-token distribution and its sampled token."""

    def value(self, rows: Rows) -> Float[Tensor, " row"]:
        """The statistic of every row."""
        raise NotImplementedError

    def gradient(self, rows: Rows) -> Float[Tensor, "row vocab"]:
        """Derivative of each row's value with respect to its logits (after temperature); a new tensor."""
        raise NotImplementedError


@dataclass(frozen=True)
class Logp(Statistic):
    """Log-probability of the sampled token, log p_token (<= 0, nats)."""

    def value(self, rows: Rows) -> Float[Tensor, " row"]:
        """log p_token."""
        return rows.sampled

    def gradient(self, rows: Rows) -> Float[Tensor, "row vocab"]:
        """1[v = token] - p_v."""
        return _add_at(-rows.p, rows.token, 1.0)


@dataclass(frozen=True)
class Entropy(Statistic):
    """Shannon entropy H = -sum_v p_v log p_v, in nats, 0 <= H <= log V."""

    def value(self, rows: Rows) -> Float[Tensor, " row"]:
        """H."""
        return rows.entropy

    def gradient(self, rows: Rows) -> Float[Tensor, "row vocab"]:
        """-p_v (log p_v + H)."""
        return (rows.finite + rows.entropy.unsqueeze(-1)).mul_(rows.p).neg_()


@dataclass(frozen=True)
class Collision(Statistic):
    """Collision term S2 = sum_v p_v^2 (log p_v + H), in nats.

    The share of the exact first-order entropy change that does not depend on the sampled token.
    """

    def value(self, rows: Rows) -> Float[Tensor, " row"]:
        """S2."""
        return row_dot(rows.p.square(), rows.finite + rows.entropy.unsqueeze(-1))

    def gradient(self, rows: Rows) -> Float[Tensor, "row vocab"]:
        """p_v [2 p_v (log p_v + H) + p_v - 2 S2 - c - c (log p_v + H)] with c = sum p^2."""
        p, excess = rows.p, rows.finite + rows.entropy.unsqueeze(-1)
        collision = row_dot(p, p).unsqueeze(-1)
        total = row_dot(p.square(), excess).unsqueeze(-1)
        return p * ((2 * p - collision) * excess + p - 2 * total - collision)


@dataclass(frozen=True)
class Varentropy(Statistic):
    """Variance of the surprisal, sum_v p_v (log p_v + H)^2, in nats squared, >= 0."""

    def value(self, rows: Rows) -> Float[Tensor, " row"]:
        """Variance of -log p."""
        return row_dot(rows.p, (rows.finite + rows.entropy.unsqueeze(-1)).square_())

    def gradient(self, rows: Rows) -> Float[Tensor, "row vocab"]:
        """p_v [(log p_v + H)^2 + 2 (log p_v + H) - varentropy]."""
        excess = rows.finite + rows.entropy.unsqueeze(-1)
        return (excess.square() + 2 * excess - self.value(rows).unsqueeze(-1)).mul_(rows.p)


@dataclass(frozen=True)
class MaxLogp(Statistic):
    """Log-probability of the most probable token, max_v log p_v (nats)."""

    def value(self, rows: Rows) -> Float[Tensor, " row"]:
        """max log p."""
        return rows.logp.amax(-1)

    def gradient(self, rows: Rows) -> Float[Tensor, "row vocab"]:
        """1[v = argmax] - p_v; at a tie, that of the one `torch.argmax` names."""
        return _add_at(-rows.p, rows.logp.argmax(-1), 1.0)


@dataclass(frozen=True)
class TemperedLogp(Statistic):
    """Log-probability of the sampled token under p^(1/tau) normalised, tau = `temperature` > 0.

    Relative to the distribution measured: with base temperature 1 it is the log-probability at temperature tau.
    """

    temperature: float

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"TemperedLogp: temperature is {self.temperature}; give a number above 0")

    def _rows(self, rows: Rows) -> Tensor:
        return (rows.logp / self.temperature).log_softmax(-1)

    def value(self, rows: Rows) -> Float[Tensor, " row"]:
        """log p_token at the other temperature."""
        return pick(self._rows(rows), rows.token)

    def gradient(self, rows: Rows) -> Float[Tensor, "row vocab"]:
        """(1[v = token] - p_v at tau) / tau."""
        return _add_at(self._rows(rows).exp_().neg_(), rows.token, 1.0).div_(self.temperature)


class _SetStatistic(Statistic):
    """A statistic of a set of tokens that is constant for the gradient."""

    def members(self, rows: Rows) -> Bool[Tensor, "row vocab"]:
        raise NotImplementedError

    def mass(self, rows: Rows) -> Tensor:
        return torch.where(self.members(rows), rows.p, 0).sum(-1).clamp_(max=1)

    def _mass_gradient(self, rows: Rows) -> Tensor:
        inside = self.members(rows).to(rows.p.dtype)
        return inside.sub_(self.mass(rows).unsqueeze(-1)).mul_(rows.p)


def _check_share(owner: str, name: str, share: float) -> None:
    if not 0 < share <= 1:
        raise ConfigError(f"{owner}: {name} is {share}; give a number above 0 and at most 1")


@dataclass(frozen=True)
class Front:
    """The most probable tokens of some rows, largest first."""

    where: Int[Tensor, " some"]
    """Number of each row."""
    values: Float[Tensor, "some front"]
    """Probabilities."""
    order: Int[Tensor, "some front"]
    """Token ids."""
    inside: Bool[Tensor, "some front"]
    """Whether the token is in the nucleus."""

    @property
    def shares(self) -> Float[Tensor, "some front"]:
        """Probabilities renormalised on the nucleus, 0 outside; a nucleus of one has exactly 1."""
        kept = torch.where(self.inside, self.values, 0)
        return torch.where(self.inside, kept / kept.sum(-1, keepdim=True), 0)


@dataclass(frozen=True)
class _NucleusStatistic(_SetStatistic):
    p: float
    nucleus: str = "standard"
    top_k: int | None = None

    def __post_init__(self) -> None:
        _check_share(type(self).__name__, "p", self.p)
        if self.nucleus not in ("standard", "released"):
            raise ConfigError(
                f"{type(self).__name__}: nucleus is {self.nucleus!r}; give 'standard' (keeps the token that "
                "crosses p) or 'released' (drops it)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"{type(self).__name__}: top_k is {self.top_k}; give at least 1, or None")

    def fronts(self, rows: Rows) -> Iterator[Front]:
        """The most probable tokens of every row; rows whose nucleus goes on beyond `FRONT` tokens come in fronts of their own.

        Which tokens are in the nucleus is what a stable sort of the whole vocabulary says, ties included.
        """
        vocab = rows.p.shape[-1]
        limit = vocab if self.top_k is None else min(self.top_k, vocab)
        width = min(FRONT if self.p < 1 else limit, limit) + 1  # one more shows whether the last one is tied
        where, p = torch.arange(len(rows.p), device=rows.p.device), rows.p
        while len(where):
            values, order = p.topk(min(width, vocab))
            inside = self._inside(values)
            inside[:, limit:] = False
            cut_off = inside[:, -1] if width <= limit else torch.zeros_like(inside[:, -1])
            done = (~cut_off).nonzero().squeeze(-1)
            front = (
                (values, order, inside) if len(done) == len(p) else (values[done], order[done], inside[done])
            )
            yield self._by_id(Front(where[done], *front), rows)
            left = cut_off.nonzero().squeeze(-1)
            where, p = where[left], p[left]
            width = min(16 * width, limit + 1)

    def _by_id(self, front: Front, rows: Rows) -> Front:
        """Where probabilities on both sides of the edge are equal, the lower id is in."""
        values, inside = front.values, front.inside
        cut = inside[:, :-1] & ~inside[:, 1:] & (values[:, :-1] == values[:, 1:])
        tied = cut.any(-1).nonzero().squeeze(-1)
        if len(tied):
            by_id = rows.p[front.where[tied]].sort(dim=-1, descending=True, stable=True).indices
            front.order[tied] = by_id[:, : front.order.shape[1]]
        return front

    def _inside(self, values: Tensor) -> Tensor:
        possible = values != 0
        if self.p == 1:  # a sum of floats may reach 1 early or never
            return possible
        reached = values.cumsum(-1)
        if self.nucleus == "released":
            return (reached < self.p) & possible
        # the mass in front of a token decides whether it is still needed; the first one always is
        before = torch.cat([torch.zeros_like(reached[:, :1]), reached[:, :-1]], -1)
        return (before < self.p) & possible

    def members(self, rows: Rows) -> Bool[Tensor, "row vocab"]:
        """Which tokens are in the nucleus."""
        out = torch.zeros_like(rows.p, dtype=torch.bool)
        for front in self.fronts(rows):
            out[front.where.unsqueeze(-1), front.order] = front.inside
        return out


@dataclass(frozen=True)
class NucleusMass(_NucleusStatistic):
    """Probability of the nucleus (top-p set).

    `standard`: the smallest set of most probable tokens whose mass reaches p (Holtzman et al. 2020), so
    mass >= p. `released`: the tokens whose cumulative mass stays below p, without the one that crosses; it is
    empty, with mass 0, if the first token alone reaches p (SIREN's released code). p = 1 keeps every possible token in
    both readings. `top_k` looks at so many of the most probable tokens only; None at all.
    """

    def value(self, rows: Rows) -> Float[Tensor, " row"]:
        """Mass of the nucleus."""
        return self.mass(rows)

    def gradient(self, rows: Rows) -> Float[Tensor, "row vocab"]:
        """p_v (1[v in S] - mass)."""
        return self._mass_gradient(rows)


@dataclass(frozen=True)
class NucleusEntropy(_NucleusStatistic):
    """Entropy of the distribution renormalised on its nucleus (SIREN section 3.1), in nats, 0 <= H_p <= H.

    Readings of the nucleus as in `NucleusMass`; an empty nucleus has entropy 0 and no gradient.
    """

    def value(self, rows: Rows) -> Float[Tensor, " row"]:
        """Entropy inside the nucleus."""
        out = torch.empty_like(rows.p[:, 0])
        for front in self.fronts(rows):
            out[front.where] = torch.special.entr(front.shares).sum(-1)
        return out

    def gradient(self, rows: Rows) -> Float[Tensor, "row vocab"]:
        """-q_v (log q_v + H_p) inside, exactly 0 outside."""
        out = torch.zeros_like(rows.p)
        for front in self.fronts(rows):
            q = front.shares
            surprise = torch.special.entr(q)
            slope = surprise.addcmul(q, surprise.sum(-1, keepdim=True), value=-1)
            out[front.where.unsqueeze(-1), front.order] = slope
        return out


@dataclass(frozen=True)
class TopKMass(_SetStatistic):
    """Probability of the k most probable tokens; 1 if k >= V."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"TopKMass: k is {self.k}; give at least 1")

    def members(self, rows: Rows) -> Bool[Tensor, "row vocab"]:
        """Which tokens are among the k most probable."""
        top = rows.logp.topk(min(self.k, rows.logp.shape[-1]), dim=-1).indices
        return torch.zeros_like(rows.logp, dtype=torch.bool).scatter_(-1, top, True)

    def value(self, rows: Rows) -> Float[Tensor, " row"]:
        """Mass of the top k."""
        return self.mass(rows)

    def gradient(self, rows: Rows) -> Float[Tensor, "row vocab"]:
        """p_v (1[v in top k] - mass)."""
        return self._mass_gradient(rows)


@dataclass(frozen=True)
class LogKeptMass(_SetStatistic):
    """Log of the mass of tokens that pass the min-p filter p_v > kappa max p (nats, <= 0; Lp-Reg section 3).

    log q_v = log p_v - LogKeptMass for kept tokens. `keep_equal` keeps p_v = kappa max p as well (released code).
    """

    kappa: float = 0.02
    keep_equal: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.kappa < 1:
            raise ConfigError(f"LogKeptMass: kappa is {self.kappa}; give a number from 0 to below 1")

    def members(self, rows: Rows) -> Bool[Tensor, "row vocab"]:
        """Which tokens are kept."""
        threshold = self.kappa * rows.p.amax(-1, keepdim=True)
        return rows.p >= threshold if self.keep_equal else rows.p > threshold

    def value(self, rows: Rows) -> Float[Tensor, " row"]:
        """log of the kept mass."""
        return self.mass(rows).log()

    def gradient(self, rows: Rows) -> Float[Tensor, "row vocab"]:
        """q_v - p_v with q the distribution renormalised on the kept tokens."""
        return self._mass_gradient(rows).div_(self.mass(rows).unsqueeze(-1))
