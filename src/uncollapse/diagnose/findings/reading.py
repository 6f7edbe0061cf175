"""Findings about the log itself: what it lacks, and what was odd about it."""

from __future__ import annotations

from collections.abc import Iterator

from uncollapse.diagnose.finding import ENTROPY, Evidence, Facts, Finding, Number, Severity, sentence
from uncollapse.diagnose.log import Kind
from uncollapse.diagnose.phases import FEWEST

ENOUGH = 20
"""Logged steps from which levels, noise and trends can be told apart."""

_NOTES: dict[Kind, tuple[Severity, str]] = {
    "broken": ("info", "Lines that cannot be read"),
    "duplicate": ("info", "Steps logged twice"),
    "gap": ("info", "Steps are missing"),
    "mixed": ("warning", "Several runs in one log"),
    "reset": ("info", "The step counter went back"),
    "thinned": ("info", "Averaged to fit into memory"),
    "unmapped": ("info", "Columns with unknown names"),
}
"""Non-finite numbers are a finding about the update, see `uncollapse.diagnose.findings.updates`."""


def no_entropy(facts: Facts) -> Finding | None:
    """Without entropy there are no phases, no law and no forecast."""
    if not len(facts.log) or facts.series(ENTROPY, 1) is not None:
        return None
    others = sorted(facts.log.other)[:5]
    hint = (
        f" Columns with other names: {', '.join(others)}; say which it is with --map entropy=NAME."
        if others
        else ""
    )
    return Finding("no-entropy", "No entropy in this log", "warning",
                   f"No column holds the entropy per token, so phases, law and forecast are left out.{hint}",
                   confidence="high", advice=("log-entropy",))  # fmt: skip


def too_short(facts: Facts) -> Finding | None:
    """Too few steps to tell noise from change."""
    points = len(facts.log)
    found = facts.series(ENTROPY, 1)
    if points >= ENOUGH and (found is None or len(found) >= ENOUGH):
        return None
    count = points if found is None else len(found)
    what = "no phase is named" if count < FEWEST else "changes have to be large to be told from noise"
    return Finding("log-short", "Few steps so far", "info", f"{count} logged steps hold entropy; below {ENOUGH}, {what}.",
                   Evidence((), (), (Number("steps", float(count)),)), confidence="high")  # fmt: skip


def notes(facts: Facts) -> Iterator[Finding]:
    """What the reader noticed, one finding a kind."""
    for kind, (severity, title) in _NOTES.items():
        said = [note for note in facts.log.notes if note.kind == kind]
        if not said or (kind == "unmapped" and facts.series(ENTROPY, 1) is None):  # `no_entropy` says it
            continue
        steps = tuple(step for note in said for step in note.steps)
        more = f" ({len(said) - 1} more of this kind.)" if len(said) > 1 else ""
        yield Finding(f"log-{kind}", title, severity, f"{sentence(said[0].text)}{more}",
                      Evidence((), steps[:50], ()), steps[0] if steps else None, "high")  # fmt: skip
