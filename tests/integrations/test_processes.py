"""Two processes give the loss and the weights of one, for every recipe.

One update per rollout: with several, which rows share an update depends on the shuffle of each process. A recipe that
samples again is left out: how many fresh prompts a round takes is the largest number that any process lacks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from uncollapse.policy.registry import recipes
from uncollapse.policy.stages.samplers import PlainSampler

SCRIPT = Path(__file__).with_name("two_processes.py")
NAMES = [name for name, method in recipes().items() if isinstance(method.sampler, PlainSampler)]


def train(folder: Path, processes: int) -> dict:
    folder.mkdir()
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(folder), str(processes), *NAMES],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("processes")
    return train(folder / "one", 1), train(folder / "two", 2)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one(both, name):
    one, two = (found[name] for found in both)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-6)
    for key, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], value, atol=1e-6, rtol=1e-5)
