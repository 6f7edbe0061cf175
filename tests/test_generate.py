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
    assert len(lines) == 2 + len(RECORD["claims"])
    assert "| not reproduced | 0.1235 (some/effect) |" in lines[2]
    assert "a \\| b" in lines[2]
    assert "| inconclusive | - |" in lines[3]
    page = generate.result_of("entropy-mechanism")
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
