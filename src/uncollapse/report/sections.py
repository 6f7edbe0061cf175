"""The sections that a single run and a comparison share: the course of training, and what drove it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import yaml
from matplotlib.axes import Axes

from uncollapse.report import figures
from uncollapse.report.blocks import (
    Block,
    FoldBlock,
    Section,
    TableBlock,
    TextBlock,
    Tile,
    TokensBlock,
    figure,
)
from uncollapse.report.glossary import title_and_unit
from uncollapse.report.palette import LIGHT, SERIES
from uncollapse.report.series import Arm, Curve, Vector, pass_keys
from uncollapse.report.tokens import full_scale, token_view
from uncollapse.report.words import level, lost, moved, number, percent

FRACTIONS = (0.0002, 0.002, 0.02, 0.2, 0.5, 1.0)
"""Top fractions of tokens at which the covariance profile is logged; the paper's."""

ENTROPY, REWARD, VALIDATION = "entropy/token/mean", "reward/mean", "eval/reward"


def course(arms: Sequence[Arm]) -> Section:
    """Entropy and reward on one time axis."""
    section = Section("entropy", "Entropy", "Entropy and reward")
    # Quantile bands of several recipes would lie on each other and pass for uncertainty.
    quantiles = {"low": "entropy/token/p10", "high": "entropy/token/p90", "band": "10th to 90th percentile"}
    entropy = _each(arms, ENTROPY, **(quantiles if len(arms) == 1 else {}))
    reward, validation = _each(arms, REWARD), _each(arms, VALIDATION)
    if not entropy and not reward:
        return _missing(section, ENTROPY, REWARD)
    single = len(arms) == 1
    panels: list[tuple[list[Curve], str, str, Sequence[str]]] = []
    if entropy:
        panels.append((entropy, "Entropy", "nats per token", SERIES))
    if single and reward and validation:
        both = [_renamed(reward[0], "training"), _renamed(validation[0], "validation")]
        panels.append((both, "Reward", "mean per step", SERIES[1:]))
    else:
        panels += [(lines, title, "mean per step", SERIES[1:] if single else SERIES)
                   for lines, title in ((reward, "Reward"), (validation, "Validation reward")) if lines]  # fmt: skip

    def draw(axes: Sequence[Axes]) -> None:
        for ax, (lines, title, unit, colours) in zip(axes, panels, strict=True):
            figures.curves(lines, ax, title=title, unit=unit, colours=colours)

    band = next((line.band for line in entropy if line.band), "")
    alt = "Over the rollout steps: " + "; ".join(_course_in_words(arm) for arm in arms) + "."
    fig = figure("course", draw, alt=alt, panels=len(panels), height=230, share_x=True,
                 caption=f"Shaded: {band}." if band else "")  # fmt: skip
    notes = [] if entropy and reward else [TextBlock(_not_logged(ENTROPY if not entropy else REWARD))]
    lead = (
        "Entropy is the room a policy has left to explore; reward is what it bought with it. "
        "Read the two together: reward that climbs only while entropy falls will stop when it is gone."
    )
    keys = (ENTROPY, REWARD, "entropy/token/p10", "entropy/token/p90", VALIDATION)
    return Section(section.id, section.nav, section.title, lead, "", (fig, *notes), _logged(arms, keys))


def answers(arms: Sequence[Arm]) -> Section:
    """Pass@k, majority vote and distinct correct answers over training."""
    section = Section("answers", "Answers", "Breadth of the answers")
    keys = pass_keys(arms)
    distinct = _each(arms, "eval/distinct")
    if not keys and not distinct:
        return _missing(section, "eval/pass@k", "eval/distinct")
    single = len(arms) == 1
    panels: list[tuple[list[Curve], str, str, bool]] = []
    if single and keys:
        votes = pass_keys(arms, "eval/maj@")
        lines = [
            _renamed(c, key.removeprefix("eval/")) for key in [*keys, *votes] if (c := arms[0].curve(key))
        ]
        panels.append((lines, "Solved prompts", "share of prompts", True))
    elif keys:
        panels += [(_each(arms, key), key.removeprefix("eval/").capitalize(), "share of prompts", True)
                   for key in dict.fromkeys([keys[0], keys[-1]])]  # fmt: skip
    if distinct:
        panels.append((distinct, "Distinct correct answers", "per prompt", False))

    def draw(axes: Sequence[Axes]) -> None:
        for ax, (lines, title, unit, share) in zip(axes, panels, strict=True):
            figures.curves(lines, ax, title=title, unit=unit, share=share)

    fig = figure(
        "answers", draw, alt=_answers_in_words(arms, keys), panels=len(panels), height=240, share_x=True
    )
    lead = (
        "Pass@1 says how sure the model is, pass@k how much it can do at all. When they meet, "
        "every sample says the same, and more samples buy nothing."
    )
    notes = (
        [] if keys and distinct else [TextBlock(_not_logged("eval/pass@k" if not keys else "eval/distinct"))]
    )
    logged = _logged(arms, (*keys, *pass_keys(arms, "eval/maj@"), "eval/distinct"))
    return Section(section.id, section.nav, section.title, lead, "", (fig, *notes), logged)


