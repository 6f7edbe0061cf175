"""A child process that judges hostile text under limits of time, memory and files.

The child reads one JSON request a line and answers with one line. The parent waits for a bounded time; a
child that hangs or dies is killed and replaced, and the request has no answer. On POSIX the child may also
not write files, dump core, or take more than `MEMORY` bytes beyond what it starts with. It ends when its
standard input closes, so it never outlives the parent. Its hash seed is fixed: what it computes from a
seed is the same in every child.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

MEMORY = 2 * 1024**3
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from uncollapse.tasks.sandbox import serve; serve(sys.argv[2], sys.argv[3])"
)


class TimedOut(Exception):
    """The child gave no answer in time; it has been killed."""


class Failed(Exception):
    """The child reported an exception, or died."""


class Sandbox:
    """One child process, started on first use and again after it was killed.

    Args:
        module: module that the child imports before the limits are set.
        function: name in that module: request -> result, both of JSON types.
    """

    def __init__(self, module: str, function: str) -> None:
        self._target = (module, function)
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()

    def ask(self, request: dict[str, Any], *, seconds: float | int, start_seconds: float | int = 120) -> Any:
        """The child's result for one request.

        Args:
            request: of JSON types.
            seconds: limit for the answer, wall time.
            start_seconds: limit for starting the child and its imports.

        Raises:
            TimedOut: no answer in time.
            Failed: the function raised, or the child died (for example out of memory).
        """
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._start()
                self._receive(start_seconds)
            assert self._child is not None
            assert self._child.stdin is not None
            try:
                self._child.stdin.write(json.dumps(request) + "\n")
                self._child.stdin.flush()
            except OSError as error:
                self._stop()
                raise Failed("the process that judges has died") from error
            reply = self._receive(seconds)
        if "error" in reply:
            raise Failed(reply["error"])
        return reply["result"]

    def close(self) -> None:
        """End the child; the next request starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        command = [sys.executable, "-c", _START, json.dumps(sys.path), *self._target]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
        }
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        self._lines = queue.Queue()
        threading.Thread(target=_read_lines, args=(self._child.stdout, self._lines), daemon=True).start()
        weakref.finalize(self, _end, self._child)

    def _receive(self, seconds: float | int) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self._stop()
            raise TimedOut(f"no answer within {seconds:g} s") from None
        if not line:
            self._stop()
            raise Failed("the process that judges has died")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _stop(self) -> None:
        if self._child is not None:
            _end(self._child)
            self._child = None


def _read_lines(stream: Any, lines: queue.Queue[str]) -> None:
    """Hand over each line, and an empty one at the end of the stream."""
    with stream, suppress(ValueError):
        for line in stream:
            lines.put(line)
    lines.put("")


def _end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    if child.stdin is not None:
        with suppress(OSError):
            child.stdin.close()


def serve(module: str, function: str) -> None:
    """The child's loop; anything that the judge prints goes nowhere."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    judge: Callable[[dict[str, Any]], Any] = getattr(importlib.import_module(module), function)
    _limit_resources()
    _reply(replies, {"result": "ready"})
    for line in sys.stdin:
        try:
            reply = {"result": judge(json.loads(line))}
        except BaseException as error:  # whatever hostile text provokes, SystemExit too
            reply = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        _reply(replies, reply)


def _reply(stream: Any, reply: dict[str, Any]) -> None:
    stream.write(json.dumps(reply) + "\n")
    stream.flush()


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:  # not POSIX: the limit of time alone
        return
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY,) * 2)


def _address_space() -> int:
    """Bytes of address space in use, 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as facts:
            return int(facts.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return MEMORY
