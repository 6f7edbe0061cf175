"""Which tokens spent the entropy: the first-order account of a token dump.

For a softmax policy, a step of policy gradient changes the mean entropy by -eta Cov(logp, A) to first order (Cui et al.,
arXiv 2505.22617), a sum over tokens. With the covariance taken over the N trained tokens of a step, token i drives

    d_i = -(A_i - mean A) (logp_i - mean logp) / N,

in advantage x nats, that is, change of entropy per unit of step size eta: negative where it spends entropy. Drives of a
step add up to minus its covariance; drives of several steps are added up as they are.

The account is exact for a tabular policy and one small step. A network shares its parameters between tokens, and
clipping, weights and the optimiser's scaling come on top: read it as shares and ranks, not as a forecast.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

from uncollapse.diagnose.predicted import Answer, predict, tell
from uncollapse.errors import DataError
from uncollapse.token_dump import Tokens, read_dump

FRACTIONS = (2e-4, 2e-3, 0.02, 0.2)
"""Top fractions of the tokens whose share of the covariance is told."""
QUADRANTS = ("probable rewarded", "probable punished", "rare rewarded", "rare punished")
"""By log-probability above or below the step's mean, and by the sign of the advantage."""
POSITIONS = 100_000
"""Places that are told apart; later ones are left out of `Attribution.positions`."""


@dataclass(frozen=True)
class Drive:
    """What a set of tokens did: how many they are, and their drive added up (advantage x nats)."""

    tokens: int
    drive: float


@dataclass(frozen=True)
class TokenDrive:
    """All occurrences of one token: sum of their drives, and means of what they were (NaN where the dump lacks one)."""

    token: int
    text: str
    tokens: int
    drive: float
    entropy: float
    logp: float
    advantage: float


