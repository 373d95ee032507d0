"""Factors padded to a larger rank, so that PEFT can swap adapters of several ranks into one compiled model."""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv2d, Linear
from torch import nn

from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.layers.kinds import factor_dicts
from eigenpeft.tuners.layers.linear import InputFactor, MixedFactor, OutputFactor


def has_our_factors(model: nn.Module) -> bool:
    """Whether a linear layer or 2-d convolution of a model has factors of ours, which PEFT's own padding would replace.

    Args:
        model: Model with adapters.
    """
    layers = (layer for layer in model.modules() if isinstance(layer, Linear | Conv2d))
    return any(isinstance(factor, MixedFactor | OutputFactor) for layer in layers for factor in layer.lora_B.values())


def pad_ranks(model: nn.Module, target_rank: int) -> bool:
    """Pad the rank of every linear layer's and 2-d convolution's adapters with zeros, which changes no update.

    EigenLoRA's core "low_rank" gets rows of C_in and columns of C_out; the other cores have no rank.

    Args:
        model: Model with adapters, ours among them (`has_our_factors`).
        target_rank: Rank that they have afterwards.

    Returns:
        Whether there was an adapter.

    Raises:
        AdapterConfigError: If an adapter is MoSLoRA, whose mixer would have to grow, a plain LoRA shares the model, a rank is
            larger than `target_rank`, or the groups of a convolution do not divide it.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Linear | Conv2d)]
    pairs = [(layer, *(factors[name] for factors in factor_dicts(layer))) for layer in layers for name in layer.lora_B]
    for layer, inside, outside in pairs:
        _check(layer, inside, outside, target_rank)
    for layer, inside, outside in pairs:
        if inside.coefficients is not None:
            _pad(inside, outside, target_rank, n_groups=_n_groups(layer))
    return True


def _n_groups(layer: LoraLayer) -> int:
    return getattr(layer.get_base_layer(), "groups", 1)


def _check(layer: LoraLayer, inside: Any, outside: Any, target_rank: int) -> None:
    if not isinstance(outside, OutputFactor) or not isinstance(inside, InputFactor):
        reason = "the mixer would have to grow" if isinstance(outside, MixedFactor) else "it is plain LoRA beside ours"
        raise AdapterConfigError(
            f"The model's adapters cannot be padded to target_rank={target_rank}: {reason}. Leave target_rank out, and "
            "swap adapters of one rank."
        )
    if inside.coefficients is None:
        return
    rank, n_groups = len(inside.coefficients), _n_groups(layer)
    # Both as PEFT says them of LoRA, for code that knows its words.
    if target_rank % n_groups:
        raise AdapterConfigError(
            f"Trying to pad a Conv2d LoRA adapter with groups={n_groups} to target rank {target_rank}, but the target rank "
            f"is not divisible by {n_groups}. Please choose a target rank that is divisible by {n_groups}."
        )
    if rank > target_rank:
        raise AdapterConfigError(
            f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger ({rank}). Pass at "
            "least that, or leave target_rank out."
        )


@torch.no_grad()
def _pad(inside: Any, outside: Any, target_rank: int, *, n_groups: int) -> None:
    old_in, old_out = inside.coefficients, outside.coefficients
    missing = (target_rank - len(old_in)) // n_groups
    if missing:
        # The inner channels of a convolution lie group by group; C_out has those of one group.
        blocks = nn.functional.pad(old_in.unflatten(0, (n_groups, -1)), (0, 0, 0, missing))
        inside.coefficients = nn.Parameter(blocks.flatten(0, 1), requires_grad=old_in.requires_grad)
        padded = nn.functional.pad(old_out, (0, missing))
        outside.coefficients = nn.Parameter(padded, requires_grad=old_out.requires_grad)
        inside.out_features, outside.in_features = target_rank, padded.shape[1]
