"""Any of our adapters as an ordinary LoRA adapter that needs no eigenpeft to load."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from eigenpeft.collection.formats.keys import without_wrappers
from eigenpeft.collection.formats.labels import LABELS_NAME, label_file, label_names
from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg.factored import truncate
from eigenpeft.subspace import AdapterStore
from eigenpeft.tuners.files.base_start import start_of, with_start
from eigenpeft.tuners.files.lora_fields import kept_fields
from eigenpeft.tuners.files.lora_files import PREFIX, LoraUpdate, lora_keys, write_lora
from eigenpeft.tuners.files.store_export import contents_of_member
from eigenpeft.tuners.host.target_names import strays
from eigenpeft.tuners.layers.blocks import dense_weight
from eigenpeft.tuners.layers.kinds import factor_dicts, kind_of, weight_name

_INSIDE_ATTENTION = ".base_layer.out_proj"  # where LoRA keeps the layer of an attention's output projection


def export_lora(
    model_or_store: PeftModel | AdapterStore,
    out_dir: str | Path,
    *,
    adapter_name: str = "default",
    rank: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write one adapter as a plain LoRA folder: `A = C_in V_in`, `B = V_outᵀ C_out` (or `B M` for MoSLoRA).

    lora_A is (r, in_features) and lora_B (out_features, r); see EigenLoRAx, arXiv 2502.04700, section 3, and MoSLoRA,
    arXiv 2406.11909, equation 3. Exact at the adapter's own rank (the number of components for the cores "full",
    "diagonal" and "mixture"), to which comes that of the merge that the adapter started at (`init_from`,
    `eigenpeft.combining.merged_start`). No matrix of the size of a weight is formed. What else was trained is written
    too: heads, biases (`bias`, `lora_bias`) and tokens (`trainable_token_indices`). Linear layers, embeddings,
    convolutions, attention and parameters (`target_parameters`) are all written as LoRA keeps them.

    Args:
        model_or_store: A PEFT model with the adapter, also one that torch.compile, DistributedDataParallel or accelerate has
            wrapped, or a store with it as a member.
        out_dir: Folder to make.
        adapter_name: Which adapter.
        rank: Truncate each update to this rank, in the least Frobenius error; None keeps it exact.
        overwrite: Whether to replace a plain LoRA adapter that eigenpeft wrote there. An adapter that was trained or
            downloaded is never replaced: an export can be a lossy copy of it.

    Raises:
        AdapterConfigError: If there is no such adapter or it adapts no layer, a plain LoRA cannot express it (DoRA and others,
            by name), `rank` is not positive, or is asked of a layer with several experts or groups.
        ArtifactError: If the folder holds something that is not replaced, or cannot be written; or if a member cannot be read.
        KeyError: If the store has no member `adapter_name`.

    Examples:
        >>> import torch
        >>> from eigenpeft.subspace import ModuleSubspace, PrincipalSubspace
        >>> ones = torch.ones(2)
        >>> spectra = {"singular_values_in": ones, "singular_values_out": ones, "explained_variance_ratio": ones / 2}
        >>> bank = ModuleSubspace(torch.eye(2, 4), torch.eye(2, 3), **spectra)
        >>> from peft import get_peft_model
        >>> from eigenpeft import EigenLoraConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> model = get_peft_model(base, EigenLoraConfig(subspace=PrincipalSubspace({"0": bank}), r=2))
        >>> export_lora(model, "plain-lora")
        >>> sorted(path.name for path in Path("plain-lora").glob("adapter*"))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    updates, fields, others = read_adapter(model_or_store, adapter_name, rank=rank)
    origin = model_or_store.origin if isinstance(model_or_store, AdapterStore) else None
    inputs = () if origin is None else (origin,)
    labels = _labels(model_or_store, adapter_name, fields.get("task_type"))
    files = {LABELS_NAME: label_file(labels)} if labels else None
    write_lora(
        Path(out_dir), updates=updates, fields=fields, others=others, files=files, overwrite=overwrite, inputs=inputs
    )


Contents = tuple[list[LoraUpdate], dict[str, Any], dict[str, Tensor]]
"""Updates, fields of LoRA's configuration, and further tensors of the adapter's file by key."""


def read_adapter(model_or_store: PeftModel | AdapterStore, adapter_name: str, *, rank: int | None) -> Contents:
    """What an exported file of one adapter holds, in whichever format it is written.

    Args:
        model_or_store: A PEFT model with the adapter, or a store with it as a member.
        adapter_name: Which adapter.
        rank: Truncate each update to this rank, in the least Frobenius error; None keeps it exact.

    Raises:
        AdapterConfigError: If there is no such adapter or it adapts no layer, a plain LoRA cannot express it (DoRA and others,
            by name), `rank` is not positive, or is asked of a layer with several experts or groups.
        KeyError: If the store has no member `adapter_name`.
        ArtifactError: If a member cannot be read.
    """
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise AdapterConfigError(f"rank={rank!r} must be None or a whole number of at least 1.")
    read = contents_of_member if isinstance(model_or_store, AdapterStore) else contents_of_model
    updates, fields, others = read(model_or_store, adapter_name)  # pyright: ignore[reportArgumentType]
    if rank is not None:
        updates = [_truncated(update, rank) for update in updates]
    return updates, fields, others


def contents_of_model(model: nn.Module, name: str) -> Contents:
    """What a model has of one adapter: its updates as factors, its configuration's fields, its other trained tensors.

    Args:
        model: A PEFT model, or one that torch.compile, DistributedDataParallel or accelerate has wrapped.
        name: The adapter.

    Raises:
        AdapterConfigError: If there is no such adapter, a plain LoRA cannot express it, or it adapts nothing.
    """
    inner: Any = _unwrapped(model)
    configs = getattr(inner, "peft_config", {})
    if name not in configs:
        raise AdapterConfigError(
            f"adapter_name={name!r} is not in the model; it has {', '.join(map(repr, configs)) or 'none'}."
        )
    fields = kept_fields(inner, vars(configs[name]), name)
    layers = {path: layer for path, layer in inner.named_modules() if isinstance(layer, LoraLayer)}
    updates = [
        _update(without_wrappers(path).removeprefix(PREFIX), layer, name)
        for path, layer in layers.items()
        if name in factor_dicts(layer)[0]
    ]
    if not updates:
        raise AdapterConfigError(
            f"{name!r} adapts no layer of the model, so that there is nothing to export. The model has the adapters "
            f"{', '.join(map(repr, configs))}: name one that adapts a layer."
        )
    base = inner.get_base_model() if isinstance(inner, PeftModel) else inner
    start = start_of(base)
    if start is not None:
        updates = with_start(updates, start)
    fields["exclude_modules"] = strays(base, {update.target for update in updates if update.kind == "module"}) or None
    own = tuple(f"{path}.lora_" for path in layers)
    state = get_peft_model_state_dict(inner, adapter_name=name)
    others = {
        # A model that transformers adapted itself has the base model's own names.
        PREFIX + without_wrappers(key).removeprefix(PREFIX): value
        for key, value in state.items()
        if not key.startswith(own)
    }
    return updates, fields, others


def _labels(model_or_store: Any, name: str, task: Any) -> list[str] | None:
    """Names of a classifier's labels, where they are known."""
    if isinstance(model_or_store, AdapterStore):
        found = model_or_store[name].record.get("labels")
        return found if isinstance(found, list) else None
    is_classifier = getattr(task, "value", task) in ("SEQ_CLS", "TOKEN_CLS")
    return label_names(getattr(_unwrapped(model_or_store), "config", None)) if is_classifier else None


def _unwrapped(model: nn.Module) -> nn.Module:
    """The PEFT model inside what torch.compile, DistributedDataParallel, DeepSpeed or accelerate put around it."""
    while not hasattr(model, "peft_config"):
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _update(path: str, layer: Any, name: str) -> LoraUpdate:
    lora_A, lora_B = (dense_weight(factors[name]).detach() for factors in factor_dicts(layer))
    kind = kind_of(layer)
    target = "parameter" if kind.is_parameter else "nested" if path.endswith(_INSIDE_ATTENTION) else "module"
    keys = lora_keys(path, is_embedding=kind.name == "embedding")
    bias = getattr(factor_dicts(layer)[1][name], "bias", None)
    return LoraUpdate(
        lora_B,
        lora_A,
        float(layer.scaling[name]),
        weight_name(path, layer),
        keys,
        kind=target,
        n_blocks=kind.n_blocks(layer),
        bias=None if bias is None else bias.detach(),
    )


def _truncated(update: LoraUpdate, rank: int) -> LoraUpdate:
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
