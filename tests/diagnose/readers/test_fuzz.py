"""Damaged logs of every format give logs or a one-line error, never anything else.

`tests/data/corpus` keeps damaged files: seeds of every kind of damage, and every file that ever failed. To look for more:
`HYPOTHESIS_PROFILE=explore pytest tests/diagnose/readers/test_fuzz.py`; a failure writes its file into the corpus.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uncollapse.diagnose.log import Log
from uncollapse.diagnose.readers import read
from uncollapse.errors import DataError

DATA = Path(__file__).parents[2] / "data"
CORPUS = DATA / "corpus"
SIZE = 6000
"""Bytes of a valid log that are kept: the damage is what is tested, not the length."""


def fixtures():
    """Name and first bytes of one valid file of every format."""
    chosen = {
        "events.out.tfevents.1": "tensorboard/*tfevents*",
        "run.wandb": "wandb/*/*.wandb",
        "example.db": "trackio/example.db",
        "trainer_state.json": "checkpoint-30/trainer_state.json",
        "verl.jsonl": "verl.jsonl",
        "verl.log": "verl_console.log",
        "export.csv": "wandb_export.csv",
        "table.csv": "table.csv",
    }
    found = {name: next((DATA / "collapse").glob(pattern)).read_bytes() for name, pattern in chosen.items()}
    found["metrics.jsonl"] = (DATA / "own" / "metrics.jsonl").read_bytes()
    return {
        name: data if name in ("example.db", "trainer_state.json") else data[:SIZE]
        for name, data in found.items()
    }


VALID = fixtures()


def check(path):
    """Read a file; what comes back has the shape of a log."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            logs, told = read(path), "a log"
        except DataError as error:
            logs, told = [], str(error)
    assert told
    assert "\n" not in told
    assert len(told) < 2000
    for log in logs:
        assert isinstance(log, Log)
        assert log.step.dtype == np.int64
        assert len(log) > 0
        assert (np.diff(log.step) > 0).all()
        for values in [*log.columns.values(), *log.other.values()]:
            assert values.shape == log.step.shape
            assert not np.isinf(values).any()
        assert set(log.origin) == set(log.columns)
        assert all("\n" not in note.text for note in log.notes)


@st.composite
def damaged(draw):
    """A valid file with some damage: bytes flipped, cut, repeated, put in or moved."""
    name = draw(st.sampled_from(sorted(VALID)))
    data = bytearray(VALID[name])
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, 80))
        kind = draw(st.sampled_from(["flip", "cut", "end", "repeat", "insert", "zero", "digits"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "end":
            del data[at:]
        elif kind == "repeat":
            data[at:at] = data[at : at + length]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=20))
        elif kind == "zero":
            data[at : at + length] = bytes(length)
        elif kind == "digits":
            data[at:at] = draw(
                st.sampled_from(
                    [b"9" * 400, b"-", b"e999", b"NaN", b'"', b"{", b"[[[", b"\n", b",,", b"- step:9 - a:1 "]
                )
            )
    return name, bytes(data)


@given(damaged())
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_damage_gives_logs_or_one_line(tmp_path, case):
    name, data = case
    path = tmp_path / name
    path.write_bytes(data)
    try:
        check(path)
    except BaseException:
        CORPUS.mkdir(exist_ok=True)
        (CORPUS / f"{hashlib.sha256(data).hexdigest()[:10]}-{name}").write_bytes(data)
        raise


@given(
    st.binary(max_size=300),
    st.sampled_from(["a.csv", "a.jsonl", "events.out.tfevents.1", "a.wandb", "a.db", "a.log"]),
)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_logs_or_one_line(tmp_path, data, name):
    magic = {"a.wandb": b":W&B\xe1\xbe\0", "a.db": b"SQLite format 3\0", "a.csv": b"step,entropy\n1,2\n"}.get(
        name, b""
    )
    (tmp_path / name).write_bytes(magic + data)
    check(tmp_path / name)


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*")), ids=lambda path: path.name)
def test_the_corpus(path):
    check(path)
