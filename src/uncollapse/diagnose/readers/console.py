"""What a trainer printed: verl's console lines, and the mappings that the Transformers trainer prints.

verl prints `step:12 - actor/entropy:0.31 - critic/score/mean:0.5`, behind colours and the prefix of a Ray worker; other
lines are passed over. Transformers prints `{'loss': '0.1', 'entropy': '0.3', ...}` without a step: rows are numbered.
Nothing that was printed is evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from uncollapse.diagnose.readers.collect import Collector, as_number
from uncollapse.diagnose.readers.runs import Runs
from uncollapse.diagnose.readers.text import bare, lines

VERL, TRANSFORMERS = "verl console log", "Transformers console log"
LONGEST = 1 << 20
"""Bytes of the longest line that is looked at."""
_VERL = re.compile(rb"(?:^|[\s)\]])step:(\d{1,15})((?: - [^\r\n]*)?)")
_PRINTED = re.compile(rb"\{'[^'{}]{1,200}': .*\}")
_PAIR = re.compile(rb"'([^'{}]{1,200})': '?([-+.\w]{1,40})'?(?=[,}])")
_WRAPPED = re.compile(r"\w+(?:\.\w+)*\(([^()]{1,40})\)")
"""A number with its type around it, as `np.float64(0.31)`."""


def format_of(head: Iterable[bytes]) -> str | None:
    """The format of the console whose lines these are, or None."""
    for line in head:
        match = _VERL.search(bare(line)) if b"step:" in line else None
        if match is not None and b":" in match[2]:
            return VERL
        if _printed(bare(line)):
            return TRANSFORMERS
    return None


def read_verl(path: Path, runs: Runs) -> list[Collector]:
    """The runs in what verl printed."""
    runs.step, runs.run = "\0step", ""
    broken = 0
    for _, line in lines(path):
        if b"step:" not in line or len(line) > LONGEST:
            continue
        match = _VERL.search(bare(line))
        if match is None or b":" not in match[2]:
            continue
        row: dict[str, Any] = {"\0step": int(match[1])}
        for pair in match[2].decode("utf-8", "replace").split(" - ")[1:]:
            name, _, text = pair.rpartition(":")
            try:
                row[name] = float(text)
            except ValueError:
                number = _wrapped(text)
                if number is not None:
                    row[name] = number
                broken += number is None
        runs.add(row)
    return _told(runs, broken)


def read_transformers(path: Path, runs: Runs) -> list[Collector]:
    """The runs in what the Transformers trainer printed; an evaluation belongs to the row before it."""
    number = -1
    for _, line in lines(path):
        if b"{'" not in line or len(line) > LONGEST or (found := _printed(bare(line))) is None:
            continue
        row = {
            name.decode("utf-8", "replace"): as_number(text.decode("ascii", "replace"))
            for name, text in found
        }
        if "train_runtime" in row:
            continue
        if "step" in row:
            runs.step = "step"
        elif runs.step is None:
            evaluation = any(name.startswith("eval_") for name in row)
            number += not evaluation or number < 0
            runs.uncounted = 1
            collector = runs.collector("", number)
            if collector is not None:
                collector.add_row(number, row)
            continue
        runs.add(row)
    return _told(runs, 0)


def _printed(line: bytes) -> list[tuple[bytes, bytes]] | None:
    """The pairs of a mapping that was printed, if it is the trainer's: several numbers, one of them an epoch or a loss."""
    if b"{'" not in line or (match := _PRINTED.search(line)) is None:
        return None
    pairs: list[tuple[bytes, bytes]] = _PAIR.findall(match[0])
    names = {name for name, _ in pairs}
    known = {b"loss", b"epoch", b"eval_loss", b"train_loss", b"learning_rate"}
    return pairs if len(names) > 1 and names & known else None


def _wrapped(text: str) -> float | None:
    wrapped = _WRAPPED.fullmatch(text.strip())
    return as_number(wrapped[1]) if wrapped else None


def _told(runs: Runs, broken: int) -> list[Collector]:
    found = runs.collectors()
    for collector in found:
        if broken:
            collector.note("broken", f"{broken} values cannot be read as numbers and were skipped")
    return found
