"""`eigenpeft sft` and its siblings: two real steps from files on disk, and what they say when something is missing."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer

if not find_spec("trl"):
    pytest.skip("needs the extra trl", allow_module_level=True)

from eigenpeft import AdapterCollection, AdapterStore, PrincipalSubspace
from eigenpeft.cli.training.trl import SCRIPTS
from tests.recipes.tiny import rows, tiny_model, tiny_tokenizer
from tests.tuners.conftest import random_subspace, tiny_llama

TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.05, "save_strategy": "no"}
TRAINING |= {"report_to": "none", "bf16": False, "use_cpu": True, "dataloader_pin_memory": False}
TRAINING |= {"lora_r": 4, "lora_dropout": 0, "logging_steps": 1}
GENERATING = {
    "num_generations": 2,
    "max_completion_length": 4,
    "reward_funcs": "tests.cli.training.test_trl.even_words",
}
OWN = {
    "grpo": GENERATING,
    "rloo": GENERATING,
    "distillation": {"max_completion_length": 4, "teacher_model_name_or_path": "teacher"},
}


def even_words(completions, **_):
    """A verifiable reward, found by its name: the share of words with an even number."""
    return [
        sum(word.startswith("w") and int(word[1:]) % 2 == 0 for word in text.split()) / max(len(text.split()), 1)
        for text in completions
    ]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Model, subspace and one folder of JSONL a trainer, in the working directory."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("base")
    tiny_llama(initializer_range=0.2).save_pretrained("teacher")
    for folder in ("base", "teacher"):
        tiny_tokenizer().save_pretrained(folder)
    random_subspace(tiny_model(), ("q_proj", "v_proj")).save_pretrained("subspace")
    for name in SCRIPTS:
        Path("data", name).mkdir(parents=True)
        rows(name).to_json(Path("data", name, "train.jsonl"))
    return tmp_path


def arguments(name, *more):
    files = {"model_name_or_path": "base", "dataset_name": f"data/{name}", "output_dir": "out"}
    flags = files | TRAINING | OWN.get(name, {})
    return [name, *(part for flag, value in flags.items() for part in (f"--{flag}", str(value))), *more]


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_steps_in_a_subspace(run, place, name):
    ran = run(*arguments(name, "--subspace", "subspace", "--core", "full", "--n_components", 6))
    assert ran.code == 0, ran.err
    config = json.loads((place / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["core"], config["n_components"]) == ("EIGENLORA", "full", 6)
    assert "Training " in ran.out
    card = (place / "out" / "README.md").read_text()
    assert "core full, K 6 in the subspace subspace" in " ".join(ran.out.split())
    assert "core full, K 6 in the subspace subspace" in card
    assert f"Trained with `eigenpeft {name}`" in card
    assert "## Loading this adapter" in card
    assert not any(
        word in card for word in ("None", "[More Information Needed]", "time machine")
    )  # drafts of PEFT and TRL
    trainer = "reward" if name == "reward" else "sft"
    loaded = PeftModel.from_pretrained(tiny_model(trainer), place / "out")
    assert all(p.any() for key, p in loaded.named_parameters() if "lora_B" in key)
    if name == "reward":
        assert config["task_type"] == "SEQ_CLS"
        saved = loaded.get_submodule("base_model.model.score").modules_to_save["default"].weight
        assert not torch.equal(saved, tiny_model("reward").score.weight)


def test_the_number_of_trained_values_is_said_and_on_the_card(run, place):
    ran = run(*arguments("sft", "--subspace", "subspace", "--save_strategy", "steps", "--save_steps", "1"))
    assert ran.code == 0, ran.err
    trained = sum(p.numel() for key, p in load_file("out/adapter_model.safetensors").items())
    total = sum(p.numel() for p in tiny_model().parameters())
    said = " ".join(ran.out.split())
    assert f"Training {trained:,} values (" in said
    share = float(said.partition(" values (")[2].partition("%")[0]) / 100
    assert share == pytest.approx(trained / total, rel=0.5)
    assert f"| {trained:,} values (" in Path("out/README.md").read_text()
    assert "Supervised fine-tuning, 2 steps, learning rate 0.05" in Path("out/README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "core"),
    [
        (["--core", "mixture", "--sources", "store", "--weights", "module"], "mixture"),
        (
            ["--subspace", "subspace", "--init_from", "mean", "--init_adapters", "a", "b", "--init_scale", "0.5"],
            "low_rank",
        ),
    ],
)
def test_starts_from_other_adapters(run, place, flags, core):
    for name in ("a", "b"):
        options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        get_peft_model(tiny_model(), LoraConfig(r=2, **options)).save_pretrained(name)
    adapters = AdapterCollection.from_pretrained(["a", "b"])
    AdapterStore.from_collection(PrincipalSubspace.from_pretrained("subspace"), adapters).save_pretrained("store")
    assert run(*arguments("sft", *flags)).code == 0
    model = PeftModel.from_pretrained(tiny_model(), "out")
    assert model.peft_config["default"].core == core
    assert (model.peft_config["default"].offset_ranks is None) == (core == "mixture")


def test_other_methods_and_a_file_of_flags(run, place):
    (place / "run.yaml").write_text("peft_method: moslora\ninit_mixer: orthogonal\nlora_target_modules: [q_proj]\n")
    assert run(*arguments("sft", "--config", "run.yaml")).code == 0
    config = json.loads((place / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["init_mixer"]) == ("MOSLORA", "orthogonal")
    assert run(*arguments("sft", "--peft_method", "lora")).code == 0
    assert json.loads((place / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize(("control", "peft_type"), [("shuffled", "EIGENLORA"), ("same_parameters", "LORA")])
def test_a_control_by_one_flag(run, place, control, peft_type):
    ran = run(*arguments("sft", "--subspace", "subspace", "--control", control))
    assert ran.code == 0, ran.err
    config = json.loads((place / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["subspace"] if peft_type == "EIGENLORA" else None) == (peft_type, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "EigenLoRA needs --subspace"),
        (["--subspace", "nowhere"], "nowhere"),
        (["--peft_method", "moslora", "--core", "full"], "--core mean nothing to --peft_method moslora"),
        (
            ["--subspace", "subspace", "--init_mixer", "identity"],
            "--init_mixer mean nothing to --peft_method eigenlora",
        ),
        (["--subspace", "subspace", "--n_components", "0"], "n_components=0"),
        (["--subspace", "subspace", "--control", "mean_only"], "control='mean_only' needs the adapters"),
        (["--peft_method", "lora", "--control", "random"], "--control mean nothing to --peft_method lora"),
        (["--subspace", "subspace", "--dataset_name", ""], "No data"),
    ],
)
def test_a_wrong_flag_is_one_message(run, place, flags, message):
    ran = run(*arguments("sft", *flags))
    assert ran.code == 1
    assert message in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("flags", "rate", "message"),
    [
        ((), 1e-2, "No --learning_rate was given: training starts at 0.01"),
        (("--core", "diagonal"), 3e-2, "starts at 0.03"),
        (("--control", "lora"), 2e-3, "starts at 0.002"),
        (("--learning_rate", "1e-4"), 1e-4, "--learning_rate 0.0001 is far below the 0.01"),
        (("--learning_rate", "5e-3"), 5e-3, None),
    ],
)
def test_a_learning_rate_that_suits_the_adapter(run, place, monkeypatch, caplog, flags, rate, message):
    used = []
    monkeypatch.setattr("trl.scripts.sft.main", lambda _, training, *__: used.append(training.learning_rate))
    words = arguments("sft", "--subspace", "subspace")
    at = words.index("--learning_rate")
    ran = run(*words[:at], *words[at + 2 :], *flags)
    assert ran.code == 0, ran.err
    assert used == [rate]
    assert (message in caplog.text) if message else ("learning_rate" not in caplog.text)


def test_a_cpu_without_use_cpu_is_one_message(run, place):
    words = arguments("sft", "--subspace", "subspace", "--bf16", "True")
    at = words.index("--use_cpu")
    ran = run(*words[:at], *words[at + 2 :])
    assert ran.code == 1
    assert "Error: eigenpeft sft: Your setup doesn't support bf16" in ran.err
    assert "Traceback" not in ran.err


def test_a_file_is_data_and_a_cpu_is_chosen_where_there_is_nothing_else(run, place, caplog, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    words = arguments("sft", "--subspace", "subspace")
    for flag in ("--use_cpu", "--bf16"):
        at = words.index(flag)
        words = words[:at] + words[at + 2 :]
    words[words.index("data/sft")] = "data/sft/train.jsonl"
    ran = run(*words)
    assert ran.code == 0, ran.err
    assert "training on the CPU in float32 (--use_cpu true --bf16 false)" in caplog.text
    assert (place / "out" / "adapter_config.json").exists()
    Path("data.txt").write_text("no rows")
    words[words.index("data/sft/train.jsonl")] = "data.txt"
    assert "is a file of no known kind; pass .jsonl, .json, .csv, .parquet" in run(*words).err
    for missing in ("absent.jsonl", "./absent", "/absent/data"):  # no Hub id, so that nothing is looked for there
        words[words.index("--dataset_name") + 1] = missing
        assert f"There is no file or folder '{Path(missing)}'" in run(*words).err


def test_help_names_their_flags_and_ours(run):
    ran = run("dpo", "--help")
    assert ran.code == 0
    for flag in ("--subspace", "--core", "--peft_method", "--beta", "--learning_rate"):
        assert flag in ran.out


def test_without_trl_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr("eigenpeft.cli.training.trl.find_spec", lambda name: None)
    ran = run("sft", "--output_dir", "out")
    assert ran.code == 1
    assert "pip install 'eigenpeft[trl]'" in ran.err


@pytest.mark.parametrize("name", SCRIPTS)
def test_over_a_quantized_base_coefficients_stay_float32(run, place, name, monkeypatch):
    # No quantisation back-end is needed: the mark is what TRL looks at before it rounds what is trained.
    load = PreTrainedModel.from_pretrained.__func__

    def marked(cls, *words, **settings):
        model = load(cls, *words, **settings)
        model.is_loaded_in_8bit = True
        return model

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(marked))
    seen = []
    train = Trainer.train
    monkeypatch.setattr(
        Trainer,
        "train",
        lambda self, *words, **settings: (
            seen.extend(p.dtype for p in self.model.parameters() if p.requires_grad) or train(self, *words, **settings)
        ),
    )
    ran = run(*arguments(name, "--subspace", "subspace"))
    assert ran.code == 0, ran.err
    assert seen
    assert set(seen) == {torch.float32}


@pytest.mark.slow
def test_accelerate_launch(place):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "eigenpeft"]
    ran = subprocess.run(
        [*command, *arguments("sft", "--subspace", str(place / "subspace"))],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert (place / "out" / "adapter_model.safetensors").is_file()
