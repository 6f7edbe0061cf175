"""The harness and its record; what is measured is not asserted."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def result(value=2.0):
    row = {
        "seconds": {"median": 1.0, "p20": 0.9, "p80": 1.1, "min": 0.8},
        "time_over_ours": value,
        "min_over_ours": value,
        "cpu_seconds": 1.0,
        "cpu_over_ours": value,
        "extra_peak_mb": 3.0,
        "largest_difference": 1e-6,
    }
    return {
        "summary": "a summary",
        "size": "n=1",
        "date": "2026-01-02T03:04:05+00:00",
        "rounds": 1,
        "machine": {"cpu": "x", "cores": 2, "threads": 1, "load_1min_before": 0.1, "load_1min_after": 0.2},
        "versions": {"torch": "2"},
        "rows": {"uncollapse": row},
        "absent": {"verl": "not installed"},
        "goals": [{"goal": "a goal", "value": value, "limit": 1.0, "at_least": True, "met": value >= 1}],
    }


def test_record_merges_by_name_and_renders(tmp_path):
    from benchmarks import record

    record.save({"one": result()}, tmp_path)
    record.save({"two": result(0.5)}, tmp_path)
    record.save({"one": result(3.0)}, tmp_path)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["schema"] == record.SCHEMA
    assert set(kept["benchmarks"]) == {"one", "two"}
    assert kept["benchmarks"]["one"]["rows"]["uncollapse"]["time_over_ours"] == 3
    text = (tmp_path / "README.md").read_text()
    assert "a goal: 3 (at least 1.0): reached." in text
    assert "**missed**" in text
    assert "| verl | absent: not installed |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "results.json"]


def test_other_schema_is_not_overwritten(tmp_path):
    from benchmarks import record

    (tmp_path / "results.json").write_text('{"schema": 99}')
    with pytest.raises(SystemExit, match="schema 99"):
        record.save({"one": result()}, tmp_path)
    assert (tmp_path / "results.json").read_text() == '{"schema": 99}'


def test_committed_table_is_fresh():
    from benchmarks import record

    if record.HERE.joinpath("results.json").exists():
        assert record.HERE.joinpath("README.md").read_text() == record.table(
            record.load(record.HERE / "results.json")
        )


def test_rounds_are_paired_and_ratios_are_of_rounds():
    from benchmarks import harness

    calls = []
    wall, cpu = harness.times(
        {harness.OURS: lambda: calls.append(0), "peer": lambda: calls.append(1)}, rounds=5, tick=lambda: None
    )
    assert [sorted(calls[i : i + 2]) for i in range(0, 10, 2)] == [[0, 1]] * 5
    assert {name: len(values) for name, values in (wall | cpu).items()} == {harness.OURS: 5, "peer": 5}
    rows = harness.summary(
        {harness.OURS: [1.0, 2.0, 9.0], "peer": [2.0, 4.0, 9.0]}, {"peer": [1.0], harness.OURS: [4.0]}
    )
    assert rows["peer"]["time_over_ours"] == 2
    assert rows["peer"]["cpu_over_ours"] == 0.25
    assert rows[harness.OURS]["seconds"]["median"] == 2


def test_peak_counts_what_was_allocated_meanwhile():
    from benchmarks import harness

    size = 64 * 2**20
    assert 0.98 * size <= harness.peak_of(lambda: bytearray(b"x") * size) <= 1.2 * size
    held = lambda: (bytearray(b"x") * size, time.sleep(0.1))  # noqa: E731 a sampler misses short peaks
    assert 0.98 * size <= harness._sampled_peak(held) <= 1.2 * size


def test_goal_judges():
    from benchmarks.harness import Goal

    assert Goal("g", lambda rows: 2.0, 1.0, True).judge({})["met"] is True
    assert Goal("g", lambda rows: 2.0, 1.0, False).judge({})["met"] is False
    assert Goal("g", lambda rows: None, 1.0, False).judge({})["met"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "text"), [(["--list"], 0, "token_stats"), (["--only", "nope"], 2, "nope")]
)
def test_command_line(arguments, code, text):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code
    assert text in done.stdout + done.stderr


def test_token_stats_case_agrees_with_its_peers(monkeypatch):
    pytest.importorskip("trl")
    from benchmarks import token_stats

    monkeypatch.setattr(token_stats, "TIME", 3)
    monkeypatch.setattr(token_stats, "D", 5)
    monkeypatch.setattr(token_stats, "V", 211)
    case = token_stats.case()
    assert set(case.check()) >= {token_stats.TRL_FULL, token_stats.TRL_CHUNKED}
    assert all(value < 1e-4 for value in case.check().values())


def test_the_score_of_diagnose_counts_right_and_wrong():
    from benchmarks import diagnose as benchmark
    from uncollapse.studies.testbeds import logs

    cases = [logs.make("healthy", 0), logs.make("slow-collapse", 0)]
    said = [benchmark.diagnose(case.log) for case in (cases[0], cases[0])]
    counted = benchmark.confusion(cases, said)
    assert counted["accuracy"] == 0.5
    assert sum(map(sum, counted["states"])) == 2
    assert benchmark.findings(cases, said)["entropy-collapse"]["recall"] == 0
    assert benchmark.mistake(cases[0], said[0]) is None
    assert benchmark.mistake(cases[1], said[1])["missed"] == ["entropy-collapse"]
    log = benchmark.long_log(200)
    assert len(log.columns) == 15


def test_the_cost_model_of_processes_is_a_line_in_rows_and_a_ring():
    from benchmarks import processes

    def case(rows, step, reduced=0.0):
        parts = {"generate": 1 + rows / 32, "score and update": rows / 16, "rest": 0.5}
        return parts | {"step": step, "all-reduce": reduced, "wait and exchange": 0.0}

    cases = {
        "1 process": case(32, 4.5),
        "1 process, half of the rows": case(16, 3),
        "2 processes": case(16, 3.3, 0.3),
    }
    assert processes.predicted(cases, 1) == pytest.approx(4.5)
    assert processes.predicted(cases, 2) == pytest.approx(1.5 + 1.5 + 0.3)
    assert processes.predicted(cases, 10**6) == pytest.approx(1.5 + 0.6, rel=1e-4)
    result = {"summary": "", "model": "m", "rows": 32, "steps": 3, "date": "2026-01-02", "cases": cases}
    assert processes.table(result).count("extrapolated, not measured") == 4


def test_a_field_of_the_comparison_has_what_its_engine_can_run():
    from benchmarks import comparison

    table, model = comparison.contestants("modsum"), comparison.contestants("tiny")
    assert "lp-reg-full" in table  # two policies' logits at once
    assert "lp-reg-full" not in model
    assert {"grpo", "lp-reg-scaled"} <= set(model) <= set(table)


def test_lp_reg_chooses_tokens_at_the_scale_of_the_comparison():
    from benchmarks import comparison
    from uncollapse.studies.testbeds.engine import LogitsEngine, Trainer
    from uncollapse.studies.testbeds.modsum import ModSum, ModSumLab, TablePolicy

    task, made = ModSum(), comparison.contestants("modsum")["lp-reg-scaled"]
    policy = TablePolicy(task.initial_logits(torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
    trainer = Trainer(made, LogitsEngine(ModSumLab(task), policy), optimizer, minibatches=4)
    reports = [report for _ in range(8) for report in trainer.step(list(range(task.prompts)))[1]]
    chosen = sum(float(report.metrics["lp_reg/selected/frac"][0]) for report in reports)
    assert chosen >= 8 * 5  # of 768 tokens in each of 8 rollout batches


def test_the_comparison_has_every_recipe_on_as_many_rows_and_tells_means_with_intervals(
    tmp_path, monkeypatch
):
    from benchmarks import comparison
    from uncollapse.policy.registry import recipes

    known = comparison.contestants("modsum")
    assert set(known) >= set(recipes()) | {"clip-cov-scaled"}
    assert {made.sampler.samples for made in known.values()} == {comparison.SAMPLES}

    def run(recipe, seed):
        return {"entropy": 1.0 + seed if recipe.name == "grpo" else 3.0, "reward": 0.5, "seconds": 2.0}

    monkeypatch.setitem(comparison.RUN, "modsum", run)
    monkeypatch.setattr(comparison, "WORK", tmp_path)
    result = comparison.measure("modsum", ["grpo", "dapo"], (0, 1))
    text = comparison.table(result, "modsum")
    assert text.index("| dapo | 3.000 ± 0.00 |") < text.index("| grpo | 1.500 ±")
    assert "| 0.500 ± 0.00 | 1.000 ± 0.00 |" in text

    one = {
        "origin": {"commit": "b" * 40},
        "seeds": [0, 1],
        "recipes": {"siren": {}},
        "refused": {},
        "commits": {"siren": "b" * 40},
    }
    both = comparison.merged(result | {"refused": {"siren": "no"}}, one)
    assert list(both["recipes"]) == ["grpo", "dapo", "siren"]
    assert both["refused"] == {}
    assert both["commits"]["siren"] != both["commits"]["grpo"] == result["origin"]["commit"]
    assert comparison.merged(result, one | {"seeds": [5]})["recipes"] == {"siren": {}}
    assert comparison.merged(None, one) == one
    later = result | {"commits": result["commits"] | {"dapo": "c" * 40}}
    assert f"Measured before, at commit {'c' * 10}: `dapo`." in comparison.table(later, "modsum")
