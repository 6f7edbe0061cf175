from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from uncollapse import studies
from uncollapse.catalogue import papers
from uncollapse.errors import ConfigError, DataError, UnknownName
from uncollapse.studies.claims import Bound, Claim, Verdict
from uncollapse.studies.statistics import Estimate, exact, mean_over_seeds
from uncollapse.studies.study import Measurements, Study, Trials, reproduce, run_study

CLAIM = Claim("E1", "x is positive", "x over seeds", Bound("x", ">", 0.0), "x")


def make(runs: list[str], fail_at: int | None = None) -> Study:
    def measure(quick: bool, trials: Trials) -> Measurements:
        seeds = range(2 if quick else 4)
        trials.plan(len(seeds))
        values = []
        for seed in seeds:

            def run(seed: int = seed) -> dict[str, float]:
                if seed == fail_at:
                    raise KeyboardInterrupt
                runs.append(f"seed {seed}")
                return {"x": 1.0 + 0.1 * seed}

            values.append(trials.trial(f"seed {seed}", run)["x"])
        estimates = {"x": mean_over_seeds(values, seeds), "bad": Estimate(math.nan, -math.inf, math.inf, "t")}
        return Measurements(estimates, {"curve": [1, (2, math.inf)]}, tuple(seeds))

    return Study("toy", (CLAIM,), measure, sources=("uncollapse.studies.testbeds",))


def test_verdict_and_file(tmp_path: Path) -> None:
    outcome = run_study(make([]), quick=False, output=tmp_path / "out", work=tmp_path / "work")
    assert outcome.results[0].verdict is Verdict.reproduced
    record = json.loads((tmp_path / "out/toy.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert record["claims"][0]["verdict"] == "reproduced"
    assert record["claims"][0]["criterion"] == "reproduced if 95% interval of x > 0"
    assert record["claims"][0]["bounds"][0]["state"] == "met"
    assert record["estimates"]["x"]["seeds"] == [0, 1, 2, 3]
    assert record["estimates"]["bad"]["value"] is None
    assert record["details"]["curve"] == [1, [2, None]]
    origin = record["provenance"]
    assert origin["command"] == "uncollapse reproduce toy"
    assert {"torch", "numpy", "python", "uncollapse"} <= set(origin["packages"])
    assert origin["seeds"] == [0, 1, 2, 3]
    assert str(tmp_path) not in json.dumps(record)


def test_quick_gives_no_verdict_and_leaves_the_full_result_alone(tmp_path: Path) -> None:
    run_study(make([]), quick=False, output=tmp_path, work=tmp_path / "work")
    before = (tmp_path / "toy.json").read_bytes()
    outcome = run_study(make([]), quick=True, output=tmp_path, work=tmp_path / "work")
    assert outcome.results[0].verdict is None
    assert (tmp_path / "toy.json").read_bytes() == before
    record = json.loads((tmp_path / "toy.quick.json").read_text())
    assert record["quick"] is True
    assert record["claims"][0]["verdict"] is None


def test_an_interrupted_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    runs: list[str] = []
    where = {"quick": False, "output": tmp_path, "work": tmp_path / "work"}
    with pytest.raises(KeyboardInterrupt):
        run_study(make(runs, fail_at=2), **where)
    assert not (tmp_path / "toy.json").exists()
    seen: list[tuple[int, int, str]] = []
    outcome = run_study(make(runs), **where, progress=lambda *now: seen.append(now))
    assert runs == [f"seed {i}" for i in range(4)]
    assert seen[-1] == (4, 4, "seed 3")
    fresh = run_study(make([]), quick=False, output=tmp_path / "b", work=tmp_path / "other")
    assert outcome.record["estimates"] == fresh.record["estimates"]


def test_a_truncated_trial_file_is_run_again(tmp_path: Path) -> None:
    trials = Trials(tmp_path)
    assert trials.trial("t", lambda: {"x": 1}) == {"x": 1}
    (file,) = tmp_path.glob("*.json")
    file.write_text(file.read_text()[:10])
    assert Trials(tmp_path).trial("t", lambda: {"x": 2}) == {"x": 2}


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DataError, match="could not make"):
        run_study(make([]), quick=False, output=tmp_path / "taken" / "out", work=tmp_path / "work")
    outcome = run_study(make([]), quick=False, output=tmp_path, work=tmp_path / "work")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken", "toy.json", "work"]
    assert outcome.figure is None


def test_the_room_offers_reproduce() -> None:
    assert studies.reproduce is reproduce
    assert not hasattr(studies, "nothing")


def test_unknown_and_unstudied_papers() -> None:
    with pytest.raises(UnknownName, match="entropy-mechanism"):
        reproduce("entropy-mechanisms")
    unstudied = [slug for slug, entry in papers().items() if not entry.studied]
    for slug in unstudied[:1]:
        with pytest.raises(ConfigError, match=f"{slug} has no study yet"):
            reproduce(slug)


def test_exact_estimates_are_judged_like_any_other() -> None:
    assert CLAIM.judge({"x": exact(-1.0)}) is Verdict.not_reproduced
