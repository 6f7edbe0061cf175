"""What the engines offer to a recipe, as far as they are installed."""

from __future__ import annotations

import os

from uncollapse.policy.batch import Stat
from uncollapse.studies.testbeds.engine import OFFERS


def offers() -> tuple[dict[str, frozenset[str | type[Stat]]], dict[str, str]]:
    """The offers of each engine that is there, and for each other one why it is not."""
    # Importing transformers must not look for anything on the network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = {"testbed": OFFERS}
    absent = {"verl": "not connected in this version"}
    try:
        from uncollapse.integrations.trl import OFFERS as TRL
    except ModuleNotFoundError as error:
        absent["TRL"] = f"{error.name} is not installed; run: pip install 'uncollapse[rl]'"
    else:
        found["TRL"] = TRL
    return found, absent
