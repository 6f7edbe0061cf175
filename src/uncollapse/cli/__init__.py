"""The command line: it parses and prints, the work is done elsewhere. The only place that prints.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 a claim is not met or a finding is grave
where that was asked for, 2 something that the user can mend (said in one line), 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

from cyclopts import App
from cyclopts.exceptions import CycloptsError

from uncollapse import __version__
from uncollapse.cli.output import console, fail, fail_alone, note, show_warnings
from uncollapse.errors import UncollapseError
from uncollapse.integrations.processes import ProcessError

_VERBS: dict[str, str | dict[str, str]] = {
    "demo": "demo:demo",
    "diagnose": "diagnose:diagnose",
    "inspect": "inspect:inspect",
    "cliff": "cliff:cliff",
    "train": "train:train",
    "compare": "compare:compare",
    "report": "reports:report",
    "list": "catalogue:list_",
    "show": "catalogue:show",
    "recipe": {"show": "recipe:show", "list": "recipe:list_"},
    "reproduce": "reproduce:reproduce",
    "doctor": "doctor:doctor",
}
"""Commands in the order of the help, and the function of each."""


def build() -> App:
    """The application. The modules of all verbs are imported, since a help without their summaries would be none;
    what a verb needs beyond parsing it imports when it runs."""
    app = App(
        name="uncollapse",
        help="See, explain and prevent collapse: entropy collapse in reinforcement learning first of all.\n\n"
        "Start with `uncollapse demo`: it trains a small language model until its entropy collapses, trains it again "
        "with remedies, and writes a report.",
        help_epilogue="Results go to stdout, progress to stderr. Exit codes: 0 done, 1 what --fail-on names was found, "
        "2 mistake in the input, 130 interrupted.",
        version=__version__,
        help_format="markdown",
        suppress_keyboard_interrupt=False,
    )
    for place, (name, target) in enumerate(_VERBS.items()):
        if isinstance(target, str):
            app.command(_function(target), name=name, sort_key=place)
        else:
            app.command(_recipes(name, target, place))
    return app


def _recipes(name: str, verbs: Mapping[str, str], place: int) -> App:
    words = "Look at recipes: what they are made of, what they need, where they run."
    app = App(name=name, help=words, sort_key=place)
    for verb, target in verbs.items():
        app.command(_function(target), name=verb)
    return app


def _function(target: str) -> Callable[..., object]:
    module, name = target.split(":")
    found: Callable[..., object] = getattr(import_module(f"uncollapse.cli.{module}"), name)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    show_warnings()
    tokens = list(sys.argv[1:] if argv is None else argv)
    try:
        result = build()(
            tokens,
            console=console(),
            error_console=console(stderr=True),
            print_error=False,
            exit_on_error=False,
            result_action="return_value",
        )
    except ProcessError as error:
        fail_alone(str(error))
        return 2
    except (UncollapseError, CycloptsError) as error:
        fail(_advice(error))
        return 2
    except KeyboardInterrupt as error:
        note(str(error) or "interrupted")
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough; a second failure while closing would only confuse.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(f"the disk is full ({error.filename or 'while writing'}); make room and continue with --resume")
        return 2
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def _advice(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, CycloptsError):
        chain = " ".join(error.command_chain or ())
        name = " ".join(part for part in ("uncollapse", chain.removeprefix("uncollapse").strip()) if part)
        return f"{text.rstrip('.')}; see {name} --help"
    return text
