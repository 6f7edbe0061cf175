"""The token dump: what is written reads back, and what is no dump gives one line."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from uncollapse.errors import ConfigError, DataError
from uncollapse.token_dump import COLUMNS, KEY, SCHEMA, TokenDump, is_dump, read_dump

ROWS, TIME = 3, 7


def arrays(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(ROWS, TIME, dtype=torch.bool)
    mask[1, 5:] = False
    mask[2, :] = False
    return {
        "token": torch.randint(0, 50, (ROWS, TIME), generator=generator),
        "mask": mask,
        "old_logp": -torch.rand(ROWS, TIME, generator=generator).to(dtype),
        "advantage": torch.randn(ROWS, generator=generator),
        "entropy": torch.rand(ROWS, TIME, generator=generator),
        "reward": torch.tensor([1.0, 0.0, float("nan")]),
        "group": torch.tensor([4, 4, 5]),
    }


def test_what_is_written_reads_back(tmp_path):
    given = arrays()
    dump = TokenDump(tmp_path / "dump", temperature=0.7)
    dump.write(3, **given, uid=[10, 11, 12], text=[[f"t{i}" for i in range(TIME)]] * ROWS)
    dump.write(2, **arrays(1))
    second, third = read_dump(tmp_path / "dump")
    assert (second.step, third.step) == (2, 3)
    assert len(third) == 7 + 5  # the last row has no trained token and so none at all
    assert third.integer("uid").tolist() == [10] * 7 + [11] * 5
    assert third.integer("position").tolist() == [*range(7), *range(5)]
    exists = given["mask"]
    np.testing.assert_array_equal(third.integer("token"), given["token"][exists])
    np.testing.assert_allclose(third.number("old_logp"), given["old_logp"][exists], rtol=1e-7)
    np.testing.assert_allclose(
        third.number("advantage"), given["advantage"][:, None].expand(ROWS, TIME)[exists], rtol=1e-7
    )
    assert third.number("reward").tolist() == [1.0] * 7 + [0.0] * 5
    assert third.text[:2] == ["t0", "t1"]
    assert np.isnan(third.number("logp")).all()
    assert second.text == [""] * len(second)
    assert json.loads(pq.read_schema(tmp_path / "dump" / "step-00000003.parquet").metadata[KEY]) == {
        "schema": 1, "temperature": 0.7,
    }  # fmt: skip
    assert is_dump(tmp_path / "dump")
    assert not is_dump(tmp_path)


def test_length_keeps_tokens_that_are_not_trained_on(tmp_path):
    TokenDump(tmp_path).write(0, **arrays(), length=torch.tensor([7, 7, 2]))
    (tokens,) = read_dump(tmp_path)
    assert len(tokens) == 16
    assert tokens.mask.sum() == 12


def test_bfloat16_and_empty_batches(tmp_path):
    TokenDump(tmp_path).write(0, **arrays(dtype=torch.bfloat16))
    TokenDump(tmp_path).write(
        1, token=np.zeros((0, 4), int), mask=np.zeros((0, 4)), old_logp=np.zeros((0, 4)), advantage=[]
    )
    (tokens,) = read_dump(tmp_path)
    assert np.isfinite(tokens.number("old_logp")).all()


def test_writing_a_step_again_replaces_it_and_leaves_no_draft(tmp_path):
    dump = TokenDump(tmp_path)
    dump.write(0, **arrays())
    dump.write(0, **arrays(5))
    (tokens,) = read_dump(tmp_path)
    np.testing.assert_array_equal(tokens.integer("token"), arrays(5)["token"][arrays()["mask"]])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000.parquet"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": 1}, "no column 'logits'"),
        ({"mask": np.ones(3)}, r"mask has shape \(3,\)"),
        ({"entropy": np.ones((ROWS, 2))}, r"entropy has shape \(3, 2\)"),
        ({"reward": np.ones((ROWS, TIME))}, r"reward has shape"),
        ({"length": np.ones(9)}, r"length has shape"),
        ({"text": [["a"]] * ROWS}, "text has to be"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        TokenDump(tmp_path).write(0, **(arrays() | change))
    with pytest.raises(ConfigError, match="needs 'old_logp'"):
        TokenDump(tmp_path).write(0, token=arrays()["token"], mask=arrays()["mask"], advantage=np.ones(3))
    assert not list(tmp_path.iterdir())


def write_foreign(path, schema=SCHEMA, drop=(), **types):
    rows = 4
    values = {
        c.name: pa.array([1] * rows) if c.type != "string" else pa.array(["x"] * rows)
        for c in COLUMNS
        if c.name not in drop and (c.required or c.name in types)
    }
    values["mask"] = pa.array([True, True, None, False])
    values["step"] = pa.array([0, 0, 1, 1])
    metadata = {} if schema is None else {KEY: json.dumps({"schema": schema}).encode()}
    table = pa.table({name: value for name, value in values.items() if name not in drop})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def test_another_trainers_file_of_several_steps_and_wider_types(tmp_path):
    steps = list(read_dump(write_foreign(tmp_path / "a.parquet")))
    assert [tokens.step for tokens in steps] == [0, 1]
    assert steps[1].mask.tolist() == [False, False]  # a null is not trained on


def test_what_is_no_dump_gives_one_line(tmp_path):
    cases = {
        "newer": (write_foreign(tmp_path / "new.parquet", schema=SCHEMA + 1), "newer than 1"),
        "none": (write_foreign(tmp_path / "old.parquet", schema=None), "no token dump"),
        "odd": (write_foreign(tmp_path / "odd.parquet", schema="x"), "no token dump"),
        "lacks": (
            write_foreign(tmp_path / "lacks.parquet", drop=("advantage",)),
            "lacks the column 'advantage'",
        ),
        "gone": (tmp_path / "gone", "holds no token dump"),
    }
    (tmp_path / "junk.parquet").write_bytes(b"PAR1" + b"\xff" * 100 + b"PAR1")
    cases["junk"] = (tmp_path / "junk.parquet", "cannot be read")
    for path, message in cases.values():
        with pytest.raises(DataError, match=message) as caught:
            list(read_dump(path))
        assert "\n" not in str(caught.value)


def test_damaged_files_give_one_line_or_tokens(tmp_path):
    path = TokenDump(tmp_path).write(0, **arrays())
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(whole)
        data[random.integers(len(data))] ^= int(random.integers(1, 256))
        path.write_bytes(data)
        try:
            list(read_dump(path))
        except DataError as error:
            told = str(error)
        else:
            told = "tokens"
        assert "\n" not in told


def test_steps_out_of_order_are_told(tmp_path):
    TokenDump(tmp_path).write(0, **arrays()).rename(tmp_path / "z.parquet")
    TokenDump(tmp_path).write(4, **arrays())
    with pytest.raises(DataError, match="step 0 after step 4"):
        list(read_dump(tmp_path))
