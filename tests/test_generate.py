"""The generator of the docs' blocks: it tells what is there, says so when nothing is, and finds stale pages."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "generate.py"
RECORD: dict[str, Any] = {
    "slug": "entropy-mechanism",
    "quick": False,
    "claims": [
        {"id": "E1", "paper_says": "a | b", "criterion": "c > 0", "verdict": "not reproduced", "effect": "some/effect"},
        {"id": "E2", "paper_says": "more", "criterion": "d > 0", "verdict": "inconclusive", "effect": "unknown"},
    ],
    "estimates": {"some/effect": {"value": 0.123456, "low": None, "high": 1.0}},
    "limits": "small",
    "provenance": {"command": "run", "packages": {"torch": "2.13.0"}, "seeds": [0, 1], "commit": None},
}  # fmt: skip


@pytest.fixture
def generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "BENCHMARKS", tmp_path / "results.json")
    return module


def test_nothing_measured_is_said(generate: ModuleType) -> None:
    assert generate.results_table(None) == "No study has been run to the end yet."
    assert generate.result_of("siren").startswith("Not measured yet.")
    assert generate.benchmarks_table(None).startswith("Not measured yet.")


def test_verdicts_are_told_as_they_are(generate: ModuleType) -> None:
    (generate.RESULTS / "entropy-mechanism.json").write_text(json.dumps(RECORD))
    (generate.RESULTS / "entropy-mechanism.quick.json").write_text(json.dumps(RECORD | {"quick": True}))
    lines = generate.results_table(None).splitlines()
    by_verdict = {"reproduced": "-", "not reproduced": "-", "inconclusive": "-"}
    by_verdict |= {claim["verdict"]: claim["id"] for claim in RECORD["claims"]}
    assert lines[2].split(" | ")[1:] == [*list(by_verdict.values())[:-1], f"{by_verdict['inconclusive']} |"]
    page = generate.result_of("entropy-mechanism")
    assert "a \\| b" in page
    assert "0.1235 (some/effect)" in page
    assert "**not reproduced**" in page
    assert "Limits: small" in page
    assert "command run, torch 2.13.0" in page
    assert "Seeds: 0, 1." in page


def test_check_writes_nothing_and_finds_the_stale_page(
    generate: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = generate.ROOT / "README.md"
    stale = "before\n<!-- generated: results -->\nold\n<!-- end -->\nafter\n"
    readme.write_text(stale)
    assert generate.main(["--check"]) == 1
    assert "stale: README.md" in capsys.readouterr().out
    assert readme.read_text() == stale
    assert generate.main([]) == 0
    assert readme.read_text() == stale.replace("old", "No study has been run to the end yet.")
    assert generate.main(["--check"]) == 0


def test_a_block_that_nothing_makes_is_an_error(generate: ModuleType) -> None:
    with pytest.raises(KeyError, match="nonsense"):
        generate.filled("<!-- generated: nonsense -->\n<!-- end -->")


def test_the_score_of_diagnose_is_told_with_its_mistakes(generate: ModuleType) -> None:
    assert generate.confusion_table(None).startswith("Not measured yet.")
    confusion = {"runs": 3, "states": [[1, 1], [0, 1]], "accuracy": 2 / 3}
    score = {
        "seeds": [7], "labels": ["healthy", "collapsed"], **confusion, "louder": {"2": 0.5}, "arbitrary": confusion,
        "findings": {"mismatch": {"found": 1, "missed": 2, "wrong": 3}},
        "mistakes": [{"run": "healthy-7", "truth": "healthy", "said": "collapsed", "missed": [], "wrong": ["mismatch"]}],
        "median_error_of_the_begin": 0.012, "forecasts": 5, "forecasts_covered": 4, "traps": {"spike": False}, "traps_passed": 0.0,
        "watched": {"sound": 2, "sound_stopped": 1, "falling": 0, "falling_stopped": 0, "entropy_left_when_stopped": None},
    }  # fmt: skip
    generate.BENCHMARKS.write_text(json.dumps({"benchmarks": {"diagnose": {"score": score}}}))
    text = generate.confusion_table(None)
    for part in (
        "67 % told right",
        "| **healthy** | 1 | 1 |",
        "| `mismatch` | 1 | 2 | 3 |",
        "| healthy-7 | healthy | collapsed |",
        "4 intervals",
        "0 of 1 (spike)",
    ):
        assert part in text


def test_thresholds_and_advice_come_from_the_code(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "ROOT", SCRIPT.parents[1])
    assert "| `SPENT` | 0.15 | phases | Share of the starting entropy" in generate.thresholds_table(None)
    assert "`entropy_target=0.4`" in generate.advice_table(None)
