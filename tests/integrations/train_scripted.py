"""Commands of `uncollapse`, one an argument, with completions that depend on the rollout and the row's number alone.

Run by `test_train_processes.py`, which reads the exit codes in the last line of stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from uncollapse.cli import main
from uncollapse.errors import DataError, UncollapseError
from uncollapse.integrations import trl
from uncollapse.integrations.processes import join


def scripted(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    first = trainer.accelerator.process_index * len(prompts)
    completions = []
    for row in range(first, first + len(prompts)):
        generator = torch.Generator().manual_seed(1000 * trainer.state.global_step + row)
        length = int(torch.randint(1, 7, (1,), generator=generator))
        completions.append(torch.randint(2, 15, (length,), generator=generator).tolist())
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def agreement() -> None:
    """What one process knows reaches all; what fails in one fails in all."""
    processes = join()

    def fails_in_the_last() -> int:
        if processes.rank == processes.count - 1:
            raise DataError("no such file")
        return 3

    assert processes.from_first(lambda: processes.rank) == 0
    assert processes.anyone(processes.rank == processes.count - 1)
    assert not processes.anyone(False)
    assert processes.together(lambda: processes.rank) == processes.rank
    for act in (processes.together, processes.from_first):
        told = _failure(partial(act, fails_in_the_last if act == processes.together else _missing))
        assert "no such file" in told, told


def _failure(act: Callable[[], Any]) -> str:
    try:
        act()
    except UncollapseError as error:
        return str(error)
    return "no failure"


def _missing() -> None:
    raise DataError("no such file")


if __name__ == "__main__":
    agreement()
    trl.GRPOTrainer = partial(trl.GRPOTrainer, rollout_func=scripted)  # type: ignore[misc]
    codes = [main(command.split()) for command in sys.argv[1:]]
    print(*codes, file=sys.stderr)
