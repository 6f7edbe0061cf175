"""These tests run where verl is installed: `make test-verl` makes such an environment."""

from __future__ import annotations

import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "policy")]
# A folder named verl is no verl.
spec = find_spec("verl")
VERL = spec is not None and spec.origin is not None

if VERL:
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", VERL_LOGGING_LEVEL="ERROR", WANDB_MODE="disabled")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import platforms  # noqa: F401  (a platform for machines without an accelerator)
        import verl.trainer.ppo.ray_trainer
        import verl.workers.engine_workers  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
