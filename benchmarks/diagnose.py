"""Diagnosis of made-up runs with known truth, and of a log of 100,000 steps.

The runs are those of `uncollapse.studies.testbeds.logs` at its held-out seeds, which no threshold was chosen on. The state is
that of the run's end; findings that a truth neither asks for nor excludes count for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.harness import OURS, Case, Goal
from uncollapse.diagnose.diagnosis import Diagnosis, diagnose
from uncollapse.diagnose.log import Log
from uncollapse.studies.testbeds import logs
from uncollapse.studies.testbeds.traps import Trap, traps

SUMMARY = "`diagnose`: time for a log of 100,000 steps with 15 columns, and what it says about made-up runs with known truth"
STATES = ("healthy", "plateau", "collapsing", "collapsed", "exploding", "unknown")


def long_log(steps: int, seed: int = 0) -> Log:
    """A run that collapses late, with every column there is."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, steps)
    noise = {name: rng.standard_normal(steps) for name in ("h", "r", "v", "d", "l", "u", "g")}
    entropy = 0.8 * np.exp(-4 * np.clip(t - 0.5, 0, None)) * np.exp(0.05 * noise["h"])
    reward = 0.2 + 0.6 * t + 0.05 * noise["r"]
    tenth = np.arange(steps) % 10 == 0
    columns = {
        "entropy/token/mean": entropy,
        "reward/mean": reward,
        "reward/std": np.abs(0.3 + 0.02 * noise["d"]),
        "reward/zero_variance_groups": np.clip(0.2 + 0.5 * t + 0.05 * noise["d"], 0, 1),
        "length/mean": 300 * np.exp(0.2 * noise["l"]),
        "length/truncated": np.clip(0.05 + 0.02 * noise["l"], 0, 1),
        "clip/high/frac": np.abs(0.01 + 0.002 * noise["u"]),
        "clip/low/frac": np.abs(0.004 + 0.001 * noise["u"]),
        "kl/old/k3": np.abs(0.001 + 1e-4 * noise["u"]),
        "kl/ref/mean": 0.1 * t + 0.001 * np.abs(noise["u"]),
        "mismatch/logp/mean": np.abs(0.01 + 0.001 * noise["u"]),
        "grad/norm": np.exp(0.3 * noise["g"]),
        "eval/reward": np.where(tenth, reward - 0.02 + 0.02 * noise["v"], np.nan),
        "eval/pass@1": np.where(tenth, reward, np.nan),
        "eval/pass@8": np.where(tenth, 0.8 + 0 * t, np.nan),
    }
    return Log("made up", "made up", np.arange(1, steps + 1), columns)


def score() -> dict[str, Any]:
    """What `diagnose` says against the truth: held-out runs, runs of any shape, forecasts, traps, runs followed live."""
    held_out = [logs.make(kind, seed) for kind in logs.kinds() for seed in logs.HELD_OUT]
    said = [diagnose(case.log) for case in held_out]
    shapes = [logs.arbitrary(seed) for seed in logs.ARBITRARY]
    forecasts, covered = forecast_coverage()
    caught = {trap.name: escapes(trap) for trap in traps()}
    return {
        "seeds": list(logs.HELD_OUT),
        "labels": list(STATES),
        **confusion(held_out, said),
        "louder": {
            str(loud): confusion(
                again := [logs.make(c.kind, c.seed, loud=loud) for c in held_out],
                [diagnose(c.log) for c in again],
            )["accuracy"]
            for loud in (2, 4)
        },
        "arbitrary": confusion(shapes, [diagnose(case.log) for case in shapes]),
        "findings": findings(held_out, said),
        "mistakes": [
            row for case, found in zip(held_out, said, strict=True) if (row := mistake(case, found))
        ],
        "median_error_of_the_begin": float(np.median(delays(held_out, said))),
        "forecasts": forecasts,
        "forecasts_covered": covered,
        "watched": watched(),
        "traps": caught,
        "traps_passed": sum(caught.values()) / len(caught),
    }


