"""Small reward models, and users whose weights are known."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig, PreTrainedTokenizerFast

from eigenpeft import LowRankRewardModel

TEXT = "the a joke about cats dogs is very funny not polite help me please no yes sorry user assistant"
WORDS = TEXT.split(" ")


@pytest.fixture
def normal():
    return lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(normal):
    """Three basis rewards of four features, users ada and bob."""
    made = LowRankRewardModel(normal(3, 4), concentration=torch.tensor([0.2, 0.5, 0.3]))
    made.users.put(["ada", "bob"], user_weights=torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0]]), n_pairs=[12, 3])
    return made


@pytest.fixture(scope="session")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *WORDS])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    made.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    return made


def tiny_llama(num_labels=1, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        num_labels=num_labels,
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


def tiny_bert(num_labels=1, seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        num_labels=num_labels,
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.fixture(params=[tiny_llama, tiny_bert], ids=["llama", "bert"])
def backbone(request):
    return request.param()
