"""The recipe in Flower's own simulation: real processes, and a run that goes on after the rounds of a stopped one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra federated: make federated")

from peft import PeftModel  # noqa: E402
from transformers import BertForSequenceClassification  # noqa: E402

from tests.recipes.tiny import WORDS, tiny_tokenizer  # noqa: E402
from tests.tuners.conftest import random_subspace, tiny_bert  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
ROOT = Path(__file__).parents[2]


def run(folder, *arguments):
    """The recipe in a process of its own, offline; what it printed of the rounds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(ROOT / "recipes" / "federated.py"),
        "--config",
        str(ROOT / "recipes" / "federated.yaml"),
    ]
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if line.startswith("round ")]


def test_the_recipe_runs_and_goes_on(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    random_subspace(tiny_bert(), ("query", "value"), n_components=6).save_pretrained(tmp_path / "subspace")
    (tmp_path / "data").mkdir()
    for name, n in (("train", 60), ("test", 12)):
        rows = [{"text": f"{WORDS[i % 30]} {WORDS[(i * 7) % 30]}", "label": i % 3} for i in range(n)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model": tmp_path / "base", "dataset": tmp_path / "data", "subspace": tmp_path / "subspace"}
    given |= {"output_dir": tmp_path / "federation", "n_clients": 2, "local_steps": 2}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    first = run(tmp_path, *words, "--rounds", 1)
    assert [line.split(":")[0] for line in first] == ["round 1"]
    # Four weights of 6 x 6, and a head of 3 x 32 and 3 numbers, in float32.
    assert "2 clients" in first[0]
    assert f"{4 * (4 * 36 + 99) / 1e3:.1f} kB from each" in first[0]
    second = run(tmp_path, *words, "--rounds", 3)
    assert [line.split(":")[0] for line in second] == ["round 1", "round 2", "round 3"]
    state = json.loads((tmp_path / "federation" / "federation.json").read_text())
    assert [each["round"] for each in state["rounds"]] == [1, 2, 3]
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    assert PeftModel.from_pretrained(base, tmp_path / "federation-adapter").peft_config["default"].core == "full"
