"""`uncollapse diagnose`: what happens to a run, from its log alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from uncollapse.cli.catalogue import AsJson
from uncollapse.cli.output import as_json, note, say
from uncollapse.errors import ConfigError, DataError

if TYPE_CHECKING:
    from uncollapse.diagnose.attribution import Attribution
    from uncollapse.diagnose.diagnosis import Diagnosis
    from uncollapse.diagnose.finding import Finding, Severity

_IN_FULL = 3
"""Runs up to which each is printed in full."""

FailOn = Literal["severe", "warning", "never"]


def diagnose(
    path: Path,
    /,
    *,
    map_: Annotated[tuple[str, ...], Parameter(name="--map", consume_multiple=True, negative="")] = (),
    tokens: Path | None = None,
    html: Path | None = None,
    fail_on: FailOn = "severe",
    watch: Annotated[bool, Parameter(negative="")] = False,
    every: float = 30.0,
    json_: AsJson = False,
) -> int:
    """Say what happens to a run, from the log that its trainer wrote: phases, findings, forecast, what to change.

    Reads the logs of TRL and Transformers, TensorBoard, W&B, trackio and verl, our own run directories, and any CSV or
    JSONL; nothing is written to them. Levels are relative to the run's own first steps. Exit code 1 if a finding is at
    least as grave as `--fail-on`, so that a launcher can stop a run that is lost.

    Examples: `uncollapse diagnose outputs/checkpoint-500`; `uncollapse diagnose metrics.csv --map entropy=actor_ent`;
    `uncollapse diagnose runs/today --watch --every 60 || kill %1`; `uncollapse diagnose runs --html diagnosis.html`.

    Parameters
    ----------
    path
        A log file, or a directory that holds one or more.
    map_
        Which column is which, where the names do not say: `entropy=NAME reward=NAME`.
    tokens
        A token dump of this run: says which tokens spent the entropy. A run directory of ours brings its own.
    html
        Write a page with figures to this file.
    fail_on
        Severity from which the exit code is 1.
    watch
        Follow the log while the run goes on: print what is new, end as soon as a finding is as grave as `--fail-on`.
    every
        Seconds between two looks with `--watch`.
    """
    mapping = _mapping(map_)
    if watch and tokens is not None:
        raise ConfigError("--tokens looks at a dump once; leave it out with --watch")
    if watch:
        return _follow(path, mapping, html=html, fail_on=fail_on, every=every, json_=json_)
    found = _diagnosed(path, mapping)
    dump = tokens or _own_dump(path, len(found))
    account = None if dump is None else _account(dump, len(found))
    if json_:
        told = {} if account is None else {"tokens": _plain(account)}
        as_json({"schema": 1, "runs": [one.to_dict() for one in found], **told})
    else:
        _print(found)
        if account is not None:
            from uncollapse.cli.diagnosis import show_tokens

            show_tokens(account)
    _page(html, found, account)
    return int(any(_grave(one, fail_on) for one in found))


def _print(found: Sequence[Diagnosis]) -> None:
    from uncollapse.cli.diagnosis import overview, show

    if len(found) > 1:
        overview(found)
    if len(found) > _IN_FULL:
        say("")
        say(f"{len(found)} runs; name one of them for its findings in full, or ask for --html or --json.")
        return
    for index, one in enumerate(found):
        if index or len(found) > 1:
            say("")
        show(one)


def _mapping(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        known, equals, name = pair.partition("=")
        if not (known and equals and name):
            raise ConfigError(f"--map takes KNOWN=NAME, such as entropy=actor/ent; got {pair!r}")
        found[known] = name
    return found


def _diagnosed(path: Path, mapping: dict[str, str]) -> list[Diagnosis]:
    from uncollapse.diagnose.diagnosis import diagnose as judge
    from uncollapse.diagnose.readers import read

    return [judge(log) for log in read(path, mapping=mapping)]


def _own_dump(path: Path, runs: int) -> Path | None:
    """The token dump that a run of ours has in its directory."""
    from uncollapse.runs import DUMP
    from uncollapse.token_dump import is_dump

    return path / DUMP if runs == 1 and is_dump(path / DUMP) else None


def _account(tokens: Path, runs: int) -> Attribution:
    from uncollapse.diagnose.attribution import attribute

    if runs != 1:
        raise ConfigError(f"--tokens is about one run, and here are {runs}; name one of them")
    return attribute(tokens)


def _plain(found: Attribution) -> dict[str, Any]:
    """The account for programs; units as in `uncollapse.diagnose.attribution`."""
    from uncollapse.diagnose.attribution import FRACTIONS

    return {
        "tokens": found.tokens,
        "drive": found.drive,
        "shares": {f"{fraction:g}": share for fraction, share in zip(FRACTIONS, found.shares, strict=True)},
        "quadrants": {name: asdict(one) for name, one in found.quadrants.items()},
        "predicted": {name: asdict(one) for name, one in found.predicted.items()},
        "spenders": [_finite(asdict(one)) for one in found.spenders],
        "keepers": [_finite(asdict(one)) for one in found.keepers],
    }


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and value != value else value for key, value in row.items()}


def _page(html: Path | None, found: Sequence[Diagnosis], account: Attribution | None = None) -> None:
    if html is not None:
        from uncollapse.report import diagnosis

        note(f"page: {diagnosis.write(html, found, account)}")


def _grave(found: Diagnosis, fail_on: FailOn) -> tuple[Finding, ...]:
    return () if fail_on == "never" else found.at_least(fail_on)


def _follow(
    path: Path, mapping: dict[str, str], *, html: Path | None, fail_on: FailOn, every: float, json_: bool
) -> int:
    """Look again whenever a file has changed; what was said once is said again only if it has become graver."""
    if not every > 0:
        raise ConfigError(f"--every takes a number of seconds above 0, got {every:g}")
    said: dict[str, dict[str, Severity]] = {}
    waiting = ""
    for _ in _changes(path, every):
        try:
            found = _diagnosed(path, mapping)
        except DataError as error:  # a run that has just begun has no log yet
            if str(error) != waiting:
                waiting = str(error)
                note(f"waiting: {waiting}")
            continue
        waiting = ""
        for one in found:
            _tell_news(one, said, json_=json_)
        if any(_grave(one, fail_on) for one in found):
            _page(html, found)
            return 1
        if html is not None:
            _page(html, found)
    return 0


def _tell_news(found: Diagnosis, said: dict[str, dict[str, Severity]], *, json_: bool) -> None:
    from uncollapse.cli.diagnosis import show_finding
    from uncollapse.diagnose.finding import news

    source = found.log.source
    last = int(found.log.step[-1]) if len(found.log) else 0
    if not json_ and source not in said:
        say(f"{source}: step {last:,}, {found.state}")
    for one in news(found.findings, said.setdefault(source, {})):
        if json_:
            _as_line({"run": source, "step": last, "state": found.state, "finding": one.id, "severity": one.severity,
                      "statement": one.statement, "since": one.since, "advice": list(one.advice)})  # fmt: skip
        else:
            show_finding(one, at=last)


def _as_line(data: dict[str, object]) -> None:
    import json
    import sys

    sys.stdout.write(json.dumps(data, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _changes(path: Path, every: float) -> Iterator[None]:
    """Once at the beginning and then whenever a file below `path` has another size or time."""
    before: object = None
    while True:
        now = _stamp(path)
        if now != before:
            before = now
            yield
        time.sleep(every)


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    files = (
        [path]
        if path.is_file()
        else sorted(Path(root, name) for root, _, names in os.walk(path) for name in names)
    )
    found = []
    for file in files:
        try:
            status = file.stat()
        except OSError:  # gone between the listing and now
            continue
        found.append((str(file), status.st_size, status.st_mtime_ns))
    return tuple(found)
