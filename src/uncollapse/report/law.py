"""The section on the entropy law: the fit, its rival, its ceiling, and what may be concluded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from uncollapse.errors import DataError
from uncollapse.measure.entropy_law import EntropyLaw, LawComparison, LawVerdict, compare_laws
from uncollapse.report import figures
from uncollapse.report.blocks import Block, Section, TableBlock, TextBlock, figure
from uncollapse.report.sections import ENTROPY, REWARD, VALIDATION, swatches
from uncollapse.report.series import Arm, Estimate, Log
from uncollapse.report.words import estimate, level, number, percent

_EARLY = 0.15
"""Share of the steps from which the paper forecasts the rest."""


def section(arms: Sequence[Arm]) -> Section:
    """Fit the law to every run; show the first recipe's, since the law is about runs without entropy control."""
    title = "The entropy law"
    if not arms or not arms[0].logs:
        return Section("law", "Law", title, missing="The law cannot be fitted: there is no run.")
    log = arms[0].logs[0]
    try:
        found = fit(log)
    except DataError as error:
        return Section(
            "law", "Law", title, missing=f"The law cannot be fitted: {error}.", metrics=("law/ceiling",)
        )
    blocks: list[Block] = [
        figure(
            "law",
            lambda axes: figures.law(
                found, axes[0], title="Validation reward" if reward_metric(log) == VALIDATION else "Reward"
            ),
            height=340,
            alt=_alt(found),
            caption=_caption(arms),
        ),
        _laws(found),
        TextBlock(_verdict(found)),
    ]
    if forecast := _forecast(found.exponential):
        blocks.append(TextBlock(forecast))
    if len(arms) > 1 or len(arms[0].logs) > 1:
        blocks.append(_ceilings(arms))
    return Section("law", "Law", title, _lead(found), "", tuple(blocks))


def fit(log: Log) -> LawComparison:
    """Both laws on the steps with entropy and reward, see `reward_metric`. Raises `DataError` if they cannot be fitted."""
    entropy_steps, entropy = log.values(ENTROPY)
    steps, reward = log.values(reward_metric(log))
    common, mine, theirs = np.intersect1d(entropy_steps, steps, return_indices=True)
    if not common.size:
        missing = [name for name, found in (("entropy", entropy_steps), ("reward", steps)) if not found.size]
        raise DataError(
            f"{' and '.join(missing)} not logged" if missing else "no step has both entropy and reward"
        )
    if common.size > 1 and np.ptp(reward[theirs]) == 0:
        raise DataError(f"reward stayed at {level(float(reward[theirs][0]))} throughout")
    return compare_laws(entropy[mine], reward[theirs])


def reward_metric(log: Log) -> str:
    """The reward that the law is about: validation reward where five steps or more have it, else the training reward."""
    steps = np.intersect1d(log.values(ENTROPY)[0], log.values(VALIDATION)[0])
    return VALIDATION if steps.size >= 5 else REWARD


def _interval(law: EntropyLaw) -> tuple[float, float]:
    low, high = law.interval(0.0)
    return float(low), float(high)


