"""Tiny real architectures from configs, and a subspace of random orthonormal bases for any of them."""

import importlib.metadata

import jaxtyping
import pytest
import torch
from packaging.version import Version
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.integrations import peft as integration
from transformers.pytorch_utils import Conv1D

from eigenpeft import PrincipalSubspace
from eigenpeft.subspace import ModuleSubspace, SubspaceInfo

VOCABULARY = 50
WANTED_PEFT = getattr(integration, "MIN_PEFT_VERSION", "0")
needs_own_adapters = pytest.mark.skipif(
    Version(importlib.metadata.version("peft")) < Version(WANTED_PEFT),
    reason=f"transformers' own add_adapter refuses this peft: it asks for >= {WANTED_PEFT} (get_peft_model is tested beside it)",
)


def tiny_llama(**changes):
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def tiny_gpt2():
    torch.manual_seed(0)
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=VOCABULARY, **settings, **no_dropout)
    config.loss_type = "ForCausalLM"
    return GPT2LMHeadModel(config).eval()


def tiny_bert(num_labels=3):
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**settings, vocab_size=VOCABULARY, num_labels=num_labels, max_position_embeddings=32)
    return BertForSequenceClassification(config).eval()


def random_subspace(model, suffixes, *, n_components=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    modules, transposed = {}, []
    for name, module in model.named_modules():
        if any(name.endswith(suffix) for suffix in suffixes):
            transposed += [name] if isinstance(module, Conv1D) else []
            out_features, in_features = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
            sides = (torch.randn(width, n_components, generator=generator) for width in (in_features, out_features))
            spectrum = torch.linspace(2, 1, n_components)
            modules[name] = ModuleSubspace(
                *(torch.linalg.qr(side)[0].mT.contiguous() for side in sides),
                singular_values_in=spectrum,
                singular_values_out=spectrum,
                explained_variance_ratio=spectrum / 2 / spectrum.sum(),
            )
    return PrincipalSubspace(
        modules, info=SubspaceInfo(base_model_name_or_path="tiny", fan_in_fan_out=tuple(transposed))
    )


MODELS = {
    "llama": (tiny_llama, ("q_proj", "v_proj", "down_proj")),
    "gpt2": (tiny_gpt2, ("c_attn",)),
}


@pytest.fixture(params=MODELS)
def architecture(request):
    """(function that makes the model, suffixes of its adapted modules): one with Linear, one with Conv1D."""
    return MODELS[request.param]


def is_conv1d(architecture):
    """Whether the base weights are stored transposed, which LoRA's own config has to be told."""
    return architecture[0] is tiny_gpt2


@pytest.fixture
def no_shape_checks(monkeypatch):
    """Turns off the checks of shapes that the tests put around eigenpeft.linalg, which torch.compile cannot trace."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch._dynamo.reset()  # compiled graphs of other tests count towards the limit of recompilations


@pytest.fixture
def tokens():
    return torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))


def train(model, tokens, *, steps=4, lr=0.5):
    """A few plain SGD steps that move every trainable tensor; returns the logits after them."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.eval()
    return logits(model, tokens)


def trained_by_trainer(make, tokens, folder, *, steps, **resume):
    """transformers' Trainer on a new model from `make`, with a checkpoint every second step; `resume` is `train`'s."""
    settings = {"save_strategy": "steps", "save_steps": 2, "report_to": [], "use_cpu": True, "learning_rate": 1e-2}
    arguments = TrainingArguments(
        folder, max_steps=steps, disable_tqdm=True, logging_strategy="no", lr_scheduler_type="constant", **settings
    )
    model = make()
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens]).train(**resume)
    return model.eval()


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens).logits
