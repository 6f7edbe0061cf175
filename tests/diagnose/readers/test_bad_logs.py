"""What users really have: resets, gaps, several runs in one file, numbers that are none, files that are broken."""

from __future__ import annotations

import json
import os
import struct
import zlib

import numpy as np
import pytest

from uncollapse.diagnose.readers import collect, read, tensorboard
from uncollapse.diagnose.readers.crc32c import crc32c
from uncollapse.errors import DataError, UnknownName


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(steps, offset=0.0, **more):
    return [
        {"step": step, "entropy": 1 / (1 + step) + offset, "reward": step / 100, **more} for step in steps
    ]


def kinds(log):
    return [note.kind for note in log.notes]


def note(log, kind):
    (found,) = (note for note in log.notes if note.kind == kind)
    return found


# ---- what the steps say ------------------------------------------------------------------------------------


def test_a_resume_goes_on_with_the_last_value_of_each_step(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", rows(range(1, 21)) + rows(range(15, 31), offset=5))
    (log,) = read(path)
    assert list(log.step) == list(range(1, 31))
    assert log["entropy/token/mean"][13] == 1 / 15
    np.testing.assert_allclose(log["entropy/token/mean"][14:], [1 / (1 + s) + 5 for s in range(15, 31)])
    assert kinds(log) == ["reset"]
    assert note(log, "reset").steps == (15,)


def test_a_counter_that_begins_again_is_another_run_the_last_one_first(tmp_path):
    path = write_rows(
        tmp_path / "a.jsonl", rows(range(1, 21)) + rows(range(1, 6), offset=5) + rows(range(4, 9), offset=9)
    )
    last, first = read(path)
    assert (len(last), len(first)) == (8, 20)
    assert kinds(last) == ["mixed", "reset"]
    assert kinds(first) == ["mixed"]
    assert first["entropy/token/mean"].max() < 1


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_interleaved_runs_with_a_column_that_tells_them_apart(tmp_path, ending):
    table = [
        row
        for pair in zip(rows(range(9), run_id="a"), rows(range(9), 5, run_id="b"), strict=True)
        for row in pair
    ]
    path = tmp_path / f"mixed.{ending}"
    if ending == "jsonl":
        write_rows(path, table)
    else:
        lines = [",".join(table[0]), *(",".join(map(str, row.values())) for row in table)]
        path.write_text("\n".join(lines) + "\n")
    logs = read(path)
    assert [log.source.rpartition("#")[2] for log in logs] == ["b", "a"]
    assert [len(log) for log in logs] == [9, 9]
    assert all(kinds(log) == ["mixed"] for log in logs)
    np.testing.assert_allclose(logs[0]["entropy/token/mean"] - logs[1]["entropy/token/mean"], 5)


def test_interleaved_runs_without_such_a_column_are_told(tmp_path):
    table = [row for pair in zip(rows(range(9)), rows(range(9), 5), strict=True) for row in pair]
    (log,) = read(write_rows(tmp_path / "a.jsonl", table))
    assert kinds(log) == ["mixed"]


def test_gaps_and_duplicates_are_told(tmp_path):
    steps = [*range(0, 200, 10), *range(300, 500, 10), 490]
    (log,) = read(write_rows(tmp_path / "a.jsonl", rows(steps)))
    assert kinds(log) == ["duplicate", "gap"]
    assert note(log, "gap").steps == (190,)
    assert "10 rows" in note(log, "gap").text
    assert note(log, "duplicate").steps == (490,)


def test_rows_without_a_counter_are_numbered(tmp_path):
    (log,) = read(write_rows(tmp_path / "a.jsonl", [{"entropy": 1.0 / i} for i in range(1, 6)]))
    assert list(log.step) == [0, 1, 2, 3, 4]
    assert kinds(log) == ["unmapped"]
    (tmp_path / "b.csv").write_text("time,entropy\n0.5,1\n1.5,2\n2.25,3\n")
    (log,) = read(tmp_path / "b.csv")
    assert list(log.step) == [0, 1, 2]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_very_short_runs(tmp_path, count):
    (log,) = read(write_rows(tmp_path / "a.jsonl", rows(range(count))))
    assert len(log) == count
    assert log.notes == ()


# ---- what the numbers say ----------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_become_nan_and_are_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step":1,"entropy":NaN}\n{"step":2,"entropy":Infinity}\n{"step":3,"entropy":1e999}\n'
                    '{"step":4,"entropy":1e200}\n{"step":5,"entropy":2}\n{"step":6,"entropy":"-inf"}\n')  # fmt: skip
    (log,) = read(path)
    np.testing.assert_array_equal(log["entropy/token/mean"], [np.nan] * 4 + [2.0, np.nan])
    assert note(log, "nonfinite").steps == (1, 2, 3, 4, 6)
    assert "entropy (5)" in note(log, "nonfinite").text


