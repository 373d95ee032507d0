"""What the recipes are tried on: a tiny real model, a tokenizer of one token a word, a few rows in every form."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from tests.tuners.conftest import VOCABULARY, tiny_llama

TARGETS = ("q_proj", "v_proj", "down_proj")
WORDS = [f"w{number}" for number in range(VOCABULARY - 4)]


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
