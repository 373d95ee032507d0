"""Any of our adapters as an ordinary LoRA adapter that needs no eigenpeft to load."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, ParamWrapper
from safetensors.torch import save_file
from torch import Tensor

from eigenpeft.atomic import atomic_folder
from eigenpeft.errors import AdapterConfigError, ArtifactError
from eigenpeft.linalg.factored import truncate
from eigenpeft.subspace import CoefficientStore
from eigenpeft.tuners.convolution_factors import is_convolution
from eigenpeft.tuners.swapping import factor_dicts, weight_name

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_INSIDE_ATTENTION = ".base_layer.out_proj"  # where LoRA keeps the layer of an attention's output projection
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
    size of a weight is formed. Trained heads and biases of a model are written too. Linear layers, embeddings,
    convolutions, attention and parameters (`target_parameters`) are all written as LoRA keeps them.

    Args:
        model_or_store: A PEFT model with the adapter, or a store with it as a member.
        out_dir: Folder to make. An adapter that is already there is replaced.
        adapter_name: Which adapter.
        rank: Truncate each update to this rank, in the least Frobenius error; None keeps it exact.

    Raises:
        AdapterConfigError: If there is no such adapter, it is DoRA, `rank` is not positive, or is asked of a layer with
            several experts or groups.
        ArtifactError: If the folder holds something else or cannot be written.
    """
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise AdapterConfigError(f"rank={rank!r} must be None or a whole number of at least 1.")
    out_dir = Path(out_dir)
    if out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / _CONFIG).is_file():
        raise ArtifactError(f"{str(out_dir)!r} is not empty and holds no adapter; choose another folder, or empty it.")
    read = _from_store if isinstance(model_or_store, CoefficientStore) else _from_model
    updates, fields, others = read(model_or_store, adapter_name)  # pyright: ignore[reportArgumentType]
    if rank is not None:
        updates = [_truncated(update, rank) for update in updates]
    _write(out_dir, updates, fields, others)


@dataclass(frozen=True)
class _Update:
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


Contents = tuple[list[_Update], dict[str, Any], dict[str, Tensor]]
"""Updates, fields of LoRA's configuration, and further tensors of the adapter's file by key."""


def _from_store(store: CoefficientStore, name: str) -> Contents:
    member = store.member(name)
    updates = [
        _Update(*pair, 1.0, module, _keys(module, is_embedding=module in store.subspace.info.embeddings))
        for module in store.subspace
        if (pair := store.factors(name, module)) is not None
    ]
    base = member.get("base_model") or store.subspace.info.base_model_name_or_path
    transposed = any(update.target in store.subspace.info.fan_in_fan_out for update in updates)
    fields = {"task_type": member.get("task_type"), "base_model_name_or_path": base, "fan_in_fan_out": transposed}
    return updates, fields, {}


def _from_model(model: PeftModel, name: str) -> Contents:
    configs = getattr(model, "peft_config", {})
    if name not in configs:
        raise AdapterConfigError(
            f"adapter_name={name!r} is not in the model; it has {', '.join(map(repr, configs)) or 'none'}."
        )
    config = configs[name]
    if getattr(config, "use_dora", False):
        raise AdapterConfigError(f"{name!r} uses DoRA, whose update is no product of two factors; merge it instead.")
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    updates = [
        _update(path.removeprefix(_PREFIX), layer, name)
        for path, layer in layers.items()
        if name in factor_dicts(layer)[0]
    ]
    if not updates:
        raise AdapterConfigError(f"{name!r} adapts no layer of the model; there is nothing to export.")
    own = tuple(f"{path}.lora_" for path in layers)
    state = get_peft_model_state_dict(model, adapter_name=name)
    others = {key: value for key, value in state.items() if not key.startswith(own)}
    fields = {field: getattr(config, field) for field in _KEPT_FIELDS}
    return updates, fields, others


def _update(path: str, layer: Any, name: str) -> _Update:
    lora_A, lora_B = (getattr(factors[name], "weight", factors[name]).detach() for factors in factor_dicts(layer))
    kind, n_blocks, base = "module", 1, layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        kind, n_blocks = "parameter", layer.num_experts
    elif is_convolution(base):
        n_blocks = base.groups
    elif path.endswith(_INSIDE_ATTENTION):
        kind = "inside"
    keys = _keys(path, is_embedding=isinstance(layer, Embedding))
    scaling = float(layer.scaling[name])
    return _Update(lora_B, lora_A, scaling, weight_name(path, layer), keys, kind=kind, n_blocks=n_blocks)


def _keys(path: str, *, is_embedding: bool) -> tuple[str, str]:
    ends = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    return f"{path}.{ends[0]}", f"{path}.{ends[1]}"


def _truncated(update: _Update, rank: int) -> _Update:
    if update.n_blocks > 1:
        what = "experts" if update.kind == "parameter" else "groups"
        raise AdapterConfigError(
            f"rank={rank}: {update.target!r} has {update.n_blocks} {what}, whose updates cannot be truncated together; "
            "leave rank out."
        )
    lora_B, lora_A = update.lora_B.float(), update.lora_A.float()
    smaller_B, smaller_A = truncate(lora_B.flatten(1), lora_A.flatten(1), rank=min(rank, len(lora_A)))
    kernels = (side.shape[2:] for side in (lora_B, lora_A))
    smaller_B, smaller_A = smaller_B.view(*smaller_B.shape, *next(kernels)), smaller_A.view(-1, *lora_A.shape[1:])
    return replace(update, lora_B=smaller_B, lora_A=smaller_A)


def _write(out_dir: Path, updates: Sequence[_Update], fields: dict[str, Any], others: dict[str, Tensor]) -> None:
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
            tensors[f"{_PREFIX}{key}"] = factor.cpu().contiguous().clone()
    with atomic_folder(out_dir, last=_CONFIG) as scratch, torch.no_grad():
        save_file(tensors, scratch / _WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(scratch))


def _with_common_rank(updates: Sequence[_Update]) -> list[_Update]:
    """Attention and its output projection, which LoRA gives one rank and alpha, padded with zeros to the larger rank."""
    by_target = {update.target: update for update in updates}
    for inside in updates:
        if inside.kind == "inside":
            around = by_target[inside.target.removesuffix(".out_proj")]
            rank = max(inside.rank, around.rank)
            by_target |= {each.target: _padded(each, rank, around.scaling) for each in (inside, around)}
    return list(by_target.values())


def _padded(update: _Update, rank: int, scaling: float) -> _Update:
    missing = rank - update.rank
    lora_A = torch.nn.functional.pad(update.lora_A, (0, 0, 0, missing))
    lora_B = torch.nn.functional.pad(update.lora_B * (update.scaling / scaling), (0, missing))
    return replace(update, lora_A=lora_A, lora_B=lora_B, scaling=scaling)


def _exactly(target: str) -> str:
    # PEFT reads pattern keys as the end of a module's name, so that "0.query" would also be "10.query": anchor them.
    return "^" + target.replace(".", r"\.")
