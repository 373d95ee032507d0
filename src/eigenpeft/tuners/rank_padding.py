"""Factors padded to a larger rank, so that PEFT can swap adapters of several ranks into one compiled model."""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv2d, Linear
from torch import nn

from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.factors import InputFactor, MixedFactor, OutputFactor
from eigenpeft.tuners.swapping import factor_dicts


def pad_ranks(model: nn.Module, target_rank: int, *, pad_plain: Callable[[nn.Module, int], bool]) -> bool:
    """Pad the rank of every linear layer's and 2-d convolution's adapters with zeros, which changes no update.

    EigenLoRA's core "low_rank" gets rows of C_in and columns of C_out; the other cores have no rank.

    Args:
        model: Model with adapters.
        target_rank: Rank that they have afterwards.
        pad_plain: PEFT's own function, for models without our adapters; it would put plain LoRA in the place of ours.

    Returns:
        Whether there was an adapter.

    Raises:
        AdapterConfigError: If an adapter is MoSLoRA, whose mixer would have to grow, or is on a convolution with groups, or
            a plain LoRA shares the model, or a rank is larger than `target_rank`.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Linear | Conv2d)]
    pairs = [(layer, *(factors[name] for factors in factor_dicts(layer))) for layer in layers for name in layer.lora_B]
    if not any(isinstance(outside, MixedFactor | OutputFactor) for _, _, outside in pairs):
        return pad_plain(model, target_rank)
    for layer, inside, outside in pairs:
        _check(layer, inside, outside, target_rank)
    for _, inside, outside in pairs:
        if inside.coefficients is not None:
            _pad(inside, outside, target_rank - len(inside.coefficients))
    return True


def _check(layer: LoraLayer, inside: Any, outside: Any, target_rank: int) -> None:
    if not isinstance(outside, OutputFactor):
        reason = "the mixer would have to grow" if isinstance(outside, MixedFactor) else "it is plain LoRA beside ours"
    elif getattr(layer.get_base_layer(), "groups", 1) > 1:
        reason = "the channels of a convolution with groups are bound to these"
    elif isinstance(inside, InputFactor) and inside.coefficients is not None and len(inside.coefficients) > target_rank:
        reason = f"one has rank {len(inside.coefficients)} already"
    else:
        return
    raise AdapterConfigError(
        f"The model's adapters cannot be padded to target_rank={target_rank}: {reason}. Leave target_rank out, and swap "
        "adapters of one rank."
    )


@torch.no_grad()
def _pad(inside: Any, outside: Any, missing: int) -> None:
    if missing:
        for factor, pad in ((inside, (0, 0, 0, missing)), (outside, (0, missing))):
            old = factor.coefficients
            factor.coefficients = nn.Parameter(nn.functional.pad(old, pad), requires_grad=old.requires_grad)
        inside.out_features += missing
        outside.in_features += missing
