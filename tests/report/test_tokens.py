from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.diagnose.attribution import attribute
from uncollapse.report.tokens import full_scale, predicted_view, shade, token_view
from uncollapse.token_dump import Tokens


def record(step: int, entropy: list[Any], tokens: list[str] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "sample": "p",
        "prompt": "2+2=",
        "tokens": tokens or ["a"] * len(entropy),
        "entropy": entropy,
        **more,
    }


def test_change_is_between_first_and_last_scoring() -> None:
    view = token_view(
        [record(0, [2.0, 1.0]), record(5, [1.0, 9.0]), record(9, [0.0, 1.5], logp=[-1.0, -2.0], reward=1.0)],
        2.0,
    )
    assert view is not None
    (probe,) = view.probes
    assert probe.steps == (0, 5, 9)
    assert [token.shade for token in probe.tokens] == [-4, 1]
    assert (
        probe.tokens[0].tip
        == "entropy 2.00 → 0.00 nats\nlog-probability unknown → \u22121.00 nats\nstep 0 → 9"
    )
    assert probe.tokens[0].entropy == "2.000,1.000,0.000"
    assert (probe.before, probe.after, probe.reward) == (1.5, 0.75, 1.0)


def test_half_of_the_loss_is_counted() -> None:
    view = token_view([record(0, [8.0, 1.0, 1.0, 1.0]), record(1, [0.0, 0.0, 0.0, 2.0])], 1.0)
    assert view is not None
    assert view.sentence.startswith(
        "Half of all the entropy that was lost went at 25\u202f% of the tokens (1 of 4)."
    )
    gained = token_view([record(0, [1.0]), record(1, [2.0])], 1.0)
    assert gained is not None
    assert gained.sentence.startswith("No token lost entropy")


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record(0, [1.0])],
        [record(0, [1.0], ["a"]), record(1, [1.0], ["b"])],  # sampled anew: not comparable
        [record(0, []), record(1, [])],
        [record(0, [1.0], ["a", "b"]), record(1, [1.0], ["a", "b"])],
        [{"step": 0, "tokens": "ab", "entropy": [1, 2]}, {"step": 1}],
    ],
)
def test_nothing_to_compare(records: list[dict[str, Any]]) -> None:
    assert token_view(records, 1.0) is None
    assert full_scale(records) == 1.0


def test_unknown_entropies_stay_uncoloured() -> None:
    view = token_view([record(0, [math.nan, 1.0], ["", "\n"]), record(1, [0.0, math.nan], ["", "\n"])], 1.0)
    assert view is not None
    assert [token.shade for token in view.probes[0].tokens] == [0, 0]
    assert [token.text for token in view.probes[0].tokens] == ["\u2205", "\u23ce\n"]
    assert "unknown" in view.probes[0].tokens[0].tip


def test_short_answers_share_a_row() -> None:
    short, long = (
        token_view([record(0, [1.0]), record(1, [0.0])], 1.0),
        token_view([record(0, [1.0] * 50), record(1, [0.0] * 50)], 1.0),
    )
    assert short is not None
    assert long is not None
    assert (short.short, long.short) == (True, False)


@given(st.floats(-50, 50), st.floats(0.1, 10))
def test_shades_are_symmetric_and_bounded(change: float, scale: float) -> None:
    assert shade(change, scale) == -shade(-change, scale)
    assert abs(shade(change, scale)) <= 4
    if abs(change) < scale / 8.01:
        assert shade(change, scale) == 0


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20))
def test_the_scale_is_a_round_number_no_smaller_than_the_typical_change(changes: list[float]) -> None:
    scale = full_scale([record(0, [0.0] * len(changes)), record(1, changes)])
    assert scale >= 0.0999
    assert float(f"{scale:.2g}") == pytest.approx(scale)


def dumped(**given: Any) -> Tokens:
    """One answer of five tokens: one of each quadrant, and one that is not trained on."""
    columns = {
        "token": np.arange(5),
        "uid": np.full(5, 8),
        "position": np.arange(5),
        "old_logp": np.log([0.6, 0.6, 0.1, 0.1, 0.5]),
        "logp": np.full(5, np.nan),
        "advantage": np.array([1.0, -1.0, 1.0, -1.0, 1.0]),
        "entropy": np.full(5, 1.2),
        "reward": np.ones(5),
        "mask": np.array([True, True, True, True, False]),
        "text": np.array(["the", " cat", "\n", "<b>", ""], dtype=object),
        **given,
    }
    return Tokens(3, columns)


def test_predicted_changes_are_coloured_by_their_quadrant() -> None:
    account = attribute([dumped()])
    view = predicted_view(account.answers, account.predicted)
    assert view is not None
    (probe,) = view.probes
    shades = [token.shade for token in probe.tokens]
    assert shades[0] == -shades[1] <= -3
    assert shades[2] == -shades[3] > 0
    assert shades[4] == 0
    assert probe.tokens[0].tip.startswith("probable rewarded: lowers entropy (\u22120.165 advantage")
    assert probe.tokens[2].tip.startswith("rare rewarded: raises entropy (")
    assert probe.tokens[4].tip == "not trained on, or not measured"
    assert [token.text for token in probe.tokens] == ["the", " cat", "\u23ce\n", "<b>", "\u2205"]
    assert "probable rewarded 31" in view.sentence
    assert (view.unit, view.ends) == ("advantage \u00d7 nats", ("lowers", "raises"))
    assert (probe.name, probe.reward, probe.steps) == ("8 of step 3", 1.0, (3,))
    assert all(token.entropy == "" for token in probe.tokens)


def test_nothing_is_predicted_without_entropies_or_advantages() -> None:
    for given_ in ({"entropy": np.full(5, np.nan)}, {"advantage": np.zeros(5)}):
        account = attribute([dumped(**given_)])
        assert predicted_view(account.answers, account.predicted) is None