def test_null_and_empty_cells_are_not_logged(tmp_path):
    write_rows(
        tmp_path / "a.jsonl", [{"step": 1, "entropy": 1, "kl": None}, {"step": 1, "entropy": None, "kl": 2}]
    )
    (tmp_path / "a.csv").write_text("step,entropy,kl,name\n1,1,,x\n1,,2,y\n")
    for name in ("a.jsonl", "a.csv"):
        (log,) = read(tmp_path / name)
        assert log["entropy/token/mean"] == [1]
        assert log["kl/ref/mean"] == [2]
        assert "nonfinite" not in kinds(log)


def test_no_entropy_is_a_note_and_not_an_error(tmp_path):
    (log,) = read(
        write_rows(tmp_path / "a.jsonl", [{"step": i, "myent": 1.0, "reward": 0.5} for i in range(4)])
    )
    assert not log.has("entropy/token/mean")
    assert "myent" in note(log, "unmapped").text
    (log,) = read(tmp_path / "a.jsonl", mapping={"entropy": "myent"})
    assert log.origin["entropy/token/mean"] == "myent"
    assert log.notes == ()


def test_a_mapping_is_checked(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", rows(range(3)))
    with pytest.raises(UnknownName, match="entropie"):
        read(path, mapping={"entropie": "entropy"})
    with pytest.raises(DataError, match="no column 'gone'; it has: entropy, reward"):
        read(path, mapping={"reward": "gone"})


def test_mapping_says_which_columns_count_and_tell_runs_apart(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"tick": i // 2, "who": i % 2, "entropy": i} for i in range(8)])
    logs = read(path, mapping={"step": "tick", "run": "who"})
    assert [list(log.step) for log in logs] == [[0, 1, 2, 3]] * 2


def test_an_entropy_loss_of_either_sign_is_an_entropy(tmp_path):
    for sign in (1, -1):
        write_rows(
            tmp_path / "a.jsonl", [{"step": i, "train/entropy_loss": sign * (2 - i / 4)} for i in range(8)]
        )
        (log,) = read(tmp_path / "a.jsonl")
        np.testing.assert_allclose(log["entropy/token/mean"], 2 - np.arange(8) / 4)
    write_rows(tmp_path / "a.jsonl", [{"step": i, "train/entropy_loss": i - 3} for i in range(8)])
    (log,) = read(tmp_path / "a.jsonl")
    assert not log.has("entropy/token/mean")


# ---- long logs ---------------------------------------------------------------------------------------------


def test_a_long_log_is_thinned_by_averages(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "ROWS", 100)
    monkeypatch.setattr(collect, "PENDING", 250)
    steps = np.arange(0, 3000, 3)
    path = tmp_path / "a.csv"
    path.write_text(
        "step,entropy,reward\n" + "".join(f"{s},{s / 7},{1 if s < 1500 else 'nan'}\n" for s in steps)
    )
    (log,) = read(path)
    assert 50 <= len(log) <= 100
    assert "thinned" in kinds(log)
    assert log.step[-1] == 2997
    assert (np.diff(log.step) > 0).all()
    width = 32
    bins = steps // width
    wanted = [np.mean(steps[bins == b]) / 7 for b in np.unique(bins)]
    np.testing.assert_allclose(log["entropy/token/mean"], wanted)
    assert np.isnan(log["reward/mean"][-1])
    assert log["reward/mean"][0] == 1


def test_more_columns_than_anyone_can_read(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "COLUMNS", 5)
    (log,) = read(
        write_rows(tmp_path / "a.jsonl", [{"step": 0, "entropy": 1.0, **{f"c{i}": i for i in range(50)}}])
    )
    assert len(log.columns) + len(log.other) == 5
    assert "more than 5 columns" in note(log, "broken").text


# ---- broken files ------------------------------------------------------------------------------------------


def test_broken_lines_are_counted_and_the_cut_one_at_the_end_too(tmp_path):
    path = tmp_path / "a.jsonl"
    good = [json.dumps(row) for row in rows(range(5))]
    path.write_text("\n".join([*good[:2], "{nonsense", "[1, 2]", *good[2:], '{"step": 5, "entr']))
    (log,) = read(path)
    assert list(log.step) == [0, 1, 2, 3, 4]
    assert "3 lines" in note(log, "broken").text
    assert "(3, 4, 8)" in note(log, "broken").text
    (tmp_path / "a.csv").write_text("step,entropy\n1,1\n2\n3,3,3\n4,4\n5,")
    (log,) = read(tmp_path / "a.csv")
    assert "2 rows" in note(log, "broken").text
    assert list(log.step) == [1, 4]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\n\n", b"\0" * 100, bytes(range(256)) * 40, b"[" * 100_000, b'{"a":' * 100_000, b"{}", b"[]", b"null",
        b'{"step": 1}\n{"step": 2}\n', b"SQLite format 3\0" + b"\xff" * 5000, b":W&B\xe1\xbe\0", b":W&B\xe1\xbe\0" + b"\1" * 99,
        b"step,entropy\n", b"just words\nand more words\n", b"\xff\xfe", b"\x1f\x8b\x08junk", b'{"log_history": []}',
        b'{"log_history": [1, null, "x"]}', "step,entropie\nx,ü\n".encode("latin-1"), b"step:1 - \nstep:2\n",
    ],
)  # fmt: skip
def test_files_that_are_no_log_give_one_line(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "file" in str(caught.value)


def test_places_that_are_no_log_give_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "gone", tmp_path / ("x" * 5000), "a\0b"):
        with pytest.raises(DataError) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_links_that_go_in_circles(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "self.csv").symlink_to(tmp_path / "a" / "self.csv")
    with pytest.raises(DataError, match="holds no log"):
        read(tmp_path)
    write_rows(tmp_path / "a" / "log.jsonl", rows(range(4)))
    assert len(read(tmp_path)) == 1


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.csv", "a.db", "a.wandb", "events.out.tfevents.1", "trainer_state.json"]
)
def test_no_permission(tmp_path, monkeypatch, name):
    path = write_rows(tmp_path / name, rows(range(3)))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)  # the superuser may read whatever a mode forbids
    with pytest.raises(DataError, match="Permission denied"):
        read(path)


