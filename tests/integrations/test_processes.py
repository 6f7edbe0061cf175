"""Two processes give the loss and the weights of one.

One update per rollout: with several, which rows share an update depends on the shuffle of each process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_processes.py")


def train(folder: Path, name: str, processes: int) -> dict:
    folder.mkdir()
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(folder), name, str(processes)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.parametrize("name", ["grpo", "clip-cov"])
def test_two_processes_equal_one(tmp_path, name):
    one, two = train(tmp_path / "one", name, 1), train(tmp_path / "two", name, 2)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-6)
    for key, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], value, atol=1e-6, rtol=1e-5)
