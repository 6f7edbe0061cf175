"""The parts that the readers are made of, each against a naive reference."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.diagnose.names import is_known, unit
from uncollapse.diagnose.readers import collect
from uncollapse.diagnose.readers.aliases import ALIASES, SHORT, full_mapping, meaning
from uncollapse.diagnose.readers.collect import Collector, as_step
from uncollapse.diagnose.readers.crc32c import crc32c, masked_crcs
from uncollapse.diagnose.readers.flat import DEEPEST, MOST, flat
from uncollapse.diagnose.readers.wire import Malformed, fields, signed, varint

# ---- names -------------------------------------------------------------------------------------------------


def test_every_alias_stands_for_a_known_column_and_no_name_for_two():
    assert len({alias.name for alias in ALIASES}) == len(ALIASES)
    for alias in ALIASES:
        known = alias.known.replace("<k>", "8")
        assert is_known(known)
        spelled = alias.name.replace("*", "8")
        found = meaning(spelled)
        assert found is not None
        assert found[0] == known, spelled
        assert is_known(alias.name) or found[1] > 0
    assert all(is_known(name) for name in SHORT.values())
    assert unit("eval/pass@16") == "share of prompts"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("train/entropy", "entropy/token/mean"),
        ("train/entropy/token/mean", "entropy/token/mean"),
        ("train/reward", "reward/mean"),
        ("eval/reward", "eval/reward"),
        ("Entropy", "entropy/token/mean"),
        ("val-core/openai/gsm8k/acc/mean@8", "eval/reward"),
        ("val-core/gsm8k/acc/best@8/mean", "eval/pass@8"),
        ("val-core/gsm8k/acc/best@x/mean", None),
        ("eval_entropy", None),
        ("entropy_coef", None),
    ],
)
def test_what_names_mean(name, known):
    found = meaning(name)
    assert (found and found[0]) == known


def test_short_names_are_written_out():
    assert full_mapping({"entropy": "e", "step": "s"}) == {"entropy/token/mean": "e", "step": "s"}


# ---- bytes -------------------------------------------------------------------------------------------------


def test_crc32c_of_the_published_example_and_of_many_at_once():
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, appendix B.4, and the catalogue of CRCs
    assert crc32c(bytes(32)) == 0x8A9136AA
    random = np.random.default_rng(0)
    data = random.integers(0, 256, 5000).astype(np.uint8)
    for length in (0, 1, 2, 3, 31, 47):
        start = random.integers(0, 4900, 40)
        found = masked_crcs(data, start, np.full(40, length))
        for at, value in zip(start.tolist(), found.tolist(), strict=True):
            crc = crc32c(data[at : at + length].tobytes())
            assert value == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.one_of(st.integers(0, 2**64 - 1), st.binary(max_size=200))))
)
def test_wire_reads_what_is_written(message):
    def coded(number):
        out = b""
        while number > 127:
            out, number = out + bytes([number & 127 | 128]), number >> 7
        return out + bytes([number])

    data = b"".join(
        coded(n << 3) + coded(v) if isinstance(v, int) else coded(n << 3 | 2) + coded(len(v)) + v
        for n, v in message
    )
    assert list(fields(data)) == message
    for end in range(1, len(data), 7):
        try:
            assert list(fields(data[:end])) == message[: len(list(fields(data[:end])))]
        except Malformed:
            continue


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_malformed(data):
    try:
        list(fields(data))
    except Malformed:
        return


def test_wire_numbers():
    assert varint(b"\xac\x02", 0) == (300, 2)
    assert signed(2**64 - 1) == -1
    assert list(fields(b"\x0d" + struct.pack("<f", 0.5) + b"\x11" + struct.pack("<d", 1.5))) == [
        (1, struct.pack("<f", 0.5)), (2, struct.pack("<d", 1.5)),
    ]  # fmt: skip
    with pytest.raises(Malformed):
        varint(b"\xff" * 11, 0)


# ---- settings ----------------------------------------------------------------------------------------------


def test_flat_settings_have_bounds():
    assert flat({"a": {"b": 1, "c": [1, {}, "x"]}, "d": None}) == {"a.b": 1, "a.c": [1, "x"], "d": None}
    deep: dict = {"end": 1}
    for _ in range(DEEPEST + 5):
        deep = {"x": deep}
    assert flat(deep) == {}
    wide = {str(i): {str(j): 0 for j in range(100)} for i in range(1000)}
    assert len(flat(wide)) == MOST
    bomb: dict = {}
    for _ in range(40):
        bomb = {"a": bomb, "b": bomb, "leaf": 0}
    assert len(flat(bomb)) <= MOST


# ---- collecting --------------------------------------------------------------------------------------------

ROW = st.tuples(
    st.integers(0, 40),
    st.dictionaries(
        st.sampled_from("abcd"), st.one_of(st.none(), st.floats(), st.integers(-3, 3), st.just("word"))
    ),
)


def usual(value):
    """What the collector makes of one value: a finite number, NaN, or nothing."""
    if value is None or value == "word":
        return None
    return float(value) if abs(value) <= collect.LARGEST else math.nan


@given(st.lists(ROW, max_size=60), st.sampled_from([1, 7, 10_000]))
def test_collected_rows_equal_a_naive_table(rows, pending):
    table: dict[str, dict[int, float]] = {}
    for step, row in rows:
        for name, value in row.items():
            number = usual(value)
            if number is not None:
                table.setdefault(name, {})[step] = number
    collector, whole = Collector(), collect.PENDING
    try:
        collect.PENDING = pending
        for step, row in rows:
            collector.add_row(step, dict(row))
        steps, columns = collector.columns()
    finally:
        collect.PENDING = whole
    assert steps.tolist() == sorted({step for column in table.values() for step in column})
    assert set(columns) == set(table)
    for name, column in table.items():
        np.testing.assert_array_equal(columns[name], [column.get(step, math.nan) for step in steps.tolist()])
    collector.observations()


def test_disjoint_columns_do_not_make_a_huge_table(monkeypatch):
    monkeypatch.setattr(collect, "CELLS", 2000)
    monkeypatch.setattr(collect, "PENDING", 100)
    collector = Collector()
    for step in range(4000):
        collector.add_row(step, {f"c{step % 20}": 1.0})
    steps, columns = collector.columns()
    assert len(steps) * len(columns) <= 2000
    assert all(np.nanmax(values) == 1.0 for values in columns.values())


@pytest.mark.parametrize(
    ("value", "step"),
    [(3, 3), (3.0, 3), ("3", 3), ("3.0", 3), (3.5, None), (True, None), (None, None), (math.nan, None), (1e300, None),
     (10**30, None), ("x", None), ([3], None), (-2, -2)],
)  # fmt: skip
def test_steps_as_logs_write_them(value, step):
    assert as_step(value) == step
