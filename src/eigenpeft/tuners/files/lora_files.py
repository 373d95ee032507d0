"""A plain LoRA adapter on disk: updates as factors, written as PEFT writes them, whole or not at all."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from safetensors import numpy as numpy_files
from safetensors import torch as torch_files
from torch import Tensor

from eigenpeft.artifacts.atomic import atomic_folder

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
MERGE_REPORT = "merge_report.json"  # beside an adapter that `eigenpeft merge` wrote
KIND = "plain LoRA adapter"
PREFIX = "base_model.model."
_METADATA = {"format": "pt"}
_IN_NUMPY = {torch.float32, torch.float64, torch.float16}
_CARD_HEADING = "## Rank and scaling"
_CARD_SECTION = """{heading}

An ordinary LoRA adapter with one rank, {r}, and one `lora_alpha`, {alpha:g}, in all of its {n_modules} modules: the update of a
weight is `{scaling:g} * B @ A`. Software that knows one rank and one alpha for a whole adapter (vLLM, SGLang, llama.cpp) applies
the same update as PEFT.{how}
"""


@dataclass(frozen=True)
class LoraUpdate:
    """One weight's factors, in the shapes in which LoRA keeps them.

    Attributes:
        lora_B: (out_features, r), or a 1x1 convolution; (out_features, r * n_blocks) for experts.
        lora_A: (r, in_features), or a convolution to r channels; (n_blocks * r, in_features) for experts.
        scaling: s.
        target: The base model's name of the weight, as LoRA's configuration takes it.
        keys: Keys of A and B in the adapter's file, without the prefix.
        kind: "module", "parameter", or "nested" for what LoRA adapts along with the module around it.
        n_blocks: Experts of a parameter, or groups of a convolution.
        bias: (out_features,) that the scaling multiplies with B A x, or None (`lora_bias`).
    """

    lora_B: Tensor
    lora_A: Tensor
    scaling: float
    target: str
    keys: tuple[str, str]
    kind: Literal["module", "parameter", "nested"] = "module"
    n_blocks: int = 1
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """As LoRA's configuration counts it: of one expert."""
        return self.lora_A.shape[0] // (self.n_blocks if self.kind == "parameter" else 1)


def lora_keys(path: str, *, is_embedding: bool) -> tuple[str, str]:
    """Keys of A and B in an adapter's file, without the prefix.

    Args:
        path: Name of the module.
        is_embedding: Whether it is one.
    """
    ends = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    return f"{path}.{ends[0]}", f"{path}.{ends[1]}"


def write_lora(
    out_dir: Path,
    *,
    updates: Sequence[LoraUpdate],
    fields: dict[str, Any],
    others: dict[str, Tensor],
    rank: int | None = None,
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    inputs: Sequence[str | Path] = (),
) -> None:
    """Write a folder that plain PEFT loads; whole or not at all.

    All modules get one rank and one alpha (`with_one_rank_and_alpha`), and README.md says so; what else a README.md that is
    already there says is kept.

    Args:
        out_dir: Folder to make.
        updates: Factors of every weight.
        fields: Further fields of LoRA's configuration.
        others: Further tensors of the file, by key: heads and biases.
        rank: Rank to pad to; None takes the largest of the updates.
        files: Further files, by path inside the folder; a README.md among them takes the place of one that is there.
        overwrite: Whether to replace a plain LoRA adapter that eigenpeft wrote; one that was trained is never replaced.
        inputs: Paths that were read; the folder must not be one of them or lie inside one.

    Raises:
        ArtifactError: If the folder holds something that is not replaced, or cannot be written.
    """
    writing = atomic_folder(out_dir, kind=KIND, overwrite=overwrite, inputs=inputs, carried=[CARD_NAME])
    with writing as scratch:
        fill_lora_folder(scratch, updates=updates, fields=fields, others=others, rank=rank)
        for name, content in (files or {}).items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(content)
        there = scratch if CARD_NAME in (files or {}) else out_dir
        (scratch / CARD_NAME).write_text(_card(there, updates, rank=rank), encoding="utf-8")


def fill_lora_folder(
    folder: Path,
    *,
    updates: Sequence[LoraUpdate],
    fields: dict[str, Any],
    others: dict[str, Tensor],
    rank: int | None = None,
) -> None:
    """Write the two files that PEFT reads into a folder that is not in place yet; `write_lora` does the rest.

    Args:
        folder: An existing folder.
        updates: Factors of every weight.
        fields: Further fields of LoRA's configuration.
        others: Further tensors of the file, by key: heads and biases.
        rank: Rank to pad to; None takes the largest of the updates.
    """
    updates = with_one_rank_and_alpha(updates, rank=rank)
    r = max((update.rank for update in updates), default=1)
    scaling = updates[0].scaling if updates else 1.0
    in_full = sorted(update.target for update in updates if update.kind == "module")
    settings: dict[str, Any] = {"target_modules": in_full, **fields}
    config = LoraConfig(
        r=r,
        lora_alpha=scaling * r,  # pyright: ignore[reportArgumentType] (need not be whole: PEFT only divides it by r)
        target_parameters=sorted(update.target for update in updates if update.kind == "parameter") or None,
        inference_mode=True,
        **settings,
    )
    tensors = dict(others)
    for update in updates:
        for key, factor in zip(update.keys, (update.lora_A, update.lora_B), strict=True):
            tensors[f"{PREFIX}{key}"] = factor
        if update.bias is not None:
            tensors[f"{PREFIX}{update.keys[1].removesuffix('weight')}bias"] = update.bias
    _save(tensors, folder / WEIGHTS_NAME)
    config.save_pretrained(str(folder))


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    owned = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}  # the writers ignore strides
    if all(tensor.dtype in _IN_NUMPY for tensor in owned.values()):
        # For hundreds of small tensors in a third of the time, and without the copies that shared memory needs.
        numpy_files.save_file({key: tensor.numpy() for key, tensor in owned.items()}, path, metadata=_METADATA)
    else:
        torch_files.save_file({key: tensor.clone() for key, tensor in owned.items()}, path, metadata=_METADATA)


