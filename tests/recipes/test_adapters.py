"""The recipes for classifying, distilling, exporting and publishing, on tiny models."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from eigenpeft import EigenLoraConfig
from tests.recipes.tiny import TARGETS, rows, tiny_model, tiny_tokenizer, words
from tests.tuners.conftest import logits, random_subspace, tiny_bert

TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "save_strategy": "no"}
TRAINING |= {"dataloader_pin_memory": False}


def flags(**values):
    lists = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return [part for name, value in lists.items() for part in (f"--{name}", *map(str, value))]


@pytest.fixture
def lora(tmp_path):
    """Base model, subspace and a trained plain LoRA on disk."""
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    random_subspace(tiny_model(), TARGETS).save_pretrained(tmp_path / "subspace")
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=list(TARGETS), task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "lora")
    return tmp_path


@pytest.mark.parametrize("pairs", [False, True])
def test_classification_prints_every_control(recipe, tmp_path, pairs):
    tiny_bert().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    random_subspace(tiny_bert(), ("query", "value"), n_components=6).save_pretrained(tmp_path / "subspace")
    (tmp_path / "data").mkdir()
    for split, start in (("train", 0), ("test", 100)):
        more = [{"text_pair": words(50 + row)} if pairs else {} for row in range(12)]
        lines = [json.dumps({"text": words(start + row), "label": f"kind {row % 3}", **more[row]}) for row in range(12)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    printed = recipe(
        "classification",
        *flags(model="base", dataset="data", subspace="subspace", metric="accuracy", seeds=[0, 1], r=2, lora_alpha=4),
        *flags(output_dir="out", **TRAINING),
    )
    sizes = dict(re.findall(r"^(\w+) +([\d,]+) trainable parameters  \d\.\d+ \(", printed, re.MULTILINE))
    assert list(sizes) == ["head", "random", "eigenlora", "same_parameters", "lora"]
    assert re.search(r"^majority +0 trainable parameters  0\.333$", printed, re.MULTILINE)
    assert json.loads(Path("out/head/config.json").read_text())["id2label"]["2"] == "kind 2"
    assert Path("out/tokenizer.json").is_file()
    numbers = {name: int(size.replace(",", "")) - int(sizes["head"]) for name, size in sizes.items()}
    assert numbers["random"] == numbers["eigenlora"] == 4 * 2 * 2 * 6  # modules, sides, rank, components
    assert 0 < numbers["same_parameters"] <= max(numbers["eigenlora"], 64) < numbers["lora"]
    assert json.loads(Path("out/eigenlora/adapter_config.json").read_text())["peft_type"] == "EIGENLORA"


def test_distilling_gets_nearer_to_the_adapter(recipe, lora):
    (lora / "prompts").mkdir()
    rows("distillation").to_json(lora / "prompts" / "train.jsonl")
    printed = recipe(
        "distill_lora",
        *flags(model="base", lora="lora", subspace="subspace", dataset="prompts", output_dir="out", core="full"),
        *flags(**TRAINING | {"max_steps": 8, "bf16": False, "max_completion_length": 6, "learning_rate": 0.05}),
    )
    base, projected, distilled = (float(number) for number in re.findall(r"divergence .*: ([\d.]+)", printed))
    assert base > projected > 0
    assert distilled < projected
    assert json.loads(Path("out/adapter_config.json").read_text())["core"] == "full"


def test_exporting_changes_nothing_and_says_how_to_serve(recipe, lora):
    model = get_peft_model(
        tiny_model(), EigenLoraConfig(subspace=str(lora / "subspace"), init_from=str(lora / "lora"), r=4)
    )
    model.save_pretrained(lora / "ours")
    printed = recipe(
        "export_and_serve", *flags(adapter="ours", model="base", out="served", prompt="w1 w2 w3", merge=True)
    )
    assert float(re.search(r"difference of the export: (\S+)", printed)[1]) < 1e-4
    assert "--max-lora-rank 8" in printed  # the smallest that vLLM takes and that holds 4
    has_gguf = find_spec("gguf") is not None
    assert ("--lora served/adapter.gguf" if has_gguf else "needs the package gguf") in printed
    assert Path("served/adapter.gguf").is_file() == has_gguf
    tokens = torch.arange(4, 14)[None]
    merged = type(tiny_model()).from_pretrained("served/merged")
    want = logits(PeftModel.from_pretrained(tiny_model(), "ours").eval(), tokens)
    torch.testing.assert_close(logits(merged.eval(), tokens), want)


def test_publishing_dry(recipe, lora):
    printed = recipe("publish", *flags(folder="subspace", repo_id="me/bases", dry_run=True))
    assert "library_name: eigenpeft" in printed
    assert "file: subspace.safetensors" in printed
