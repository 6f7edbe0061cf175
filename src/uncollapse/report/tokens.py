"""Tokens coloured by entropy: lost or gained between two scorings, or predicted to be lost or gained in a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uncollapse.diagnose.attribution import QUADRANTS, Drive
from uncollapse.diagnose.predicted import Answer
from uncollapse.report.words import level, number, percent

STRENGTHS = 4
"""Colour steps on each side of the diverging scale."""


@dataclass(frozen=True)
class Token:
    """One token: its text, `shade` from -4 (lost) to 4 (gained), the tooltip, and its entropies and logps by step.

    Without entropies by step there is nothing to replay: the shade and the tooltip stay as they are.
    """

    text: str
    shade: int
    tip: str
    entropy: str = ""
    logp: str = ""


@dataclass(frozen=True)
class Probe:
    """One probe completion, with the change of its mean entropy in nats."""

    name: str
    prompt: str
    tokens: tuple[Token, ...]
    steps: tuple[int, ...]
    before: float
    after: float
    reward: float | None


@dataclass(frozen=True)
class TokenView:
    """Coloured answers: the probes, the full scale with its unit and what its ends mean, and the gist in a sentence."""

    probes: tuple[Probe, ...]
    scale: float
    sentence: str
    unit: str = "nats"
    ends: tuple[str, str] = ("lost", "gained")

    @property
    def short(self) -> bool:
        """Whether prompts and answers are short enough to stand two in a row."""
        return all(len(p.prompt) <= 40 and sum(len(t.text) for t in p.tokens) <= 40 for p in self.probes)


def full_scale(*runs: Sequence[dict[str, Any]]) -> float:
    """Entropy change (nats) at the strongest colour, the same for all `runs`: the 90th percentile, rounded up."""
    change = np.concatenate([np.zeros(0), *(c for records in runs for c in _changes(_scored(records)))])
    known = np.abs(change[np.isfinite(change)])
    return _round_up(float(np.quantile(known, 0.9))) if known.size else 1.0


def token_view(records: Sequence[dict[str, Any]], scale: float, *, most: int = 6) -> TokenView | None:
    """The probes that were scored at two steps or more, at most `most` of them, or None if there are none."""
    series = _scored(records)
    if not series:
        return None
    change = np.concatenate(_changes(series))
    known = change[np.isfinite(change)]
    probes = tuple(_probe(group, scored, scale) for group, scored in series[:most])
    return TokenView(probes, scale, _concentration(known))


def predicted_view(answers: Sequence[Answer], quadrants: Mapping[str, Drive]) -> TokenView | None:
    """Answers of a token dump, coloured by the change that a small step is predicted to make; None without answers.

    `quadrants` are those of the same account, see `uncollapse.diagnose.attribution.Attribution.predicted`.
    """
    if not answers:
        return None
    known = np.concatenate([np.abs(one.changes.change[one.changes.known]) for one in answers])
    scale = _round_up(float(np.quantile(known, 0.9)) if known.size else 0.0, least=0.001)
    probes = tuple(_predicted_probe(one, scale) for one in answers)
    return TokenView(probes, scale, _quadrants(quadrants), "advantage \u00d7 nats", ("lowers", "raises"))


def shade(change: float, scale: float) -> int:
    """Colour step of an entropy change in nats: negative for lost, 0 within an eighth of the full scale."""
    if not math.isfinite(change):
        return 0
    size = min(STRENGTHS, int(abs(change) / scale * STRENGTHS + 0.5))
    return size if change > 0 else -size


def _scored(records: Sequence[dict[str, Any]]) -> list[tuple[list[dict[str, Any]], np.ndarray]]:
    return [found for group in _by_sample(records).values() if (found := _comparable(group)) is not None]


def _changes(series: list[tuple[list[dict[str, Any]], np.ndarray]]) -> list[np.ndarray]:
    return [scored[-1] - scored[0] for _, scored in series]


def _by_sample(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if isinstance(record.get("tokens"), list) and isinstance(record.get("entropy"), list):
            groups.setdefault(str(record.get("sample")), []).append(record)
    return groups


def _comparable(group: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], np.ndarray] | None:
    """The records with the tokens of the last one: a probe that was sampled anew cannot be compared."""
    last = group[-1]
    same = [r for r in group if r["tokens"] == last["tokens"] and len(r["entropy"]) == len(last["tokens"])]
    if len(same) < 2 or not last["tokens"]:
        return None
    return same, np.array([_numbers(r["entropy"]) for r in same])


def _probe(group: list[dict[str, Any]], scored: np.ndarray, scale: float) -> Probe:
    first, last = group[0], group[-1]
    size = len(last["tokens"])
    logp = np.array(
        [_numbers(r["logp"]) if len(r.get("logp") or ()) == size else [math.nan] * size for r in group]
    )
    steps = tuple(int(record["step"]) for record in group)
    tokens = tuple(
        _token(str(text), scored[:, i], logp[:, i], steps, scale) for i, text in enumerate(last["tokens"])
    )
    reward = last.get("reward", first.get("reward"))
    known = isinstance(reward, (int, float)) and math.isfinite(reward)
    before, after = _mean(scored[0]), _mean(scored[-1])
    return Probe(str(last.get("sample")), str(last.get("prompt", "")), tokens, steps, before, after,
                 float(reward) if known and reward is not None else None)  # fmt: skip


def _token(text: str, entropy: np.ndarray, logp: np.ndarray, steps: tuple[int, ...], scale: float) -> Token:
    change = float(entropy[-1] - entropy[0])
    lines = [f"entropy {_value(entropy[0])} \u2192 {_value(entropy[-1])} nats"]
    if np.isfinite(logp[[0, -1]]).any():
        lines.append(f"log-probability {_value(logp[0])} \u2192 {_value(logp[-1])} nats")
    lines.append(f"step {steps[0]} \u2192 {steps[-1]}")
    return Token(_visible(text), shade(change, scale), "\n".join(lines), _csv(entropy), _csv(logp))


def _predicted_probe(answer: Answer, scale: float) -> Probe:
    tokens = tuple(
        Token(_visible(text), shade(float(answer.changes.change[i]), scale), _reason(answer, i))
        for i, text in enumerate(answer.texts)
    )
    shown = "" if len(answer.texts) == answer.length else f", its first {len(answer.texts)} tokens"
    mean = _mean(answer.entropy)
    reward = answer.reward if math.isfinite(answer.reward) else None
    name = f"{answer.uid} of step {answer.step}{shown}"
    return Probe(name, "", tokens, (answer.step,), mean, mean, reward)


def _reason(answer: Answer, i: int) -> str:
    """Why a token is predicted to move entropy: its quadrant, and the numbers."""
    change, quadrant = float(answer.changes.change[i]), int(answer.changes.quadrant[i])
    if not math.isfinite(change):
        return "not trained on, or not measured"
    kind = QUADRANTS[quadrant] if quadrant >= 0 else "neither"
    way = {True: "lowers", False: "raises"}[change < 0] if change else "leaves"
    return "\n".join(
        (
            f"{kind}: {way} entropy ({number(change)} advantage \u00d7 nats)",
            f"entropy {_value(answer.entropy[i])} nats, log-probability {_value(answer.logp[i])} nats",
            f"advantage {_value(answer.advantage[i])}",
        )
    )


def _quadrants(found: Mapping[str, Drive]) -> str:
    total = sum(abs(one.drive) for one in found.values())
    if not total:
        return "No token is predicted to change entropy."
    parts = (f"{name} {percent(abs(one.drive) / total)}" for name, one in found.items())
    return (
        "What a small step would do to the entropy at each token. Rewarding a probable token or punishing a rare one lowers it; "
        f"rewarding a rare or punishing a probable one raises it. Shares of the change: {', '.join(parts)}."
    )


def _visible(text: str) -> str:
    """A token of nothing but line breaks or nothing at all would leave nothing to colour or point at."""
    if not text:
        return "\u2205"
    return text.replace("\r", "").replace("\n", "\u23ce\n") if "\n" in text else text


def _concentration(change: np.ndarray) -> str:
    losses = np.sort(-change[change < 0])[::-1]
    if not losses.size or losses.sum() < 1e-9:
        return "No token lost entropy between the first and the last scoring."
    needed = int(np.searchsorted(np.cumsum(losses), losses.sum() / 2)) + 1
    gained = change[change > 0].sum()
    text = (
        f"Half of all the entropy that was lost went at {percent(needed / change.size)} of the tokens "
        f"({needed} of {change.size})."
    )
    return text + (
        f" {percent(gained / losses.sum())} of the loss was gained elsewhere." if gained > 0 else ""
    )


def _numbers(values: Sequence[Any]) -> list[float]:
    return [float(v) if isinstance(v, (int, float)) else math.nan for v in values]


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


def _value(value: float) -> str:
    return level(float(value)) if math.isfinite(value) else "unknown"


def _csv(values: np.ndarray) -> str:
    return ",".join(f"{v:.3f}" if math.isfinite(v) else "" for v in values.tolist())


def _round_up(value: float, least: float = 0.1) -> float:
    """The next number with few digits, for a scale that people can read."""
    floor = max(value, least)
    power = 10.0 ** math.floor(math.log10(floor))
    return next(
        step * power
        for step in (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
        if step * power >= floor * 0.999
    )