def with_one_rank_and_alpha(updates: Sequence[LoraUpdate], *, rank: int | None = None) -> list[LoraUpdate]:
    """The same updates at one rank and one scaling: smaller ranks are padded with zeros, other scalings folded into B.

    PEFT reads a rank and an alpha of every module (`rank_pattern`, `alpha_pattern`). llama.cpp divides the one alpha of the
    file by the rank of each tensor, and older versions of vLLM apply `lora_alpha / r` of the config to all modules: both
    are right only when the whole adapter has one rank and one alpha. Updates that agree already are returned unchanged.

    Args:
        updates: Updates of one adapter.
        rank: Rank to pad to, at least the largest; None takes the largest.

    Examples:
        >>> import torch
        >>> first = LoraUpdate(torch.ones(3, 2), torch.ones(2, 4), 2.0, "a", ("a.lora_A.weight", "a.lora_B.weight"))
        >>> second = LoraUpdate(torch.ones(3, 1), torch.ones(1, 4), 4.0, "b", ("b.lora_A.weight", "b.lora_B.weight"))
        >>> [(update.rank, update.scaling) for update in with_one_rank_and_alpha([first, second])]
        [(2, 2.0), (2, 2.0)]
    """
    ranks, scalings = {update.rank for update in updates}, Counter(update.scaling for update in updates)
    if rank is not None:
        ranks.add(rank)
    if len(ranks) <= 1 and len(scalings) <= 1:
        return list(updates)
    # PEFT gives each group of a convolution an equal part of the rank.
    multiple = lcm(*(update.n_blocks for update in updates if update.kind != "parameter"))
    common = max(ranks) if len(ranks) == 1 else -(-max(ranks) // multiple) * multiple
    nonzero = Counter({scaling: count for scaling, count in scalings.items() if scaling})
    scaling = (nonzero or scalings).most_common(1)[0][0]
    return [_padded(update, common, scaling) for update in updates]


def _padded(update: LoraUpdate, rank: int, scaling: float) -> LoraUpdate:
    lora_A, lora_B, bias = update.lora_A, update.lora_B, update.bias
    if update.scaling != scaling:
        # In float32 or better: 16 bits would round the product.
        lora_B = lora_B.to(torch.promote_types(lora_B.dtype, torch.float32)) * (update.scaling / scaling)
        bias = None if bias is None else bias.to(lora_B.dtype) * (update.scaling / scaling)
    if update.rank != rank:
        # A holds its experts or groups one after the other. B holds the experts of each rank one after the other, and the
        # share of the rank that one group of a convolution sees.
        experts = update.n_blocks if update.kind == "parameter" else 1
        by_block = lora_A.reshape(update.n_blocks, -1, *lora_A.shape[1:])
        share = rank if update.kind == "parameter" else rank // update.n_blocks
        lora_A = _with_zeros(by_block, 1, share).reshape(-1, *lora_A.shape[1:])
        lora_B = _with_zeros(lora_B, 1, share * experts)
    return replace(update, lora_A=lora_A, lora_B=lora_B, bias=bias, scaling=scaling)


def _with_zeros(tensor: Tensor, axis: int, size: int) -> Tensor:
    missing = list(tensor.shape)
    missing[axis] = size - tensor.shape[axis]
    return torch.cat((tensor, tensor.new_zeros(missing)), dim=axis)


def _card(folder: Path, given: Sequence[LoraUpdate], *, rank: int | None) -> str:
    """README.md of the folder: what is there, with the section on rank and scaling added or brought up to date."""
    written = with_one_rank_and_alpha(given, rank=rank)
    r = max((update.rank for update in written), default=1)
    scaling = written[0].scaling if written else 1.0
    path = folder / CARD_NAME
    there = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    before, _, old = there.partition(_CARD_HEADING)
    after = old[old.index("\n## ") + 1 :] if "\n## " in old else ""
    how = ""
    if any(update.rank != r or update.scaling != scaling for update in given):
        how = " Smaller ranks are padded with zeros, and scalings that differ are folded into B."
    section = _CARD_SECTION.format(
        heading=_CARD_HEADING, r=r, alpha=r * scaling, n_modules=len(given), scaling=scaling, how=how
    )
    return "\n".join(f"{part.strip()}\n" for part in (before, section, after) if part.strip())
