"""TRL's trainers on tiny real models: a tokenizer in memory, a few rows each, two real steps."""

from dataclasses import dataclass
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from eigenpeft import EigenLoraConfig, MosLoraConfig
from tests.tuners.conftest import VOCABULARY, tiny_llama

TARGETS = ("q_proj", "v_proj", "down_proj")
WORDS = [f"w{number}" for number in range(VOCABULARY - 4)]
TASK_TYPES = {"reward": "SEQ_CLS"}
CORES = ("low_rank", "mixer", "diagonal")


def tiny_tokenizer():
    """One token a word, `w0` to `w45`."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_model(trainer="sft"):
    """The base model that a trainer asks for, the same weights every time."""
    if trainer != "reward":
        return tiny_llama()
    config = LlamaConfig(**tiny_llama().config.to_diff_dict() | {"num_labels": 1})
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).eval()


def words(seed, length=5):
    """`length` words drawn by `seed`, with the space that ends a prompt."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[index] for index in torch.randint(len(WORDS), (length,), generator=generator)) + " "


def rows(trainer, number=8):
    """A data set in the form that the trainer documents."""
    prompts, good, bad = ([words(seed + 100 * part) for seed in range(number)] for part in range(3))
    return Dataset.from_dict(
        {
            "sft": {"prompt": prompts, "completion": good},
            "dpo": {"prompt": prompts, "chosen": good, "rejected": bad},
            "kto": {"prompt": prompts, "completion": good, "label": [row % 2 == 0 for row in range(number)]},
            "reward": {"chosen": good, "rejected": bad},
            "grpo": {"prompt": prompts},
            "rloo": {"prompt": prompts},
            "distillation": {"prompt": prompts},
        }[trainer]
    )


def even_words(completions, **_):
    """A verifiable reward: the share of words with an even number."""
    return [
        sum(word.startswith("w") and int(word[1:]) % 2 == 0 for word in text.split()) / max(len(text.split()), 1)
        for text in completions
    ]


SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {"beta": 0.5},
    "kto": {"beta": 0.5},
    "reward": {},
    "grpo": {"beta": 0.04, "num_generations": 2, "max_completion_length": 6},
    "rloo": {"beta": 0.05, "num_generations": 2, "max_completion_length": 6},
    "distillation": {"max_completion_length": 6},
}
CLASSES = {
    "sft": (trl.SFTTrainer, trl.SFTConfig),
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "kto": (trl.KTOTrainer, trl.KTOConfig),
    "reward": (trl.RewardTrainer, trl.RewardConfig),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
    "distillation": (trl.DistillationTrainer, trl.DistillationConfig),
}
EXTRAS = {
    "grpo": lambda: {"reward_funcs": even_words},
    "rloo": lambda: {"reward_funcs": even_words},
    "distillation": lambda: {"teacher_model": tiny_llama(initializer_range=0.2)},
}


@dataclass(frozen=True)
class Method:
    """A method under test and where its subspace lies."""

    name: str
    subspace: str

    def config(self, trainer="sft"):
        common = {"r": 4, "lora_alpha": 8, "task_type": TASK_TYPES.get(trainer, "CAUSAL_LM")}
        if trainer == "reward":
            common["modules_to_save"] = ["score"]
        if self.name == "moslora":
            return MosLoraConfig(target_modules=list(TARGETS), **common)
        return EigenLoraConfig(subspace=self.subspace, core=self.name.removeprefix("eigenlora "), **common)


def make_trainer(trainer, method, folder, *, trained=False, callbacks=None, **settings):
    """The trainer with a fresh adapter (`peft_config=`) or with a PeftModel whose adapter is already off zero."""
    trainer_class, config_class = CLASSES[trainer]
    torch.manual_seed(7)
    model, adapter = tiny_model(trainer), method.config(trainer)
    if trained:
        model = trained_model(trainer, method)
    arguments = config_class(
        output_dir=str(folder / "runs"),
        **{"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.05, "lr_scheduler_type": "constant"}
        | {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": 0, "disable_tqdm": True}
        | {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False, "gradient_checkpointing": False}
        | SETTINGS[trainer]
        | settings,
    )
    return trainer_class(
        model=model,
        args=arguments,
        train_dataset=rows(trainer),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        **({} if trained else {"peft_config": adapter}),
        **EXTRAS.get(trainer, dict)(),
    )


def trained_model(trainer, method):
    """A PeftModel whose every trainable tensor has been moved away from its start."""
    model = get_peft_model(tiny_model(trainer), method.config(trainer))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def history(trainer, key):
    """The logged values of a metric."""
    return [row[key] for row in trainer.state.log_history if key in row]
