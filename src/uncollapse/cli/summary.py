"""A comparison in numbers: what each recipe ended at, with intervals over seeds."""

from __future__ import annotations

from typing import Any

from uncollapse.report.series import Estimate, arms_of_comparison
from uncollapse.runs import Comparison

COLUMNS = (
    ("entropy/token/mean", "entropy (nats)"),
    ("reward/mean", "reward"),
    ("eval/pass@1", "pass@1"),
    ("eval/pass@8", "pass@8"),
    ("eval/distinct", "distinct right"),
    ("time/step", "s/step"),
)
"""What the table on the terminal shows; the summary file holds every metric."""


def summarise(comparison: Comparison) -> dict[str, Any]:
    """First and last value (means over the first and last twentieth of the steps) of every metric per recipe."""
    return {
        "recipes": {
            arm.name: {
                "seeds": len(arm.logs),
                "first": {key: _plain(arm.first(key)) for key in arm.metrics()},
                "last": {key: _plain(arm.last(key)) for key in arm.metrics()},
            }
            for arm in arms_of_comparison(comparison)
        }
    }


def _plain(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    return {"mean": estimate.mean, "half_width_95": estimate.half, "values": list(estimate.values)}


def cell(value: dict[str, Any] | None) -> str:
    """`0.512 ± 0.031`, or `-`."""
    if not value or value.get("mean") is None:
        return "-"
    half = value.get("half_width_95")
    return f"{value['mean']:.3f}" if half is None else f"{value['mean']:.3f} ± {half:.3f}"
