from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.report.tokens import full_scale, shade, token_view


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
