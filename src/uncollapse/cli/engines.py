"""What the engines offer to a recipe."""

from __future__ import annotations

from uncollapse.integrations.offers import TRL
from uncollapse.policy.batch import Stat
from uncollapse.studies.testbeds.engine import OFFERS as TESTBED

OFFERS: dict[str, frozenset[str | type[Stat]]] = {"testbed": TESTBED, "TRL": TRL}
ABSENT = {"verl": "not connected in this version"}
