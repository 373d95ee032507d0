"""The recipe in Flower's own simulation: real processes, and a run that goes on after the rounds of a stopped one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra federated: make federated")

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import BertForSequenceClassification  # noqa: E402

from tests.recipes.tiny import WORDS, tiny_tokenizer  # noqa: E402
from tests.tuners.conftest import random_subspace, tiny_bert  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
ROOT = Path(__file__).parents[2]


COMMAND = [
    sys.executable,
    str(ROOT / "recipes" / "federated.py"),
    "--config",
    str(ROOT / "recipes" / "federated.yaml"),
]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(folder, *arguments):
    """The recipe in a process of its own, offline; what it printed of the rounds."""
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if line.startswith("round ")]


def prepare(folder):
    """A tiny base model, subspace and data; the recipe's arguments but the rounds and the output."""
    tiny_bert().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    random_subspace(tiny_bert(), ("query", "value"), n_components=6).save_pretrained(folder / "subspace")
    (folder / "data").mkdir()
    for name, n in (("train", 60), ("test", 12)):
        rows = [{"text": f"{WORDS[i % 30]} {WORDS[(i * 7) % 30]}", "label": i % 3} for i in range(n)]
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model": folder / "base", "dataset": folder / "data", "subspace": folder / "subspace"}
    given |= {"n_clients": 2, "local_steps": 2}
    return [word for name, value in given.items() for word in (f"--{name}", value)]


def test_the_recipe_runs_and_goes_on(tmp_path):
    words = [*prepare(tmp_path), "--out", tmp_path / "federation"]
    first = run(tmp_path, *words, "--rounds", 1)
    assert [line.split(":")[0] for line in first] == ["round 1"]
    # Four weights of 6 x 6, and a head of 3 x 32 and 3 numbers, in float32.
    assert "2 clients" in first[0]
    assert f"{4 * (4 * 36 + 99) / 1e3:.2f} kB from each" in first[0]
    second = run(tmp_path, *words, "--rounds", 3)
    assert [line.split(":")[0] for line in second] == ["round 1", "round 2", "round 3"]
    state = json.loads((tmp_path / "federation" / "federation.json").read_text())
    assert [each["round"] for each in state["rounds"]] == [1, 2, 3]
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    assert PeftModel.from_pretrained(base, tmp_path / "federation-adapter").peft_config["default"].core == "full"


def test_clients_that_send_seeds(tmp_path):
    words = [*prepare(tmp_path), "--out", tmp_path / "federation"]
    (line,) = run(tmp_path, *words, "--rule", "seeds", "--rounds", 1)
    assert "2 clients" in line
    assert f"{(2 * 12 + 8) / 1e3:.2f} kB from each" in line


def test_a_run_that_was_killed_ends_where_one_that_was_not_ends(tmp_path):
    """SIGKILL to the process and all that it started, in the middle of a round; nothing of it may have a last word."""
    words = [*prepare(tmp_path), "--rounds", 4]
    whole = run(tmp_path, *words, "--out", tmp_path / "whole")
    killed = tmp_path / "killed"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*COMMAND, *map(str, words), "--out", str(killed)],
            cwd=tmp_path,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            until = time.monotonic() + 1800
            while not (killed / "federation.json").exists():  # the first round is written, and the second under way
                assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
                assert time.monotonic() < until, "the first round does not end"
                time.sleep(0.05)
        finally:
            kill_tree(process.pid)
            process.wait()
    assert process.returncode == -signal.SIGKILL
    state = json.loads((killed / "federation.json").read_text())
    n_done = len(state["rounds"])
    assert 1 <= n_done < 4, "it was killed before its end"
    resumed = run(tmp_path, *words, "--out", killed)
    assert resumed == whole[n_done - 1 :]
    for name in ("arrays.safetensors", "federation.json"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    one, other = (load_file(tmp_path / f"{name}-adapter" / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def kill_tree(root):
    """SIGKILL to a process and its descendants, those that ray started included."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(words[1])
    doomed, grown = {root}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in doomed} - doomed
        doomed, grown = doomed | more, bool(more)
    for pid in sorted(doomed):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
