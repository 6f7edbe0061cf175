import sys
from pathlib import Path

import pytest

from uncollapse.tasks.sandbox import Failed, Sandbox, TimedOut


@pytest.fixture(scope="module")
def sandbox():
    sys.path.append(str(Path(__file__).parent))
    made = Sandbox("judges", "judge")
    yield made
    made.close()
    sys.path.remove(str(Path(__file__).parent))


def echo(sandbox, value):
    return sandbox.ask({"do": "echo", "value": value}, seconds=60)


@pytest.mark.parametrize("value", [None, "text\nwith lines", "\ud800", [1, {"a": 0.5}], "x" * 200_000])
def test_results_come_back(sandbox, value):
    assert echo(sandbox, value) == value


@pytest.mark.parametrize(
    ("do", "message"), [("raise", "ValueError: no"), ("exit", "SystemExit: 3"), ("die", "has died")]
)
def test_a_judge_that_fails_is_replaced(sandbox, do, message):
    with pytest.raises(Failed, match=message):
        sandbox.ask({"do": do}, seconds=60)
    assert echo(sandbox, "again") == "again"


def test_a_judge_that_hangs_is_killed(sandbox):
    with pytest.raises(TimedOut, match=r"no answer within 0\.1 s"):
        sandbox.ask({"do": "hang"}, seconds=0.1)
    assert echo(sandbox, "again") == "again"


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")
def test_a_judge_can_neither_fill_the_disk_nor_the_memory(sandbox, tmp_path):
    with pytest.raises(Failed, match="OSError"):
        sandbox.ask({"do": "write", "path": str(tmp_path / "file")}, seconds=60)
    with pytest.raises(Failed, match="MemoryError"):
        sandbox.ask({"do": "allocate"}, seconds=60)
    assert echo(sandbox, "again") == "again"


def test_closing_ends_the_child_and_asking_starts_another():
    made = Sandbox("json", "dumps")
    assert made.ask({"a": 1}, seconds=60) == '{"a": 1}'
    made.close()
    made.close()
    assert made.ask({"a": 1}, seconds=60) == '{"a": 1}'
    made.close()
