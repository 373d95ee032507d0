"""A tiny Llama with a byte tokenizer, our configurations on it, and every stable TRL trainer set up for a few steps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

pytest.importorskip("trl", reason="needs the extra trl")

from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from eigenpeft import EigenLoraConfig, MosLoraConfig
from tests.tuners.conftest import random_subspace

SUFFIXES = ("q_proj", "v_proj", "down_proj")
SPECIAL = ("<pad>", "<bos>", "<eos>")
CONFIGS = ("eigen_low_rank", "eigen_mixer", "eigen_diagonal", "moslora")
PAIRS = [("What is 2+3?", " It is 5.", " No idea at all."), ("Say hello.", " Hello there!", " Go away.")] * 4


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that any text works and the vocabulary stays small."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *sorted(ByteLevel.alphabet())])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )


def tiny_base(head: type = LlamaForCausalLM, *, seed: int = 0, dtype: torch.dtype = torch.float32):
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"num_labels": 1} if head is LlamaForSequenceClassification else {}
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(SPECIAL) + 256,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    return head(config).to(dtype).eval()


@pytest.fixture(scope="session")
def subspace_dir(tmp_path_factory):
    """A subspace of random bases, saved: what is reloaded must find it again."""
    place = tmp_path_factory.mktemp("subspace")
    random_subspace(tiny_base(), SUFFIXES, n_components=8).save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory):
    """The tiny base and its tokenizer on disk."""
    place = tmp_path_factory.mktemp("base")
    tiny_base().save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def make_config(subspace_dir) -> Callable[..., PeftConfig]:
    def make(kind: str, task_type: str = "CAUSAL_LM") -> PeftConfig:
        if kind == "moslora":
            return MosLoraConfig(r=4, target_modules=list(SUFFIXES), task_type=task_type)
        core: Any = kind.removeprefix("eigen_")
        return EigenLoraConfig(subspace=str(subspace_dir), r=4, lora_alpha=8, core=core, task_type=task_type)

    return make


def trained(base, config: PeftConfig) -> PeftModel:
    """An adapter that is no longer the base model, as one trained before would be."""
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": prompt} for prompt, _, _ in PAIRS])


def preferences() -> Dataset:
    return Dataset.from_list([{"prompt": p, "chosen": good, "rejected": bad} for p, good, bad in PAIRS])


def texts() -> Dataset:
    return Dataset.from_list([{"text": prompt + good} for prompt, good, _ in PAIRS])


def labelled() -> Dataset:
    return Dataset.from_list(
        [{"prompt": p, "completion": text, "label": text == good} for p, good, bad in PAIRS for text in (good, bad)]
    )


def whole() -> Dataset:
    return Dataset.from_list([{"chosen": p + good, "rejected": p + bad} for p, good, bad in PAIRS])


def reward(completions: list[str], **_: Any) -> list[float]:
    """Differs within any group, so that advantages are not all zero."""
    return [float(sum(text.encode()) % 97) for text in completions]


@dataclass(frozen=True)
class Setup:
    """How one trainer is made: its class, its configuration's class and settings, its data, other arguments."""

    trainer: type
    config: type
    data: Callable[[], Dataset]
    settings: dict[str, Any]
    arguments: Callable[[], dict[str, Any]] = dict


SAMPLING = {"max_completion_length": 6, "temperature": 1.0}
GROUPS = {**SAMPLING, "num_generations": 2, "beta": 0.1}
SETUPS = {
    "sft": Setup(SFTTrainer, SFTConfig, texts, {"max_length": 32}),
    "dpo": Setup(DPOTrainer, DPOConfig, preferences, {"max_length": 48}),
    "kto": Setup(KTOTrainer, KTOConfig, labelled, {"max_length": 48}),
    "reward": Setup(RewardTrainer, RewardConfig, whole, {"max_length": 48}),
    "grpo": Setup(GRPOTrainer, GRPOConfig, prompts, GROUPS, lambda: {"reward_funcs": reward}),
    "rloo": Setup(RLOOTrainer, RLOOConfig, prompts, GROUPS, lambda: {"reward_funcs": reward}),
    "distillation": Setup(
        DistillationTrainer, DistillationConfig, prompts, SAMPLING, lambda: {"teacher_model": tiny_base(seed=1)}
    ),
}


def make_trainer(name: str, out, *, model, peft_config: PeftConfig | None = None, callbacks=(), **changes: Any):
    setup = SETUPS[name]
    settings = {
        "output_dir": str(out),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return setup.trainer(
        model=model,
        args=setup.config(**settings | setup.settings | changes),
        train_dataset=setup.data(),
        processing_class=byte_tokenizer(),
        peft_config=peft_config,
        callbacks=list(callbacks),
        **setup.arguments(),
    )


def first(trainer, key: str) -> float:
    """The first logged value of a metric."""
    return next(row[key] for row in trainer.state.log_history if key in row)
