"""The processes of one launch that build a subspace together: who fits what, and waiting for each other."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from eigenpeft.errors import LostProcessError


class Team:
    """The processes started by `torchrun` or `accelerate launch`, or this process alone.

    Args:
        state: accelerate's view of the launch; None for this process alone.
    """

    def __init__(self, state: PartialState | None = None):
        self._state = state
        self.size: int = 1 if state is None else state.num_processes
        self.rank: int = 0 if state is None else state.process_index

    @classmethod
    def of_this_launch(cls) -> "Team":
        """All processes of the launch this one belongs to; joins their process group where there are several."""
        # gloo, on GPU machines too: what is exchanged are names and numbers, the tensors go through files.
        return cls(PartialState(cpu=True)) if launched() else cls()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that reports and writes."""
        return self.rank == 0

    def part(self, costs: Mapping[str, float]) -> list[str]:
        """This process's part of the work, the same partition in every process.

        Args:
            costs: Cost of each piece, by name.
        """
        return share_out(costs, self.size)[self.rank]

    def gather(self, values: Sequence[Any], *, doing: str) -> list[Any]:
        """The values of all processes, in the order of their ranks; every process waits for all others.

        Args:
            values: What this process has; anything that can be pickled.
            doing: What to say was going on when another process is found dead.

        Raises:
            LostProcessError: If another process ended.
        """
        if self.size == 1:
            return list(values)
        try:
            return gather_object(list(values))
        except RuntimeError as error:  # gloo's and NCCL's errors of a broken connection
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise LostProcessError(
                f"Another of the {self.size} processes ended while {doing} (noticed by process {self.rank}: {reason}). "
                "What was finished is kept: run the same command again and it goes on from there."
            ) from error


def launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def share_threads() -> None:
    """Give each process of a launch its share of the machine's cores; without a launch, leave all as it is.

    Launchers set one thread per process unless told otherwise, which leaves cores idle where there are more.
    """
    if launched():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))))


def share_out(costs: Mapping[str, float], n_parts: int) -> list[list[str]]:
    """Split work into parts of nearly equal cost: the dearest first, each to the part that has least so far.

    At most 4/3 of the best possible largest part (Graham, SIAM J. Appl. Math. 17, 1969).

    Args:
        costs: Cost of each piece, by name.
        n_parts: Number of parts, at least 1.

    Returns:
        The names of each part, in the order of `costs`.
    """
    loads, parts = [0.0] * n_parts, [set[str]() for _ in range(n_parts)]
    for name in sorted(costs, key=lambda name: -costs[name]):  # sorted is stable: ties keep the order given
        lightest = loads.index(min(loads))
        loads[lightest] += costs[name]
        parts[lightest].add(name)
    return [[name for name in costs if name in part] for part in parts]


def module_cost(n_rows: int, shape: tuple[int, int]) -> float:
    """Time to fit a module, in products of its stacks with one vector, roughly.

    Args:
        n_rows: Σ r over the adapters that have it.
        shape: (out_features, in_features).
    """
    return float(n_rows) * math.fsum(shape)