def covariance(arms: Sequence[Arm]) -> Section:
    """How few tokens drive the loss of entropy."""
    section = Section("covariance", "Covariance", "What drove it")
    profiles = [(arm, _profile(arm)) for arm in arms]
    profiles = [(arm, profile) for arm, profile in profiles if profile]
    mean = _each(arms, "covariance/token/mean")
    if not profiles and not mean:
        return _missing(section, "covariance/top/*", "covariance/token/mean")
    blocks: list[Block] = []
    if profiles and any(value for _, value in profiles[0][1]):
        arm, profile = profiles[0]
        who = "" if len(arms) == 1 else f" ({arm.name})"
        words = ", ".join(f"{_top(f)} {number(v)}" for f, v in profile)
        blocks.append(figure("profile", lambda axes: figures.covariance_profile(profile, axes[0]), height=38 * len(profile) + 60,
                             alt=f"Mean covariance of the top tokens{who}: {words}.",
                             caption=f"Mean over all logged steps{who}."))  # fmt: skip
    if profiles:
        blocks.append(_profile_table(profiles))
    if mean:
        blocks.append(figure("covariance", lambda axes: figures.curves(
            mean, axes[0], title="Covariance of all tokens", unit="advantage \u00d7 nats"), height=230,
            alt="Mean token covariance over the rollout steps."))  # fmt: skip
    lead = (
        "Tokens that are both likely and rewarded burn entropy: to first order a step lowers it in proportion to the "
        "covariance of log-probability and advantage. " + _carried(profiles[0][1] if profiles else [])
    )
    keys = ("covariance/token/mean", *(f"covariance/top/{f:g}" for f in FRACTIONS))
    return Section(section.id, section.nav, section.title, lead, "", tuple(blocks), _logged(arms, keys))


def text(arms: Sequence[Arm]) -> Section:
    """Tokens coloured by how much entropy they lost."""
    section = Section("text", "Text", "Where in the text it was lost")
    most = 6 if len(arms) == 1 else 2
    scale = full_scale(*(log.tokens for arm in arms for log in arm.logs))
    blocks: list[Block] = []
    for arm in arms:
        views = (token_view(log.tokens, scale, most=most) for log in arm.logs)
        if view := next((view for view in views if view is not None), None):
            blocks.append(TokensBlock(view, "" if len(arms) == 1 else arm.name))
    shown = bool(blocks)
    positions = _positions(arms[0]) if arms else []
    if positions:
        blocks.append(figure("positions", lambda axes: figures.position_profile(positions, axes[0]), height=230,
                             alt="Entropy by position in the answer, early to late in training."))  # fmt: skip
    if not blocks:
        return Section(section.id, section.nav, section.title, missing=(
            "Not logged: this needs completions that were scored at two steps or more, in tokens.jsonl."))  # fmt: skip
    lead = "The same answers, scored again as training went on. Point at a token to see its numbers; move the slider to replay."
    keys = tuple(key for arm in arms for key in arm.metrics() if key.startswith("entropy/position/"))
    return Section(section.id, section.nav, section.title, lead if shown else "", "", tuple(blocks), keys)


