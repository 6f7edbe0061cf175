"""What holds of the smoke run of every study."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from uncollapse.studies.study import Outcome, Study, run_study, study

Smoke = Callable[..., tuple[Outcome, set[str]]]


@pytest.fixture
def smoke(tmp_path: Path) -> Smoke:
    """Runs a study at its smoke size: it is the one of its slug, gives no verdict, a figure, and a number for all that it names.

    `may_lack` says which statistics a small run may miss; those that it does miss come back beside the outcome.
    """

    def run(
        chosen: Study, may_lack: Callable[[str], bool] = lambda name: False, **options: Any
    ) -> tuple[Outcome, set[str]]:
        assert study(chosen.slug) is chosen
        outcome = run_study(chosen, quick=True, output=tmp_path, work=tmp_path / "work", **options)
        assert [result.verdict for result in outcome.results] == [None] * len(chosen.claims)
        assert outcome.figure is not None
        assert outcome.figure.read_text().startswith("<?xml")
        named = {bound.statistic for claim in chosen.claims for bound in claim.criterion.bounds}
        named |= {claim.effect for claim in chosen.claims}
        named |= {name for one in chosen.observations for name in one.statistics}
        missing = named - set(outcome.measurements.estimates)
        assert not {name for name in missing if not may_lack(name)}
        return outcome, missing

    return run
