"""The demo, cut short: its recipes are what they say, and its summary is what the runs gave."""

from __future__ import annotations

from importlib import resources

import pytest

pytest.importorskip("trl")

from uncollapse.cli import main
from uncollapse.cli.demo import SETTINGS, in_words
from uncollapse.integrations.settings import settings
from uncollapse.policy.config import load_recipes
from uncollapse.runs import Comparison, Run

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_recipes_of_the_demo_are_plain_grpo_and_remedies():
    with resources.as_file(resources.files("uncollapse.cli").joinpath("demo.yaml")) as path:
        found = load_recipes(path)
    assert next(iter(found)) == "grpo"
    assert len(found) >= 3
    for made in found.values():
        assert settings(**SETTINGS).prompts * made.sampler.samples % settings(**SETTINGS).updates == 0


def test_the_demo_cut_short(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "uncollapse.cli.demo.SETTINGS", {**SETTINGS, "prompts": 2, "eval_prompts": 2, "eval_every": 0}
    )
    output = str(tmp_path / "demo")
    assert main(["demo", "--output", output, "--steps", "1"]) == 0
    captured = capsys.readouterr()
    assert "demo.yaml" in captured.err
    assert f"report: {output}/report.html" in captured.out
    assert "grpo: entropy" in captured.out
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    assert main(["demo", "--output", output, "--steps", "1"]) == 0
    again = capsys.readouterr()
    assert again.out == captured.out
    assert "step 1/1" not in again.err


def test_the_summary_in_words_is_made_of_the_numbers_of_the_runs(tmp_path):
    comparison = Comparison.create(tmp_path / "c", {"recipes": ["grpo", "kl"]})
    for name, last in (("grpo", 0.1), ("kl", 1.0)):
        run = Run.create(comparison.run_path(name, 0), {"seed": 0})
        run.append({"step": 0, "entropy/token/mean": 2.0, "reward/mean": 0.25})
        run.append({"step": 1, "entropy/token/mean": last, "reward/mean": 0.75})
    first, second = in_words(comparison)
    assert first.startswith("grpo: entropy fell from")
    assert "95% lost" in first.replace("\u202f", "")
    assert "50% lost" in second.replace("\u202f", "")
    assert "reward rose from" in first