def health(arms: Sequence[Arm]) -> Section:
    """Everything else that was logged, in small."""
    section = Section("health", "Health", "Health of the training")
    shown = ("entropy/", "covariance/", "eval/", REWARD)
    names = [
        key
        for key in dict.fromkeys(key for arm in arms for key in arm.metrics())
        if not key.startswith(shown)
    ]
    panels = [(key, _each(arms, key)) for key in names][:18]
    if not panels:
        return Section(
            section.id,
            section.nav,
            section.title,
            missing="Not logged: no clip fractions, lengths, gradients or times.",
        )

    def draw(axes: Sequence[Axes]) -> None:
        for ax, (key, lines) in zip(axes, panels, strict=True):
            title, unit = title_and_unit(key)
            share = unit.startswith("share") or key.endswith("/frac")
            figures.curves(
                lines, ax, title=title, unit="" if share else unit, share=share, label=False, xlabel=""
            )

    fig = figure("health", draw, alt="Over the rollout steps: " + ", ".join(key for key, _ in panels) + ".",
                 panels=len(panels), columns=3, narrow_columns=2, height=170,
                 caption="One panel per metric over the rollout steps; the glossary says what each means.")  # fmt: skip
    left_out = len(names) - len(panels)
    notes = [TextBlock(f"{left_out} further metrics are in metrics.jsonl.")] if left_out > 0 else []
    return Section(
        section.id, section.nav, section.title, "", "", (fig, *notes), tuple(key for key, _ in panels)
    )


def setup(arms: Sequence[Arm], extra: Sequence[tuple[str, str]] = ()) -> Section:
    """Configurations, seeds, and what could not be read; `extra` are further (summary, YAML) pairs."""
    blocks: list[Block] = []
    rows = []
    for arm in arms:
        seeds = ", ".join(str(log.seed) for log in arm.logs if log.seed is not None) or "not recorded"
        steps = sorted({int(log.rows[-1]["step"]) + 1 if log.rows else 0 for log in arm.logs})
        known = next((log.config for log in arm.logs), {})
        rows.append((arm.name, str(known.get("model", "\u2013")), str(known.get("task", "\u2013")), seeds,
                     str(steps[0]) if len(steps) == 1 else f"{steps[0]}\u2013{steps[-1]}"))  # fmt: skip
    blocks.append(TableBlock(("recipe", "model", "task", "seeds", "steps"), tuple(rows)))
    for arm in arms:
        for log in arm.logs:
            for name, lines in log.broken.items():
                listed = ", ".join(map(str, lines[:8])) + (" \u2026" if len(lines) > 8 else "")
                what = (
                    f"1 line of {name} could not be read and is"
                    if len(lines) == 1
                    else f"{len(lines)} lines of {name} could not be read and are"
                )
                blocks.append(TextBlock(f"{arm.name}, seed {log.seed}: {what} left out ({listed})."))
    folds = list(extra) + [
        (f"Configuration of {arm.name}" + (f", seed {log.seed}" if log.seed is not None else ""),
         yaml.safe_dump(log.config, sort_keys=False, allow_unicode=True))
        for arm in arms for log in arm.logs
    ]  # fmt: skip
    blocks += [FoldBlock(summary, body) for summary, body in folds]
    return Section("setup", "Setup", "What was run", blocks=tuple(blocks))


def swatches(arms: Sequence[Arm]) -> tuple[str, ...]:
    """Colour roles of the recipes, for tables; none for a single one."""
    roles = {colour: role for role, colour in LIGHT.items()}
    return tuple(roles[arm.colour] for arm in arms) if all(arm.colour for arm in arms) else ()


def _each(arms: Sequence[Arm], key: str, **band: str) -> list[Curve]:
    return [curve for arm in arms if (curve := arm.curve(key, **band)) is not None]


def _renamed(curve: Curve, name: str) -> Curve:
    return Curve(name, curve.steps, curve.values, curve.low, curve.high, curve.band)


def _logged(arms: Sequence[Arm], keys: Sequence[str]) -> tuple[str, ...]:
    known = {key for arm in arms for key in arm.metrics()}
    return tuple(key for key in keys if key in known)


def _not_logged(*keys: str) -> str:
    return f"Not logged: {' and '.join(keys)}."


def _missing(section: Section, *keys: str) -> Section:
    return Section(section.id, section.nav, section.title, missing=_not_logged(*keys))


def _course_in_words(arm: Arm) -> str:
    parts = []
    for key, name, unit in ((ENTROPY, "entropy", " nats"), (REWARD, "reward", "")):
        first, last = arm.first(key), arm.last(key)
        if first and last:
            parts.append(f"{name} {moved(first.mean, last.mean)}{unit}")
    return f"{arm.name}, {' and '.join(parts)}" if parts else f"{arm.name}, nothing logged"


