"""The section on tokens: which of them spent the entropy, to first order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from uncollapse.diagnose.attribution import FRACTIONS, Attribution, TokenDrive
from uncollapse.report import figures
from uncollapse.report.blocks import Block, Section, TableBlock, TextBlock, TokensBlock, figure
from uncollapse.report.palette import SERIES
from uncollapse.report.series import Curve, Estimate
from uncollapse.report.tokens import predicted_view
from uncollapse.report.words import level, number, percent

_LISTED = 12


def section(found: Attribution) -> Section:
    """What drove the change of entropy in a token dump."""
    quadrants = [(name, Estimate((one.drive,))) for name, one in found.quadrants.items()]
    words = "; ".join(f"{name} {number(one.mean)}" for name, one in quadrants)

    def draw(axes: Sequence[Axes]) -> None:
        figures.bars(quadrants, axes[0], title="Drive", unit="advantage \u00d7 nats", colours=SERIES[:1])

    blocks: list[Block] = [
        figure("quadrants", draw, height=230, alt=f"Drive of the four kinds of tokens: {words}.",
               caption="Negative: these tokens spent entropy. Probable and rare are relative to the mean log-probability of a step."),
    ]  # fmt: skip
    if found.positions.size > 1:
        blocks.append(_positions(found))
    for tokens, title in ((found.spenders, "spent most"), (found.keepers, "kept most")):
        if tokens:
            blocks.append(_table(tokens[:_LISTED], title))
    view = predicted_view(found.answers, found.predicted)
    if view is not None:
        blocks.append(TokensBlock(view, "Token by token"))
    blocks.append(
        TextBlock(
            "First order: exact for a tabular policy and one small step. A network shares its parameters between tokens, and clipping "
            "and the optimiser's scaling come on top, so read shares and ranks, not forecasts."
        )
    )
    return Section("tokens", "Tokens", "Which tokens spent the entropy", _lead(found), "", tuple(blocks))


def _lead(found: Attribution) -> str:
    share = dict(zip(FRACTIONS, found.shares, strict=True))[0.02]
    way = "spent" if found.drive < 0 else "gained"
    return (
        f"Over {found.tokens:,} trained tokens of {len(found.steps)} steps entropy was {way} on balance ({number(found.drive)} advantage "
        f"\u00d7 nats per unit of step size). The top {percent(0.02)} of the tokens carry {percent(share)} of what pushed it down."
    )


def _positions(found: Attribution) -> Block:
    wanted = min(found.positions.size, 200)
    parts = np.array_split(np.arange(found.positions.size), wanted)
    steps = np.array([float(part.mean()) for part in parts])
    drive = np.array([float(found.positions[part].sum() / len(part)) for part in parts])
    line = Curve("drive", steps, drive)
    return figure("positions", lambda axes: figures.curves([line], axes[0], title="Drive by position", unit="advantage \u00d7 nats",
                                                           xlabel="position in the answer (tokens)"),
                  height=190, alt="Drive by position in the answer.")  # fmt: skip


def _table(tokens: Sequence[TokenDrive], title: str) -> TableBlock:
    rows = tuple(
        (
            repr(one.text) if one.text else f"id {one.token}",
            f"{one.tokens:,}",
            number(one.drive),
            "\u2013" if one.entropy != one.entropy else level(one.entropy),
            level(one.logp),
            level(one.advantage),
        )
        for one in tokens
    )
    return TableBlock(("token", "times", "drive", "entropy", "log-prob", "advantage"), rows,
                      f"Tokens that {title}, over all their occurrences; entropy (nats), log-probability (nats) and advantage are means.")  # fmt: skip
