"""The page on LoRe: its commands lead from ratings to the best items of a new user, and to a classifier of that user's own."""

import json
import re
import shlex
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from eigenpeft import LowRankRewardModel
from eigenpeft.cli import load
from eigenpeft.demo import base_model

PAGE = Path(__file__).parents[2] / "docs" / "lore.md"
MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def section(title):
    return PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]


def test_from_ratings_to_a_ranking_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = section("From ratings to a ranking")
    namespace = {}
    exec(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)[0], namespace)
    (commands,) = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    assert [line.split()[2] for line in commands.splitlines()] == ["fit", "add-user", "score", "export"]
    for line in commands.replace(MODEL, base_model()).splitlines():
        result = CliRunner().invoke(load(), shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, result.output
    best = [json.loads(line) for line in Path("best.jsonl").read_text().splitlines()]
    rewards = LowRankRewardModel.from_pretrained("taste").reward_func()(
        completions=namespace["dishes"], user_id=["ada"] * len(namespace["dishes"])
    )
    order = sorted(range(len(rewards)), key=lambda item: -rewards[item])
    assert [row["row"] for row in best] == [row["item"] for row in best] == order[:3]
    assert [row["completion"] for row in best] == [namespace["dishes"][item] for item in order[:3]]
    assert min(row["item"] for row in best) >= 8  # none has meat
    rated = {row["chosen"] for row in map(json.loads, Path("ada.jsonl").read_text().splitlines())}
    assert not {row["completion"] for row in best} <= rated  # dishes that Ada did not rate are ranked too
    classifier = AutoModelForSequenceClassification.from_pretrained("ada-taste").eval()
    tokenizer = AutoTokenizer.from_pretrained("ada-taste")
    with torch.no_grad():
        logits = classifier(**tokenizer(namespace["dishes"], padding=True, return_tensors="pt")).logits[:, 0]
    assert logits.argsort(descending=True).tolist() == order