def test_a_directory_that_may_not_be_listed(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        read(tmp_path)


def test_data_beside_a_log_is_no_log(tmp_path):
    write_rows(tmp_path / "log.jsonl", rows(range(4)))
    (tmp_path / "houses.csv").write_text("price,rooms\n1,2\n3,4\n")
    (log,) = read(tmp_path)
    assert log.format == "JSON Lines"
    (tmp_path / "log.jsonl").unlink()
    assert read(tmp_path)[0].format == "table"


def test_one_broken_log_does_not_hide_the_others(tmp_path):
    write_rows(tmp_path / "good.jsonl", rows(range(4)))
    (tmp_path / "bad.db").write_bytes(b"SQLite format 3\0 and then nothing")
    (log,) = read(tmp_path)
    assert len(log) == 4


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "latin-1"])
def test_other_encodings(tmp_path, encoding):
    (tmp_path / "a.csv").write_bytes("step;entropy;größe\r\n1;0.5;x\r\n2;0.25;y\r\n".encode(encoding))
    (log,) = read(tmp_path / "a.csv")
    assert list(log["entropy/token/mean"]) == [0.5, 0.25]


def test_quoted_cells_and_tabs(tmp_path):
    (tmp_path / "a.tsv").write_text('"step"\t"entropy"\t"text"\n1\t0.5\t"two\nlines"\n2\t0.25\t""\n')
    (log,) = read(tmp_path / "a.tsv")
    assert list(log.step) == [1, 2]


def test_a_table_without_names(tmp_path):
    (tmp_path / "a.csv").write_text("0,1.5\n1,1.25\n2,1.0\n")
    (log,) = read(tmp_path / "a.csv", mapping={"entropy": "column 2", "step": "column 1"})
    assert list(log["entropy/token/mean"]) == [1.5, 1.25, 1.0]


def test_steps_that_no_counter_has(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1, "entropy": 1}\n{"step": 1e300, "entropy": 2}\n{"step": null, "entropy": 3}\n'
                    '{"step": "x", "entropy": 4}\n{"step": 2, "entropy": 5}\n')  # fmt: skip
    (log,) = read(path)
    assert list(log.step) == [1, 2]


