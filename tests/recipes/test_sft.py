"""recipes/sft.py takes two steps as a script, from its YAML, and exports what it trained."""

import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftConfig

from tests.trl.conftest import base_dir as base_dir
from tests.trl.conftest import subspace_dir as subspace_dir
from tests.trl.conftest import texts

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kind"), [("eigenlora", "EIGENLORA"), ("moslora", "MOSLORA"), ("lora", "LORA")])
def test_two_steps(method, kind, base_dir, subspace_dir, tmp_path):  # noqa: F811
    (tmp_path / "data").mkdir()
    texts().to_json(tmp_path / "data" / "train.jsonl")
    options = {"config": RECIPES / "sft.yaml", "model": base_dir, "dataset": tmp_path / "data", "method": method}
    options |= {
        "subspace": subspace_dir,
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "use_cpu": True,
        "bf16": False,
    }
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    result = subprocess.run(
        [sys.executable, str(RECIPES / "sft.py"), *words], capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert PeftConfig.from_pretrained(tmp_path / "out").peft_type == kind
    assert PeftConfig.from_pretrained(tmp_path / "out" / "lora").peft_type == "LORA"