def _lead(found: LawComparison) -> str:
    law = found.exponential
    if law.a <= 0:
        return (
            f"In this run reward did not rise as entropy fell (a = {number(law.a)}), so the law names no ceiling: "
            "entropy was not what reward was paid with."
        )
    low, high = _interval(law)
    reached = float(np.mean(law.reward[-max(1, law.n // 20) :]))
    meaning = (
        f"If R = b \u2212 a\u00b7exp(H) holds, reward cannot pass {level(law.ceiling)} (95\u202f% interval {level(low)} to {level(high)}) "
        f"however long this run trains, because by then the entropy is spent. It stands at {level(reached)}."
    )
    if reached > law.ceiling:
        return meaning + " That is above the ceiling already: the law does not hold here to that accuracy."
    if law.ceiling > 1:
        return meaning + " A ceiling above 1 binds no reward that is a success rate."
    return meaning


def _verdict(found: LawComparison) -> str:
    delta = abs(found.delta_aic)
    counted = f"{found.effective_n:.0f} effective points (neighbouring steps repeat each other)"
    if found.verdict is LawVerdict.indistinguishable:
        return (
            f"The two laws cannot be told apart here: AIC differs by {number(delta)} on paper, too little once counted on {counted}. "
            "The ceiling depends on which one is right, so take it as a hint."
        )
    better = found.verdict is LawVerdict.exponential
    ceiling = found.exponential.ceiling if better else found.straight_line.ceiling
    name = "The exponential law" if better else "A straight line in H"
    advice = (
        ""
        if better
        else f" Its value at zero entropy, {level(ceiling)}, is then the better guess at the ceiling."
    )
    return f"{name} fits better: its AIC is lower by {number(delta)}, and still after counting only {counted}.{advice}"


def _forecast(law: EntropyLaw) -> str:
    try:
        early = law.extrapolate(_EARLY)
    except DataError:
        return ""
    way = "too high" if early.final_error > 0 else "too low"
    return (
        f"Fitted to the first {percent(_EARLY)} of the steps alone, the exponential law forecasts a ceiling of "
        f"{level(early.law.ceiling)}; its forecast of the last step is {level(abs(early.final_error))} {way}."
    )


def _laws(found: LawComparison) -> TableBlock:
    rows = []
    for law, name in (
        (found.exponential, "b \u2212 a\u00b7exp(H)"),
        (found.straight_line, "b \u2212 a\u00b7H"),
    ):
        low, high = _interval(law)
        rows.append((name, f"{number(law.a)} \u00b1 {number(law.a_se, 2)}", f"{number(law.b)} \u00b1 {number(law.b_se, 2)}",
                     f"{level(law.ceiling)} ({level(low)} to {level(high)})", f"{law.r2:.3f}" if law.r2 == law.r2 else "\u2013",
                     number(law.aic, 4)))  # fmt: skip
    kind = (
        "robust to autocorrelation"
        if found.exponential.errors == "hac"
        else "classical; they assume independent steps"
    )
    caption = f"{found.exponential.n} steps; \u00b1 one standard error ({kind}); ceiling with its 95\u202f% interval."
    return TableBlock(("law", "a", "b", "at H = 0", "R\u00b2", "AIC"), tuple(rows), caption)


def _ceilings(arms: Sequence[Arm]) -> TableBlock:
    rows = []
    for arm in arms:
        fits = []
        for log in arm.logs:
            try:
                fits.append(fit(log))
            except DataError:
                continue
        if not fits:
            rows.append((arm.name, "\u2013", "\u2013", "cannot be fitted"))
            continue
        ceiling = Estimate(tuple(f.exponential.ceiling for f in fits))
        r2 = Estimate(tuple(f.exponential.r2 for f in fits))
        preferred = [f.verdict.value for f in fits]
        rows.append(
            (
                arm.name,
                estimate(ceiling),
                estimate(r2),
                ", ".join(f"{v} ({preferred.count(v)})" for v in dict.fromkeys(preferred)),
            )
        )
    return TableBlock(("recipe", "ceiling", "R\u00b2", "preferred law (seeds)"), tuple(rows),
                      "Exponential law, fitted to each seed. A remedy that holds entropy up leaves the law without meaning.",
                      swatches(arms))  # fmt: skip


def _alt(found: LawComparison) -> str:
    law = found.exponential
    return (
        f"Reward against entropy with the fitted law: a = {number(law.a)}, b = {number(law.b)}, ceiling {level(law.ceiling)} "
        f"at zero entropy, R squared {law.r2:.3f}; the rival straight line meets zero entropy at {level(found.straight_line.ceiling)}."
    )


def _caption(arms: Sequence[Arm]) -> str:
    who = (
        "" if len(arms) == 1 and len(arms[0].logs) == 1 else f" {arms[0].name}, seed {arms[0].logs[0].seed}."
    )
    return f"One dot per step, from early (faint) to late (strong). Band: 95\u202f% interval of the exponential law.{who}"