# ---- event files -------------------------------------------------------------------------------------------


def record(data):
    def check(part):
        crc = crc32c(part)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(data))
    return length + check(length) + data + check(data)


def event(tag, step, value):
    scalar = b"\x0a" + bytes([len(tag)]) + tag + b"\x15" + struct.pack("<f", value)
    summary = b"\x0a" + bytes([len(scalar)]) + scalar
    counted = (
        b""
        if step == 0
        else b"\x10" + (bytes([step]) if step < 128 else bytes([step & 127 | 128, step >> 7]))
    )
    return b"\x09" + struct.pack("<d", 1e9 + step) + counted + b"\x2a" + bytes([len(summary)]) + summary


def events(steps):
    return [record(event(b"entropy", step, 1 / (1 + step))) for step in steps]


@pytest.mark.parametrize("count", [3, 300])
def test_events_of_every_width_of_step(tmp_path, count):
    (tmp_path / "events.out.tfevents.1").write_bytes(b"".join(events(range(count))))
    (log,) = read(tmp_path)
    assert list(log.step) == list(range(count))
    np.testing.assert_allclose(log["entropy/token/mean"], 1 / (1 + np.arange(count)), rtol=1e-6)


def test_a_broken_record_is_skipped_and_a_broken_length_looked_past(tmp_path):
    parts = events(range(300))
    parts[40] = parts[40][:-6] + b"\xff" + parts[40][-5:]
    parts[90] = b"\x01" + parts[90][1:]
    parts[150] = b"some junk of a dying disk" * 3
    (tmp_path / "events.out.tfevents.1").write_bytes(b"".join(parts) + parts[7][:9])
    (log,) = read(tmp_path)
    assert sorted(set(range(300)) - set(log.step.tolist())) == [40, 90, 150]
    told = " ".join(note.text for note in log.notes)
    assert "1 broken records" in told
    assert "lost the place of the records 2 times and found it again" in told
    assert "cut off" in told


def test_a_second_event_file_goes_on_or_begins_again(tmp_path):
    (tmp_path / "events.out.tfevents.1").write_bytes(b"".join(events(range(1, 50))))
    (tmp_path / "events.out.tfevents.20").write_bytes(b"".join(events(range(40, 80))))
    (log,) = read(tmp_path)
    assert list(log.step) == list(range(1, 80))
    assert note(log, "reset").steps == (40,)
    (tmp_path / "events.out.tfevents.300").write_bytes(b"".join(events(range(1, 20))))
    last, first = read(tmp_path)
    assert (len(last), len(first)) == (19, 79)
    # The same in one file, and where the run that begins again logs another tag first.
    both = [
        record(event(tag, step, 1.0 + run))
        for run in (0, 1)
        for step in range(30)
        for tag in (b"loss", b"entropy")
    ]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "events.out.tfevents.1").write_bytes(b"".join(both))
    last, first = read(tmp_path / "one")
    for log, value in ((last, 2.0), (first, 1.0)):
        assert log["loss/total"].tolist() == log["entropy/token/mean"].tolist() == [value] * 30


