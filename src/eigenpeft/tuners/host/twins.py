"""Frozen parts of an adapter that is made as a copy of another: TRL's references copy parameters alone."""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from eigenpeft.tuners.layers.kinds import factor_dicts
from eigenpeft.tuners.layers.shared_bases import drop_unused_bases


def twin_of(configs: Mapping[str, Any], adapter_name: str) -> str | None:
    """Another adapter that has the very configuration of one, as TRL gives it to its "ref"; None where there is none.

    Args:
        configs: Configurations of the adapters, by name.
        adapter_name: The one that is being made.
    """
    own = configs[adapter_name]
    return next((name for name, config in configs.items() if config is own and name != adapter_name), None)


@torch.no_grad()
def copy_frozen(model: nn.Module, adapter_name: str, *, twin: str) -> None:
    """Give an adapter the frozen tensors of its twin: offsets, a mixture's cores, mixers that are not trained, embedded bases.

    What an adapter's file brings, if one is loaded afterwards, takes their place.

    Args:
        model: Model with both adapters.
        adapter_name: The new one.
        twin: The other.
    """
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for factors in factor_dicts(layer):
            if adapter_name in factors and twin in factors:
                _copy(factors[adapter_name], factors[twin])
        if hasattr(layer, "lora_bases"):
            drop_unused_bases(layer)


def _copy(new: Any, old: Any) -> None:
    if type(new) is not type(old) or isinstance(
        new, torch.Tensor
    ):  # LoRA's own factors of embeddings are bare parameters
        return
    theirs = dict(old.named_buffers(recurse=False))
    for name, buffer in new.named_buffers(recurse=False):
        if name in theirs and theirs[name].shape == buffer.shape:
            buffer.copy_(theirs[name])
    frozen_bank, other = getattr(new, "frozen_bank", None), getattr(old, "frozen_bank", None)
    if frozen_bank is not None and other is not None and not frozen_bank.is_filled and other.is_filled:
        new.use_bank(other)
