"""Lines and blocks of a text file, whatever its encoding, plain or gzip, in bounded memory; nothing is written."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from uncollapse.errors import DataError

BLOCK = 1 << 22
"""Bytes read at a time."""
LONGEST = 1 << 24
"""Bytes of the longest line that is read; a longer one is no row of a log."""

GZIP = b"\x1f\x8b"
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_CUT = (EOFError, zlib.error, gzip.BadGzipFile)
_COLOUR = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


def unreadable(path: Path, error: OSError) -> DataError:
    """What to raise when the system refuses to read a file."""
    return DataError(
        f"{path} cannot be read: {error.strerror or type(error).__name__}; check path and permissions"
    )


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked if it is gzip. Raises `DataError`."""
    try:
        with path.open("rb") as raw:
            if raw.read(2) == GZIP:
                raw.seek(0)
                with gzip.open(raw) as stream:
                    yield stream  # type: ignore[misc]
            else:
                raw.seek(0)
                yield raw
    except OSError as error:
        if isinstance(error, _CUT):
            raise DataError(
                f"{path} is a broken gzip file; unpack what is left of it and read that"
            ) from error
        raise unreadable(path, error) from error


def head(path: Path, size: int = 1 << 16) -> bytes:
    """The first bytes of a file, as UTF-8 text if a mark says that it is text of another encoding."""
    with opened(path) as stream:
        try:
            data = stream.read(size)
        except _CUT:
            return b""
    mark, encoding = _encoding(data)
    return (
        data[len(mark) :].decode(encoding, "replace").encode() if encoding != "utf-8" else data[len(mark) :]
    )


def blocks(path: Path) -> Iterator[bytes]:
    """Whole lines, some megabytes of them at a time, as UTF-8; the last one may lack its end.

    A line longer than `LONGEST` comes in pieces. A gzip file that breaks off ends there.
    """
    with opened(path) as stream:
        rest, decoder = b"", None
        first = True
        while True:
            try:
                data = stream.read(BLOCK)
            except _CUT:
                data = b""
            if first:
                mark, encoding = _encoding(data)
                data, first = data[len(mark) :], False
                if encoding != "utf-8":
                    decoder = codecs.getincrementaldecoder(encoding)("replace")
            if decoder is not None:
                more = bool(data)
                data = decoder.decode(data, final=not more).encode()
                if not data and more:
                    continue
            if not data:
                break
            cut = data.rfind(b"\n") + 1
            if cut:
                yield rest + data[:cut]
                rest = data[cut:]
            else:
                rest += data
                if len(rest) > LONGEST:
                    yield rest + b"\n"
                    rest = b""
        if rest:
            yield rest


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers from 1, without their ends."""
    number = 0
    for block in blocks(path):
        for line in block.split(b"\n") if not block.endswith(b"\n") else block[:-1].split(b"\n"):
            number += 1
            yield number, line


def bare(line: bytes) -> bytes:
    """A line of a console without colours and what a progress bar wrote over."""
    return _COLOUR.sub(b"", line) if b"\x1b" in line else line


def _encoding(data: bytes) -> tuple[bytes, str]:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return mark, encoding
    return b"", "utf-8"


def numbered(broken: list[int], what: str) -> str:
    """A sentence on lines or records that cannot be read, with the numbers of the first ones."""
    shown = ", ".join(map(str, broken[:8])) + (f" and {len(broken) - 8} more" if len(broken) > 8 else "")
    return f"{len(broken)} {what}{'s' if len(broken) > 1 else ''} cannot be read and were skipped ({shown})"
