"""Any of our adapters as an ordinary LoRA adapter that needs no eigenpeft to load."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from eigenpeft.atomic import atomic_folder
from eigenpeft.errors import AdapterConfigError, ArtifactError
from eigenpeft.linalg.factored import truncate
from eigenpeft.subspace import CoefficientStore

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEPT_FIELDS = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "fan_in_fan_out",
    "modules_to_save",
    "bias",
    "lora_dropout",
)


def export_lora(
    model_or_store: PeftModel | CoefficientStore,
    out_dir: str | Path,
    *,
    adapter_name: str = "default",
    rank: int | None = None,
) -> None:
    """Write one adapter as a plain LoRA folder: `A = C_in V_in`, `B = V_outᵀ C_out` (or `B M` for MoSLoRA).

    Exact at the adapter's own rank (the number of components for the cores "mixer" and "diagonal"). No matrix of the
    size of a weight is formed. Trained heads and biases of a model are written too.

    Args:
        model_or_store: A PEFT model with the adapter, or a store with it as a member.
        out_dir: Folder to make. An adapter that is already there is replaced.
        adapter_name: Which adapter.
        rank: Truncate each update to this rank, in the least Frobenius error; None keeps it exact.

    Raises:
        AdapterConfigError: If there is no such adapter, it is DoRA, or `rank` is not positive.
        ArtifactError: If the folder holds something else or cannot be written.
    """
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise AdapterConfigError(f"rank={rank!r} must be None or a whole number of at least 1.")
    out_dir = Path(out_dir)
    if out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / _CONFIG).is_file():
        raise ArtifactError(f"{str(out_dir)!r} is not empty and holds no adapter; choose another folder, or empty it.")
    if isinstance(model_or_store, CoefficientStore):
        factors, fields, others = _from_store(model_or_store, adapter_name)
    else:
        factors, fields, others = _from_model(model_or_store, adapter_name)
    if rank is not None:
        factors = {
            name: (*truncate(lora_B.float(), lora_A.float(), rank=min(rank, len(lora_A))), scaling)
            for name, (lora_B, lora_A, scaling) in factors.items()
        }
    _write(out_dir, factors, fields, others)


Updates = dict[str, tuple[Tensor, Tensor, float]]
"""`(lora_B, lora_A, scaling)` by module name."""


def _from_store(store: CoefficientStore, name: str) -> tuple[Updates, dict[str, Any], dict[str, Tensor]]:
    member = store.member(name)
    updates = {module: (*pair, 1.0) for module in store.subspace if (pair := store.factors(name, module)) is not None}
    base = member.get("base_model") or store.subspace.info.base_model_name_or_path
    transposed = any(module in store.subspace.info.fan_in_fan_out for module in updates)
    fields = {"task_type": member.get("task_type"), "base_model_name_or_path": base, "fan_in_fan_out": transposed}
    return updates, fields, {}


def _from_model(model: PeftModel, name: str) -> tuple[Updates, dict[str, Any], dict[str, Tensor]]:
    configs = getattr(model, "peft_config", {})
    if name not in configs:
        raise AdapterConfigError(
            f"adapter_name={name!r} is not in the model; it has {', '.join(map(repr, configs)) or 'none'}."
        )
    config = configs[name]
    if getattr(config, "use_dora", False):
        raise AdapterConfigError(f"{name!r} uses DoRA, whose update is no product of two factors; merge it instead.")
    updates = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            lora_A, lora_B = (_weight(factors[name]) for factors in (layer.lora_A, layer.lora_B))
            if lora_A.ndim != 2:
                raise AdapterConfigError(f"{path!r} is a convolution; export_lora writes linear layers. Merge it.")
            updates[path.removeprefix(_PREFIX)] = (lora_B, lora_A, float(layer.scaling[name]))
    if not updates:
        raise AdapterConfigError(f"{name!r} adapts no linear layer of the model; there is nothing to export.")
    own = tuple(f"{_PREFIX}{module}.lora_" for module in updates)
    state = get_peft_model_state_dict(model, adapter_name=name)
    others = {key: value for key, value in state.items() if not key.startswith(own)}
    fields = {field: getattr(config, field) for field in _KEPT_FIELDS}
    return updates, fields, others


def _write(out_dir: Path, updates: Updates, fields: dict[str, Any], others: dict[str, Tensor]) -> None:
    ranks = {module: len(lora_A) for module, (_, lora_A, _) in updates.items()}
    alphas = {module: scaling * ranks[module] for module, (_, _, scaling) in updates.items()}
    # The commonest rank and alpha are the config's; modules that differ are listed.
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] (need not be whole: PEFT only divides it by r)
        target_modules=sorted(updates),
        rank_pattern={_exactly(module): value for module, value in ranks.items() if value != r},
        alpha_pattern={_exactly(module): value for module, value in alphas.items() if value != alpha},
        inference_mode=True,
        **fields,
    )
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in others.items()}
    for module, (lora_B, lora_A, _) in updates.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = lora_A.cpu().contiguous().clone()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = lora_B.cpu().contiguous().clone()
    with atomic_folder(out_dir, last=_CONFIG) as scratch, torch.no_grad():
        save_file(tensors, scratch / _WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(scratch))


def _weight(factor: Any) -> Tensor:
    return factor.weight.detach()


def _exactly(module: str) -> str:
    # PEFT reads pattern keys as the end of a module's name, so that "0.query" would also be "10.query": anchor them.
    return "^" + module.replace(".", r"\.")
