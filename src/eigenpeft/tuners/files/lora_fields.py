"""What becomes of each of LoRA's options when an adapter is written as a plain LoRA."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from eigenpeft.errors import AdapterConfigError

# Written as they are: the adapter, its heads or the model around it depend on them.
KEPT = (
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "fan_in_fan_out",
    "modules_to_save",
    "bias",
    "lora_bias",
    "lora_dropout",
    "trainable_token_indices",
    "ensure_weight_tying",
    "alora_invocation_tokens",
    "layer_replication",
)
# Said anew, from the factors themselves.
WRITTEN = (
    "peft_type",
    "peft_version",
    "inference_mode",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)
# How the adapter started and was trained, of which the trained tensors are the result.
TRAINING = (
    "init_lora_weights",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
    "velora_config",
    "monteclora_config",
    "megatron_core",
    "qalora_group_size",
    "use_bdlora",  # its blocks are written as matrices with zeros between them
)
# Updates that are not a product of two factors on the model as it is published.
REFUSED = {
    "use_dora": "DoRA, whose update is not a product of two factors",
    "use_qalora": "QALoRA, whose inputs are averaged over groups",
    "kasa_config": "KaSA, which cuts the base model's own weights",
    "arrow_config": "Arrow, which routes every token to adapters of its own",
    "megatron_config": "Megatron's parallel layers",
}
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def kept_fields(model: nn.Module, said: Mapping[str, Any], adapter_name: str) -> dict[str, Any]:
    """The options that a plain LoRA with the same logits keeps.

    Args:
        model: Model with the adapter, as PEFT or transformers made it.
        said: LoRA's options of the adapter, by the name of the field.
        adapter_name: The adapter.

    Raises:
        AdapterConfigError: If an option is set whose update a plain LoRA cannot express, or one that this version does not
            know, by name.
    """
    for name, what in REFUSED.items():
        if said.get(name):
            raise AdapterConfigError(f"{adapter_name!r} uses {what} ({name}); merge it into the base model instead.")
    start = str(said.get("init_lora_weights")).lower()
    if start.startswith(_CHANGE_THE_BASE):
        raise AdapterConfigError(
            f"{adapter_name!r} started with init_lora_weights={said['init_lora_weights']!r}, which changes the base model's own "
            "weights: on the published model its factors mean something else. Write it with PEFT's own "
            "save_pretrained(path_initial_model_for_weight_conversion=...), or merge it into the base model."
        )
    unknown = [field.name for field in fields(LoraConfig) if field.name not in _KNOWN and _is_set(said, field)]
    if unknown:
        raise AdapterConfigError(
            f"{adapter_name!r} sets {', '.join(unknown)}, which this version of eigenpeft does not know and will not lose; leave "
            "it out, or merge the adapter into the base model."
        )
    kept = {name: said[name] for name in KEPT if said.get(name) is not None}
    if kept.get("task_type") is None:
        base = type(model.get_base_model() if isinstance(model, PeftModel) else model)
        kept["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
    return kept


_KNOWN = frozenset((*KEPT, *WRITTEN, *TRAINING, *REFUSED))


def _is_set(said: Mapping[str, Any], field: Any) -> bool:
    value = said.get(field.name)
    default = field.default if field.default is not MISSING else None
    return bool(value) and value != default
