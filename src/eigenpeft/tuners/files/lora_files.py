"""A plain LoRA adapter on disk: updates as factors, written as PEFT writes them, whole or not at all."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from eigenpeft.artifacts.atomic import atomic_folder
from eigenpeft.errors import ArtifactError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraUpdate:
    """One weight's factors, in the shapes in which LoRA keeps them.

    Attributes:
        lora_B: (out_features, r), or a 1x1 convolution; (out_features, r * n_blocks) for experts.
        lora_A: (r, in_features), or a convolution to r channels; (n_blocks * r, in_features) for experts.
        scaling: s.
        target: The base model's name of the weight, as LoRA's configuration takes it.
        keys: Of A and B in the adapter's file, without the prefix.
        kind: "module", "parameter", or "inside" for what LoRA adapts along with the module around it.
        n_blocks: Experts of a parameter, or groups of a convolution.
    """

    lora_B: Tensor
    lora_A: Tensor
    scaling: float
    target: str
    keys: tuple[str, str]
    kind: Literal["module", "parameter", "inside"] = "module"
    n_blocks: int = 1

    @property
    def rank(self) -> int:
        """As LoRA's configuration counts it: of one expert."""
        return len(self.lora_A) // (self.n_blocks if self.kind == "parameter" else 1)


def lora_keys(path: str, *, is_embedding: bool) -> tuple[str, str]:
    """Keys of A and B in an adapter's file, without the prefix.

    Args:
        path: Name of the module.
        is_embedding: Whether it is one.
    """
    ends = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    return f"{path}.{ends[0]}", f"{path}.{ends[1]}"


def write_lora(out_dir: Path, updates: Sequence[LoraUpdate], fields: dict[str, Any], others: dict[str, Tensor]) -> None:
    """Write a folder that plain PEFT loads. An adapter that is already there is replaced.

    Args:
        out_dir: Folder to make.
        updates: Factors of every weight.
        fields: Further fields of LoRA's configuration.
        others: Further tensors of the file, by key: heads and biases.

    Raises:
        ArtifactError: If the folder holds something else or cannot be written.
    """
    if out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / CONFIG_NAME).is_file():
        raise ArtifactError(f"{str(out_dir)!r} is not empty and holds no adapter; choose another folder, or empty it.")
    updates = _with_common_rank(updates)
    ranks = {update.target: update.rank for update in updates}
    alphas = {update.target: update.scaling * update.rank for update in updates}
    # The commonest rank and alpha are the config's; modules that differ are listed.
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] (need not be whole: PEFT only divides it by r)
        target_modules=sorted(update.target for update in updates if update.kind == "module"),
        target_parameters=sorted(update.target for update in updates if update.kind == "parameter") or None,
        rank_pattern={_exactly(target): value for target, value in ranks.items() if value != r},
        alpha_pattern={_exactly(target): value for target, value in alphas.items() if value != alpha},
        inference_mode=True,
        **fields,
    )
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in others.items()}
    for update in updates:
        for key, factor in zip(update.keys, (update.lora_A, update.lora_B), strict=True):
            tensors[f"{PREFIX}{key}"] = factor.cpu().contiguous().clone()
    with atomic_folder(out_dir, last=CONFIG_NAME) as scratch, torch.no_grad():
        save_file(tensors, scratch / WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(scratch))


def _with_common_rank(updates: Sequence[LoraUpdate]) -> list[LoraUpdate]:
    """Attention and its output projection, which LoRA gives one rank and alpha, padded with zeros to the larger rank."""
    by_target = {update.target: update for update in updates}
    for inside in updates:
        if inside.kind == "inside":
            around = by_target[inside.target.removesuffix(".out_proj")]
            rank = max(inside.rank, around.rank)
            by_target |= {each.target: _padded(each, rank, around.scaling) for each in (inside, around)}
    return list(by_target.values())


def _padded(update: LoraUpdate, rank: int, scaling: float) -> LoraUpdate:
    missing = rank - update.rank
    lora_A = torch.nn.functional.pad(update.lora_A, (0, 0, 0, missing))
    lora_B = torch.nn.functional.pad(update.lora_B * (update.scaling / scaling), (0, missing))
    return replace(update, lora_A=lora_A, lora_B=lora_B, scaling=scaling)


def _exactly(target: str) -> str:
    # PEFT reads pattern keys as the end of a module's name, so that "0.query" would also be "10.query": anchor them.
    return "^" + target.replace(".", r"\.")