@dataclass(frozen=True)
class StepDrive:
    """One step: its trained tokens, their covariance (minus the sum of drives), mean entropy (nats, NaN if the dump has none),
    and the share of the positive covariance that each of `FRACTIONS` of the tokens carries."""

    step: int
    tokens: int
    covariance: float
    entropy: float
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Attribution:
    """Which tokens drove the change of entropy in a dump.

    Args:
        steps: one entry per step.
        spenders: tokens of the vocabulary with the most negative drive, most first.
        keepers: those with the most positive drive, most first.
        quadrants: by `QUADRANTS`; tokens with zero advantage are in none of them.
        positions: drive added up by place in the answer; `position_tokens`, how many tokens stand there.
        shares: of the positive covariance of the whole dump, carried by each of `FRACTIONS` of its tokens.
        top_tokens: how many tokens these fractions are.
        predicted: by `QUADRANTS`, but against the entropy of the token's own state: how many tokens, and their predicted
            change of that entropy, a mean over each step's tokens, added up; empty if the dump has no entropies.
        answers: some answers of the last step, to be read token by token.
    """

    steps: tuple[StepDrive, ...]
    spenders: tuple[TokenDrive, ...]
    keepers: tuple[TokenDrive, ...]
    quadrants: dict[str, Drive]
    positions: Float[np.ndarray, " time"]
    position_tokens: Int[np.ndarray, " time"]
    shares: tuple[float, ...]
    top_tokens: tuple[int, ...]
    predicted: dict[str, Drive] = field(default_factory=dict)
    answers: tuple[Answer, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that were accounted for."""
        return sum(step.tokens for step in self.steps)

    @property
    def drive(self) -> float:
        """Sum of all drives."""
        return -sum(step.covariance for step in self.steps)


def attribute(dump: str | os.PathLike[str] | Iterable[Tokens], *, top: int = 20) -> Attribution:
    """The account of a dump: a path, or its steps. `top` is how many spenders and keepers are listed.

    Log-probabilities are those of `logp` where the dump has it and of `old_logp` elsewhere. Masked tokens, and those
    whose numbers are not finite, are left out. Raises `DataError` if no token is left, or the dump cannot be read.
    """
    steps = read_dump(dump) if isinstance(dump, (str, os.PathLike)) else dump
    account = _Account()
    for tokens in steps:
        account.add(tokens)
    if not account.steps:
        raise DataError("the token dump holds no trained token with a log-probability and an advantage")
    return account.closed(top)


@dataclass
class _ById:
    """Sums for each token of the vocabulary; ids grow as they are met."""

    sums: Float[np.ndarray, "quantity vocab"] = field(default_factory=lambda: np.zeros((5, 0)))
    text: dict[int, str] = field(default_factory=dict)

    def add(self, ids: Int[np.ndarray, " token"], quantities: Float[np.ndarray, "quantity token"]) -> None:
        """Add tokens, numbered by `ids`."""
        size = max(self.sums.shape[1], int(ids.max()) + 1)
        grown = np.zeros((len(self.sums), size))
        grown[:, : self.sums.shape[1]] = self.sums
        for total, quantity in zip(grown, quantities, strict=True):
            total += np.bincount(ids, weights=quantity, minlength=size)
        self.sums = grown


class _Account:
    """Adds up step after step."""

    def __init__(self) -> None:
        self.steps: list[StepDrive] = []
        self.ids = _ById()
        self.names: dict[int, int] = {}
        self.quadrants = {name: [0, 0.0] for name in QUADRANTS}
        self.positions = np.zeros(0)
        self.position_tokens = np.zeros(0, dtype=np.int64)
        self.covariances: list[Float[np.ndarray, " token"]] = []
        self.predicted = {name: [0, 0.0] for name in QUADRANTS}
        self.last: Tokens | None = None

    def add(self, tokens: Tokens) -> None:
        """Account for one step."""
        now, old = tokens.number("logp"), tokens.number("old_logp")
        logp, advantage = np.where(np.isfinite(now), now, old), tokens.number("advantage")
        used = tokens.mask & np.isfinite(logp) & np.isfinite(advantage) & (tokens.integer("token") >= 0)
        if not used.any():
            return
        logp, advantage = logp[used], advantage[used]
        covariance, shares, _ = _profile(logp, advantage)
        drive, entropy = -covariance / len(covariance), tokens.number("entropy")[used]
        finite = np.isfinite(entropy)
        mean = float(entropy[finite].mean()) if finite.any() else float("nan")
        self.steps.append(StepDrive(tokens.step, len(drive), float(covariance.mean()), mean, shares))
        self.covariances.append(covariance.astype(np.float32))
        self._by_token(tokens, used, np.stack([np.ones_like(drive), drive, entropy, logp, advantage]))
        self._by_quadrant(logp, advantage, drive)
        self._by_position(tokens.integer("position")[used], drive)
        self._predict(tokens)
        self.last = tokens

    def _by_token(self, tokens: Tokens, used: Bool[np.ndarray, " token"], quantities: np.ndarray) -> None:
        ids, first, place = np.unique(tokens.integer("token")[used], return_index=True, return_inverse=True)
        text = tokens.columns["text"][used]
        for token, at in zip(ids.tolist(), first.tolist(), strict=True):
            number = self.names.setdefault(token, len(self.names))
            if not self.ids.text.get(number):
                self.ids.text[number] = str(text[at])[:200]
        numbers = np.array([self.names[token] for token in ids.tolist()], dtype=np.int64)
        self.ids.add(numbers[place.reshape(-1)], quantities)

    def _by_quadrant(self, logp: np.ndarray, advantage: np.ndarray, drive: np.ndarray) -> None:
        probable, rewarded, punished = logp > logp.mean(), advantage > 0, advantage < 0
        masks = (probable & rewarded, probable & punished, ~probable & rewarded, ~probable & punished)
        for name, chosen in zip(QUADRANTS, masks, strict=True):
            self.quadrants[name][0] += int(chosen.sum())
            self.quadrants[name][1] += float(drive[chosen].sum())

    def _predict(self, tokens: Tokens) -> None:
        found = predict(tokens)
        count = max(int(found.known.sum()), 1)
        for number, name in enumerate(QUADRANTS):
            chosen = found.quadrant == number
            self.predicted[name][0] += int(chosen.sum())
            self.predicted[name][1] += float(found.change[chosen].sum()) / count

    def _by_position(self, position: np.ndarray, drive: np.ndarray) -> None:
        kept = (position >= 0) & (position < POSITIONS)
        position, drive = position[kept], drive[kept]
        size = max(len(self.positions), int(position.max(initial=-1)) + 1)
        self.positions = _grown(self.positions, size) + np.bincount(position, weights=drive, minlength=size)
        self.position_tokens = _grown(self.position_tokens, size) + np.bincount(position, minlength=size)

    def closed(self, top: int) -> Attribution:
        """The account of all steps."""
        assert self.last is not None
        every = np.concatenate(self.covariances)
        shares, counts = _shares(every)
        ranked = np.argsort(self.ids.sums[1], kind="stable").tolist()
        drives = self.ids.sums[1]
        return Attribution(
            steps=tuple(self.steps),
            spenders=tuple(self._token(i) for i in ranked[:top] if drives[i] < 0),
            keepers=tuple(self._token(i) for i in ranked[::-1][:top] if drives[i] > 0),
            quadrants=_drives(self.quadrants),
            positions=self.positions,
            position_tokens=self.position_tokens,
            shares=shares,
            top_tokens=counts,
            predicted=_drives(self.predicted) if any(n for n, _ in self.predicted.values()) else {},
            answers=tell(self.last),
        )

    def _token(self, number: int) -> TokenDrive:
        """What is known of the token that was met as the `number`-th."""
        count, drive, entropy, logp, advantage = self.ids.sums[:, number].tolist()
        token = list(self.names)[number]
        means = (entropy / count, logp / count, advantage / count)
        return TokenDrive(token, self.ids.text.get(number, ""), int(count), drive, *means)


def _drives(sums: dict[str, list]) -> dict[str, Drive]:
    return {name: Drive(int(count), float(drive)) for name, (count, drive) in sums.items()}


def _profile(
    logp: Float[np.ndarray, " token"], advantage: Float[np.ndarray, " token"]
) -> tuple[Float[np.ndarray, " token"], tuple[float, ...], tuple[int, ...]]:
    """Covariance of each token (see `uncollapse.measure.covariance`), and how concentrated it is."""
    import torch

    from uncollapse.measure.covariance import token_covariance

    p, a = (torch.from_numpy(np.ascontiguousarray(values)) for values in (logp, advantage))
    covariance = token_covariance(p, a, torch.ones(len(logp), dtype=torch.bool)).numpy()
    return covariance, *_shares(covariance)


def _shares(covariance: Float[np.ndarray, " token"]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    import torch

    from uncollapse.measure.covariance import covariance_profile

    values = torch.from_numpy(np.ascontiguousarray(covariance))
    profile = covariance_profile(values.double(), torch.ones(len(covariance), dtype=torch.bool), FRACTIONS)
    return tuple(profile.share.tolist()), profile.tokens


def _grown(values: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([values, np.zeros(size - len(values), dtype=values.dtype)])