def _answers_in_words(arms: Sequence[Arm], keys: Sequence[str]) -> str:
    parts = []
    for arm in arms:
        for key in [*dict.fromkeys([*keys[:1], *keys[-1:]]), "eval/distinct"]:
            first, last = arm.first(key), arm.last(key)
            if first and last:
                parts.append(f"{arm.name}, {key.removeprefix('eval/')} {moved(first.mean, last.mean)}")
    return "Over the rollout steps: " + "; ".join(parts) + "."


def _profile(arm: Arm) -> list[tuple[float, float]]:
    means = [(f, arm.mean(f"covariance/top/{f:g}")) for f in FRACTIONS]
    return [(f, value.mean) for f, value in means if value is not None]


def _top(fraction: float) -> str:
    return f"top {100 * fraction:g}\u202f%" if fraction < 1 else "all tokens"


def _profile_table(profiles: Sequence[tuple[Arm, list[tuple[float, float]]]]) -> TableBlock:
    if len(profiles) == 1:
        profile = profiles[0][1]
        total = dict(profile).get(1.0)
        rows = tuple(
            (_top(f), number(v), number(f * v), percent(f * v / total) if total and total > 0 else "\u2013")
            for f, v in profile
        )
        return TableBlock(("tokens", "mean", "contribution", "share of total"), rows, (
            "Contribution: fraction times mean. Shares above 100\u202f% are no error: the remaining tokens have negative "
            "covariance and take it back."))  # fmt: skip
    fractions = [f for f in FRACTIONS if any(f in dict(profile) for _, profile in profiles)]
    body = tuple(
        (arm.name, *(number(dict(p)[f]) if f in dict(p) else "\u2013" for f in fractions))
        for arm, p in profiles
    )
    return TableBlock(("recipe", *map(_top, fractions)), body, "Mean covariance (advantage \u00d7 nats), over all logged steps.",
                      swatches([arm for arm, _ in profiles]))  # fmt: skip


def _carried(profile: Sequence[tuple[float, float]]) -> str:
    values = dict(profile)
    total = values.get(1.0)
    if total is None or 0.02 not in values:
        return ""
    if total <= 0:
        return f"Here the mean over all tokens is {number(total)}: on balance it did not push entropy down."
    share = 0.02 * values[0.02] / total
    if share > 1:
        return f"Here the top 2\u202f% of the tokens carry {number(share, 2)} times the total; the rest is, on balance, negative."
    return f"Here the top 2\u202f% of the tokens carry {percent(share)} of the total."


def _positions(arm: Arm) -> list[tuple[str, Vector]]:
    if not arm.logs:
        return []
    found = []
    for row in arm.logs[0].rows:
        size = 0
        while isinstance(row.get(f"entropy/position/{size}"), (int, float)):
            size += 1
        if size > 1:
            found.append(
                (
                    f"step {row['step']}",
                    np.array([row[f"entropy/position/{i}"] for i in range(size)], dtype=np.float64),
                )
            )
    if len(found) < 2:
        return []
    return [found[i] for i in dict.fromkeys((0, len(found) // 2, len(found) - 1))]


def tiles(arm: Arm) -> list[Tile]:
    """Key figures of a run: where it ended, from where, and the course in between."""
    keys = pass_keys([arm])[-1:]
    wanted = [
        (ENTROPY, "Entropy at the end", "nats"),
        (REWARD, "Reward at the end", ""),
        (VALIDATION, "Validation reward", ""),
    ]
    wanted += [(key, key.removeprefix("eval/").capitalize(), "") for key in keys]
    wanted.append(("eval/distinct", "Distinct answers", ""))
    found = []
    for key, label, unit in wanted:
        first, last = arm.first(key), arm.last(key)
        if first is None or last is None:
            continue
        share = lost(first.mean, last.mean) if key == ENTROPY else None
        gone = "" if share is None else f", {percent(abs(share))} {'lost' if share >= 0 else 'gained'}"
        found.append(Tile(label, level(last.mean), unit, f"from {level(first.mean)}{gone}", _spark(arm, key)))
    return found


def _spark(arm: Arm, key: str) -> str:
    curve = arm.curve(key)
    return "" if curve is None else spark(curve.steps, curve.values)


def spark(x: Vector, y: Vector) -> str:
    """Points of a sparkline in a box of 100 x 28; none for fewer than two values."""
    if x.size < 2:
        return ""
    span = float(y.max() - y.min()) or 1.0
    across = (x - x[0]) / (x[-1] - x[0]) * 100
    up = 26 - (y - y.min()) / span * 24
    stride = max(1, x.size // 60)
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across[::stride], up[::stride], strict=True))
