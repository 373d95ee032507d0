"""Settle a factor module that was put in the place of LoRA's own: device, dtype, trainability, DoRA's magnitude."""

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from eigenpeft.errors import AdapterConfigError


def tuned_layer(parent: nn.Module, target_name: str) -> LoraLayer:
    """The LoRA layer that PEFT has just put in place of a module.

    Args:
        parent: Module that holds it.
        target_name: Its attribute there.

    Raises:
        AdapterConfigError: If it is no LoRA layer that our methods know.
    """
    layer = getattr(parent, target_name)
    if not isinstance(layer, LoraLayer):
        raise AdapterConfigError(
            f"{target_name!r} became a {type(layer).__name__}, which is not one of PEFT's LoRA layers; exclude it."
        )
    return layer


def settle(layer: LoraLayer, adapter_name: str, *, config: LoraConfig, active_adapters: Sequence[str]) -> None:
    """Finish what `LoraLayer.update_layer` does, now for the swapped factor modules.

    Args:
        layer: LoRA layer.
        adapter_name: Adapter whose factors were swapped.
        config: Its configuration.
        active_adapters: Those of the whole model: an adapter added to others is not trainable until it is activated.
    """
    layer._move_adapter_to_device_of_base_layer(adapter_name)
    variant: Any = layer.lora_variant.get(adapter_name)
    if variant is not None:  # DoRA measured its magnitude with the factors that are gone
        variant.init(layer, adapter_name=adapter_name, config=config)
    layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)
    if adapter_name not in active_adapters:
        for factors in (layer.lora_A, layer.lora_B):
            factors[adapter_name].requires_grad_(False)
