"""Logs of runs that never ran: made from a known truth, so that `diagnose` can be scored.

`make(kind, seed)` draws a run's scale, length, noise and logging interval from the seed and bends it to what its kind
says. Truth is what the curves were built from, before noise; the values lie clear of the thresholds of `diagnose` in most
draws, not all. So a score on them says how well a state is told in noise, not how real runs are shaped.

`HELD_OUT` names the runs that the published confusion matrix is made of. It was fixed before `diagnose` was first run on
them; thresholds were chosen on `TUNING`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float

from uncollapse.diagnose.log import Log
from uncollapse.errors import UnknownName

Vector = Float[np.ndarray, " step"]

TUNING = tuple(range(6))
HELD_OUT = (1009, 2027, 3049, 4057)
"""Seeds of every kind, disjoint from those of tuning."""


@dataclass(frozen=True)
class Case:
    """A log and the truth about it.

    Args:
        kind: what it was bent to.
        seed: of all its draws.
        log: what a reader would give.
        state: the state the run ends in.
        findings: ids that have to be found.
        allowed: ids that are neither asked for nor wrong.
        from_step: step at which the entropy begins to fall or rise, or None.
    """

    kind: str
    seed: int
    log: Log
    state: str
    findings: frozenset[str] = frozenset()
    allowed: frozenset[str] = frozenset()
    from_step: int | None = None


@dataclass
class _Draft:
    """A run being bent: `t` is the share of the run, 0 to 1; columns are noiseless until `noisy`."""

    rng: np.random.Generator
    t: Vector
    step: np.ndarray
    start: float
    columns: dict[str, Vector]
    noise: float
    memory: float
    settings: dict[str, object] = field(default_factory=dict)
    keep: set[str] = field(default_factory=set)


def kinds() -> tuple[str, ...]:
    """All kinds, in the order in which tables show them."""
    return tuple(_KINDS)


def make(kind: str, seed: int, *, loud: float = 1.0) -> Case:
    """One run of a kind, its noise `loud` times as strong. Raises `UnknownName` for a kind that is not in `kinds()`."""
    if kind not in _KINDS:
        raise UnknownName("kind of run", kind, _KINDS)
    rng = np.random.default_rng([seed, *kind.encode()])
    draft = _healthy(rng)
    case = _KINDS[kind](draft)
    log = Log(
        source=f"{kind}-{seed}",
        format="made up",
        step=draft.step,
        columns=_logged(draft, loud),
        settings=draft.settings,
    )
    return replace(case, kind=kind, seed=seed, log=log)


def _healthy(rng: np.random.Generator) -> _Draft:
    """A run that learns: entropy ends within a third of its start, reward rises to the last step."""
    points, every = int(rng.integers(80, 500)), int(rng.choice([1, 1, 5, 10]))
    t = np.linspace(0, 1, points)
    start = float(np.exp(rng.uniform(np.log(0.1), np.log(3.0))))
    scale, offset = float(np.exp(rng.uniform(-0.7, 1.6))), float(rng.choice([0.0, 0.0, -1.0]))
    gain = rng.uniform(0.3, 0.6)
    share = rng.uniform(0.1, 0.3) + gain * t ** rng.uniform(0.7, 1.0)
    length = float(np.exp(rng.uniform(np.log(60), np.log(3000))))
    columns = {
        "entropy/token/mean": start * (1 + (rng.uniform(0.72, 1.2) - 1) * t),
        "reward/mean": offset + scale * share,
        "reward/std": scale * np.sqrt(np.maximum(share * (1 - share), 1e-3)),
        "reward/zero_variance_groups": rng.uniform(0.05, 0.25) + rng.uniform(0, 0.1) * t,
        "length/mean": length * (1 + rng.uniform(-0.2, 0.3) * t),
        "length/truncated": rng.uniform(0.0, 0.05) + 0 * t,
        "clip/high/frac": rng.uniform(0.001, 0.006) * (1 + 0.5 * t),
        "clip/low/frac": rng.uniform(0.001, 0.004) * (1 + 0.5 * t),
        "kl/old/k3": rng.uniform(2e-4, 2e-3) + 0 * t,
        "kl/ref/mean": rng.uniform(0.02, 0.2) * t ** rng.uniform(0.5, 1.0),
        "mismatch/logp/mean": rng.uniform(0.004, 0.015) + 0 * t,
        "diversity/distinct": rng.uniform(0.55, 0.85) * (1 - 0.15 * t),
        "grad/norm": rng.uniform(0.1, 1.5) + 0 * t,
        "lr": 1e-6 + 0 * t,
    }
    return _Draft(
        rng,
        t,
        every * np.arange(1, points + 1),
        start,
        columns,
        rng.uniform(0.02, 0.08),
        rng.uniform(0.0, 0.8),
    )


def _logged(draft: _Draft, loud: float) -> dict[str, Vector]:
    """Noise on everything, shares inside [0, 1], some columns missing that the truth does not rest on."""
    out = {}
    for name, clean in draft.columns.items():
        optional = name not in draft.keep | {"entropy/token/mean", "reward/mean", "lr"}
        if optional and draft.rng.random() < 0.25:
            continue
        if name == "lr":
            out[name] = clean
            continue
        noise = loud * _autoregressive(draft)
        if name.startswith(("reward/mean", "eval/")):
            spread = float(np.ptp(clean)) or float(np.abs(clean).mean()) or 1.0
            values = clean + draft.noise * max(spread, 0.3 * float(np.abs(clean).max())) * noise
        elif name.startswith(("reward/zero", "length/truncated", "diversity/")):
            values = np.clip(clean + 0.04 * noise, 0.0, 1.0)
        else:
            values = clean * np.exp(draft.noise * noise)
        if name.startswith("eval/"):
            gaps = np.arange(values.size) % max(values.size // 30, 1) != 0
            values = np.where(gaps, np.nan, values)
        out[name] = np.asarray(values, dtype=np.float64)
    return out


def _autoregressive(draft: _Draft) -> Vector:
    """AR(1) noise of unit variance."""
    shocks = draft.rng.standard_normal(draft.t.size)
    out, memory = np.empty_like(shocks), draft.memory
    out[0] = shocks[0]
    for i in range(1, out.size):
        out[i] = memory * out[i - 1] + np.sqrt(1 - memory**2) * shocks[i]
    return out


def _case(state: str, *findings: str, allowed: tuple[str, ...] = (), from_step: int | None = None) -> Case:
    empty = Log("", "", np.arange(1), {})
    return Case("", 0, empty, state, frozenset(findings), frozenset(allowed), from_step)


def _ramp(t: Vector, begin: float, end: float) -> Vector:
    """0 before `begin`, 1 after `end`, straight between."""
    return np.clip((t - begin) / (end - begin), 0.0, 1.0)


def _fall(draft: _Draft, begin: float, end: float, left: float) -> int:
    """Let the entropy fall exponentially to `left` of its start between two shares of the run."""
    entropy = draft.start * np.exp(np.log(left) * _ramp(draft.t, begin, end))
    draft.columns["entropy/token/mean"] = entropy
    return int(draft.step[int(begin * (draft.t.size - 1))])


_SPENT = ("ceiling-near", "reward-plateau", "clip-upper-only", "dead-groups")


def _noisy(draft: _Draft) -> Case:
    draft.noise = draft.rng.uniform(0.15, 0.25)
    draft.memory = draft.rng.uniform(0.0, 0.5)
    return _case("healthy", allowed=("ceiling-near",))


def _slow(draft: _Draft) -> Case:
    begin = _fall(draft, 0.0, draft.rng.uniform(0.6, 0.85), draft.rng.uniform(0.01, 0.08))
    return _case("collapsed", "entropy-collapse", allowed=_SPENT, from_step=begin)


def _fast(draft: _Draft) -> Case:
    _settle(draft, 0.2)
    begin = _fall(draft, 0.0, draft.rng.uniform(0.06, 0.15), draft.rng.uniform(0.01, 0.08))
    return _case("collapsed", "entropy-collapse", allowed=_SPENT, from_step=begin)


def _late(draft: _Draft) -> Case:
    at = draft.rng.uniform(0.45, 0.65)
    begin = _fall(draft, at, at + draft.rng.uniform(0.15, 0.25), draft.rng.uniform(0.01, 0.08))
    return _case("collapsed", "entropy-collapse", allowed=_SPENT, from_step=begin)


def _collapsing(draft: _Draft) -> Case:
    begin = _fall(draft, 0.0, 1.0, draft.rng.uniform(0.22, 0.5))
    return _case("collapsing", "entropy-collapse", allowed=_SPENT, from_step=begin)


def _collapsing_late(draft: _Draft) -> Case:
    begin = _fall(draft, draft.rng.uniform(0.4, 0.6), 1.0, draft.rng.uniform(0.22, 0.5))
    return _case("collapsing", "entropy-collapse", allowed=_SPENT, from_step=begin)


def _dead_at_start(draft: _Draft) -> Case:
    t, rng = draft.t, draft.rng
    draft.columns["entropy/token/mean"] = rng.uniform(0.003, 0.015) * (1 - 0.3 * t)
    draft.columns["reward/zero_variance_groups"] = rng.uniform(0.85, 0.95) + 0 * t
    draft.columns["reward/mean"] = draft.columns["reward/mean"][:1] + 0 * t
    draft.keep |= {"reward/zero_variance_groups"}
    return _case(
        "collapsed", "low-entropy-start", "dead-groups", allowed=("reward-plateau", "entropy-collapse")
    )


def _exploding(draft: _Draft) -> Case:
    t, rng, at = draft.t, draft.rng, draft.rng.uniform(0.3, 0.6)
    rise = _ramp(t, at, 1.0)
    draft.columns["entropy/token/mean"] = draft.start * np.exp(np.log(rng.uniform(2.5, 5.0)) * rise)
    reward = draft.columns["reward/mean"]
    draft.columns["reward/mean"] = reward - rng.uniform(0.8, 1.2) * np.ptp(reward) * rise
    begin = int(draft.step[int(at * (t.size - 1))])
    return _case("exploding", "entropy-explosion", allowed=("reward-fall",), from_step=begin)


def _settle(draft: _Draft, at: float) -> None:
    """Let the reward rise until `at` and stand still from there."""
    reward = draft.columns["reward/mean"]
    draft.columns["reward/mean"] = reward[0] + np.ptp(reward) * _ramp(draft.t, 0.0, at)


def _plateau(draft: _Draft) -> Case:
    at = draft.rng.uniform(0.25, 0.45)
    _settle(draft, at)
    draft.columns["entropy/token/mean"] = draft.start * (
        1 - draft.rng.uniform(0.05, 0.4) * _ramp(draft.t, 0.0, at)
    )
    return _case("plateau", "reward-plateau", allowed=("ceiling-near",))


def _recovered(draft: _Draft) -> Case:
    t = draft.t
    drop = draft.rng.uniform(0.45, 0.65)
    draft.columns["entropy/token/mean"] = draft.start * (
        1 - drop * _ramp(t, 0.0, 0.2) + (drop - 0.25) * _ramp(t, 0.3, 0.7)
    )
    return _case("healthy", allowed=("ceiling-near",))


def _short_answers(draft: _Draft) -> Case:
    draft.columns["length/mean"] *= 1 - draft.rng.uniform(0.65, 0.9) * _ramp(
        draft.t, 0.1, draft.rng.uniform(0.5, 0.8)
    )
    draft.keep |= {"length/mean"}
    return _case("healthy", "length-collapse", allowed=("reward-hacking", "ceiling-near"))


def _truncation(draft: _Draft) -> Case:
    rise = _ramp(draft.t, 0.2, draft.rng.uniform(0.7, 1.0))
    draft.columns["length/mean"] = draft.columns["length/mean"][0] * (1 + draft.rng.uniform(1.2, 2.0) * rise)
    draft.columns["length/truncated"] = 0.03 + draft.rng.uniform(0.35, 0.7) * rise
    draft.keep |= {"length/mean", "length/truncated"}
    return _case("healthy", "truncation", allowed=("length-explosion", "reward-hacking", "ceiling-near"))


def _hacking(draft: _Draft) -> Case:
    t, rng = draft.t, draft.rng
    fall = _ramp(t, rng.uniform(0.2, 0.4), 1.0)
    reward = draft.columns["reward/mean"]
    draft.columns["eval/reward"] = reward[0] + np.ptp(reward) * (
        0.8 * _ramp(t, 0.0, 0.3) - rng.uniform(0.6, 0.9) * fall
    )
    draft.columns["diversity/distinct"] = 0.7 - rng.uniform(0.4, 0.6) * fall
    draft.keep |= {"eval/reward", "diversity/distinct"}
    return _case("healthy", "reward-hacking", allowed=("ceiling-near",))


def _kl(draft: _Draft) -> Case:
    t, rng = draft.t, draft.rng
    draft.columns["kl/ref/mean"] = (
        0.05 * (0.2 + t) * np.exp(np.log(rng.uniform(15, 80)) * _ramp(t, rng.uniform(0.55, 0.7), 1.0))
    )
    draft.keep |= {"kl/ref/mean"}
    return _case("healthy", "kl-blow-up", allowed=("ceiling-near",))


def _mismatch(draft: _Draft) -> Case:
    draft.columns["mismatch/logp/mean"] = 0.008 * np.exp(
        np.log(draft.rng.uniform(10, 40)) * _ramp(draft.t, 0.2, 0.9)
    )
    draft.keep |= {"mismatch/logp/mean"}
    return _case("healthy", "mismatch", allowed=("ceiling-near",))


def _dead_groups(draft: _Draft) -> Case:
    draft.columns["reward/zero_variance_groups"] = 0.15 + draft.rng.uniform(0.55, 0.8) * _ramp(
        draft.t, 0.1, 0.9
    )
    draft.keep |= {"reward/zero_variance_groups"}
    return _case("healthy", "dead-groups", allowed=("ceiling-near",))


def _one_update(draft: _Draft) -> Case:
    for name in ("clip/high/frac", "clip/low/frac", "kl/old/k3"):
        draft.columns[name] = 0 * draft.t
    draft.keep |= {"clip/high/frac", "clip/low/frac"}
    return _case("healthy", "updates-inert", allowed=("ceiling-near",))


def _pass_at_k(draft: _Draft) -> Case:
    t, rng = draft.t, draft.rng
    draft.columns["eval/pass@1"] = 0.25 + rng.uniform(0.2, 0.4) * t
    draft.columns["eval/pass@8"] = 0.8 - rng.uniform(0.12, 0.3) * t
    draft.keep |= {"eval/pass@1", "eval/pass@8"}
    return _case("healthy", "pass-at-k", allowed=("ceiling-near",))


def _spikes(draft: _Draft) -> Case:
    at = draft.rng.choice(np.arange(10, draft.t.size), size=int(draft.rng.integers(3, 9)), replace=False)
    draft.columns["grad/norm"][at] *= draft.rng.uniform(15, 60)
    draft.keep |= {"grad/norm"}
    return _case("healthy", "gradient-spikes", allowed=("ceiling-near",))


def _short_log(draft: _Draft) -> Case:
    points = int(draft.rng.integers(3, 8))
    draft.t, draft.step = draft.t[:points], draft.step[:points]
    draft.columns = {name: values[:points] for name, values in draft.columns.items()}
    return _case("unknown", "log-short")


def _no_entropy(draft: _Draft) -> Case:
    del draft.columns["entropy/token/mean"]
    return _case("unknown", "no-entropy")


_KINDS: dict[str, Callable[[_Draft], Case]] = {
    "healthy": lambda draft: _case("healthy", allowed=("ceiling-near",)),
    "noisy": _noisy,
    "recovered": _recovered,
    "slow-collapse": _slow,
    "fast-collapse": _fast,
    "late-collapse": _late,
    "collapsing": _collapsing,
    "collapsing-late": _collapsing_late,
    "dead-at-start": _dead_at_start,
    "exploding": _exploding,
    "plateau": _plateau,
    "short-answers": _short_answers,
    "truncation": _truncation,
    "reward-hacking": _hacking,
    "kl-blow-up": _kl,
    "mismatch": _mismatch,
    "dead-groups": _dead_groups,
    "one-update": _one_update,
    "pass-at-k": _pass_at_k,
    "gradient-spikes": _spikes,
    "short-log": _short_log,
    "no-entropy": _no_entropy,
}


# ---- runs of any shape -------------------------------------------------------------------------------------

ARBITRARY = tuple(range(9000, 9100))
"""Seeds of the arbitrary runs that are scored; fixed before `diagnose` was run on any of them."""


def arbitrary(seed: int) -> Case:
    """A run whose log-entropy goes through two to four random straight pieces, wherever the thresholds lie.

    Its truth is what the documented definitions say of the noiseless end: below 15 % of the start collapsed, twice or more
    exploding, falling by a tenth or more in its last piece to below two thirds collapsing, else healthy (the reward rises to
    the end). Many end close to a threshold, where noise alone can tip the answer.
    """
    rng = np.random.default_rng([seed, 31])
    draft = _healthy(rng)
    pieces = int(rng.integers(2, 5))
    lengths = rng.dirichlet(np.full(pieces, 4.0))
    lengths = 0.1 + (1 - 0.1 * pieces) * lengths  # no piece is shorter than a tenth of the run
    knots = np.concatenate([[0.0], np.cumsum(lengths)])
    levels = np.concatenate([[0.0], rng.uniform(np.log(0.05), np.log(3.0), pieces)])
    still = np.flatnonzero(rng.random(pieces) < 0.4)
    for piece in still:
        levels[piece + 1] = levels[piece]
    curve = np.interp(draft.t, knots, levels)
    draft.columns["entropy/token/mean"] = draft.start * np.exp(curve)
    end, change = float(levels[-1]), float(levels[-1] - levels[-2])
    if end <= np.log(0.15):
        state = "collapsed"
    elif end >= np.log(2.0):
        state = "exploding"
    else:
        state = "collapsing" if change <= -0.1 and end < np.log(2 / 3) else "healthy"
    log = Log(f"arbitrary-{seed}", "made up", draft.step, _logged(draft, 1.0))
    return replace(_case(state), kind="arbitrary", seed=seed, log=log)
