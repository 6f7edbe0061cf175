"""Choose a learning rate for an arm before its study, on seeds and data that the study does not use."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def climb(
    ladder: Sequence[float], starts: Sequence[float], score: Callable[[float], float], *, reach: int
) -> dict[float, float]:
    """Scores along a ladder of rates, in its order; the larger the better.

    Goes from `starts` outwards until the best rate has `reach` others on either side, or the ladder ends.
    """
    found = {rate: score(rate) for rate in starts}
    while True:
        best = ladder.index(max(found, key=found.__getitem__))
        near = [rate for rate in ladder[max(best - reach, 0) : best + reach + 1] if rate not in found]
        if not near:
            return dict(sorted(found.items()))
        found |= {rate: score(rate) for rate in near}
