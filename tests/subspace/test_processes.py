"""Real launches of two processes on this machine: the same bytes as one, one clear error when one is killed, a resume."""

import os
import subprocess
import sys

import pytest

from tests.factories import make_collection

pytestmark = pytest.mark.slow
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", "0")
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no")  # fmt: skip


def start(folder, out, *launcher, **environment):
    command = [sys.executable, *launcher, "-m", "eigenpeft", "build", str(folder), "-k", "5", "--out", str(out)]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings)


@pytest.fixture
def adapters(tmp_path):
    modules = {f"layer.{i}.query": (24, 40) for i in range(6)}
    return make_collection(tmp_path / "adapters", n_adapters=4, rank=(4, 2), noise=0.3, modules=modules).folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_write_the_bytes_of_one(tmp_path, adapters, launcher):
    runs = {"one": start(adapters, tmp_path / "one"), "two": start(adapters, tmp_path / "two", *launcher)}
    for name, process in runs.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.count("Wrote") == 1, name  # one process speaks
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "one", "two"]


def test_bad_input_is_one_message(tmp_path, adapters):
    command = [
        sys.executable,
        *TORCHRUN,
        "-m",
        "eigenpeft",
        "build",
        str(adapters),
        "-k",
        "500",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("6 of 6 modules cannot be fitted as asked") == 1
    assert "exceeds the numerical rank" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()
