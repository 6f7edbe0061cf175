"""The made-up logs are what they say: reproducible, of known truth, and with seeds for tuning kept apart."""

import numpy as np
import pytest

from uncollapse.diagnose.names import KNOWN
from uncollapse.errors import UnknownName
from uncollapse.studies.testbeds import logs


def test_seeds_of_tuning_and_scoring_are_disjoint_and_make_at_least_sixty_runs():
    assert not set(logs.TUNING) & set(logs.HELD_OUT)
    assert len(logs.kinds()) * len(logs.HELD_OUT) >= 60


@pytest.mark.parametrize("kind", logs.kinds())
def test_a_run_depends_on_its_seed_alone(kind):
    one, same, other = logs.make(kind, 1), logs.make(kind, 1), logs.make(kind, 2)
    assert all(np.array_equal(one.log[name], same.log[name], equal_nan=True) for name in one.log.columns)
    assert len(one.log) != len(other.log) or not np.array_equal(
        one.log["reward/mean"], other.log["reward/mean"]
    )
    assert (one.state, one.findings) == (other.state, other.findings)


@pytest.mark.parametrize("kind", logs.kinds())
def test_columns_are_known_and_shares_are_shares(kind):
    log = logs.make(kind, 3).log
    assert all(name in KNOWN or name.startswith("eval/pass@") for name in log.columns)
    assert np.all(np.diff(log.step) > 0)
    for name in ("reward/zero_variance_groups", "length/truncated", "diversity/distinct"):
        known = log[name][np.isfinite(log[name])]
        assert np.all((known >= 0) & (known <= 1))
    entropy = log["entropy/token/mean"]
    assert np.all(entropy[np.isfinite(entropy)] >= 0)


def test_truth_is_in_the_curve():
    def left(kind):
        values = logs.make(kind, 0).log["entropy/token/mean"]
        return np.median(values[-5:]) / np.median(values[:3])

    assert left("slow-collapse") < 0.12
    assert 0.15 < left("collapsing") < 0.6
    assert left("exploding") > 2
    assert left("healthy") > 0.6


def test_louder_runs_are_noisier_versions_of_the_same():
    quiet, loud = logs.make("healthy", 0, loud=0.0), logs.make("healthy", 0, loud=3.0)
    assert len(quiet.log) == len(loud.log)
    rough = [np.abs(np.diff(case.log["entropy/token/mean"])).mean() for case in (quiet, loud)]
    assert rough[1] > 5 * rough[0]


def test_an_unknown_kind_is_refused():
    with pytest.raises(UnknownName, match="did you mean healthy"):
        logs.make("healty", 0)
