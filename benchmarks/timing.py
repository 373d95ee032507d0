"""CPU time of several functions in turns, in one process, and the environment it was measured in."""

import os
import platform
import time
from pathlib import Path
from statistics import median

import peft
import torch
import transformers

import eigenpeft


def interleaved(functions, *, rounds, seconds):
    """Median milliseconds of CPU time a call, each function running in every round, so that all see the same machine.

    Args:
        functions: Name to function without arguments.
        rounds: How often each takes its turn, after one round to warm up.
        seconds: About how long the turns of one function last together.
    """
    calls, times = {}, {name: [] for name in functions}
    for name, function in functions.items():
        function()
        calls[name] = max(1, round(seconds / rounds / max(_seconds(function, 1), 1e-6)))
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(_seconds(function, calls[name]) / calls[name] * 1e3)
    return {name: median(values) for name, values in times.items()}


def _seconds(function, calls):
    # All of the process, not of this thread: the backward pass may run in one of its own.
    start = time.process_time()
    for _ in range(calls):
        function()
    return time.process_time() - start


def environment():
    """What the numbers depend on."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in cpu.splitlines() if "model name" in line]
    return {
        "eigenpeft": eigenpeft.__version__,
        "peft": peft.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
