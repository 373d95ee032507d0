"""Checkpoints of the papers' own code as plain LoRA: EigenLoRAx's fork of PEFT, and MoSLoRA's."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from torch import Tensor

from eigenpeft.artifacts.reading import read_json
from eigenpeft.collection.formats.keys import canonical_module
from eigenpeft.collection.formats.settings import LoraSettings, settings_of
from eigenpeft.collection.formats.weights import WeightsFile, open_weights
from eigenpeft.errors import CollectionError
from eigenpeft.tuners.files.lora_files import CONFIG_NAME, LoraUpdate, lora_keys, write_lora

_EIGENLORA = re.compile(
    r"(?P<module>.+)\.eigenlora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<part>components|loadings)"
)
_MOSLORA = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B|AB)(?:\.(?P<adapter>[^.]+))?\.weight")
# What the forks' configurations share with LoRA's of today and an update, a head or a base model depends on.
_KEPT_FIELDS = ("task_type", "base_model_name_or_path", "fan_in_fan_out", "modules_to_save", "bias")

Parts = dict[str, Tensor]


def convert_reference_checkpoint(folder: str | Path, out_dir: str | Path, *, overwrite: bool = False) -> None:
    """Write a checkpoint of the reference repositories as a plain LoRA folder with the same update.

    - EigenLoRAx (`peft_type: EIGENLORA`): `ΔW = (C_B L_B)(C_A L_A)ᵀ` of components C and loadings L; no scaling.
    - MoSLoRA (`lora_use_mixer: true`): `ΔW = α/r · B (W A)` of the factors and the mixer W, saved as `lora_AB`.

    The result loads in plain PEFT, and a folder of such results is a collection. Heads and biases are kept as they are.

    Args:
        folder: `adapter_config.json` and `adapter_model.safetensors` or `.bin`, as the repository's code saved them.
        out_dir: Folder to make.
        overwrite: Whether to replace a plain LoRA adapter that eigenpeft wrote there.

    Raises:
        CollectionError: If the folder is neither kind, or parts are missing, do not fit, or are not finite.
        ArtifactError: If `out_dir` holds something that is not replaced, or cannot be written.

    Examples:
        A checkpoint of the MoSLoRA repository with one adapted module, written here by hand:

        >>> import json
        >>> import torch
        >>> from eigenpeft.tuners import convert_reference_checkpoint
        >>> from safetensors.torch import load, save_file
        >>> Path("moslora").mkdir()
        >>> config = {"peft_type": "LORA", "lora_use_mixer": True, "r": 2, "lora_alpha": 4, "target_modules": ["query"]}
        >>> _ = Path("moslora", "adapter_config.json").write_text(json.dumps(config))
        >>> parts = {"lora_A": torch.ones(2, 8), "lora_AB": torch.eye(2), "lora_B": torch.ones(6, 2)}
        >>> tensors = {f"base_model.model.query.{part}.weight": tensor for part, tensor in parts.items()}
        >>> save_file(tensors, "moslora/adapter_model.safetensors")
        >>> convert_reference_checkpoint("moslora", "plain-lora")
        >>> sorted(load(Path("plain-lora/adapter_model.safetensors").read_bytes()))
        ['base_model.model.query.lora_A.weight', 'base_model.model.query.lora_B.weight']
    """
    folder = Path(folder)
    try:
        config = read_json(folder / CONFIG_NAME)
        weights = open_weights(folder)
    except (OSError, ValueError) as error:
        raise CollectionError(
            [
                f"{str(folder)!r} is not an adapter folder: {error}. Pass the folder that has {CONFIG_NAME} and the weights."
            ]
        ) from error
    if not isinstance(config, Mapping):
        raise CollectionError([f"{str(folder)!r} has a {CONFIG_NAME} that is not a JSON object; get a fresh copy."])
    is_eigenlora = config.get("peft_type") == "EIGENLORA"
    if not is_eigenlora and not config.get("lora_use_mixer"):
        raise CollectionError(
            [
                f"{str(folder)!r} has peft_type {config.get('peft_type')!r} and no lora_use_mixer; only 'EIGENLORA' "
                "checkpoints of the EigenLoRAx repository and 'LORA' ones of the MoSLoRA repository with lora_use_mixer are "
                "converted. A plain LoRA needs no conversion."
            ]
        )
    if config.get("task_type") not in (None, *(kind.value for kind in TaskType)):
        raise CollectionError(
            [
                f"{str(folder)!r} has task_type {config['task_type']!r:.60}; PEFT knows "
                f"{', '.join(kind.value for kind in TaskType)}, or null."
            ]
        )
    try:
        modules, others = _parts(weights, _EIGENLORA if is_eigenlora else _MOSLORA)
        if is_eigenlora:
            updates = [_update(name, *_eigenlora_factors(parts), 1.0) for name, parts in modules.items()]
        else:
            settings, problems = settings_of(dict(config))
            if settings is None:
                raise ValueError("; it ".join(problems))
            updates = [_moslora_update(name, parts, settings) for name, parts in modules.items()]
    except (KeyError, ValueError, RuntimeError) as error:
        message = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CollectionError([f"{str(folder)!r} cannot be converted: it {message}."]) from error
    fields: dict[str, Any] = {field: config[field] for field in _KEPT_FIELDS if config.get(field) is not None}
    write_lora(Path(out_dir), updates=updates, fields=fields, others=others, overwrite=overwrite, inputs=(folder,))


def _parts(weights: WeightsFile, pattern: re.Pattern[str]) -> tuple[dict[str, Parts], Parts]:
    """Module to its tensors by name, "A.components" or "AB", and everything that belongs to none."""
    modules: dict[str, Parts] = {}
    others: Parts = {}
    adapters: set[str | None] = set()
    for key in weights.shapes:
        tensor = weights.read(key)
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"has NaN or Inf in {key!r}")
        found = pattern.fullmatch(key)
        if found is None:
            others[key] = tensor
            continue
        adapters.add(found["adapter"])
        part = ".".join(found[name] for name in ("side", "part") if name in found.groupdict())
        modules.setdefault(canonical_module(found["module"]), {})[part] = tensor.float()
    if len(adapters) > 1:
        raise ValueError(
            f"holds several adapters, {', '.join(sorted(map(str, adapters)))}; save each in a folder of its own"
        )
    if not modules:
        raise ValueError(f"has none of the tensors of its kind among {len(weights.shapes)}")
    return modules, others


def _eigenlora_factors(parts: Parts) -> tuple[Tensor, Tensor]:
    if "A.loadings" not in parts or "B.loadings" not in parts:
        raise ValueError(
            "has components but no loadings: that is where training starts and no adapter. Fit the same subspace with "
            "`eigenpeft build --method eigenlorax --n-pseudo-components 32`"
        )
    lora_A = (parts["A.components"] @ parts["A.loadings"]).mT
    return parts["B.components"] @ parts["B.loadings"], lora_A


def _moslora_update(module: str, parts: Parts, settings: LoraSettings) -> LoraUpdate:
    rank = settings.rank_of(module)
    if len(parts["A"]) != rank:
        raise ValueError(
            f"has factors of rank {len(parts['A'])} for {module!r} and rank {rank} in its config, so that its scaling is unknown"
        )
    return _update(module, parts["B"], parts["AB"] @ parts["A"], settings.scaling_of(module))


def _update(module: str, lora_B: Tensor, lora_A: Tensor, scaling: float) -> LoraUpdate:
    if lora_B.ndim != 2 or lora_A.ndim != 2 or lora_B.shape[1] != len(lora_A):
        raise ValueError(
            f"has factors of shapes {tuple(lora_B.shape)} and {tuple(lora_A.shape)} for {module!r}, which do not fit"
        )
    return LoraUpdate(lora_B, lora_A, scaling, module, lora_keys(module, is_embedding=False))
