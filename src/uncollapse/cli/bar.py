"""A progress bar for work that is counted: on stderr, lines where that is no terminal."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from uncollapse.cli.output import console, note


class Bar:
    """A progress bar on stderr; lines where it is no terminal."""

    def __init__(self, title: str) -> None:
        screen = console(stderr=True)
        columns = (
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self.bar = Progress(*columns, console=screen) if screen.is_terminal else None
        self.last = -1

    def __enter__(self) -> Bar:
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("starting", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, done: int, total: int, what: str = "") -> None:
        """So much is done of so much, and what is being done."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, description=what)
        elif done != self.last:
            self.last = done
            note(f"{done}/{total} {what}".rstrip())
