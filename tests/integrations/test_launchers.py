"""The packaged configurations of accelerate: every key is known to it, and FSDP trains what one process trains.

FSDP runs here on two CPU processes; DeepSpeed needs a GPU, so that its configurations are only read.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

SCRIPT = Path(__file__).with_name("sharded.py")
FOLDER = Path(str(resources.files("uncollapse.integrations").joinpath("launchers")))
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    expected = {
        "fsdp2": DistributedType.FSDP,
        "cpu": DistributedType.MULTI_GPU,
        "ddp": DistributedType.MULTI_GPU,
    }
    assert config.distributed_type == expected.get(path.stem, DistributedType.DEEPSPEED)
    options = vars(launch_command_parser().parse_args(["script.py"]))
    # What launch reads of the nested part is one of its own options; anything else it would pass over in silence.
    for name in (config.fsdp_config or {}) | (config.deepspeed_config or {}):
        assert name in options, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_configuration_says_how_many_processes(path):
    assert yaml.safe_load(path.read_text())["num_processes"] > 1


def run(folder: Path, launcher: list[str], processes: int) -> dict:
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(folder), str(processes)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[dict, dict]:
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    config = yaml.safe_load((FOLDER / "fsdp2.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": 2, "mixed_precision": "no"}
    (two / "fsdp2.yaml").write_text(yaml.safe_dump(config))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(two / "fsdp2.yaml")]
    launcher += ["--main_process_port", "0"]
    return run(one, [sys.executable], 1), run(two, launcher, 2)


@pytest.mark.parametrize("name", ["grpo, untied", "clip-cov, tied", "dapo, tied"])
def test_sharded_parameters_train_as_whole_ones_do(both, name):
    one, two = (found[name] for found in both)
    assert not one["sharded"]
    assert two["sharded"]
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-6)
    assert two["weights"].keys() == one["weights"].keys()
    for key, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], value, atol=1e-6, rtol=1e-5)


def test_sharded_processes_sample_to_the_end_together_and_resume(both):
    _, two = both
    assert len(two["sampled"]["entropy"]) == 4
    assert min(two["sampled"]["entropy"]) > 0
