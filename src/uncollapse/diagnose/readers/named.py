"""From the columns of a file to those of a `Log`: by a mapping given by hand, and by the table of names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from uncollapse.diagnose.log import Log, Note
from uncollapse.diagnose.readers.aliases import may_be_negated, meaning
from uncollapse.diagnose.readers.collect import Collector, Values

_ENTROPY = "entropy/token/mean"


def log_of(collector: Collector, source: str, kind: str, mapping: Mapping[str, str]) -> Log:
    """The log of what was collected. A column of `mapping` goes first, then the surest name for each known column."""
    steps, table = collector.columns()
    origin = _chosen(list(table), mapping)
    notes = [*collector.observations()]
    columns: dict[str, Values] = {}
    for known, name in list(origin.items()):
        values = table[name]
        if may_be_negated(name) and name not in mapping.values():
            values = -values if (np.nan_to_num(values) <= 0).all() else values
            if (np.nan_to_num(values) < 0).any():
                notes.append(
                    Note(
                        "unmapped", f"{name} is of both signs, and so no entropy; say with a mapping if it is"
                    )
                )
                del origin[known]
                continue
        columns[known] = values
    if len(steps) and not np.isfinite(columns.get(_ENTROPY, np.empty(0))).any():
        names = ", ".join(name[:60] for name in table if name not in origin.values())[:400]
        notes.append(
            Note("unmapped", f"no column is known as the entropy; name it if it is one of these: {names}")
        )
    used = set(origin.values())
    return Log(
        source=f"{source}#{collector.name}" if collector.name and len(collector.name) < 200 else source,
        format=kind,
        step=steps,
        columns=columns,
        other={name: values for name, values in table.items() if name not in used},
        origin=origin,
        settings=collector.settings,
        notes=tuple(notes),
    )


def _chosen(names: list[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """For each known column the name that stands for it in the file."""
    chosen: dict[str, tuple[int, str]] = {
        known: (-1, name) for known, name in mapping.items() if name in names
    }
    taken = {name for _, name in chosen.values()}
    for name in names:
        found = None if name in taken else meaning(name)
        if found is None:
            continue
        known, rank = found
        if known not in chosen or rank < chosen[known][0]:
            chosen[known] = (rank, name)
    return {known: name for known, (_, name) in chosen.items()}
