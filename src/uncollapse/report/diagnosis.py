"""The page of a diagnosis: course, findings, advice, law and log of one run or several."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from uncollapse.diagnose.advice import Advice
from uncollapse.diagnose.attribution import Attribution
from uncollapse.diagnose.diagnosis import Diagnosis
from uncollapse.diagnose.finding import ENTROPY, REWARD, Finding
from uncollapse.diagnose.series import series
from uncollapse.errors import DataError
from uncollapse.report import attribution, figures, page, phases, sections
from uncollapse.report.blocks import (
    AdviceBlock,
    Block,
    FindingBlock,
    FoldBlock,
    Section,
    TableBlock,
    TextBlock,
    Tile,
    figure,
)
from uncollapse.report.words import level, number, percent
from uncollapse.runs import write_text


def render(found: Sequence[Diagnosis], tokens: Attribution | None = None) -> str:
    """The page as HTML: a section each for one run; for several, an overview and one chapter a run.

    `tokens` is the account of a token dump, for the page of one run. Raises `DataError` if there is no run, or several
    and `tokens`.
    """
    if not found:
        raise DataError("there is no run to write a page about")
    if tokens is not None and len(found) > 1:
        raise DataError(f"a token dump belongs to one run, and here are {len(found)}; name one of them")
    if len(found) == 1:
        one = found[0]
        return page.fill(
            eyebrow=f"Diagnosis \u00b7 {one.log.format} \u00b7 {one.log.source}",
            title=one.headline,
            lead=_lead(one),
            tiles=_tiles(one),
            parts=_sections(one, tokens),
        )
    parts = [_overview(found)]
    parts += [_chapter(one, f"run{index}") for index, one in enumerate(found, start=1)]
    ill = sum(one.worst == "severe" for one in found)
    return page.fill(
        eyebrow=f"Diagnosis \u00b7 {len(found)} runs",
        title=f"{ill} of {len(found)} runs need a decision" if ill else f"{len(found)} runs, none in danger",
        lead=["Every run has a chapter of its own; levels are relative to its own first steps."],
        tiles=[],
        parts=parts,
    )


def write(
    path: str | os.PathLike[str], found: Sequence[Diagnosis], tokens: Attribution | None = None
) -> Path:
    """Write the page to `path`, atomically; arguments and errors as of `render`, and if it cannot be written."""
    return write_text(path, render(found, tokens))


def writer(path: str | os.PathLike[str]) -> Callable[[Diagnosis], Path]:
    """A function that writes the page of one diagnosis to `path`, for `CollapseMonitor(at_end=...)`."""
    return lambda found: write(path, [found])


def _lead(found: Diagnosis) -> list[str]:
    grave = [one.statement for one in found.findings if one.severity != "info"][:2]
    if grave:
        return grave
    return ["Nothing was found that needs a decision."] + [one.statement for one in found.findings[:1]]


def _tiles(found: Diagnosis) -> list[Tile]:
    tiles = []
    for key, label, unit in ((ENTROPY, "Entropy now", "nats"), (REWARD, "Reward now", "")):
        one = series(found.log, key, at_least=1)
        if one is not None:
            start = found.course.start if key == ENTROPY and found.course.phases else one.start
            tiles.append(
                Tile(
                    label,
                    level(one.end),
                    unit,
                    f"from {level(start)}",
                    sections.spark(one.binned().step, one.binned().value),
                )
            )
    if found.ceiling is not None and found.ceiling.holds:
        used = f"{percent(min(max(found.ceiling.used, 0.0), 9.99))} of the way there"
        tiles.append(Tile("Predicted ceiling", level(found.ceiling.value), "", used, ""))
    if found.forecast is not None:
        step = found.forecast.step
        bounds = [
            f"{edge:,}" if edge is not None else "unknown"
            for edge in (found.forecast.low, found.forecast.high)
        ]
        note = (
            f"95\u202f%: {bounds[0]} to {bounds[1]}"
            if step
            else f"not before step {found.forecast.horizon:,}"
        )
        tiles.append(Tile("Entropy spent at step", f"{step:,}" if step else "later", "", note, ""))
    return tiles


def _sections(found: Diagnosis, tokens: Attribution | None) -> list[Section]:
    blocks: list[Block] = [block for block in (phases.course(found, "course"), _phase_table(found)) if block]
    metrics = tuple(found.log.columns)
    return [
        Section("course", "Course", "Course of the run", "", "" if blocks else _NO_COURSE, tuple(blocks), metrics),
        Section("findings", "Findings", "Findings", missing="" if found.findings else "Nothing was found.",
                blocks=tuple(_card(found, one, "") for one in found.findings)),
        Section("advice", "What to try", "What to try", missing="" if found.advice else "Nothing to change.",
                lead=_ADVICE if found.advice else "", blocks=tuple(_advice(one, "") for one in found.advice)),
        _law(found),
        *([attribution.section(tokens)] if tokens is not None else []),
        Section("log", "The log", "The log", blocks=tuple(_log(found))),
    ]  # fmt: skip


_NO_COURSE = "The log holds neither entropy nor reward."
_ADVICE = (
    "In the order of the findings that ask for it. Change one thing, run again from before the marked step, and compare: "
    "entropy that is kept is not yet reward that is won."
)


def _chapter(found: Diagnosis, prefix: str) -> Section:
    """Everything about one of several runs."""
    blocks: list[Block] = [TextBlock(f"{found.headline}. {' '.join(_lead(found))}")]
    blocks += [block for block in (phases.course(found, f"{prefix}-course"), _phase_table(found)) if block]
    blocks += [_card(found, one, f"{prefix}-") for one in found.findings]
    blocks += [_advice(one, f"{prefix}-") for one in found.advice]
    blocks += _log(found)
    name = Path(found.log.source).name or found.log.source
    return Section(prefix, name, found.log.source, blocks=tuple(blocks), metrics=tuple(found.log.columns))


def _overview(found: Sequence[Diagnosis]) -> Section:
    rows = tuple(
        (
            one.log.source,
            one.state,
            f"{one.log.step[-1]:,}" if len(one.log) else "\u2013",
            next((finding.title for finding in one.findings), "nothing found"),
        )
        for one in found
    )
    swatches = tuple(phases.COLOUR[one.state] for one in found)
    return Section("overview", "Overview", "Overview", blocks=(TableBlock(("run", "state", "last step", "first finding"), rows, "", swatches),))  # fmt: skip


def _phase_table(found: Diagnosis) -> TableBlock | None:
    if not found.course.phases:
        return None
    rows = tuple(
        (
            phase.state,
            f"{phase.first:,} to {phase.last:,}",
            f"{percent(phase.start)} to {percent(phase.end)}",
            f"{number(phase.halving)} steps" if phase.halving != float("inf") else "\u2013",
        )
        for phase in found.course.phases
    )
    return TableBlock(("phase", "steps", "entropy, of the start", "halves every"), rows,
                      f"The start: {level(found.course.start)} nats per token, the run's own first steps.",
                      tuple(phases.COLOUR[phase.state] for phase in found.course.phases))  # fmt: skip


def _card(found: Diagnosis, finding: Finding, prefix: str) -> FindingBlock:
    name = f"{prefix}finding-{_slug(finding.id)}"
    titles = {one.id: one.title for one in found.advice}
    return FindingBlock(
        id=name,
        severity=finding.severity,
        title=finding.title,
        text=finding.statement,
        since=f"step {finding.since:,}" if finding.since is not None else "",
        numbers=(
            *(
                (one.label, f"{number(one.value)}{f' {one.unit}' if one.unit else ''}")
                for one in finding.evidence.numbers
            ),
            ("confidence", finding.confidence),
        ),
        figure=phases.evidence(found, finding, name),
        advice=tuple(
            (f"{prefix}advice-{_slug(key)}", titles[key]) for key in finding.advice if key in titles
        ),
    )


def _advice(one: Advice, prefix: str) -> AdviceBlock:
    pasted = (
        ("TRL: GRPOConfig", one.trl_lines()),
        ("verl: overrides", one.verl_lines()),
        (f"uncollapse in a TRL script: recipe {one.recipe}", one.our_lines()),
    )
    return AdviceBlock(
        id=f"{prefix}advice-{_slug(one.id)}",
        title=one.title,
        text=one.why,
        codes=tuple((label, code) for label, code in pasted if code),
        caution=one.caution,
        sources=tuple((f"arXiv {paper}", f"https://arxiv.org/abs/{paper}") for paper in one.arxiv),
    )


def _law(found: Diagnosis) -> Section:
    law = found.ceiling
    title = "The entropy law"
    if law is None:
        return Section(
            "law",
            "Law",
            title,
            missing="The law cannot be fitted: it needs entropy and reward that both move, at the same steps.",
        )
    fit, line = law.laws.exponential, law.laws.straight_line
    rows = tuple(
        (name, number(one.a), number(one.b), f"{level(one.ceiling)} ({level(float(one.interval(0.0)[0]))} to {level(float(one.interval(0.0)[1]))})",
         f"{one.r2:.3f}")
        for name, one in (("b \u2212 a\u00b7exp(H)", fit), ("b \u2212 a\u00b7H", line))
    )  # fmt: skip
    lead = (
        f"Reward has gone {percent(law.used)} of the way to {level(law.value)}, its value at zero entropy."
        if law.holds
        else "The law does not describe this run: reward is not paid for with entropy, or with too much noise. Its ceiling means nothing here."
    )
    drawn = figure("law", lambda axes: figures.law(law.laws, axes[0], title=_reward_title(law.reward_column)), height=320,
                   alt=f"Reward against entropy; ceiling {level(fit.ceiling)}.",
                   caption="One dot per step or bin, from early (faint) to late (strong). Band: 95\u202f% interval of the exponential law.")  # fmt: skip
    said = (
        f"Preferred: {law.laws.verdict.value} (effective \u0394AIC {number(law.laws.effective_delta_aic)})."
    )
    return Section(
        "law",
        "Law",
        title,
        lead,
        "",
        (drawn, TableBlock(("law", "a", "b", "at H = 0", "R\u00b2"), rows, said)),
    )


def _reward_title(column: str) -> str:
    return "Reward" if column == REWARD else "Validation reward"


def _log(found: Diagnosis) -> list[Block]:
    log = found.log
    rows = tuple(
        (name, log.origin.get(name, name), str(int((values == values).sum())))
        for name, values in log.columns.items()
    )
    blocks: list[Block] = [TextBlock(f"{log.format}, {len(log)} logged steps, read from {log.source}.")]
    blocks += [TextBlock(note.text) for note in log.notes[:20]]
    if len(log.notes) > 20:
        blocks.append(TextBlock(f"{len(log.notes) - 20} more notes were left out."))
    if rows:
        blocks.append(TableBlock(("column", "in the file", "values"), rows))
    if log.other:
        blocks.append(FoldBlock("Columns with unknown names", "\n".join(sorted(log.other)[:500])))
    if log.settings:
        blocks.append(
            FoldBlock(
                "Settings",
                json.dumps(dict(log.settings), indent=2, default=str, ensure_ascii=False)[:100_000],
            )
        )
    return blocks


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", name.lower())
