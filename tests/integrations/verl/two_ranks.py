"""One of two processes that share the rows of each optimiser step: `two_ranks.py MODEL FOLDER RANK`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "policy")]


def main(model, folder, rank):
    import platforms  # noqa: F401
    import real
    import test_real_engine as single
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    real.join(dist.FileStore(str(Path(folder) / "store"), 2), rank, 2)
    for name in ("clip-cov", "nucleus"):
        training_worker = real.worker(model)
        single.through_verl(real.Group(training_worker, 2, rank), name)
        found = real.parameters(training_worker)
        if rank == 0:
            torch.save(found, Path(folder) / f"{name}.pt")
    dist.destroy_process_group()


main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
