"""TensorBoard event files, without TensorBoard: TFRecord framing and the few protobuf fields of a scalar.

A record is its length (8 bytes), the masked CRC-32C of the length, the data and the masked CRC-32C of the data. A record
whose data do not match is skipped; where a length does not match, the next one that does is looked for. All checks and
nearly all decoding run in NumPy over records of one length at a time: a run logs the same tags again and again.

Fields read (tensorboard/compat/proto): Event.wall_time 1, step 2, summary 5; Summary.value 1; Value.tag 1,
simple_value 2, tensor 8; TensorProto.dtype 1, tensor_content 4, float_val 5, double_val 6, string_val 8.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

from uncollapse.diagnose.readers.collect import LAST_STEP, Collector
from uncollapse.diagnose.readers.crc32c import masked_crcs
from uncollapse.diagnose.readers.flat import flat
from uncollapse.diagnose.readers.runs import Runs
from uncollapse.diagnose.readers.text import opened
from uncollapse.diagnose.readers.wire import Malformed, fields, signed

FORMAT = "TensorBoard events"
BLOCK = 1 << 23
LONGEST = 1 << 20
"""Bytes of the longest record that is looked at: a scalar has some tens, images and histograms are skipped."""
RESYNC = 1 << 20
"""Bytes searched for the next record after one whose length is broken."""
_HEAD, _EDGE = 12, 16
_LEAST = 8
_WEIGHT = (np.arange(1, 1025, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
"""Weights of the bytes in a sum that is the same for the same tag; what else has that sum is compared and told apart."""

Offsets = Int[np.ndarray, " _"]
Bytes = UInt8[np.ndarray, " byte"]
Scalars = dict[str, list[tuple[Any, Any, Any]]]
"""For each tag: arrays of record number, step and value."""


def looks_like(head: bytes) -> bool:
    """Whether a file that starts so is a TFRecord file: the first length matches its CRC."""
    if len(head) < _HEAD:
        return False
    data = np.frombuffer(head[:_HEAD], dtype=np.uint8)
    return bool(masked_crcs(data, np.array([0]), np.array([8]))[0] == struct.unpack_from("<I", head, 8)[0])


def read(paths: Sequence[Path]) -> list[Collector]:
    """The run that the event files of one directory hold; a file that begins again at the first step begins another."""
    runs, counters = Runs(restarts=False), _Counters()
    for path in paths:
        trouble = Trouble()
        settings: dict[str, Any] = {}
        with opened(path) as stream:
            for records in _records(stream, trouble):
                _add(runs, _scalars(records, settings, trouble), counters)
        current = next(reversed(runs.found.values()), None)
        if current is None:
            continue
        current.settings.update(settings)
        for text in trouble.told(path.name):
            current.note("broken", text)
    return runs.collectors()


class Trouble:
    """What could not be read in one file."""

    def __init__(self) -> None:
        self.records = 0
        self.lengths = 0
        self.stopped = False
        self.cut = False

    def told(self, name: str) -> Iterator[str]:
        """One sentence for each kind of trouble."""
        if self.records:
            yield f"{name}: {self.records} broken records were skipped"
        if self.lengths:
            yield f"{name}: lost the place of the records {self.lengths} times" + (
                " and did not find it again; the rest was not read" if self.stopped else " and found it again"
            )
        if self.cut:
            yield f"{name}: the last record is cut off"


class Records:
    """Whole records of one block."""

    def __init__(self, data: Bytes, start: Offsets, length: Offsets) -> None:
        self.data, self.start, self.length = data, start, length

    def bytes_of(self, row: int) -> bytes:
        """The data of one record."""
        return self.data[self.start[row] : self.start[row] + self.length[row]].tobytes()


def _records(stream: IO[bytes], trouble: Trouble) -> Iterator[Records]:
    """Blocks of records whose lengths and data match their checks."""
    rest = b""
    while True:
        try:
            data = stream.read(BLOCK)
        except (EOFError, OSError):
            data = b""
        buffer = rest + data
        start, length, at = _walk(buffer)
        array = np.frombuffer(buffer, dtype=np.uint8)
        good = _lengths_match(array, start)
        if not good.all():
            at = int(start[np.argmin(good)]) - _HEAD
            start, length = start[: np.argmin(good)], length[: np.argmin(good)]
        kept = length <= LONGEST
        start, length = start[kept], length[kept]
        fine = masked_crcs(array, start, length) == _stored(array, start + length)
        trouble.records += int((~fine).sum())
        yield Records(array, start[fine], length[fine])
        if not good.all() or _is_lost(buffer, at):
            trouble.lengths += 1
            found = _next_record(array, at + 1)
            if found is None:
                trouble.stopped = True
                return
            at = found
        elif not data:
            trouble.cut = at < len(buffer)
            return
        rest = _skipped(stream, buffer, at)


def _walk(buffer: bytes) -> tuple[Offsets, Offsets, int]:
    """Where the data of each whole record start, how long they are, and where the first incomplete record starts."""
    unpack, size, at = struct.Struct("<Q").unpack_from, len(buffer), 0
    start, length = [], []
    while at + _EDGE <= size:
        (count,) = unpack(buffer, at)
        if at + _EDGE + count > size:
            break
        start.append(at + _HEAD)
        length.append(count)
        at += _EDGE + count
    return np.array(start, dtype=np.int64), np.array(length, dtype=np.int64), at


def _stored(data: Bytes, at: Offsets) -> Any:
    """The little-endian 32-bit numbers at these offsets."""
    four = data[at[:, None] + np.arange(4)].astype(np.uint32)
    return four[:, 0] | four[:, 1] << np.uint32(8) | four[:, 2] << np.uint32(16) | four[:, 3] << np.uint32(24)


def _lengths_match(data: Bytes, start: Offsets) -> Bool[np.ndarray, " row"]:
    expected = masked_crcs(data, start - _HEAD, np.full(len(start), 8))
    return np.asarray(expected == _stored(data, start - 4))


def _is_lost(buffer: bytes, at: int) -> bool:
    """Whether the incomplete record at the end is none at all, because its length does not match its check."""
    if len(buffer) - at < _HEAD:
        return False
    return not looks_like(buffer[at : at + _HEAD])


def _next_record(data: Bytes, at: int) -> int | None:
    """The next offset, within `RESYNC` bytes, at which a length matches its check."""
    window = np.arange(at, min(at + RESYNC, len(data) - _HEAD + 1))
    if not len(window):
        return None
    # A length has zeros above its third byte: almost all offsets are ruled out before any check is computed.
    plausible = window[(data[window + 4] | data[window + 5] | data[window + 6] | data[window + 7]) == 0]
    found = plausible[_lengths_match(data, plausible + _HEAD)] if len(plausible) else plausible
    return int(found[0]) if len(found) else None


def _skipped(stream: IO[bytes], buffer: bytes, at: int) -> bytes:
    """What of the buffer is still to be read; a record too long to hold is passed over."""
    rest = buffer[at:]
    if len(rest) < _HEAD:
        return rest
    beyond = struct.unpack_from("<Q", rest)[0] + _EDGE - len(rest)
    if beyond <= LONGEST:
        return rest
    while beyond > 0:
        try:
            passed = len(stream.read(min(beyond, BLOCK)))
        except (EOFError, OSError):
            passed = 0
        if not passed:
            break
        beyond -= passed
    return b""


# ---- scalars of many records -------------------------------------------------------------------------------


def _scalars(records: Records, settings: dict[str, Any], trouble: Trouble) -> Scalars:
    found: Scalars = {}
    for size in np.unique(records.length):
        rows = np.flatnonzero(records.length == size)
        slow = rows if len(rows) < _LEAST else _same_length(records, rows, int(size), found)
        for row in slow.tolist():
            try:
                for tag, step, value in _event(records.bytes_of(row), settings):
                    found.setdefault(tag, []).append(([row], [step], [value]))
            except (Malformed, struct.error):
                trouble.records += 1
    return found


def _same_length(records: Records, rows: Offsets, size: int, found: Scalars) -> Offsets:
    """Decode records of one length that hold one plain scalar; gives back those that are not so plain.

    Such an event is wall time (9 bytes), step (a varint, or nothing for 0), and then, up to its last four bytes, the
    same bytes for the same tag: only the first record of each kind is decoded field by field.
    """
    if size < 20 or size > len(_WEIGHT):
        return rows
    table = records.data[records.start[rows][:, None] + np.arange(size)]
    slow = np.ones(len(rows), dtype=bool)
    for width in range(0, 9):
        here = (table[:, 0] == 0x09) & (table[:, 9] == (0x10 if width else 0x2A)) & (10 + width < size - 5)
        if width:
            here &= (table[:, 10 : 9 + width] >= 0x80).all(axis=1) & (table[:, 9 + width] < 0x80)
        else:
            width = -1
        chosen = np.flatnonzero(here)
        if len(chosen):
            done = _same_shape(table[chosen], rows[chosen], 10 + width, found)
            slow[chosen[done]] = False
    return rows[slow]


def _same_shape(
    table: UInt8[np.ndarray, "row byte"], rows: Offsets, middle: int, found: Scalars
) -> Bool[np.ndarray, " row"]:
    """Decode events whose bytes from `middle` on are the summary; says which of them were plain scalars."""
    done = np.zeros(len(rows), dtype=bool)
    rest = table[:, middle:-4]
    _, first, kind = np.unique(
        rest.astype(np.uint64) @ _WEIGHT[: rest.shape[1]], return_index=True, return_inverse=True
    )
    steps = np.zeros(len(rows), dtype=np.int64)
    for place, byte in enumerate(range(10, middle)):
        steps |= (table[:, byte].astype(np.int64) & 0x7F) << (7 * place)
    values = np.ascontiguousarray(table[:, -4:]).view("<f4")[:, 0].astype(np.float64)
    for number, sample in enumerate(first):
        tag = _plain_tag(table[sample].tobytes(), middle)
        if tag is None:
            continue
        same = np.flatnonzero(kind.reshape(-1) == number)
        same = same[(rest[same] == rest[sample]).all(axis=1)]
        done[same] = True
        kept = same[steps[same] <= LAST_STEP]
        found.setdefault(tag, []).append((rows[kept], steps[kept], values[kept]))
    return done


def _plain_tag(event: bytes, middle: int) -> str | None:
    """The tag, if what follows `middle` is a summary of one value whose last field is the simple value."""
    try:
        ((number, summary),) = fields(event[middle:])
        assert isinstance(summary, bytes)
        ((inner, value),) = fields(summary)
        assert isinstance(value, bytes)
        (first, tag), *_, (last, _) = fields(value)
    except (Malformed, ValueError, AssertionError):
        return None
    plain = number == 5 and inner == 1 and first == 1 and last == 2 and value[-5:-4] == b"\x15"
    return tag.decode("utf-8", "replace") if plain and isinstance(tag, bytes) else None


class _Counters:
    """Where a run begins again. Each tag may count steps of its own, so that only one tag, that with the most values, tells."""

    def __init__(self) -> None:
        self.values: Counter[str] = Counter()
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}

    def restarts(self, columns: Mapping[str, tuple[Offsets, Offsets]]) -> Offsets:
        """Records of this block at which another run begins; `columns` are records and steps of each tag."""
        self.values.update({tag: len(rows) for tag, (rows, _) in columns.items()})
        main = self.values.most_common(1)[0][0]
        found = np.empty(0, dtype=np.int64)
        if main in columns:
            rows, steps = columns[main]
            before = np.concatenate([[self.last.get(main, steps[0])], steps[:-1]])
            back = np.flatnonzero((steps < before) & (steps <= self.first.get(main, steps[0])))
            found = rows[back]
            if len(back):
                self.first, self.last = {main: int(steps[back[-1]])}, {}
        for tag, (_, steps) in columns.items():
            self.first.setdefault(tag, int(steps[0]))
            self.last[tag] = int(steps[-1])
        return found


def _add(runs: Runs, scalars: Scalars, counters: _Counters) -> None:
    """Hand a block of records to the runs that they belong to."""
    columns = {}
    for tag, parts in scalars.items():
        rows, steps, values = (
            np.concatenate([np.asarray(piece) for piece in part]) for part in zip(*parts, strict=True)
        )
        order = np.argsort(rows, kind="stable")
        columns[tag] = (
            rows[order].astype(np.int64),
            steps[order].astype(np.int64),
            values[order].astype(np.float64),
        )
    if not columns:
        return
    every = np.unique(np.concatenate([rows for rows, _, _ in columns.values()]))
    steps = np.zeros(len(every), dtype=np.int64)
    placed = {}
    for tag, (rows, at, values) in columns.items():
        # One event may hold several values of one tag; the last one counts.
        last = np.concatenate([rows[1:] != rows[:-1], [True]])
        place = np.searchsorted(every, rows[last])
        steps[place] = at[last]
        placed[tag] = (place, values[last])
    restarts = counters.restarts({tag: (rows, at) for tag, (rows, at, _) in columns.items()})
    cuts = [_begin(steps, int(at)) for at in np.searchsorted(every, restarts)]
    for start, stop in pairwise([0, *cuts, len(every)]):
        if start in cuts:
            runs.begin()
        bounds = {tag: np.searchsorted(place, (start, stop)) for tag, (place, _) in placed.items()}
        part = {
            tag: (placed[tag][0][low:high] - start, placed[tag][1][low:high])
            for tag, (low, high) in bounds.items()
        }
        runs.add_block(steps[start:stop], part)


def _begin(steps: Offsets, at: int) -> int:
    """Where the step that holds a record begins: its other tags were logged just before."""
    while at > 0 and steps[at - 1] == steps[at]:
        at -= 1
    return at


# ---- one event, field by field -----------------------------------------------------------------------------


def _event(event: bytes, settings: dict[str, Any]) -> Iterator[tuple[str, int, float]]:
    """Tag, step and value of every scalar; texts of arguments go into `settings`."""
    step, summaries = 0, []
    for number, value in fields(event):
        if number == 2 and isinstance(value, int):
            step = signed(value)
        elif number == 5 and isinstance(value, bytes):
            summaries.append(value)
    if abs(step) > LAST_STEP:
        return
    for summary in summaries:
        for number, value in fields(summary):
            if number == 1 and isinstance(value, bytes):
                tag, scalar = _value(value, settings)
                if scalar is not None:
                    yield tag, step, scalar


def _value(value: bytes, settings: dict[str, Any]) -> tuple[str, float | None]:
    tag, scalar, tensor = "", None, None
    for number, content in fields(value):
        if isinstance(content, int):
            continue
        if number == 1:
            tag = content.decode("utf-8", "replace")
        elif number == 2 and len(content) == 4:
            (scalar,) = struct.unpack("<f", content)
        elif number == 8:
            tensor = content
    if tensor is not None:
        scalar = _tensor(tag, tensor, settings)
    return tag, scalar


def _tensor(tag: str, tensor: bytes, settings: dict[str, Any]) -> float | None:
    """The scalar in a tensor of one float or double, or None; a JSON text is taken for settings."""
    kind, content = 0, b""
    for number, value in fields(tensor):
        if number == 1 and isinstance(value, int):
            kind = value
        elif number in (4, 5, 6) and isinstance(value, bytes):
            content = value
        elif number == 8 and isinstance(value, bytes) and tag.endswith("text_summary"):
            _settings(value, settings)
    if kind == 1 and len(content) == 4:
        return float(struct.unpack("<f", content)[0])
    if kind == 2 and len(content) == 8:
        return float(struct.unpack("<d", content)[0])
    return None


def _settings(text: bytes, settings: dict[str, Any]) -> None:
    """What Transformers writes as a text: its arguments and the model's configuration, as JSON."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(found, dict):
        settings.update(flat(found))
