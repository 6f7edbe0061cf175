"""A study: claims fixed before the run, an experiment made of resumable trials, verdicts computed by code.

`reproduce(slug)` runs the study of a paper, survives interruption (each finished trial is on disk), and writes
`<output>/<slug>.json` and `<output>/<slug>.svg`. A quick run gives no verdict and never touches those files.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uncollapse.catalogue import paper, papers
from uncollapse.errors import ConfigError, DataError
from uncollapse.runs import write_text
from uncollapse.studies.claims import Claim, Verdict
from uncollapse.studies.provenance import provenance
from uncollapse.studies.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = 1
"""Version of the result file; a reader refuses a newer one."""

Progress = Callable[[int, int, str], None]
"""Called with trials done, trials in total and what happens now."""


@dataclass(frozen=True)
class Measurements:
    """What a study measured: `estimates` for the criteria, `details` (JSON values) for the figure and the page."""

    estimates: Mapping[str, Estimate]
    details: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Observation:
    """Something reported without a criterion, such as a control: which estimates, and what they are for."""

    id: str
    text: str
    statistics: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """The reproduction of one paper.

    `measure(quick, trials)` does the work through `trials.trial`, so that it can be interrupted; `figure` draws its
    measurements. `sources` are the packages whose code decides what a trial gives: a change there discards
    unfinished work, so that one result never mixes two versions.
    """

    slug: str
    claims: tuple[Claim, ...]
    measure: Callable[[bool, Trials], Measurements]
    figure: Callable[[Measurements], Figure] | None = None
    observations: tuple[Observation, ...] = ()
    limits: str = ""
    sources: tuple[str, ...] = ("uncollapse.measure", "uncollapse.policy", "uncollapse.studies.testbeds")


@dataclass(frozen=True)
class Result:
    """A claim and what came out; `verdict` is None for a quick run."""

    claim: Claim
    verdict: Verdict | None
    effect: Estimate | None


@dataclass(frozen=True)
class Outcome:
    """Everything `reproduce` found out, and the files it wrote."""

    slug: str
    quick: bool
    results: tuple[Result, ...]
    measurements: Measurements
    record: Mapping[str, Any]
    path: Path
    figure: Path | None


class Trials:
    """Runs trials and keeps each finished one on disk, so that a killed study continues where it stopped."""

    def __init__(self, directory: Path, total: int = 0, progress: Progress | None = None) -> None:
        self.directory, self.total, self.done, self.seconds = directory, total, 0, 0.0
        self._progress = progress

    def plan(self, total: int) -> None:
        """Announce how many trials there will be."""
        self.total = total

    def trial(self, name: str, run: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What `run` returned under this name, from disk if it has run before. It must be JSON and depend on `name` alone."""
        file = self.directory / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
        self.say(name)
        kept = _read(file)
        if kept is None:
            start = time.perf_counter()
            value = run()
            kept = {"name": name, "seconds": time.perf_counter() - start, "value": value}
            _write(file, json.dumps(kept))
        self.done += 1
        self.seconds += kept["seconds"]
        self.say(name)
        return dict(kept["value"])

    def say(self, what: str) -> None:
        """Report progress without finishing a trial."""
        if self._progress is not None:
            self._progress(self.done, self.total, what)


def studies() -> tuple[str, ...]:
    """Slugs of the papers that have a study."""
    return tuple(slug for slug, entry in papers().items() if entry.studied)


def study(slug: str) -> Study:
    """The study of a paper. Raises `UnknownName` for no such paper, `ConfigError` for a paper without a study."""
    entry = paper(slug)
    if not entry.studied:
        raise ConfigError(f"{slug} has no study yet; papers with one: {', '.join(studies()) or 'none'}")
    found = importlib.import_module(entry.study).STUDY
    assert isinstance(found, Study)
    return found


def reproduce(
    slug: str,
    *,
    quick: bool = False,
    output: Path = Path("results"),
    work: Path = Path("runs/reproduce"),
    progress: Progress | None = None,
) -> Outcome:
    """Run the study of a paper and write its result; prints nothing.

    Finished trials live in `<work>/<slug>` and are reused by the next call as long as the code that produced them is
    the same. A full run writes `<output>/<slug>.json` and the figure, atomically; a `quick` run gives no verdict
    and writes `<output>/<slug>.quick.json` and `.quick.svg` instead.
    """
    return run_study(study(slug), quick=quick, output=output, work=work, progress=progress)


def run_study(
    chosen: Study, *, quick: bool, output: Path, work: Path, progress: Progress | None = None
) -> Outcome:
    """`reproduce` for a study object."""
    origin = provenance(f"uncollapse reproduce {chosen.slug}{' --quick' if quick else ''}")
    directory = (
        work / chosen.slug / f"{'quick' if quick else 'full'}-{_fingerprint(chosen, origin['packages'])}"
    )
    trials = Trials(directory, progress=progress)
    measured = chosen.measure(quick, trials)
    results = tuple(
        Result(
            claim, None if quick else claim.judge(measured.estimates), measured.estimates.get(claim.effect)
        )
        for claim in chosen.claims
    )
    origin |= {"seconds": round(trials.seconds, 1), "seeds": list(measured.seeds)}
    record = _record(chosen, quick, results, measured, origin)
    stem = f"{chosen.slug}.quick" if quick else chosen.slug
    path = output / f"{stem}.json"
    picture = None
    if chosen.figure is not None:
        picture = output / f"{stem}.svg"
        _draw(chosen.figure(measured), picture)
    _write(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return Outcome(chosen.slug, quick, results, measured, record, path, picture)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"could not make {path.parent}: {reason}; choose another directory") from error
    write_text(path, text)


def _record(
    chosen: Study, quick: bool, results: tuple[Result, ...], measured: Measurements, origin: Mapping[str, Any]
) -> dict[str, Any]:
    entry = paper(chosen.slug) if chosen.slug in papers() else None
    claims = []
    for result in results:
        claim = result.claim
        bounds = [asdict(b) | {"state": b.state(measured.estimates).value} for b in claim.criterion.bounds]
        claims.append(
            {
                "id": claim.id,
                "paper_says": claim.paper_says,
                "measured": claim.measured,
                "criterion": claim.criterion_text,
                "bounds": bounds,
                "verdict": None if result.verdict is None else result.verdict.value,
                "effect": claim.effect,
            }
        )
    record = {
        "schema": SCHEMA,
        "slug": chosen.slug,
        "paper": None if entry is None else {"title": entry.title, "arxiv": entry.arxiv},
        "quick": quick,
        "claims": claims,
        "observations": [asdict(o) for o in chosen.observations],
        "limits": chosen.limits,
        "estimates": {name: asdict(e) for name, e in measured.estimates.items()},
        "details": measured.details,
        "provenance": origin,
    }
    return {key: _plain(item) for key, item in record.items()}


def _plain(value: Any) -> Any:
    """JSON values only: infinite and NaN become null, tuples become lists, floats keep 9 digits."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value


def _read(file: Path) -> dict[str, Any] | None:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return kept if isinstance(kept, dict) else None


def _fingerprint(chosen: Study, packages: Mapping[str, str]) -> str:
    """Changes with the code that decides the trials and with the versions of the libraries below it."""
    digest = hashlib.sha256(json.dumps(packages, sort_keys=True).encode())
    files = {Path(inspect.getfile(chosen.measure))}
    for name in chosen.sources:
        files |= set(Path(inspect.getfile(importlib.import_module(name))).parent.rglob("*.py"))
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _draw(figure: Figure, path: Path) -> None:
    import io

    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    _write(path, buffer.getvalue())
