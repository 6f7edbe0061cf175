"""Progress on stderr: a live line in a terminal, a plain one every few steps elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from uncollapse.cli.output import console, note
from uncollapse.integrations.progress import Progress, Watch

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK = 32
_PLAIN_LINES = 20
"""About how many lines a run prints where there is no terminal."""


def sparkline(values: list[float], width: int = _SPARK) -> str:
    """The course of a figure from 0 to its largest value, `width` characters at most."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    size = max(1, math.ceil(len(finite) / width))
    means = [sum(finite[i : i + size]) / len(finite[i : i + size]) for i in range(0, len(finite), size)]
    top = max(*means, 1e-12) if len(means) > 1 else max(means[0], 1e-12)
    return "".join(_BLOCKS[min(int(max(mean, 0.0) / top * 8), 7)] for mean in means)


def duration(seconds: float) -> str:
    """`45 s`, `3:20`, `1:02:00`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


class _View:
    """What is known about the run so far; both displays draw from it."""

    def __init__(self, title: str) -> None:
        self.title, self.latest, self.what = title, Progress(0, 1), "starting"
        self.entropy: list[float] = []
        self.times: list[float] = []

    def update(self, progress: Progress) -> None:
        self.what = progress.what
        if not progress.row:
            return
        self.latest = progress
        self.entropy.append(progress.row.get("entropy/token/mean", math.nan))
        self.times.append(progress.row.get("time/step", math.nan))

    def figures(self) -> list[tuple[str, str]]:
        row = self.latest.row
        found = [
            ("reward", "reward/mean", 3),
            ("entropy", "entropy/token/mean", 3),
            ("ceiling", "law/ceiling", 2),
        ]
        shown = [
            (name, f"{row[key]:.{digits}f}")
            for name, key, digits in found
            if math.isfinite(row.get(key, math.nan))
        ]
        recent = [t for t in self.times[-10:] if math.isfinite(t)]
        if recent:
            pace = sum(recent) / len(recent)
            shown.append(("s/step", f"{pace:.2f}"))
            shown.append(("left", duration(pace * (self.latest.steps - self.latest.done))))
        return shown


@contextmanager
def watching(title: str) -> Iterator[Watch]:
    """Show the progress of one run; a function to call with each `Progress`."""
    screen = console(stderr=True)
    view = _View(title)
    if not screen.is_terminal:
        yield _Plain(view)
        return
    with Live(console=screen, auto_refresh=False, transient=False) as live:

        def watch(progress: Progress) -> None:
            view.update(progress)
            live.update(_drawn(view), refresh=True)

        live.update(_drawn(view), refresh=True)
        yield watch


def _drawn(view: _View) -> Group:
    grid = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=view.latest.steps, completed=view.latest.done, width=24)
    grid.add_row(
        Text(view.title, style="bold"),
        bar,
        f"{view.latest.done}/{view.latest.steps}",
        Text(view.what, style="dim"),
    )
    line = Text("  ")
    for name, value in view.figures():
        line.append(f"{name} ", style="dim")
        line.append(value)
        if name == "entropy":
            line.append(f" {sparkline(view.entropy)}", style="cyan")
        line.append("  ")
    return Group(grid, line)


class _Plain:
    """A line every few steps, for logs."""

    def __init__(self, view: _View) -> None:
        self.view, self.printed = view, 0.0

    def __call__(self, progress: Progress) -> None:
        self.view.update(progress)
        if progress.what:
            note(f"{self.view.title}: {progress.what}")
            return
        every = max(progress.steps // _PLAIN_LINES, 1)
        due = progress.done in (1, progress.steps) or progress.done % every == 0
        # Steps of minutes are each worth a line.
        if due or time.monotonic() - self.printed > 60:
            self.printed = time.monotonic()
            figures = "  ".join(f"{name} {value}" for name, value in self.view.figures())
            note(f"{self.view.title}: step {progress.done}/{progress.steps}  {figures}")
