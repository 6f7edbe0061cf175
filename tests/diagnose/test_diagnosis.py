"""The whole way from a log to plain values, on runs of known truth and on logs that are meant to mislead."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import uncollapse.diagnose as package
from uncollapse.diagnose.diagnosis import SCHEMA, diagnose
from uncollapse.diagnose.finding import SEVERITIES
from uncollapse.diagnose.log import Log, Note
from uncollapse.diagnose.names import KNOWN
from uncollapse.studies.testbeds import logs
from uncollapse.studies.testbeds.traps import traps


@pytest.mark.parametrize("kind", logs.kinds())
def test_made_up_runs_are_told_apart(kind):
    case = logs.make(kind, logs.TUNING[1])
    found = diagnose(case.log)
    ids = {one.id for one in found.findings}
    assert found.state == case.state
    assert case.findings <= ids <= case.findings | case.allowed


@pytest.mark.parametrize("trap", traps(seed=1), ids=lambda trap: trap.name)
def test_traps_are_not_fallen_into(trap):
    found = diagnose(trap.log)
    ids = {one.id for one in found.findings}
    assert found.state in trap.states
    assert trap.findings <= ids
    assert not trap.forbidden & ids


def test_a_diagnosis_is_plain_json_with_a_schema():
    found = diagnose(logs.make("collapsing-late", 1).log)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["schema"] == SCHEMA
    assert data["state"] == "collapsing"
    assert data["worst"] == found.worst
    assert data["forecast"]["step"] > data["steps"]["last"]
    assert [phase["state"] for phase in data["phases"]] == ["healthy", "collapsing"]
    assert data["findings"][0]["id"] == "entropy-collapse"
    assert data["advice"][0]["trl"]["use_adaptive_entropy"] is True
    assert set(data["law"]) >= {"holds", "ceiling", "used", "exponential", "straight_line", "preferred"}


def test_the_same_log_gives_the_same_diagnosis_and_is_left_as_it_was():
    log = logs.make("slow-collapse", 2).log
    before = {name: values.copy() for name, values in log.columns.items()}
    assert diagnose(log).to_dict() == diagnose(log).to_dict()
    assert all(np.array_equal(before[name], values, equal_nan=True) for name, values in log.columns.items())


def test_steps_that_are_logged_every_ten_change_no_judgement():
    case = logs.make("late-collapse", 0)
    wide = Log("", "", case.log.step * 10, case.log.columns)
    one, other = diagnose(case.log), diagnose(wide)
    assert [f.id for f in one.findings] == [f.id for f in other.findings]
    assert [p.first * 10 for p in one.course.phases] == [p.first for p in other.course.phases]


def test_at_least_and_headline():
    found = diagnose(logs.make("slow-collapse", 0).log)
    assert found.headline == "This run has collapsed"
    assert {one.severity for one in found.at_least("severe")} == {"severe"}
    assert found.at_least("info") == found.findings
    graver = diagnose(logs.make("reward-hacking", 0).log)
    assert graver.headline.startswith("This run is healthy, but: ")


def test_public_names_load_lazily():
    assert package.diagnose is diagnose
    assert "read" in dir(package)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


VALUES = st.one_of(
    st.floats(-10, 10), st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1e-320, 1e99, -1e99, 1e150, 1e308])
)


@st.composite
def any_log(draw):
    n = draw(st.integers(0, 40))
    names = draw(st.lists(st.sampled_from([*KNOWN, "eval/pass@1", "eval/pass@8"]), max_size=8, unique=True))
    columns = {name: np.array(draw(st.lists(VALUES, min_size=n, max_size=n))) for name in names}
    step = np.cumsum(draw(st.lists(st.integers(1, 10**6), min_size=n, max_size=n))).astype(np.int64)
    kinds = draw(st.lists(st.sampled_from(["broken", "gap", "mixed", "nonfinite", "reset"]), max_size=2))
    return Log("any", "any", step, columns, notes=tuple(Note(kind, "odd", (1,)) for kind in kinds))


@settings(max_examples=120)
@given(any_log())
def test_no_log_makes_it_fail(log):
    data = json.loads(json.dumps(diagnose(log).to_dict(), allow_nan=False))
    assert data["worst"] in (None, *SEVERITIES)
