"""A plain LoRA that goes on from an adapter that exists, such as the nearest to a new task, without its head."""

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from eigenpeft.collection import AdapterCollection
from eigenpeft.collection.opening import some
from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg import Factors
from eigenpeft.subspace import AdapterStore
from eigenpeft.tuners.eigenlora.merged_start import open_adapters
from eigenpeft.tuners.starts.config import StartedLoraConfig, check_rank


def init_lora_from_adapter(
    model: nn.Module,
    *,
    adapters: AdapterCollection | AdapterStore | str | Path,
    name: str | None = None,
    adapter_name: str = "default",
    **lora: Any,
) -> PeftModel:
    """A plain LoRA that starts where one adapter is, in which everything is trained.

    The adapter's updates are taken and its head is not: the new task has another. Of a store that is the member as it lies
    in the bases.

    Args:
        model: Base model, with the new task's head.
        adapters: Collection or store that has the adapter; or folder or Hub id of one.
        name: Which one, such as the first of `eigenpeft.audit.nearest_adapters`; None where there is only one.
        adapter_name: Name of the new adapter.
        **lora: Further fields of `peft.LoraConfig`; r and `lora_alpha` default to the adapter's rank, so that the scaling is 1.

    Returns:
        The adapted model.

    Raises:
        ArtifactError: If a store is damaged.
        AdapterConfigError: If there is no such adapter, r is less than its rank, `lora_alpha` is 0, or the model has none of its
            modules.
        CollectionError: If its files cannot be read.
        SubspaceError: If the tensors of a store's bases do not fit each other.
        TypeError: If `peft.LoraConfig` has no field of a name in `**lora`.
        ValueError: What `peft.LoraConfig` and `get_peft_model` raise, such as for `target_modules` that the model lacks.

    Examples:
        >>> from eigenpeft.demo import base_model, shipped_adapters
        >>> from transformers import AutoModelForSequenceClassification
        >>> base = AutoModelForSequenceClassification.from_pretrained(base_model(), num_labels=8)
        >>> model = init_lora_from_adapter(base, adapters=shipped_adapters() / "cr", task_type="SEQ_CLS")
        >>> model.peft_config["default"].r
        8
    """
    config = lora_config_from_adapter(adapters, name=name, **lora)
    adapted = get_peft_model(model, config, adapter_name=adapter_name)  # pyright: ignore[reportArgumentType]
    assert isinstance(adapted, PeftModel)
    return adapted


def lora_config_from_adapter(
    adapters: AdapterCollection | AdapterStore | str | Path, *, name: str | None = None, **lora: Any
) -> StartedLoraConfig:
    """A `peft.LoraConfig` whose adapter starts where another is, for `get_peft_model` and trainers alike.

    Args:
        adapters: As for `init_lora_from_adapter`.
        name: As for `init_lora_from_adapter`.
        **lora: As for `init_lora_from_adapter`.

    Raises:
        ArtifactError: If a store is damaged.
        AdapterConfigError: If there is no such adapter, r is less than 1, or `lora_alpha` is 0.
        CollectionError: If its files cannot be read.
        SubspaceError: If the tensors of a store's bases do not fit each other.
        TypeError: If `peft.LoraConfig` has no field of a name in `**lora`.
        ValueError: What `peft.LoraConfig` raises for fields that do not go together.

    Examples:
        >>> from eigenpeft.demo import shipped_adapters
        >>> lora_config_from_adapter(shipped_adapters() / "cr", task_type="SEQ_CLS").peft_type.value
        'LORA'
    """
    source = open_adapters(adapters)
    if name is None and len(source) == 1:
        (name,) = source.names
    if name not in source.names:
        raise AdapterConfigError(
            f"name={name!r} is not one of the {len(source)} adapters: {some(source.names, limit=10)}."
        )
    factors = _factors_of(source, name)
    rank = max(len(rows) for _, rows in factors.values())
    settings = {"r": rank, "fan_in_fan_out": _is_transposed(source)} | lora
    check_rank(settings["r"])
    config = StartedLoraConfig(**{"lora_alpha": settings["r"]} | settings)
    if not config.lora_alpha:
        raise AdapterConfigError(
            f"lora_alpha={config.lora_alpha!r} makes every update 0, and the adapter could not start where {name!r} is; pass "
            "another number, or leave it out."
        )
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    config.start = {module: (columns * (1 / scaling), rows) for module, (columns, rows) in factors.items()}
    return config


def _factors_of(source: AdapterCollection | AdapterStore, name: str) -> dict[str, Factors]:
    if isinstance(source, AdapterStore):
        return dict(source.subspace.reconstruct(source[name].cores))
    return {
        module: (read.lora_B, read.lora_A) for module in source.modules for read in source.factors(module, names=[name])
    }


def _is_transposed(source: AdapterCollection | AdapterStore) -> bool:
    if isinstance(source, AdapterStore):
        return bool(source.subspace.info.fan_in_fan_out)
    return any(source.fan_in_fan_out(module) for module in source.modules)
