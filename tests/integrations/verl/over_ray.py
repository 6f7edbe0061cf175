"""Two of verl's workers as processes of a local Ray, the driver here: `over_ray.py MODEL FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
PATHS = [str(HERE), str(HERE.parents[1] / "policy")]
sys.path[:0] = PATHS


def main(model, folder):
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_DEDUP_LOGS="0", RAY_ENABLE_UV_RUN_RUNTIME_ENV="0")
    import platforms  # noqa: F401
    import ray
    import real
    import test_real_engine as single
    import torch
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

    path = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
    environment = {
        "PYTHONPATH": path,
        "VERL_PLATFORM": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    ray.init(
        num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", object_store_memory=80_000_000,
        runtime_env={"env_vars": environment}, log_to_driver=False,
    )  # fmt: skip
    try:
        pool = RayResourcePool(process_on_nodes=[2], use_gpu=False, max_colocate_count=1)
        made = RayClassWithInitArgs(ray.remote(real.RayWorker), config=real.settings(model))
        group = RayWorkerGroup(resource_pool=pool, ray_cls_with_init=made, device_name="cpu")
        group.reset()
        workers = real.RayGroup(group, 2)
        single.through_verl(workers, "clip-cov")
        torch.save(group.weights()[0], Path(folder) / "ray.pt")
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