def test_tags_that_count_steps_of_their_own_are_one_run(tmp_path):
    parts = []
    for rollout in range(20):
        parts += [record(event(b"entropy", rollout, 1.0)), record(event(b"reward", rollout, 0.5))]
        parts += [record(event(b"loss", 4 * rollout + update, 0.1)) for update in range(4)]
        parts += [record(event(b"eval/reward", rollout // 10, 0.1))] if rollout % 10 == 9 else []
    (tmp_path / "events.out.tfevents.1").write_bytes(b"".join(parts))
    (log,) = read(tmp_path)
    assert log.step[-1] == 79
    assert log.has("entropy/token/mean", 20)
    assert log.has("eval/reward", 2)
    assert log.has("loss/total", 80)


def test_tensors_hold_scalars_too():
    def field(number, data):
        return bytes([number << 3 | 2, len(data)]) + data

    tensor = b"\x08\x01" + field(4, struct.pack("<f", 0.5))
    double = b"\x08\x02" + field(6, struct.pack("<d", 0.25))
    values = field(1, field(1, b"a") + field(8, tensor)) + field(1, field(1, b"b") + field(8, double))
    found = list(tensorboard._event(b"\x10\x07" + field(5, values), {}))
    assert found == [("a", 7, 0.5), ("b", 7, 0.25)]


def test_a_record_too_long_to_hold_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "LONGEST", 200)
    parts = [*events(range(5)), record(b"\0" * 70_000), *events(range(5, 9))]
    (tmp_path / "events.out.tfevents.1").write_bytes(b"".join(parts))
    for block in (1 << 10, 1 << 23):
        monkeypatch.setattr(tensorboard, "BLOCK", block)
        (log,) = read(tmp_path)
        assert list(log.step) == list(range(9))


# ---- W&B ---------------------------------------------------------------------------------------------------


def test_a_broken_chunk_of_wandb_costs_its_record_only(tmp_path):
    def chunk(data):
        return struct.pack("<IHB", zlib.crc32(data, zlib.crc32(b"\1")), len(data), 1) + data

    def row(step, entropy):
        items = b""
        for name, value in ((b"_step", step), (b"entropy", entropy)):
            text = json.dumps(value).encode()
            item = b"\x12" + bytes([len(name)]) + name + b"\x82\x01" + bytes([len(text)]) + text
            items += b"\x0a" + bytes([len(item)]) + item
        return chunk(b"\x12" + bytes([len(items)]) + items)

    parts = [row(i, float("nan") if i == 3 else i / 8) for i in range(9)]
    parts[5] = parts[5][:-1] + b"!"
    path = tmp_path / "run.wandb"
    path.write_bytes(b":W&B\xe1\xbe\0" + b"".join(parts) + parts[0][:11])
    (log,) = read(path)
    assert list(log.step) == [0, 1, 2, 3, 4, 6, 7, 8]
    assert kinds(log) == ["broken", "broken", "nonfinite", "gap"]
    assert log["entropy/token/mean"][-1] == 1


def test_an_export_of_several_runs(tmp_path):
    (tmp_path / "export.csv").write_text(
        '"train/global_step","one - train/entropy","one - train/entropy__MIN","one - train/entropy__MAX","a - b - reward",'
        '"a - b - reward__MIN","a - b - reward__MAX"\n"1","0.5","0.5","0.5","","",""\n"2","","","","3","3","3"\n'
    )
    logs = read(tmp_path / "export.csv")
    assert [(log.source.rpartition("#")[2], list(log.step), list(log.columns)) for log in logs] == [
        ("a - b", [2], ["reward/mean"]),
        ("one", [1], ["entropy/token/mean"]),
    ]


# ---- consoles ----------------------------------------------------------------------------------------------


def test_verl_numbers_with_their_types_around_and_lines_between(tmp_path):
    (tmp_path / "run.log").write_text(
        "loading\n" * 2000
        + "(TaskRunner pid=1) step:0 - val-core/gsm8k/acc/mean@1:0.5\n"
        + "Training Progress: 3%|x| 1/9 step:1 - actor/entropy:np.float64(0.75) - actor/lr:1e-06 - critic/score/mean:nan\n"
        + "\x1b[36m(TaskRunner pid=1)\x1b[0m step:2 - actor/entropy:0.5 - val-core/gsm8k/acc/best@8/mean:0.9 - odd:word\n"
    )
    (log,) = read(tmp_path / "run.log")
    assert list(log.step) == [0, 1, 2]
    np.testing.assert_array_equal(log["entropy/token/mean"], [np.nan, 0.75, 0.5])
    assert log["eval/reward"][0] == 0.5
    assert log["eval/pass@8"][2] == 0.9
    assert sorted(kinds(log)) == ["broken", "nonfinite"]


def test_what_the_transformers_trainer_prints(tmp_path):
    (tmp_path / "out.log").write_text(
        "{'loss': '0.5', 'entropy': '1.5', 'epoch': '0.1'}\n 3%|x| 1/30 [00:01<00:30]{'loss': 0.25, 'entropy': 1.25, "
        "'epoch': 0.2}\n{'eval_loss': 0.2, 'eval_reward': 0.75, 'epoch': 0.2}\n{'loss': 0.1, 'entropy': nan, 'epoch': 0.3}\n"
        "{'train_runtime': 3.0, 'train_loss': 0.1, 'epoch': 0.3}\n{'not': 'ours'}\n"
    )
    (log,) = read(tmp_path / "out.log")
    assert list(log.step) == [0, 1, 2]
    np.testing.assert_array_equal(log["entropy/token/mean"], [1.5, 1.25, np.nan])
    np.testing.assert_array_equal(log["eval/reward"], [np.nan, 0.75, np.nan])
