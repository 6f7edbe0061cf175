"""W&B offline runs (`offline-run-*/run-*.wandb`), without wandb: a LevelDB log of protobuf records.

The file starts with `:W&B`, two magic bytes and a version; then come blocks of 32 KiB of chunks: CRC-32 of type and data
(4 bytes), length (2), type (1: a whole record; 2, 3, 4: its first, middle and last part). A chunk that does not match its
CRC is skipped, and with it the record; a broken length costs the rest of its block.

Fields read (wandb_internal.proto): Record.history 2, config 5, run 17; HistoryRecord.item 1 and ConfigRecord.update 1
with key 1, nested_key 2, value_json 16; RunRecord.run_id 1, config 4, display_name 8.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from uncollapse.diagnose.readers.collect import Collector, as_number
from uncollapse.diagnose.readers.flat import flat
from uncollapse.diagnose.readers.runs import Runs
from uncollapse.diagnose.readers.text import opened
from uncollapse.diagnose.readers.wire import Malformed, fields

FORMAT = "W&B offline run"
MAGIC = b":W&B"
BLOCK, HEADER, CHUNK = 1 << 15, 7, 7
LONGEST = 1 << 24
"""Bytes of the longest record that is put together."""
MOST_NAMES = 20_000
"""Names that are remembered."""
_VALUE = b"\x82\x01"
"""Key of field 16, which separates the name of an item from its value."""


def read(path: Path, runs: Runs) -> list[Collector]:
    """The run of one `.wandb` file."""
    runs.run = runs.run or ""  # one file is one run
    reader = _Reader(runs)
    with opened(path) as stream:
        for record in _records(stream, reader):
            reader.take(record)
    found = runs.collectors()
    for collector in found:
        collector.name = reader.name or collector.name
        collector.settings.update(flat(reader.settings))
        if reader.broken:
            collector.note("broken", f"{reader.broken} broken records were skipped")
        if reader.cut:
            collector.note("broken", "the last record is cut off")
    return found


class _Reader:
    """Takes records and keeps what they tell."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.name = ""
        self.settings: dict[str, Any] = {}
        self.broken = 0
        self.cut = False
        self._names: dict[bytes, str | None] = {}

    def take(self, record: bytes) -> None:
        """One record, of whatever kind."""
        try:
            for number, value in fields(record):
                if not isinstance(value, bytes):
                    continue
                if number == 2:
                    self._history(value)
                elif number == 5:
                    self._config(value)
                elif number == 17:
                    self._run(value)
        except Malformed:
            self.broken += 1

    def _history(self, history: bytes) -> None:
        row = self._usual_row(history)
        if row is None:
            row = dict(self._pairs(history))
        if row:
            self.runs.add(row)

    def _usual_row(self, history: bytes) -> dict[str, Any] | None:
        """The row, if all its values are short numbers; None if it has to be decoded field by field.

        Rows are alike but for their values: cut at the key of the value field, each piece is a value (its length
        before it) and the start of the next item, whose bytes stand for the same name in every row.
        """
        start, *pieces = history.split(_VALUE)
        names, texts = [], []
        for piece in pieces:
            size = piece[0] if piece else 0x80
            name = self._name(start[2:])
            if size >= 0x80 or name is None or start[:2] != bytes((0x0A, len(start) + 1 + size)):
                return None
            names.append(name)
            texts.append(piece[1 : size + 1])
            start = piece[size + 1 :]
        try:
            return dict(zip(names, map(float, texts), strict=True))
        except ValueError:
            return None

    def _pairs(self, history: bytes) -> Iterator[tuple[str, float]]:
        for number, item in fields(history):
            if number == 1 and isinstance(item, bytes):
                name, value = _item(item)
                scalar = as_number(value.strip(b'"').decode("utf-8", "replace"))
                if name is not None and scalar is not None:
                    yield name, scalar

    def _name(self, part: bytes) -> str | None:
        """The name that the fields of an item before its value spell, or None if they spell none."""
        if part not in self._names:
            if len(self._names) > MOST_NAMES:
                return None
            try:
                self._names[part] = _item(part)[0]
            except Malformed:
                self._names[part] = None
        return self._names[part]

    def _config(self, config: bytes) -> None:
        for number, item in fields(config):
            if number == 1 and isinstance(item, bytes):
                name, value = _item(item)
                if name is None or name.startswith("_wandb"):
                    continue
                try:
                    self.settings[name] = json.loads(value)
                except (ValueError, RecursionError):
                    continue

    def _run(self, run: bytes) -> None:
        for number, value in fields(run):
            if not isinstance(value, bytes):
                continue
            if number == 8:
                self.name = value.decode("utf-8", "replace")
            elif number == 4:
                self._config(value)


def _item(item: bytes) -> tuple[str | None, bytes]:
    """Name and JSON value of an item; nested keys are joined by dots."""
    key, nested, value = "", [], b""
    for number, content in fields(item):
        if not isinstance(content, bytes):
            continue
        if number == 1:
            key = content.decode("utf-8", "replace")
        elif number == 2:
            nested.append(content.decode("utf-8", "replace"))
        elif number == 16:
            value = content
    return ".".join(nested) or key or None, value


def _records(stream: IO[bytes], trouble: _Reader) -> Iterator[bytes]:
    """Whole records, put together from the chunks of all blocks."""
    part: list[bytes] = []
    for kind, data in _chunks(stream, trouble):
        if kind == 1:
            part = []
            yield data
        elif kind == 2:
            part = [data]
        elif part and sum(map(len, part)) < LONGEST:
            part.append(data)
            if kind == 4:
                yield b"".join(part)
                part = []
        elif kind == 0:
            part = []


def _chunks(stream: IO[bytes], trouble: _Reader) -> Iterator[tuple[int, bytes]]:
    """Type and data of every chunk; type 0 where one is broken."""
    header = struct.Struct("<IHB").unpack_from
    at = HEADER
    while block := _block(stream):
        end = len(block)
        while at + CHUNK <= end:
            crc, length, kind = header(block, at)
            data = block[at + CHUNK : at + CHUNK + length]
            if kind == 0 and length == 0 and crc == 0:
                break  # a block may end in zeros
            if len(data) < length and end < BLOCK:
                trouble.cut = True
                return
            if zlib.crc32(data, zlib.crc32(block[at + 6 : at + 7])) != crc or not 1 <= kind <= 4:
                trouble.broken += 1
                yield 0, b""
                if len(data) < length:
                    break
            else:
                yield kind, data
            at += CHUNK + length
        else:
            trouble.cut = trouble.cut or (end < BLOCK and end - at > 0)
        at = 0


def _block(stream: IO[bytes]) -> bytes:
    """The next block, or what is left of it."""
    pieces, wanted = [], BLOCK
    while wanted:
        try:
            piece = stream.read(wanted)
        except (EOFError, OSError):
            break
        if not piece:
            break
        pieces.append(piece)
        wanted -= len(piece)
    return b"".join(pieces)
