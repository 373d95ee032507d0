"""The recipes that train with TRL: two steps of each method on tiny models, and what they leave behind."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import PeftModel, get_peft_model

from eigenpeft import LowRankRewardModel, PrincipalSubspace
from eigenpeft.tuners.controls import CONTROLS
from tests.factories import make_collection
from tests.recipes.conftest import RECIPES
from tests.recipes.tiny import TARGETS, rows, tiny_model, tiny_tokenizer
from tests.tuners.conftest import random_subspace

NAMES = ("sft", "dpo", "kto", "reward", "grpo")
FLAGS = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "bf16": False, "use_cpu": True}
FLAGS |= {"save_strategy": "no", "dataloader_pin_memory": False, "lr_scheduler_type": "constant"}
OWN = {"grpo": {"num_generations": 2, "max_completion_length": 4}}


@pytest.fixture
def place(tmp_path):
    """Model, subspace and JSONL rows, in the working directory of the recipe."""
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    random_subspace(tiny_model(), TARGETS).save_pretrained(tmp_path / "subspace")
    for name in NAMES:
        (tmp_path / "data" / name).mkdir(parents=True)
        texts = (
            rows(name) if name != "grpo" else Dataset.from_dict({"question": ["w1 w2 "] * 8, "answer": ["w3 3"] * 8})
        )
        texts.to_json(tmp_path / "data" / name / "train.jsonl")
    return tmp_path


def arguments(name, method):
    flags = {"model": "base", "dataset": f"data/{name}", "output_dir": "out", "method": method, "r": 4}
    flags |= FLAGS | OWN.get(name, {}) | ({"subspace": "subspace"} if method in ("eigenlora", "random") else {})
    return [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]


@pytest.mark.parametrize("method", ["eigenlora", "random", "moslora", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_two_steps_leave_an_adapter_and_a_plain_lora(recipe, place, monkeypatch, name, method):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    config = (RECIPES / f"{name}.yaml").read_text().replace("dataset_config: main\n", "")
    (place / "run.yaml").write_text(config)
    printed = recipe(name, "--config", place / "run.yaml", *arguments(name, method))
    assert "trainable params" in printed
    peft_type = {"eigenlora": "EIGENLORA", "random": "EIGENLORA", "moslora": "MOSLORA", "lora": "LORA"}[method]
    assert json.loads(Path("out/adapter_config.json").read_text())["peft_type"] == peft_type
    assert json.loads(Path("out/lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    kind, tokens = ("reward" if name == "reward" else "sft"), torch.arange(4, 14)[None]
    with torch.no_grad():
        ours, plain = (
            PeftModel.from_pretrained(tiny_model(kind), folder).eval()(tokens).logits for folder in ("out", "out/lora")
        )
        assert (
            not torch.equal(ours, tiny_model(kind)(tokens).logits) or name == "grpo"
        )  # its reward may be 0 throughout
    torch.testing.assert_close(plain, ours)


@pytest.mark.parametrize("name", NAMES)
def test_every_control_by_one_flag(place, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make = runpy.run_path(str(RECIPES / f"{name}.py"))
    modules = list(PrincipalSubspace.from_pretrained("subspace"))
    shapes = {module: tuple(tiny_model().get_submodule(module).weight.shape) for module in modules}
    made = make_collection(tmp_path / "adapters", modules=shapes, n_adapters=3)
    configs = {
        method: make["peft_config"](
            make["Arguments"](
                model="base", dataset="data", subspace="subspace", method=method, r=4, adapters=str(made.folder)
            )
        )
        for method in ("eigenlora", *CONTROLS)
    }
    task_type = "SEQ_CLS" if name == "reward" else "CAUSAL_LM"
    assert {config.task_type for config in configs.values()} == {task_type}
    assert [config.peft_type for config in configs.values()] == ["EIGENLORA"] * 4 + ["LORA"] * 2
    sizes = {
        method: sum(
            p.numel()
            for key, p in get_peft_model(tiny_model(), config).named_parameters()
            if "lora_" in key and p.requires_grad
        )
        for method, config in configs.items()
        if name != "reward"
    }
    assert all(sizes.values())
    assert len({sizes[method] for method in sizes if method not in ("same_parameters", "lora")}) <= 1
    assert all(sizes[method] <= sizes["eigenlora"] for method in sizes if method != "lora")


def test_without_a_subspace_it_says_what_is_missing(recipe, place):
    with pytest.raises(SystemExit, match="needs --subspace"):
        recipe(
            "sft",
            "--method",
            "eigenlora",
            "--dataset",
            "data/sft",
            "--output_dir",
            "out",
            "--use_cpu",
            "--bf16",
            "False",
        )


def few_numbers(method):
    """Flags of the runs that train few numbers, and how many those are on the tiny model."""
    subspace = {"subspace": "subspace"}
    return {
        "diagonal": ({"method": "eigenlora", "core": "diagonal", **subspace}, 6 * 12),
        "diagonal, random": ({"method": "random", "core": "diagonal", **subspace}, 6 * 12),
        "full, K 8": ({"method": "eigenlora", "core": "full", "n_components": 8, **subspace}, 6 * 64),
        "tinylora": ({"method": "tinylora", "tiny_u": 13}, 13),
        "lora r 1": ({"method": "lora", "r": 1, **subspace}, 4 * 64 + 2 * 80 - 2 * 16),
    }[method]


@pytest.mark.parametrize("method", ["diagonal", "diagonal, random", "full, K 8", "tinylora", "lora r 1"])
def test_grpo_with_few_numbers(recipe, place, monkeypatch, method):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    flags, n_trained = few_numbers(method)
    config = (RECIPES / "grpo.yaml").read_text().replace("dataset_config: main\n", "")
    (place / "run.yaml").write_text(config)
    flags = {"model": "base", "dataset": "data/grpo", "output_dir": "out", **FLAGS, **OWN["grpo"], **flags}
    flags |= {"sync_out_dir": "policies"} if method != "tinylora" else {}
    printed = recipe("grpo", "--config", place / "run.yaml", *(p for k, v in flags.items() for p in (f"--{k}", str(v))))
    assert f"trainable params: {n_trained:,} " in printed
    assert Path("out/adapter_config.json").is_file()
    if method != "tinylora":
        assert json.loads(Path("policies/policy-v2/adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_rewards_of_each_prompts_own_user(recipe, place, monkeypatch, algorithm):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    tiny = tiny_model("reward")
    rewards = LowRankRewardModel(torch.randn(2, 32), backbone=tiny, processing_class=tiny_tokenizer())
    rewards.users.put(["ada", "bob"], user_weights=torch.eye(2), n_pairs=[5, 5])
    rewards.save_pretrained("rewards")
    prompts = rows("grpo")["prompt"]
    asked = Dataset.from_dict({"prompt": prompts, "who": ["ada", "bob"] * (len(prompts) // 2)})
    Path("data/asked").mkdir()
    asked.to_json("data/asked/train.jsonl")
    (place / "run.yaml").write_text((RECIPES / "grpo.yaml").read_text().replace("dataset_config: main\n", ""))
    flags = {"model": "base", "dataset": "data/asked", "output_dir": "out", "subspace": "subspace", "core": "diagonal"}
    flags |= FLAGS | OWN["grpo"] | {"algorithm": algorithm, "rewards": "rewards", "user_column": "who"}
    flags |= {"sync_out_dir": "policies", "learning_rate": 0.1, "warmup_steps": 0}
    recipe("grpo", "--config", place / "run.yaml", *(p for k, v in flags.items() for p in (f"--{k}", str(v))))
    tokens = torch.arange(4, 14)[None]
    with torch.no_grad():
        trained = PeftModel.from_pretrained(tiny_model(), "out").eval()(tokens).logits
        synchronized = PeftModel.from_pretrained(tiny_model(), "policies/policy-v2").eval()(tokens).logits
        assert not torch.equal(trained, tiny_model()(tokens).logits)  # these rewards differ between completions
    torch.testing.assert_close(synchronized, trained)


def test_grpo_reads_the_last_number():
    names = runpy.run_path(str(RECIPES / "grpo.py"))
    assert [names["last_number"](text) for text in ("7 + 5 = 12.", "it is 1,234", "-3", "none")] == [
        "12",
        "1234",
        "-3",
        "",
    ]
    assert names["last_number_is_right"](["so 12", "so 13"], solution=["12", "12"]) == [1.0, 0.0]


def test_the_four_tasks_of_the_walk_through(tmp_path):
    recipe = runpy.run_path(str(RECIPES / "smollm2.py"), run_name="recipe")
    recipe["write_tasks"](tmp_path)
    intents = []
    for task in ("1", "2", "3", "4"):
        rows = {split: load_dataset(str(tmp_path / task))[split] for split in ("train", "test")}
        assert len(rows["test"]) == 64
        assert all(row["prompt"].endswith("\nIntent:") and row["completion"].startswith(" ") for row in rows["test"])
        assert set(rows["test"]["completion"]) <= set(rows["train"]["completion"])
        intents += sorted(set(rows["train"]["completion"]))
    assert len(intents) == len(set(intents)) == 77


def test_without_the_wheel_the_walk_through_says_what_to_do(tmp_path, monkeypatch):
    recipe = runpy.run_path(str(RECIPES / "smollm2.py"), run_name="recipe")
    monkeypatch.setitem(recipe["write_model"].__globals__, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="make smollm2"):
        recipe["write_model"](tmp_path)
