"""Where LoRA keeps the factors of each kind of layer, and how a factor put in their place is settled."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper
from torch import nn

from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.layers.convolution import is_convolution


def tuned_layers(layer: nn.Module, key: str) -> Iterator[tuple[str, LoraLayer]]:
    """The LoRA layers that PEFT has just made or extended for one target, by the name of the weight each adapts.

    One, but for multi-head attention, whose output projection has a layer of its own inside.

    Args:
        layer: What PEFT made or extended.
        key: Name of the target in the model; of the parameter, for bare parameters.

    Raises:
        AdapterConfigError: If it is no LoRA layer that our methods know.
    """
    if not isinstance(layer, LoraLayer):
        raise AdapterConfigError(
            f"{key!r} became a {type(layer).__name__}, which is not one of PEFT's LoRA layers; exclude it."
        )
    yield key, layer
    if isinstance(layer, MultiheadAttention):
        projection: Any = layer.get_base_layer().out_proj
        yield f"{key}.out_proj", projection


def weight_name(path: str, layer: LoraLayer) -> str:
    """The base model's own name of the weight that a layer adapts.

    Args:
        path: Where the layer is in the adapted model.
        layer: LoRA layer.
    """
    name = path.replace(".base_layer", "")
    return f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name


def factor_dicts(layer: LoraLayer) -> tuple[Any, Any]:
    """The dictionaries, by adapter, that hold a layer's A and B.

    Args:
        layer: LoRA layer.
    """
    if isinstance(layer, Embedding):
        return layer.lora_embedding_A, layer.lora_embedding_B
    return layer.lora_A, layer.lora_B


def replace_factor(factors: Any, adapter_name: str, factor: nn.Module) -> None:
    """Put a factor module where LoRA made its own, which may be a bare parameter.

    Args:
        factors: One of `factor_dicts`.
        adapter_name: Adapter.
        factor: Ours.
    """
    del factors[adapter_name]  # torch refuses a module where a parameter is
    factors[adapter_name] = factor


def weight_shape(layer: LoraLayer) -> tuple[int, int]:
    """(out_features, in_features) of the update; a convolution's input side is its flattened kernel.

    Args:
        layer: LoRA layer.
    """
    base: Any = layer.get_base_layer()
    window = math.prod(base.kernel_size) if is_convolution(base) else 1
    return layer.out_features or 0, (layer.in_features or 0) * window


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
    # DoRA measured its magnitude with the factors that are gone; on the meta device it waits for its file instead.
    if variant is not None and not any(_is_meta(factors[adapter_name]) for factors in factor_dicts(layer)):
        variant.init(layer, adapter_name=adapter_name, config=config)
    layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)
    if adapter_name not in active_adapters:
        for factors in factor_dicts(layer):
            factors[adapter_name].requires_grad_(False)


def _is_meta(factor: Any) -> bool:
    tensors = factor.parameters() if isinstance(factor, nn.Module) else [factor]
    return any(tensor.device.type == "meta" for tensor in tensors)
