"""Real launches of two processes on this machine: the same bytes as one, one clear error when one is killed, a resume."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.factories import make_collection

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc"),
]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Its --multi_gpu means "several processes on this machine", with or without GPUs; --cpu would start a single one.
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
ACCELERATE += ("--mixed_precision", "no", "--dynamo_backend", "no")


def start(folder, out, *launcher, k=5):
    command = [sys.executable, *launcher, "-m", "eigenpeft", "build", str(folder), "-k", str(k), "--out", str(out)]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings)


def make(tmp_path, *, n_modules, size):
    modules = {f"layer.{i}.query": size for i in range(n_modules)}
    return make_collection(tmp_path / "adapters", n_adapters=20, rank=(16, 8), noise=0.3, modules=modules).folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pid_of_rank(launcher, rank):
    """The process a launcher started as a rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == launcher.pid and f"RANK={rank}".encode() in path.joinpath("environ").read_bytes().split(b"\0"):
                return int(path.name)
        except OSError:
            continue
    return None


def test_two_processes_write_the_bytes_of_one(tmp_path):
    adapters = make(tmp_path, n_modules=5, size=(24, 40))
    launchers = {"one": (), "torchrun": TORCHRUN, "accelerate": ACCELERATE}
    runs = {name: start(adapters, tmp_path / name, *launcher) for name, launcher in launchers.items()}
    for name, process in runs.items():
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
        assert out.count("Wrote") == 1, name  # one process speaks
    assert files(tmp_path / "one") == files(tmp_path / "torchrun") == files(tmp_path / "accelerate")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accelerate", "adapters", "one", "torchrun"]


def test_bad_input_is_one_message_and_leaves_nothing(tmp_path):
    adapters = make(tmp_path, n_modules=4, size=(24, 40))
    process = start(adapters, tmp_path / "out", *TORCHRUN, k=500)
    _, err = process.communicate(timeout=900)
    assert process.returncode != 0
    assert err.count("4 of 4 modules cannot be fitted as asked") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters"]


def test_a_killed_process_is_one_clear_error_and_the_rest_resumes(tmp_path):
    adapters, work = make(tmp_path, n_modules=40, size=(512, 512)), tmp_path / "out.work"
    process = start(adapters, tmp_path / "out", *TORCHRUN)
    deadline = time.monotonic() + 900
    while not list(work.glob("*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pid_of_rank(process, 1), signal.SIGKILL)
    _, err = process.communicate(timeout=900)
    assert process.returncode != 0
    assert err.count("run the same command again") == 1, err
    assert not (tmp_path / "out").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    assert finished
    for name, launcher in (("out", TORCHRUN), ("one", ())):
        process = start(adapters, tmp_path / name, *launcher)
        _, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
    assert files(tmp_path / "out") == files(tmp_path / "one")
    assert not work.exists()
