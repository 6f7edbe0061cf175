"""Run contestants alternating on one input, measure time and peak memory, and say on what machine.

A benchmark is a module with `SUMMARY: str` and `case() -> Case`, or with `SIZES`, a mapping, and `case(size)`: it is
then one benchmark per size, `module: size`. Times are taken in one process, one contestant after
the other in an order that is shuffled every round; ratios are medians of the rounds' own ratios, so that a
busy minute hits both sides. Memory is taken in a fresh process per contestant.
"""

from __future__ import annotations

import gc
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

OURS = "uncollapse"


@dataclass(frozen=True)
class Goal:
    """What a benchmark has to reach, computed from its rows."""

    text: str
    value: Callable[[Mapping[str, Mapping[str, Any]]], float | None]
    limit: float
    at_least: bool

    def judge(self, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        value = self.value(rows)
        met = None if value is None else (value >= self.limit if self.at_least else value <= self.limit)
        return {"goal": self.text, "value": value, "limit": self.limit, "at_least": self.at_least, "met": met}


@dataclass(frozen=True)
class Case:
    """One input and everyone who works on it; `check` raises if a peer's result differs from ours."""

    size: str
    contestants: Mapping[str, Callable[[], Any]]
    check: Callable[[], Mapping[str, float]]
    warm_up: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    versions: tuple[str, ...] = ("torch",)
    goals: tuple[Goal, ...] = ()
    memory: bool = True
    """Whether each contestant's peak memory is measured, in a process of its own."""
    baseline: str = OURS
    """Whose time all times are divided by."""
    score: Callable[[], Mapping[str, Any]] | None = None
    """What is measured besides time and memory; it is recorded as it is, and its numbers are a row `score` for goals."""


def times(
    contestants: Mapping[str, Callable[[], Any]], *, rounds: int, tick: Callable[[], None]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and processor seconds per round and contestant; the order within a round is shuffled."""
    order, shuffle = list(contestants), random.Random(0).shuffle
    wall: dict[str, list[float]] = {name: [] for name in order}
    cpu: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            gc.collect()
            start = time.perf_counter(), time.process_time()
            contestants[name]()
            wall[name].append(time.perf_counter() - start[0])
            cpu[name].append(time.process_time() - start[1])
            tick()
    return wall, cpu


def summary(
    wall: Mapping[str, list[float]], cpu: Mapping[str, list[float]], baseline: str = OURS
) -> dict[str, dict[str, Any]]:
    """Median, 20 and 80 percentiles, minimum, and the median over rounds of each one's time over the baseline's.

    Processor time is kept beside wall time: other processes on the machine disturb it less.
    """
    rows = {}
    for name, own in wall.items():
        low, high = _percentiles(own)
        rows[name] = {
            "seconds": {"median": statistics.median(own), "p20": low, "p80": high, "min": min(own)},
            "time_over_ours": _over(wall, name, baseline),
            "min_over_ours": min(own) / min(wall[baseline]),
            "cpu_seconds": statistics.median(cpu[name]),
            "cpu_over_ours": _over(cpu, name, baseline),
        }
    return rows


def _over(seconds: Mapping[str, list[float]], name: str, baseline: str) -> float:
    return statistics.median(own / base for own, base in zip(seconds[name], seconds[baseline], strict=True))


def load(name: str) -> tuple[ModuleType, Case]:
    """The module of a benchmark and its case."""
    stem, _, size = name.partition(": ")
    module = import_module(f"benchmarks.{stem}")
    return module, module.case(size) if size else module.case()


def _percentiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], fifths[3]


def extra_peak_bytes(name: str, contestant: str, threads: int) -> int:
    """Peak resident memory above that before the call, measured in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "--only",
        name,
        "--threads",
        str(threads),
        "--memory-of",
        contestant,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ.copy())
    return int(done.stdout.strip().splitlines()[-1])


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes by which resident memory rose at most while `call` ran."""
    gc.collect()
    reset = Path("/proc/self/clear_refs")
    if reset.exists():  # Linux keeps an exact high-water mark, and forgets it on request
        reset.write_text("5")
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before
    return _sampled_peak(call)


def _status(field_name: str) -> int:
    match = re.search(rf"^{field_name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field_name}")
    return int(match.group(1)) * 1024


def _sampled_peak(call: Callable[[], Any]) -> int:
    import psutil

    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return peak - before


def machine(threads: int) -> dict[str, Any]:
    """Hardware, threads and load."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return {
        "cpu": model.group(1) if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_1min_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of distributions."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def run(name: str, *, rounds: int, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """One benchmark: agreement first, then times, then memory."""
    torch.set_num_threads(threads)
    host = machine(threads)
    module, case = load(name)
    for peer, reason in case.absent.items():
        say(f"{name}: {peer} is absent: {reason}")
    say(f"{name}: comparing results")
    differences = dict(case.check())
    say(f"{name}: {rounds} rounds of {', '.join(case.contestants)}")
    rows = summary(*times(case.contestants, rounds=rounds, tick=lambda: say(".")), case.baseline)
    for contestant, row in rows.items():
        if case.memory:
            say(f"{name}: memory of {contestant}")
            row["extra_peak_mb"] = round(extra_peak_bytes(name, contestant, threads) / 1e6, 1)
        row["largest_difference"] = differences.get(contestant)
    score = dict(case.score()) if case.score is not None else {}
    judged = {**rows, "score": score}
    return {
        "summary": module.SUMMARY,
        "size": case.size,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rounds": rounds,
        "machine": host
        | {"load_1min_after": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None},
        "versions": versions(case.versions),
        "rows": rows,
        "absent": dict(case.absent),
        "goals": [goal.judge(judged) for goal in case.goals],
        **({"score": score} if score else {}),
    }


def memory_of(name: str, contestant: str, threads: int) -> int:
    """What the child process of `extra_peak_bytes` does."""
    torch.set_num_threads(threads)
    _, case = load(name)
    case.warm_up.get(
        contestant, lambda: None
    )()  # imports and library workspaces are not the contestant's memory
    return peak_of(case.contestants[contestant])
