"""Work in several processes (gloo) that leave without tearing torch down."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing.spawn import ProcessExitedException, spawn


def in_processes(worker: Callable[..., None], *arguments: Any, folder: Path, n: int = 2) -> None:
    """Run `worker(rank, *arguments, folder)` in n processes that share a gloo group; what they find goes into files.

    A failure inside a worker is raised here. Torch sometimes aborts a process that has done all its work ("terminate called
    without an active exception", about one start in a hundred on a busy machine), and more rarely waits for ever when a group
    is taken down (the thread that is joined wants the lock of the one that joins it): workers therefore leave at once when they
    are done, and a process killed by a signal, which no failing assertion does, is tried once more in a clean folder.
    """
    try:
        spawn(_enter, args=(worker, arguments, str(folder), n), nprocs=n)
    except ProcessExitedException as error:
        if error.signal_name is None:
            raise
        shutil.rmtree(folder)
        folder.mkdir()
        spawn(_enter, args=(worker, arguments, str(folder), n), nprocs=n)


def _enter(rank: int, worker: Callable[..., None], arguments: tuple, folder: str, n: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=n)
    worker(rank, *arguments, folder)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
