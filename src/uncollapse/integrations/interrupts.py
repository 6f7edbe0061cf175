"""Ctrl-C and kill, taken at the next point where nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from uncollapse.runs import Run


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop: its checkpoint is written, `run` can be resumed."""

    def __init__(self, run: Run) -> None:
        super().__init__(f"interrupted; continue with --resume --output {run.path}")
        self.run = run


@dataclass
class StopRequest:
    """Whether somebody asked to stop."""

    requested: bool = False


@contextmanager
def stop_requests(told: Callable[[], None] | None = None) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request (`told` is called); a second one interrupts at once.

    Outside of the main thread, where Python delivers no signals, nothing is changed.
    """
    stop = StopRequest()

    def handle(number: int, frame: Any) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        if told is not None:
            told()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
