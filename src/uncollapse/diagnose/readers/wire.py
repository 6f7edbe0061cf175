"""What little of the protobuf wire format the logs need: fields of a message, without a schema and without protobuf.

A message is a sequence of fields; each starts with a varint whose low three bits are the wire type (0 varint, 1 eight
bytes, 2 bytes with their length before, 5 four bytes) and whose other bits are the field number. Source: the public
encoding guide of protocol buffers.
"""

from __future__ import annotations

from collections.abc import Iterator

Field = tuple[int, int | bytes]


class Malformed(ValueError):
    """Bytes that are no message; the caller skips the record they came from."""


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The variable-length integer at an offset, and the offset after it. Raises `Malformed`."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise Malformed("a varint runs past the end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise Malformed("a varint is longer than ten bytes")


def fields(data: bytes) -> Iterator[Field]:
    """Field numbers and values in their order; fixed-size and length-delimited values come as bytes.

    Raises `Malformed` at the first field that does not fit, after those before it.
    """
    at, size = 0, len(data)
    while at < size:
        key, at = varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = varint(data, at)
            yield number, value
            continue
        if kind == 2:
            length, at = varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise Malformed(f"wire type {kind}")
        if not number or at + length > size:
            raise Malformed("a field runs past the end")
        yield number, data[at : at + length]
        at += length


def signed(value: int) -> int:
    """A varint as a signed 64-bit integer."""
    return value - (1 << 64) if value >> 63 else value
