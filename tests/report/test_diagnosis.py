"""The page of a diagnosis: complete, self-contained, escaped."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from uncollapse.diagnose.attribution import attribute
from uncollapse.diagnose.diagnosis import diagnose
from uncollapse.diagnose.log import Log, Note
from uncollapse.errors import DataError
from uncollapse.report import diagnosis
from uncollapse.report.palette import LIGHT
from uncollapse.report.phases import COLOUR
from uncollapse.studies.testbeds import logs
from uncollapse.token_dump import Tokens

HOSTILE = '<img src=x onerror="window.pwned=1"></div><script>window.pwned=2</script>'


@pytest.fixture(scope="module")
def page() -> str:
    return diagnosis.render([diagnose(logs.make("collapsing-late", 1).log)])


def test_every_section_is_there_and_ids_are_unique(page: str) -> None:
    ids = re.findall(r'<(?:section|article)[^>]* id="([^"]+)"', page)
    assert [name for name in ids if "-" not in name] == [
        "course",
        "findings",
        "advice",
        "law",
        "log",
        "glossary",
    ]
    every = re.findall(r'\bid="([^"]+)"', page)
    assert len(every) == len(set(every))


def test_links_lead_somewhere_on_the_page(page: str) -> None:
    ids = set(re.findall(r'\bid="([^"]+)"', page))
    assert {name for name in re.findall(r'href="#([^"]+)"', page)} <= ids


def test_it_asks_the_network_for_nothing_and_runs_one_script(page: str) -> None:
    assert "default-src 'none'" in page
    assert page.count("<script>") == 1
    assert not re.search(
        r'(?:src|href)="(?!#|data:|https://arxiv\.org/abs/)', page.replace("xlink:href", "xlink")
    )


def test_findings_and_advice_are_complete(page: str) -> None:
    assert 'class="card severe"' in page
    assert "Entropy is collapsing" in page
    assert "use_adaptive_entropy=True," in page
    assert "actor_rollout_ref.actor.policy_loss.loss_mode=clip_cov" in page
    assert page.count('class="copy"') == page.count('class="code"') > 3
    assert "Careful." in page
    assert "halves every" in page


def test_the_forecast_is_drawn_and_told(page: str) -> None:
    assert "Entropy spent at step" in page
    assert "if it keeps its pace" in page


def test_what_a_log_says_is_escaped() -> None:
    step = np.arange(1, 31)
    columns = {"entropy/token/mean": np.linspace(0.9, 0.1, 30), "reward/mean": np.linspace(0, 1, 30)}
    log = Log(
        HOSTILE,
        HOSTILE,
        step,
        columns,
        {HOSTILE: step * 1.0},
        {"reward/mean": HOSTILE},
        {HOSTILE: HOSTILE},
        (Note("gap", HOSTILE, (3,)),),
    )
    page = diagnosis.render([diagnose(log)])
    assert "<img" not in page
    assert page.count("<script>") == 1


@pytest.mark.parametrize("kind", ["no-entropy", "short-log"])
def test_a_log_with_next_to_nothing_makes_a_page(kind: str) -> None:
    page = diagnosis.render([diagnose(logs.make(kind, 0).log)])
    assert "The law cannot be fitted" in page


def test_an_empty_log_makes_a_page() -> None:
    page = diagnosis.render([diagnose(Log("nothing", "x", np.arange(0), {}))])
    assert "The log holds neither entropy nor reward." in page


def test_several_runs_have_an_overview_and_a_chapter_each() -> None:
    found = [diagnose(logs.make(kind, 0).log) for kind in ("short-log", "dead-groups")]
    page = diagnosis.render([*found, replace(found[0])])
    assert re.findall(r'<section id="([^"]+)"', page) == ["overview", "run1", "run2", "run3", "glossary"]
    every = re.findall(r'\bid="([^"]+)"', page)
    assert len(every) == len(set(every))
    assert {name for name in re.findall(r'href="#([^"]+)"', page)} <= set(every)


def test_no_run_is_an_error() -> None:
    with pytest.raises(DataError, match="no run"):
        diagnosis.render([])


def test_written_pages_are_the_rendered_ones(tmp_path) -> None:
    found = diagnose(logs.make("short-log", 0).log)
    target = tmp_path / "page.html"
    assert diagnosis.write(target, [found]) == target
    assert diagnosis.writer(tmp_path / "other.html")(found).read_text(encoding="utf-8") == target.read_text(
        encoding="utf-8"
    )


def test_every_state_has_a_colour_of_the_palette() -> None:
    assert set(COLOUR.values()) <= set(LIGHT)
    assert len(set(COLOUR.values())) == len(COLOUR)


def test_answers_of_a_dump_are_coloured_by_predicted_change_and_escaped() -> None:
    columns = {
        "token": np.arange(4), "uid": np.zeros(4, int), "position": np.arange(4),
        "old_logp": np.log([0.6, 0.6, 0.1, 0.1]), "logp": np.full(4, np.nan), "entropy": np.full(4, 1.2),
        "advantage": np.array([1.0, -1.0, 1.0, -1.0]), "reward": np.ones(4), "mask": np.ones(4, bool),
        "text": np.array(["the", HOSTILE, "cat", "sat"], dtype=object),
    }  # fmt: skip
    account = attribute([Tokens(7, columns)])
    page = diagnosis.render([diagnose(logs.make("collapsing-late", 1).log)], account)
    assert HOSTILE not in page
    assert "Token by token" in page
    assert "lowers 0." in page
    assert "raises 0." in page
    assert 'title="probable rewarded: lowers entropy' in page
    assert 'class="tok k-3"' in page
    assert 'class="tok k3"' in page
    assert "data-h=" not in page
    assert "answer 0 of step 7 \u00b7 mean entropy" in page
    assert "1.20 nats" in page
    assert "Predicted entropy change of a token" in page
    without = attribute([Tokens(7, columns | {"entropy": np.full(4, np.nan)})])
    assert "Token by token" not in diagnosis.render([diagnose(logs.make("collapsing-late", 1).log)], without)
