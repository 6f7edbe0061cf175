"""`uncollapse report`: the page of a run or a comparison."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from uncollapse.cli.output import say


def report(run: Path, /, *, open_: Annotated[bool, Parameter(name="--open", negative="")] = False) -> None:
    """Write report.html for a run or a comparison; finished or not.

    Example: `uncollapse report runs/clip-cov --open`

    Parameters
    ----------
    run
        Directory of a run or a comparison.
    open_
        Open the page in the browser.
    """
    from uncollapse.report import write

    path = write(run)
    say(f"report: {path}")
    if open_:
        webbrowser.open(path.resolve().as_uri())
