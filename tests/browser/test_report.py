"""The report in a real browser: it asks the network for nothing, runs nothing of the model's, and fits the screen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from uncollapse import report
from uncollapse.diagnose.diagnosis import diagnose
from uncollapse.studies.testbeds import logs

pytestmark = pytest.mark.browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RUN_SECTIONS = ["entropy", "answers", "covariance", "text", "law", "health", "setup", "glossary"]
WIDTHS = (390, 1280)
OVERFLOWING = """() => [...document.querySelectorAll('main *')]
  .filter(e => !e.closest('.scroll, pre, svg') && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => `${e.tagName}.${e.className}`)"""


@dataclass
class Visit:
    """A page and what it did while it was open."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, synthetic: ModuleType) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("reports")
    synthetic.run(root / "run", steps=40)
    synthetic.comparison(root / "comparison", seeds=2, steps=20, recipes=("grpo", "kl-cov"))
    synthetic.Run.create(root / "empty", {})
    written = {name: report.write(root / name) for name in ("run", "comparison", "empty")}
    one, *more = (diagnose(logs.make(kind, 1).log) for kind in ("collapsing-late", "exploding", "no-entropy"))
    written["diagnosis"] = report.diagnosis.write(root / "diagnosis.html", [one])
    written["diagnoses"] = report.diagnosis.write(root / "diagnoses.html", [one, *more])
    return written


@pytest.fixture
def visit(browser: Any, reports: dict[str, Path]) -> Iterator[Any]:
    opened = []

    def go(name: str, width: int = 1280, scheme: str = "light") -> Visit:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        seen = Visit(page)
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("console", lambda message: seen.complaints.append(message.text))
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (seen.complaints.append(dialog.message), dialog.dismiss()))
        page.goto(reports[name].as_uri())
        page.wait_for_load_state("networkidle")
        opened.append(page)
        return seen

    yield go
    for page in opened:
        page.close()


@pytest.mark.parametrize("name", ["run", "comparison", "empty", "diagnosis", "diagnoses"])
def test_it_asks_the_network_for_nothing_and_is_silent(
    visit: Any, reports: dict[str, Path], name: str
) -> None:
    seen = visit(name)
    seen.page.mouse.wheel(0, 20_000)
    seen.page.wait_for_timeout(100)
    assert [url for url in seen.requests if not url.startswith("data:")] == [reports[name].as_uri()]
    assert seen.complaints == []


@pytest.mark.parametrize("name", ["run", "comparison", "empty"])
def test_all_sections_are_visible(visit: Any, name: str) -> None:
    page = visit(name).page
    expected = ["recipes", *RUN_SECTIONS] if name == "comparison" else RUN_SECTIONS
    assert page.eval_on_selector_all("main > section", "all => all.map(e => e.id)") == expected
    assert all(page.locator(f"#{section} h2").is_visible() for section in expected)
    assert page.locator("h1").is_visible()


def test_hostile_text_is_text(visit: Any) -> None:
    page = visit("run").page
    assert page.evaluate("window.pwned") is None
    assert page.locator("main img").count() == 0
    assert page.locator("script").count() == 1
    tokens = page.locator(".answer").first.inner_text()
    assert "<script>alert(1)</script>" in tokens
    assert (
        page.locator(".answer").first.locator("> .tok").count()
        == page.locator(".answer").first.locator("*").count()
    )


def test_the_policy_stops_what_escaping_might_miss(visit: Any) -> None:
    seen = visit("run")
    seen.page.evaluate(
        """() => { const d = document.createElement('div');
        d.innerHTML = '<img src="https://example.invalid/x.png" onerror="window.pwned = 3">';
        document.body.append(d); }"""
    )
    seen.page.wait_for_timeout(200)
    assert seen.page.evaluate("window.pwned") is None
    assert any("Content Security Policy" in line for line in seen.complaints)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["run", "comparison", "empty", "diagnosis", "diagnoses"])
def test_it_fits_the_screen(visit: Any, name: str, width: int) -> None:
    page = visit(name, width).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERFLOWING) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_figures_are_shown_once_and_fill_the_column(visit: Any, width: int) -> None:
    page = visit("comparison", width).page
    boxes = page.eval_on_selector_all(
        "main figure:not(.table)",
        "all => all.map(f => [...f.querySelectorAll('svg')].map(s => s.getBoundingClientRect()).filter(b => b.width))",
    )
    assert len(boxes) >= 8
    assert all(len(shown) == 1 for shown in boxes)
    assert all(shown[0]["width"] > 0.8 * min(width - 48, 800) and shown[0]["height"] > 100 for shown in boxes)


def test_dark_pages_have_light_figures(visit: Any) -> None:
    colour = "e => getComputedStyle(e).fill"
    light, dark = (visit("run", scheme=scheme).page for scheme in ("light", "dark"))
    seen = [page.eval_on_selector("#entropy .wide svg text", colour) for page in (light, dark)]
    assert seen[0] != seen[1]
    assert dark.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"


def test_pointing_at_a_curve_reads_it_out(visit: Any) -> None:
    page = visit("run").page
    figure = page.locator("#entropy .wide svg")
    figure.scroll_into_view_if_needed()
    figure.hover(position={"x": 300, "y": 120})
    tip = page.locator("#tip").inner_text()
    assert tip.startswith("step ")
    assert "Entropy " in tip
    assert "Reward, training " in tip
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()


def test_tokens_answer_to_pointer_and_keys(visit: Any) -> None:
    page = visit("run").page
    answer = page.locator(".answer").first
    answer.scroll_into_view_if_needed()
    page.wait_for_timeout(700)  # smooth scrolling hides the tooltip
    answer.locator(".tok").nth(2).hover()
    assert "log-probability" in page.locator("#tip").inner_text()
    page.mouse.move(2, 2)
    answer.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert answer.locator(".tok.on").count() == 1
    assert page.locator("#tip").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_replaying_to_the_first_step_removes_every_colour(visit: Any) -> None:
    page = visit("run").page
    probe = page.locator(".probe").first
    classes = "all => new Set(all.map(e => e.className)).size"
    assert probe.locator(".tok").evaluate_all(classes) > 1
    probe.locator("input").evaluate("e => { e.value = 0; e.dispatchEvent(new Event('input')); }")
    assert probe.locator(".tok").evaluate_all("all => all.every(e => e.className === 'tok k0')")
    assert probe.locator("output").inner_text() == "0"


def test_printing_unfolds_and_goes_light(visit: Any) -> None:
    page = visit("run", scheme="dark").page
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("nav").is_hidden()
    assert page.evaluate("[...document.querySelectorAll('details')].every(d => d.open)")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 252)"


def test_advice_can_be_copied(visit: Any) -> None:
    page = visit("diagnosis").page
    button = page.locator(".copy").first
    assert button.is_visible()
    page.evaluate(
        "() => { document.execCommand = (name) => { window.copied = [name, String(getSelection())]; return true; }; }"
    )
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('not here')); }")
    button.click()
    page.wait_for_function("document.querySelector('.copy').textContent === 'Copied'")
    name, text = page.evaluate("window.copied")
    assert name == "copy"
    assert "use_adaptive_entropy=True," in text
