"""Makers of test material: adapter folders with known updates, and tiny models; all seeded, nothing downloaded."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

# Module name to (out_features, in_features).
MODULES = {"layer.0.query": (12, 20), "layer.0.value": (16, 20), "layer.1.query": (12, 20), "layer.1.value": (16, 20)}
# lora_B (out_features, r), lora_A (r, in_features), without scaling.
Factors = Mapping[str, tuple[Tensor, Tensor]]


def random_factors(
    *, modules: Mapping[str, tuple[int, int]] = MODULES, rank: int = 4, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Standard normal factors of every module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(n_out, rank, generator=generator), torch.randn(rank, n_in, generator=generator))
        for name, (n_out, n_in) in modules.items()
    }


def write_adapter(
    folder: Path,
    factors: Factors,
    *,
    key: str = "base_model.model.{module}.lora_{factor}.weight",
    extra: Mapping[str, Tensor] | None = None,
    as_bin: bool = False,
    **config: Any,
) -> Path:
    """Write a LoRA adapter as PEFT's save_pretrained does.

    Args:
        folder: Where; made if absent.
        factors: Module to (lora_B, lora_A), without scaling.
        key: How keys are written.
        extra: Further tensors, by key.
        as_bin: Write adapter_model.bin instead of adapter_model.safetensors.
        **config: Fields of adapter_config.json over the defaults: r is the commonest rank (others go to rank_pattern)
            and lora_alpha = r, a scaling of 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {name: len(lora_A) for name, (_, lora_A) in factors.items()}
    rank = config.pop("r", Counter(ranks.values()).most_common(1)[0][0] if ranks else 4)
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny/base",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {f"^{name}": own for name, own in ranks.items() if own != rank},
        "init_lora_weights": True,
        "target_modules": sorted(factors),
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {
        key.format(module=name, factor=letter): tensor.contiguous()
        for name, pair in factors.items()
        for letter, tensor in zip("BA", pair, strict=True)
    }
    tensors |= dict(extra or {})
    if as_bin:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class MadeCollection:
    """Adapters on disk and the truth about them.

    Attributes:
        folder: Parent folder of the adapters "adapter-0", "adapter-1", ...
        updates: Adapter to module to ΔW (out_features, in_features), float64, scaling included.
        components_in: Module to the orthonormal rows (n_shared, in_features) all lora_A are made of, but for noise.
        components_out: Module to the orthonormal rows (n_shared, out_features) all lora_B are made of, but for noise.
    """

    folder: Path
    updates: dict[str, dict[str, Tensor]]
    components_in: dict[str, Tensor]
    components_out: dict[str, Tensor]

    @property
    def names(self) -> list[str]:
        return list(self.updates)


def make_collection(
    folder: Path,
    *,
    n_adapters: int = 5,
    modules: Mapping[str, tuple[int, int]] = MODULES,
    rank: int | tuple[int, ...] = 4,
    n_shared: int = 6,
    noise: float = 0.0,
    lora_alpha: float | tuple[float, ...] = 8,
    seed: int = 0,
    **config: Any,
) -> MadeCollection:
    """Write adapters whose updates lie in one subspace of `n_shared` directions a side, plus noise.

    Args:
        folder: Parent folder, made if absent.
        n_adapters: How many.
        modules: Module to (out_features, in_features).
        rank: Rank of all adapters, or ranks that they take in turn.
        n_shared: Directions a side that all updates share.
        noise: Size of random entries added to the factors, relative to their own.
        lora_alpha: Alpha of all adapters, or alphas that they take in turn.
        seed: Seed of everything.
        **config: Further fields of adapter_config.json, as for `write_adapter`.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    in_side = {name: torch.linalg.qr(normal(n_in, n_shared))[0].mT for name, (_, n_in) in modules.items()}
    out_side = {name: torch.linalg.qr(normal(n_out, n_shared))[0].mT for name, (n_out, _) in modules.items()}
    ranks = (rank,) if isinstance(rank, int) else rank
    alphas = lora_alpha if isinstance(lora_alpha, tuple) else (lora_alpha,)
    updates: dict[str, dict[str, Tensor]] = {}
    for i in range(n_adapters):
        name, r, alpha = f"adapter-{i}", ranks[i % len(ranks)], alphas[i % len(alphas)]
        factors = {}
        for module, (n_out, n_in) in modules.items():
            lora_A = normal(r, n_shared) @ in_side[module] + noise * normal(r, n_in)
            lora_B = out_side[module].mT @ normal(n_shared, r) + noise * normal(n_out, r)
            factors[module] = (lora_B.float(), lora_A.float())
        scaling = alpha / (r**0.5 if config.get("use_rslora") else r)
        updates[name] = {module: scaling * (B.double() @ A.double()) for module, (B, A) in factors.items()}
        write_adapter(folder / name, factors, r=r, lora_alpha=alpha, **config)
    return MadeCollection(folder, updates, in_side, out_side)


def tiny_llama(*, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Two layers of width 16, grouped-query attention, vocabulary of 64; weights random but large enough to matter."""
    config = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _seeded(LlamaForCausalLM, LlamaConfig(**config | overrides), seed=seed)


def tiny_gpt2(*, seed: int = 0, **overrides: Any) -> GPT2LMHeadModel:
    """Two layers of width 16 with Conv1D weights (stored transposed), vocabulary of 64, no dropout."""
    config = {
        "vocab_size": 64,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "loss_type": "ForCausalLM",
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _seeded(GPT2LMHeadModel, GPT2Config(**config | overrides), seed=seed)


def tiny_bert(*, seed: int = 0, **overrides: Any) -> BertForSequenceClassification:
    """Two layers of width 16 with a classifier of three labels, vocabulary of 64, no dropout."""
    config = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
        "num_labels": 3,
        "pad_token_id": 0,
    }
    return _seeded(BertForSequenceClassification, BertConfig(**config | overrides), seed=seed)


def _seeded(kind: type, config: Any, *, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = kind(config)
    return model.eval()
