"""Two processes give the loss and the weights of one, for every recipe.

One update per rollout: with several, which rows share an update depends on how many processes take part.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from uncollapse.integrations import offers
from uncollapse.policy.registry import recipes
from uncollapse.policy.stages.samplers import DynamicSampler

SCRIPT = Path(__file__).with_name("two_processes.py")
NAMES = [
    name
    for name, made in recipes().items()
    if not made.refusals(offers.TRL)
    and not made.split_dependent
    and "part"
    not in getattr(made.sampler, "gives", ())  # each process samples a share of its own prompts again
]


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
    assert two["rewards"] == pytest.approx(one["rewards"], abs=1e-6)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-6)
    for key, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], value, atol=1e-6, rtol=1e-5)


def test_dynamic_sampling_did_sample_again_in_both(both):
    (name,) = (name for name, method in recipes().items() if isinstance(method.sampler, DynamicSampler))
    one, two = (found[name] for found in both)
    assert min(one["oversampling"]) > 1
    # Equal shares per process may add a group that no dead one needs.
    assert min(two["oversampling"]) > 1