def confusion(cases: Sequence[logs.Case], said: Sequence[Diagnosis]) -> dict[str, Any]:
    """Counts by truth (rows) and what was said (columns), in the order of `STATES`."""
    counts = Counter((case.state, found.state) for case, found in zip(cases, said, strict=True))
    return {
        "runs": len(cases),
        "states": [[counts[truth, answer] for answer in STATES] for truth in STATES],
        "accuracy": sum(n for (truth, answer), n in counts.items() if truth == answer) / len(cases),
    }


def findings(cases: Sequence[logs.Case], said: Sequence[Diagnosis]) -> dict[str, Any]:
    """For each finding how often it was found, missed and wrongly said."""
    hit: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for case, found in zip(cases, said, strict=True):
        ids = {one.id for one in found.findings}
        hit.update(case.findings & ids)
        missed.update(case.findings - ids)
        wrong.update(ids - case.findings - case.allowed)
    return {
        name: {
            "found": hit[name],
            "missed": missed[name],
            "wrong": wrong[name],
            "precision": hit[name] / (hit[name] + wrong[name]) if hit[name] + wrong[name] else None,
            "recall": hit[name] / (hit[name] + missed[name]) if hit[name] + missed[name] else None,
        }
        for name in sorted({*hit, *missed, *wrong})
    }


def mistake(case: logs.Case, found: Diagnosis) -> dict[str, Any] | None:
    """What was wrong about one run, or None."""
    ids = {one.id for one in found.findings}
    missed, wrong = sorted(case.findings - ids), sorted(ids - case.findings - case.allowed)
    if case.state == found.state and not missed and not wrong:
        return None
    return {
        "run": f"{case.kind}-{case.seed}",
        "truth": case.state,
        "said": found.state,
        "missed": missed,
        "wrong": wrong,
    }


def delays(cases: Sequence[logs.Case], said: Sequence[Diagnosis]) -> list[float]:
    """Distance between the true and the told begin of a fall or rise, as shares of the run."""
    out = []
    for case, found in zip(cases, said, strict=True):
        since = next((one.since for one in found.findings if one.id.startswith("entropy-")), None)
        if case.from_step is not None and since is not None:
            out.append(abs(since - case.from_step) / float(case.log.step[-1] - case.log.step[0]))
    return out


def escapes(trap: Trap) -> bool:
    """Whether a trap is not fallen into."""
    found = diagnose(trap.log)
    ids = {one.id for one in found.findings}
    return found.state in trap.states and trap.findings <= ids and not trap.forbidden & ids


