"""A diagnosis on the terminal: course, phases, findings, what to change."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from uncollapse.cli.live import sparkline
from uncollapse.cli.output import console, table
from uncollapse.diagnose.advice import Advice
from uncollapse.diagnose.attribution import FRACTIONS, Attribution
from uncollapse.diagnose.diagnosis import Diagnosis
from uncollapse.diagnose.finding import ENTROPY, REWARD, Finding, percent, short
from uncollapse.diagnose.phases import Phase, State
from uncollapse.diagnose.series import Series, series

WIDTH = 48
"""Characters of the strips: the course of a figure, and the phases below it."""

_IN_FULL = 3
"""Advices printed in full; the others by their titles, since five recipes at once help nobody."""

_STATE: dict[State, tuple[str, str]] = {
    "healthy": ("\u2500", "green"),
    "plateau": ("\u2550", "bright_black"),
    "collapsing": ("\u2572", "yellow"),
    "collapsed": ("\u2581", "red"),
    "exploding": ("\u2571", "magenta"),
    "unknown": ("\u00b7", "bright_black"),
}
"""Mark and colour of a state: told apart without colour as well."""

_SEVERITY = {"severe": "bold red", "warning": "yellow", "info": "cyan"}


def _in(content: RenderableType, left: int, *, above: int = 0, below: int = 0) -> Padding:
    """Indented, without blanks up to the right edge."""
    return Padding(content, (above, 0, below, left), expand=False)


def overview(found: Sequence[Diagnosis]) -> None:
    """Print a line for each of several runs."""
    # What all paths begin with says nothing and would push the rest out of a narrow screen.
    common = os.path.commonpath([os.path.dirname(one.log.source) for one in found])
    rows = [
        [
            os.path.relpath(one.log.source, common) if common else one.log.source,
            one.state,
            f"{one.log.step[-1]:,}" if len(one.log) else "-",
            one.worst or "-",
            one.findings[0].title if one.findings else "nothing found",
        ]
        for one in found
    ]
    table(["run", "state", "last step", "worst", "first finding"], rows)


def show(found: Diagnosis) -> None:
    """Print everything about one run."""
    screen = console()
    log = found.log
    steps = f"steps {log.step[0]:,} to {log.step[-1]:,}, {len(log):,} logged" if len(log) else "no steps"
    screen.print(Text.assemble((log.source, "bold"), f"   {log.format}, {steps}"), soft_wrap=True)
    _, colour = _STATE[found.state]
    screen.print(Text(f"{found.headline}.", style=f"bold {colour}"))
    screen.print()
    screen.print(_in(_course(found), 2))
    for name, text in (("law", _law(found)), ("forecast", _forecast(found))):
        if text:
            screen.print(_in(Text.assemble((f"{name:<10}", "dim"), text), 2))
    if found.findings:
        screen.print()
        screen.print(Text("Findings", style="bold"))
        for one in found.findings:
            screen.print(_in(_finding(one), 2))
    wanted = [name for one in found.findings if one.severity != "info" for name in one.advice]
    advice = [one for one in found.advice if one.id in wanted]
    if advice:
        screen.print()
        screen.print(Text("What to try", style="bold"))
        for index, thing in enumerate(advice[:_IN_FULL], start=1):
            screen.print(_in(_advice(thing, index), 2))
        if advice[_IN_FULL:]:
            rest = "; ".join(one.title for one in advice[_IN_FULL:])
            more = Text(f"Then: {rest} (--html or --json for these in full).", style="dim")
            screen.print(_in(more, 2, above=1))


def show_finding(found: Finding, *, at: int) -> None:
    """Print one finding with the step at which it was made."""
    console().print(_in(Group(Text(f"step {at:,}", style="dim"), _finding(found)), 0))


def show_tokens(found: Attribution) -> None:
    """Print which tokens spent the entropy."""
    screen = console()
    share = dict(zip(FRACTIONS, found.shares, strict=True))[0.02]
    screen.print()
    screen.print(Text("Which tokens spent the entropy (to first order)", style="bold"))
    text = f"{found.tokens:,} tokens of {len(found.steps)} steps; the top 2 % carry {percent(share)} of what pushed entropy down"
    screen.print(_in(Text(text), 2))
    for name, one in found.quadrants.items():
        screen.print(
            _in(Text(f"{name:<20}{short(one.drive):>10} advantage x nats, {one.tokens:,} tokens"), 2)
        )
    for title, tokens in (("spent most", found.spenders[:8]), ("kept most", found.keepers[:8])):
        if tokens:
            words = ", ".join(f"{one.text!r} ({short(one.drive)})" for one in tokens)
            screen.print(_in(Text.assemble((f"{title:<12}", "dim"), words), 2))


def _course(found: Diagnosis) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, min_width=8)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    steps = _sampled(found)
    for key, name, unit in ((ENTROPY, "entropy", " nats"), (REWARD, "reward", "")):
        one = series(found.log, key)
        if one is not None:
            start = found.course.start if key == ENTROPY and found.course.phases else one.start
            grid.add_row(
                name, Text(_strip(one, steps), style="cyan"), f"{short(start)} to {short(one.end)}{unit}"
            )
    if found.course.phases:
        said = ", ".join(_phase(phase) for phase in found.course.phases[-3:])
        more = "..., " if len(found.course.phases) > 3 else ""
        grid.add_row("phases", _phases(found.course.phases, steps), more + said)
    return grid


def _sampled(found: Diagnosis) -> list[float]:
    """Evenly spaced steps, one a character."""
    if not len(found.log):
        return []
    first, last = float(found.log.step[0]), float(found.log.step[-1])
    return [first + (last - first) * i / (WIDTH - 1) for i in range(WIDTH)]


def _strip(one: Series, steps: Sequence[float]) -> str:
    import numpy as np

    values = one.binned().at(np.asarray(steps))
    low = min(float(values.min()), 0.0)  # a sparkline begins at zero; a reward may lie below
    return sparkline([float(value) - low for value in values], width=WIDTH)


def _phases(found: Sequence[Phase], steps: Sequence[float]) -> Text:
    text = Text()
    for step in steps:
        phase = next((one for one in reversed(found) if one.first <= step), found[0])
        text.append(*_STATE[phase.state])
    return text


def _phase(phase: Phase) -> str:
    return f"{phase.state} {phase.first:,} to {phase.last:,}"


def _law(found: Diagnosis) -> str:
    law = found.ceiling
    if law is None:
        return ""
    if not law.holds:
        return "reward does not follow entropy here, so the law names no ceiling"
    return (
        f"ceiling {short(law.value)} (95 %: {short(law.low)} to {short(law.high)}), {percent(law.used)} of the way gone; "
        f"preferred law: {law.laws.verdict.value}"
    )


def _forecast(found: Diagnosis) -> str:
    ahead = found.forecast
    if ahead is None:
        return ""
    if ahead.step is None:
        return f"entropy lasts beyond step {ahead.horizon:,} at this pace"
    bounds = f"{ahead.low:,} to {f'{ahead.high:,}' if ahead.high else 'unknown'}" if ahead.low else "unknown"
    return f"entropy spent (below {short(ahead.target)} nats) at step {ahead.step:,}, 95 %: {bounds}"


def _finding(one: Finding) -> RenderableType:
    head = Text()
    head.append(f"{one.severity:<8}", style=_SEVERITY[one.severity])
    head.append(one.title, style="bold")
    if one.since is not None:
        head.append(f"   since step {one.since:,}", style="dim")
    head.append(f"   confidence {one.confidence}", style="dim")
    lines: list[RenderableType] = [head, _in(Text(one.statement), 8)]
    if one.evidence.numbers:
        lines.append(Padding(Text("; ".join(map(str, one.evidence.numbers)), style="dim"), (0, 0, 0, 8)))
    return Group(*lines)


def _advice(one: Advice, index: int) -> RenderableType:
    lines: list[RenderableType] = [
        Text.assemble(f"{index}. ", (one.title, "bold"), (_sources(one), "dim")),
        _in(Text(one.why), 3),
    ]
    for label, code in (("TRL, GRPOConfig:", one.trl_lines()), ("verl, overrides:", one.verl_lines())):
        if code:
            lines += [
                _in(Text(label, style="dim"), 3),
                _in(Text(code, style="green"), 5),
            ]
    if one.recipe:
        ours = f'uncollapse: --recipe {one.recipe}, or recipe="{one.recipe}" in our GRPOTrainer for TRL'
        lines.append(_in(Text(ours, style="dim"), 3))
    if one.caution:
        lines.append(_in(Text.assemble(("Careful: ", "yellow"), one.caution), 3))
    return _in(Group(*lines), 0, below=1)


def _sources(one: Advice) -> str:
    return f"   arXiv {', '.join(one.arxiv)}" if one.arxiv else ""
