"""Where the command line writes: results to stdout, everything else to stderr; tables, JSON, one-line messages.

Of several processes that train together, the leading one alone writes.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from uncollapse.integrations.processes import leads

_PLAIN_WIDTH = 160


def console(*, stderr: bool = False) -> Console:
    """A console on the current stdout or stderr; without colour where it is no terminal or NO_COLOR is set."""
    return _console(stderr=stderr, quiet=not leads())


def _console(*, stderr: bool, quiet: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    wide = stream.isatty() or "COLUMNS" in os.environ
    width = None if wide else _PLAIN_WIDTH
    return Console(file=stream, highlight=False, soft_wrap=False, width=width, quiet=quiet)


def say(text: str) -> None:
    """A line of the result, never wrapped, its brackets taken literally."""
    console().print(escape(text), soft_wrap=True)


def note(text: str) -> None:
    """A line about what is going on."""
    console(stderr=True).print(escape(text), soft_wrap=True)


def fail(message: str) -> None:
    """The one line of an error."""
    _error_line(console(stderr=True), message)


def fail_alone(message: str) -> None:
    """The one line of an error that this process alone knows, leading or not."""
    _error_line(_console(stderr=True, quiet=False), message)


def _error_line(screen: Console, message: str) -> None:
    line = " ".join(message.split())
    screen.print(f"[bold red]error:[/] {escape(line)}", soft_wrap=True)


def show_warnings() -> None:
    """Our own warnings in one line each; those of the libraries below are not the user's to mend."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", module=r"uncollapse(\..*)?")

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        console(stderr=True).print(
            f"[yellow]warning:[/] {escape(' '.join(str(message).split()))}", soft_wrap=True
        )

    warnings.showwarning = show


def as_json(data: Any) -> None:
    """A result for programs."""
    text = json.dumps(data, indent=2, ensure_ascii=False, default=str)
    if leads():
        sys.stdout.write(text + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """A table on stdout; the last column wraps, the others keep to one line."""
    grid = Table(
        title=title, title_justify="left", box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0)
    )
    for index, column in enumerate(columns):
        last = index == len(columns) - 1
        grid.add_column(column, no_wrap=not last, overflow="fold" if last else "ellipsis")
    for row in rows:
        grid.add_row(*(escape(cell) for cell in row))
    console().print(grid)
