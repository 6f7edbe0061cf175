"""The package as a whole: light import, version, catalogue, import contracts, fresh generated pages, no network."""

import importlib
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import uncollapse
from uncollapse.catalogue import paper, papers
from uncollapse.errors import MissingExtra, UnknownName

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
HEAVY = (
    "torch",
    "numpy",
    "scipy",
    "transformers",
    "trl",
    "matplotlib",
    "pandas",
    "datasets",
    "rich",
)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_import_is_light() -> None:
    code = f"import uncollapse, sys; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_rooms_load_on_first_use() -> None:
    code = "import uncollapse, sys; uncollapse.catalogue.papers(); print('uncollapse.policy' in sys.modules)"
    assert run(sys.executable, "-c", code).stdout.strip() == "False"
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_that_name'"):
        _ = uncollapse.nothing_of_that_name


def test_rooms_are_those_on_disk() -> None:
    package = Path(uncollapse.__file__).parent
    there = {path.stem for path in package.glob("*.py")} | {
        path.parent.name for path in package.glob("*/__init__.py")
    }
    named = {
        name for name in uncollapse.__all__ if name.islower() and name.isidentifier() and name[0] != "_"
    } - {"watch"}
    assert named <= there - {"__init__", "__main__", "errors", "cli"}
    for name in sorted(named - {"integrations"}):
        assert getattr(uncollapse, name) is importlib.import_module(f"uncollapse.{name}")


def test_version_is_written_once_more_in_pyproject_and_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == uncollapse.__version__


def test_every_dependency_is_pinned_in_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(need for name in extras if name != "verl" for need in extras[name])]
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line[:1] not in ("", "#")
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; python_version (<|>=) \"3\.11\")?", line) for line in lines)

    def norm(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    pinned = {norm(line.partition("==")[0]) for line in lines}
    assert {norm(re.match(r"[\w.-]+", need)[0]) for need in wanted} - {"uncollapse"} <= pinned


@pytest.mark.parametrize("slug", papers())
def test_catalogue_entries_are_well_formed(slug: str) -> None:
    entry = paper(slug)
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", slug)
    assert entry.title.strip() == entry.title != ""
    assert re.fullmatch(r"\d{4}\.\d{4,5}", entry.arxiv)
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", entry.date)
    assert entry.authors is None or entry.authors > 0
    assert entry.code is None or re.fullmatch(r"[\w.-]+/[\w.-]+", entry.code)
    assert entry.module.startswith(f"uncollapse.{entry.room}.")
    assert entry.module.split(".")[-1].isidentifier()
    assert entry.study == f"uncollapse.studies.{entry.module.split('.')[-1]}"


def test_catalogue_names_each_paper_once() -> None:
    known = papers()
    assert list(known) == sorted(known)
    assert (
        len({entry.arxiv for entry in known.values()})
        == len({entry.module for entry in known.values()})
        == len(known)
    )


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean entropy-mechanism"):
        paper("entropy-mechanims")


def test_a_missing_extra_names_the_command() -> None:
    assert "pip install 'uncollapse[rl]'" in str(MissingExtra("trl", "rl"))


def test_import_contracts_hold_and_name_every_room() -> None:
    """The first contract is exhaustive: a room that it does not name breaks it."""
    script = Path(sys.executable).with_name("lint-imports")
    done = run(str(script), "--no-logo", "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr


def test_generated_pages_are_fresh() -> None:
    done = run(sys.executable, "docs/generate.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("host", ["192.0.2.1", "pypi.invalid"])
def test_tests_cannot_reach_the_network(host: str) -> None:
    with pytest.raises(AssertionError, match="reached for the network"):
        socket.create_connection((host, 80), timeout=1)


def test_tests_can_reach_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
