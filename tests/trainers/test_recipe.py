"""The recipe runs from its YAML to a reward model on disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from eigenpeft import LowRankRewardModel
from tests.tuners.conftest import random_subspace

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("method", ["lora", "eigenlora"])
def test_the_recipe_writes_a_reward_model(method, llama, tokenizer, data, tmp_path):
    llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data(range(10), 8).to_json(tmp_path / "data.jsonl")
    config = yaml.safe_load((ROOT / "recipes" / "lore.yaml").read_text())
    if method == "eigenlora":
        random_subspace(llama(), ("q_proj", "v_proj")).save_pretrained(tmp_path / "subspace")
        config["adapter"] = {"method": method, "r": 4, "lora_alpha": 8, "subspace": str(tmp_path / "subspace")}
    (tmp_path / "lore.yaml").write_text(yaml.safe_dump(config))
    command = [
        *(sys.executable, ROOT / "recipes" / "lore.py", "--config", tmp_path / "lore.yaml"),
        *("--dataset", tmp_path / "data.jsonl", "--model", tmp_path / "model", "--out", tmp_path / "rewards"),
        *("--max_steps", "3", "--bf16", "false", "--use_cpu", "true"),
    ]
    subprocess.run(list(map(str, command)), check=True, timeout=900, cwd=ROOT)
    model = LowRankRewardModel.from_pretrained(tmp_path / "rewards")
    assert len(model.users) == 8
    assert model.backbone is not None
    assert "eval_new_users_accuracy" in json.loads((tmp_path / "rewards" / "metrics.json").read_text())
