"""The processes that train together, as torchrun and accelerate start them: who leads, and what all agree on.

All run the same program on the same command line. The first one leads: it alone creates and writes the run directory,
prints and evaluates; what the others have to know of that is told to them here. Light to import.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from uncollapse.errors import ConfigError, UncollapseError

T = TypeVar("T")

LONGEST_WAIT = timedelta(hours=6)
"""How long a process waits for the others: as long as the leader may need for an evaluation. A process that dies ends
the others at once, by its launcher."""

_PEER_LOST = ("Connection closed by peer", "Connection reset by peer")


class ProcessError(UncollapseError):
    """Something went wrong in a process other than the leading one, which cannot tell it."""


def leads() -> bool:
    """Whether this is the first process, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Processes:
    """This process (`rank`, from 0) among `count`. `join` finds out; every method has to be called by all of them."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def anyone(self, says: bool) -> bool:
        """Whether at least one process says so."""
        return any(self._gathered(says))

    def from_first(self, act: Callable[[], T]) -> T:
        """What `act` returns in the first process, the only one to call it. If it fails there, it fails in all."""
        if self.count == 1:
            return act()
        value, problem = _tried(act) if self.leads else (None, None)
        value, told = self._gathered((value, None if problem is None else str(problem)))[0]
        if problem is not None:
            raise problem
        if told is not None:
            raise UncollapseError(told)
        return value  # type: ignore[return-value]

    def together(self, act: Callable[[], T]) -> T:
        """What `act` returns here; if it fails in one process with an error for the user, it fails in all."""
        if self.count == 1:
            return act()
        value, problem = _tried(act)
        told = self._gathered(None if problem is None else str(problem))
        if problem is not None:
            raise problem
        for rank, text in enumerate(told):
            if text is not None:
                raise UncollapseError(f"process {rank}: {text}")
        return value  # type: ignore[return-value]

    def alone(self, error: Exception) -> Exception:
        """The same error, as one that this process has to tell by itself if it does not lead."""
        if self.count > 1 and any(sign in str(error) for sign in _PEER_LOST):
            return ProcessError(f"process {self.rank}: another process has ended; its own message says why")
        if isinstance(error, UncollapseError) and not self.leads:
            return ProcessError(f"process {self.rank}: {error}")
        return error

    def _gathered(self, value: Any) -> list[Any]:
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))


def join() -> Processes:
    """The processes that the launcher started, connected to each other.

    Raises:
        ConfigError: a launch that starts other processes than it was asked for, or that shards parameters.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        # With --cpu, accelerate leaves the starting of several processes to MPI, and starts one.
        if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ:
            raise ConfigError(
                "accelerate launch --cpu starts one process whatever --num_processes says; use torchrun, "
                "or accelerate's --config_file with the file cpu.yaml that `uncollapse doctor` names"
            )
        return Processes()
    if any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED")):
        raise ConfigError(
            "train evaluates in one process, which needs all parameters there: start it with ddp.yaml or torchrun, or use "
            "uncollapse.integrations.trl.GRPOTrainer in a script of your own for FSDP and DeepSpeed"
        )
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
    return Processes(rank=state.process_index, count=state.num_processes)


def _tried(act: Callable[[], T]) -> tuple[T | None, UncollapseError | None]:
    try:
        return act(), None
    except UncollapseError as error:
        return None, error
