"""What the README and the docs show does run, and their local links lead somewhere."""

import re
from pathlib import Path

import pytest

from uncollapse.report.glossary import TERMS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number + 1}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    )
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_examples_run(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "example", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.strip()


def test_readme_stays_short_and_names_the_two_commands_first() -> None:
    assert len(README.splitlines()) < 150
    commands = re.findall(r"^(?:make|pip|uncollapse) \S+", README, re.MULTILINE)
    assert commands[:2] == ["make demo", "make test"]


def test_make_targets_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))
    }
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_lead_somewhere(page: Path) -> None:
    shown = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", shown)
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []


def test_metrics_that_the_docs_explain_are_those_of_the_report() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").partition("<!-- generated")[0]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = [metric for row in rows for metric in re.findall(r"`([^`]+)`", row)]
    assert named
    assert [metric for metric in named if not any(t.explains(metric) or t.key == metric for t in TERMS)] == []
