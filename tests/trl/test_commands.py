"""The commands that run TRL's scripts: two steps each from a base and a JSONL file on disk."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import trl
from peft import AutoPeftModelForCausalLM, PeftConfig
from transformers import LlamaForSequenceClassification

from eigenpeft.cli import trl as commands
from eigenpeft.errors import EigenPeftError
from tests.trl.conftest import SETUPS, byte_tokenizer, tiny_base

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def arguments(tmp_path, base_dir, subspace_dir):
    """Command line of two steps of any of the scripts."""

    def make(name, *more):
        data = tmp_path / "data"
        data.mkdir(exist_ok=True)
        SETUPS[name].data().to_json(data / "train.jsonl")
        base = base_dir
        if name == "reward":
            base = tmp_path / "reward-base"
            tiny_base(LlamaForSequenceClassification).save_pretrained(base)
            byte_tokenizer().save_pretrained(base)
        options = {
            "model_name_or_path": base,
            "dataset_name": data,
            "output_dir": tmp_path / "out",
            "subspace": subspace_dir,
            "lora_r": 4,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "report_to": "none",
            "bf16": "false",
            "use_cpu": "true",
            "dtype": "float32",
            "gradient_checkpointing": "false",
        }
        if name in ("grpo", "rloo"):
            options |= {"num_generations": 2, "reward_funcs": "tests.trl.conftest.reward"}
        if name in ("grpo", "rloo", "distillation"):
            options |= {"max_completion_length": 6}
        if name == "distillation":
            options |= {"teacher_model_name_or_path": base_dir}
        return [str(word) for key, value in options.items() for word in (f"--{key}", value)] + [*more]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", commands.SCRIPTS)
def test_two_steps(name, arguments, tmp_path):
    commands.run_script(name, arguments(name))
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert config.peft_type == "EIGENLORA"
    assert config.r == 4
    assert trl.ModelConfig.__module__.startswith("trl"), "TRL is left as it was"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "expected"), [("moslora", "MOSLORA"), ("lora", "LORA")])
def test_other_methods(method, expected, arguments, tmp_path):
    commands.run_script("sft", arguments("sft", "--peft_method", method, "--lora_target_modules", "q_proj", "v_proj"))
    assert PeftConfig.from_pretrained(tmp_path / "out").peft_type == expected


@pytest.mark.slow
def test_accelerate_launch(arguments, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "eigenpeft"]
    result = subprocess.run(
        [*launch, "sft", *arguments("sft", "--core", "mixer")], capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["core"] == "mixer"
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(input_ids=torch.tensor([[3, 4, 5]])).logits).all()


def test_a_missing_subspace_is_said(arguments):
    words = arguments("sft")
    position = words.index("--subspace")
    with pytest.raises(EigenPeftError, match="needs --subspace"):
        commands.run_script("sft", words[:position] + words[position + 2 :])


def test_a_missing_trl_is_said(monkeypatch):
    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: None if name == "trl" else find_spec(name))
    with pytest.raises(EigenPeftError, match=r"pip install 'eigenpeft\[trl\]'"):
        commands.run_script("sft", [])
