from __future__ import annotations

import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from uncollapse import report
from uncollapse.errors import DataError
from uncollapse.runs import Comparison, Run

RUN_SECTIONS = ["entropy", "answers", "covariance", "text", "law", "health", "setup", "glossary"]
COMPARISON_SECTIONS = ["recipes", *RUN_SECTIONS]
FEW = ("entropy/token", "reward/mean")
VOID = {"meta", "link", "input", "img", "br", "hr"}


class Page(HTMLParser):
    """Collects what the tests ask about, and checks that the tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] not in (["script"], ["style"]):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n\t]+", " ", "".join(self.texts))

    def ids(self, tag: str = "") -> list[str]:
        return [a["id"] or "" for name, a in self.tags if "id" in a and tag in ("", name)]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run_html(tmp_path_factory: pytest.TempPathFactory, synthetic: ModuleType) -> str:
    return report.render_run(synthetic.run(tmp_path_factory.mktemp("one") / "run", steps=40))


@pytest.fixture(scope="module")
def comparison_html(tmp_path_factory: pytest.TempPathFactory, synthetic: ModuleType) -> str:
    made = synthetic.comparison(
        tmp_path_factory.mktemp("many") / "c", seeds=2, steps=30, recipes=("grpo", "kl-cov")
    )
    return report.render_comparison(made)


def test_every_section_is_there_and_has_a_heading(run_html: str, comparison_html: str) -> None:
    for html, expected in ((run_html, RUN_SECTIONS), (comparison_html, COMPARISON_SECTIONS)):
        page = Page(html)
        assert page.ids("section") == expected
        assert len(page.all("h1")) == 1
        assert {a["aria-labelledby"] for a in page.all("section")} <= set(page.ids("h2"))
        assert "Not logged" not in page.text
        links = {(a["href"] or "")[1:] for a in page.all("a")}
        assert links <= set(page.ids())


def test_ids_are_unique_and_references_resolve(run_html: str, comparison_html: str) -> None:
    for html in (run_html, comparison_html):
        ids = Page(html).ids()
        assert len(ids) == len(set(ids))
        assert set(re.findall(r"url\(#([^)]+)\)", html)) | set(
            re.findall(r'xlink:href="#([^"]+)"', html)
        ) <= set(ids)


def test_the_headline_quotes_the_numbers(run_html: str) -> None:
    assert re.search(
        r"Entropy fell from 1\.\d\d to 0\.\d\d nats per token \(\d\d\u202f% lost\) while reward rose from 0\.\d\d to 0\.\d\d\.",
        Page(run_html).text,
    )


def test_nothing_is_loaded_and_no_foreign_script_may_run(run_html: str) -> None:
    page = Page(run_html)
    assert not [a for a in page.all("script") if a]
    assert len(page.all("script")) == 1
    assert page.all("img") == []
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    style = run_html[run_html.index("<style>") : run_html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_model_text_is_shown_and_not_markup(run_html: str, synthetic: ModuleType) -> None:
    page = Page(run_html)
    assert synthetic.HOSTILE not in run_html
    assert "<script>alert(1)" not in run_html
    assert "<script>alert(1)</script>" in page.text
    assert page.text.count("window.pwned=1") == 3  # a token, a prompt, the configuration


def test_figures_have_text_alternatives_in_both_widths(run_html: str) -> None:
    figures = [a for a in Page(run_html).all("svg") if a.get("class") != "spark"]
    assert len(figures) >= 12
    assert len(figures) % 2 == 0
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 20 for a in figures)


def test_figures_follow_the_colour_scheme(run_html: str) -> None:
    body = run_html[run_html.index("<body>") :]
    assert "var(--s1)" in body
    assert not re.search(r"(?:fill|stroke): ?#", body), "a colour that the dark page would not change"


def test_rendering_is_deterministic(tmp_path: Path, synthetic: ModuleType) -> None:
    made = synthetic.run(tmp_path / "run", steps=4, only=FEW)
    assert report.render_run(made) == report.render_run(made)


def test_every_metric_shown_is_explained(run_html: str) -> None:
    text = Page(run_html).text
    glossary = text[text.rindex("How to read this") :]
    for key in (
        "entropy/token/p90",
        "reward/zero_variance_groups",
        "eval/pass@*",
        "covariance/top/*",
        "kl/old/k3",
        "lr",
    ):
        assert key in glossary
    for concept in ("95 % interval", "AIC", "Entropy law"):
        assert concept in glossary


def test_comparison_reports_seeds_and_intervals(comparison_html: str) -> None:
    page = Page(comparison_html)
    assert "means over 2 seeds" in page.text
    assert "95\u202f% interval over 2 seeds" in page.text
    assert re.search(r"<td>2</td><td>0\.\d\d\u202f±\u202f", comparison_html)
    assert "kept" in page.text


def test_a_single_seed_gets_no_interval(tmp_path: Path, synthetic: ModuleType) -> None:
    made = synthetic.comparison(
        tmp_path / "c", seeds=1, steps=12, recipes=("grpo", "kl-cov"), only=(*FEW, "eval")
    )
    text = Page(report.render_comparison(made)).text
    assert "A single seed per recipe" in text
    assert "interval over" not in text
    table = text[text.index("distinct answers") : text.index("From dot to arrow")]
    assert "±" not in table


def test_an_empty_run_says_what_is_missing(tmp_path: Path) -> None:
    page = Page(report.render_run(Run.create(tmp_path / "run", {})))
    assert page.ids("section") == RUN_SECTIONS
    assert "Nothing was logged yet" in page.text
    assert page.text.count("Not logged:") == 5
    assert "The law cannot be fitted: entropy and reward not logged." in page.text


def test_an_empty_comparison_renders(tmp_path: Path) -> None:
    page = Page(report.render_comparison(Comparison.create(tmp_path / "c", {})))
    assert page.ids("section") == COMPARISON_SECTIONS
    assert "No run of this comparison was found" in page.text


def test_odd_rows_do_not_break_the_page(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {"recipe": {"name": "grpo"}, "model": {"path": "x"}})
    run.append(
        {"step": 0, "entropy/token/mean": float("nan"), "reward/mean": float("inf"), "lr": "warm", "x": True}
    )
    run.append(
        {
            "step": 5,
            "grad/norm": 1e300,
            "loss/policy": -1e-12,
            "eval/pass@x": 1,
            "eval/pass@8": 0.5,
            "y": 10**400,
        }
    )
    page = Page(report.render_run(run))
    assert "Not logged: entropy/token/mean and reward/mean." in page.text
    assert "Pass@8 stayed at 0.50" in page.text


def test_the_law_says_why_it_cannot_be_fitted(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {})
    for step in range(3):
        run.append({"step": step, "entropy/token/mean": 1.0, "reward/mean": 0.1 * step})
    assert "The law cannot be fitted: entropy is constant" in Page(report.render_run(run)).text
    flat = Run.create(tmp_path / "flat", {})
    for step in range(3):
        flat.append({"step": step, "entropy/token/mean": 1.0 - step, "reward/mean": 0.0})
    assert "The law cannot be fitted: reward stayed at 0.00 throughout." in Page(report.render_run(flat)).text
    short = Run.create(tmp_path / "short", {})
    short.append({"step": 0, "entropy/token/mean": 1.0, "reward/mean": 0.1})
    assert "The law cannot be fitted: 1 points" in Page(report.render_run(short)).text


def test_broken_lines_are_told_in_the_report(tmp_path: Path, synthetic: ModuleType) -> None:
    run = synthetic.run(tmp_path / "run", steps=3, only=FEW)
    with (run.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "rew')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = Page(report.render_run(run)).text
    assert "1 line of metrics.jsonl could not be read and is left out (4)" in text


def test_unequal_lengths_are_told(tmp_path: Path, synthetic: ModuleType) -> None:
    made = Comparison.create(tmp_path / "c", {"recipes": ["grpo", "kl-cov"]})
    synthetic.run(made.run_path("grpo", 0), "grpo", 0, 6, only=FEW)
    synthetic.run(made.run_path("kl-cov", 0), "kl-cov", 0, 4, only=FEW)
    assert "Not all runs reached 6 steps: kl-cov seed 0 (4)." in Page(report.render_comparison(made)).text


def test_write_detects_what_it_is_given(tmp_path: Path) -> None:
    Run.create(tmp_path / "run", {})
    Comparison.create(tmp_path / "c", {})
    assert report.write(tmp_path / "run") == tmp_path / "run" / "report.html"
    assert "Comparison of recipes" in report.write(str(tmp_path / "c")).read_text(encoding="utf-8")
    with pytest.raises(DataError, match="no run directory"):
        report.write(tmp_path / "nothing")


def test_the_report_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, uncollapse.report; sys.exit('torch' in sys.modules)"
    source = str(Path(report.__file__).parents[2])
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": source, "HOME": str(tmp_path)}
    )