def watched() -> dict[str, Any]:
    """Runs replayed with a look after every twenty-fifth of them, as `--watch` would: who is stopped, and when."""

    def first_severe(log: Log) -> int | None:
        for seen in range(10, len(log) + 1, max(10, len(log) // 25)):
            part = Log(
                log.source,
                log.format,
                log.step[:seen],
                {name: values[:seen] for name, values in log.columns.items()},
            )
            if diagnose(part).at_least("severe"):
                return seen
        return None

    sound = [
        logs.make(kind, seed)
        for kind in ("healthy", "noisy", "plateau", "one-update")
        for seed in logs.HELD_OUT
    ]
    falling = [
        logs.make(kind, seed)
        for kind in ("slow-collapse", "late-collapse", "collapsing")
        for seed in logs.HELD_OUT
    ]
    stopped = [first_severe(case.log) for case in falling]
    left = []
    for case, at in zip(falling, stopped, strict=True):
        entropy = case.log["entropy/token/mean"]
        if at is not None:
            left.append(float(np.median(entropy[max(0, at - 5) : at]) / np.median(entropy[:5])))
    return {
        "sound": len(sound),
        "sound_stopped": sum(first_severe(case.log) is not None for case in sound),
        "falling": len(falling),
        "falling_stopped": sum(at is not None for at in stopped),
        "entropy_left_when_stopped": float(np.median(left)) if left else None,
    }


def forecast_coverage(seeds: range = range(7000, 7040)) -> tuple[int, int]:
    """Forecasts made half way down a steady fall, and how many of their intervals hold the step where it was spent."""
    made = held = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        steps, spent = int(rng.integers(100, 400)), None
        rate = -np.log(0.15) / (steps * rng.uniform(0.6, 0.9))
        start, noise, memory = float(np.exp(rng.uniform(-2, 1))), rng.uniform(0.02, 0.08), rng.uniform(0, 0.8)
        spent = -np.log(0.15) / rate
        shocks, value = rng.standard_normal(steps), 0.0
        wiggle = []
        for shock in shocks:
            value = memory * value + np.sqrt(1 - memory**2) * shock
            wiggle.append(value)
        step = np.arange(1, steps + 1)
        entropy = start * np.exp(-rate * step + noise * np.array(wiggle))
        seen = int(0.5 * spent)
        found = diagnose(Log("", "", step[:seen], {"entropy/token/mean": entropy[:seen]})).forecast
        if found is not None and found.low is not None:
            made += 1
            held += int(found.low <= spent <= (found.high if found.high is not None else np.inf))
    return made, held


def told(score: Mapping[str, Any]) -> list[str | list[list[str]]]:
    """A recorded score for people: paragraphs, and tables as lists of rows with their head."""
    louder = " ".join(
        f"With {loud} times the noise: {100 * share:.0f} %." for loud, share in score["louder"].items()
    )
    any_shape, live = score["arbitrary"], score["watched"]
    left = live["entropy_left_when_stopped"]
    counts = [["finding", "found", "missed", "wrongly said"]]
    counts += [
        [f"`{name}`", *(str(one[key]) for key in ("found", "missed", "wrong"))]
        for name, one in score["findings"].items()
    ]
    wrong = [["run", "truth", "said", "missed", "wrongly said"]]
    wrong += [
        [m["run"], m["truth"], m["said"], ", ".join(m["missed"]), ", ".join(m["wrong"])]
        for m in score["mistakes"]
    ]
    return [
        f"{score['runs']} runs of known kinds (seeds {', '.join(map(str, score['seeds']))}): {100 * score['accuracy']:.0f} % told right. {louder}",
        _matrix(score["labels"], score["states"]),
        f"{any_shape['runs']} runs of any shape, random pieces that end wherever the thresholds lie, so that noise alone can tip some: "
        f"{100 * any_shape['accuracy']:.0f} % told right.",
        _matrix(score["labels"], any_shape["states"]),
        "Findings on the runs of known kinds:",
        counts,
        *(["Mistakes on them:", wrong] if score["mistakes"] else []),
        f"The step where entropy begins to move is off by {100 * score['median_error_of_the_begin']:.1f} % of the run (median). Of "
        f"{score['forecasts']} forecasts made half way, {score['forecasts_covered']} intervals (95 % asked for) held the step at which the "
        f"entropy was spent. Followed live, {live['sound_stopped']} of {live['sound']} sound runs would have been stopped by a severe "
        f"finding, and {live['falling_stopped']} of {live['falling']} that lose their entropy, when "
        f"{'none' if left is None else f'{100 * left:.0f} %'} of it was left (median). Traps not fallen into: "
        f"{sum(score['traps'].values())} of {len(score['traps'])} ({', '.join(score['traps'])}).",
    ]


def _matrix(labels: Sequence[str], states: Sequence[Sequence[int]]) -> list[list[str]]:
    rows = [
        [f"**{truth}**", *map(str, counts)]
        for truth, counts in zip(labels, states, strict=True)
        if sum(counts)
    ]
    return [["truth, said:", *labels], *rows]


def case() -> Case:
    """The 100,000 steps against a hundredth of them; the score comes with it."""
    full, small = long_log(100_000), long_log(1_000)

    def check() -> dict[str, float]:
        if diagnose(full).state != diagnose(small).state:
            raise RuntimeError("a hundred times more steps changed the state")
        return {}

    return Case(
        size="100,000 steps, 15 columns, in memory",
        contestants={OURS: lambda: diagnose(full), "1,000 steps": lambda: diagnose(small)},
        check=check,
        versions=("numpy", "scipy", "ruptures"),
        goals=(
            Goal(
                "seconds for 100,000 steps", lambda rows: rows[OURS]["seconds"]["median"], 5.0, at_least=False
            ),
            Goal("states told right", lambda rows: rows["score"]["accuracy"], 0.9, at_least=True),
            Goal("traps not fallen into", lambda rows: rows["score"]["traps_passed"], 1.0, at_least=True),
        ),
        warm_up={OURS: lambda: diagnose(small), "1,000 steps": lambda: diagnose(small)},
        score=score,
    )
