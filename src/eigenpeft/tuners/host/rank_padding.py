"""Factors padded to a larger rank, so that PEFT can swap adapters of several ranks into one compiled model."""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv2d, Linear
from peft.tuners.lora.variants import BdLoraLinearVariant, KasaLinearVariant
from torch import Tensor, nn

from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.layers.kinds import factor_dicts
from eigenpeft.tuners.layers.linear import InputFactor, MixedFactor, OutputFactor
from eigenpeft.tuners.layers.shards import ShardFactor

_OURS = (MixedFactor, OutputFactor, ShardFactor)
# Blocks and diagonals have sizes of their own, which PEFT's swapping would leave as they are.
_IN_PARTS = (BdLoraLinearVariant, KasaLinearVariant)


def has_our_factors(model: nn.Module) -> bool:
    """Whether a linear layer or 2-d convolution of a model has factors of ours, which PEFT's own padding would replace.

    Args:
        model: Model with adapters.
    """
    layers = (layer for layer in model.modules() if isinstance(layer, Linear | Conv2d))
    return any(isinstance(factor, _OURS) for layer in layers for factor in layer.lora_B.values())


def pad_ranks(model: nn.Module, target_rank: int) -> bool:
    """Pad the rank of every linear layer's and 2-d convolution's adapters with zeros, which changes no update.

    EigenLoRA's core "low_rank" gets rows of C_in and columns of C_out; the other cores have no rank. MoSLoRA gets rows of A,
    columns of B, and both of the mixer.

    Args:
        model: Model with adapters, ours among them (`has_our_factors`).
        target_rank: Rank that they have afterwards.

    Returns:
        Whether there was an adapter.

    Raises:
        AdapterConfigError: If a plain LoRA shares the model, the adapter is ShardLoRA's or has blocks or a diagonal between its
            factors (BD-LoRA, KaSA), a rank is larger than `target_rank`, or the groups of a convolution do not divide it.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Linear | Conv2d)]
    pairs = [(layer, *(factors[name] for factors in factor_dicts(layer))) for layer in layers for name in layer.lora_B]
    for layer, factor_in, factor_out in pairs:
        _check(layer, factor_in, factor_out, target_rank)
    for layer, factor_in, factor_out in pairs:
        if isinstance(factor_out, MixedFactor):
            _pad_mixed(factor_in, factor_out, target_rank, n_groups=_n_groups(layer))
        elif factor_in.coefficients is not None:
            _pad(factor_in, factor_out, target_rank, n_groups=_n_groups(layer))
    return True


def pad_mixers(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pad an adapter's mixers with zeros to the size that a model's have, which PEFT's hot-swapping does for factors alone.

    Args:
        model: Model whose adapter is about to be replaced in place.
        state_dict: Tensors of the new adapter, by their names in the model.
    """
    padded = dict(state_dict)
    modules = dict(model.named_modules())
    for key in padded:
        path, _, ending = key.rpartition(".")
        factor = modules.get(path, modules.get(f"_orig_mod.{path}"))
        if ending == "mixer" and isinstance(factor, MixedFactor):
            missing = factor.mixer.shape[-1] - padded[key].shape[-1]
            if missing > 0:
                padded[key] = nn.functional.pad(padded[key], (0, missing, 0, missing))
    return padded


def _n_groups(layer: LoraLayer) -> int:
    return getattr(layer.get_base_layer(), "groups", 1)


def _check(layer: LoraLayer, factor_in: Any, factor_out: Any, target_rank: int) -> None:
    is_mixed = isinstance(factor_out, MixedFactor)
    is_ours = is_mixed or (isinstance(factor_out, OutputFactor) and isinstance(factor_in, InputFactor))
    has_parts = is_ours and any(isinstance(each, _IN_PARTS) for each in layer.lora_variant.values())
    if not is_ours or has_parts:
        reason = "it has blocks, or a diagonal between its factors" if has_parts else "it is plain LoRA beside ours"
        if isinstance(factor_out, ShardFactor):
            reason = "its layers share the vectors of their factors (ShardLoRA)"
        raise AdapterConfigError(
            f"The model's adapters cannot be padded to target_rank={target_rank}: {reason}. Leave target_rank out, and "
            "swap adapters of one rank."
        )
    if not is_mixed and factor_in.coefficients is None:
        return
    n_groups = _n_groups(layer)
    rank = len(factor_in.weight)
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
def _pad_mixed(factor_in: Any, factor_out: Any, target_rank: int, *, n_groups: int) -> None:
    missing = (target_rank - len(factor_in.weight)) // n_groups
    if not missing:
        return
    blocks = factor_in.weight.unflatten(0, (n_groups, -1))
    rows = nn.functional.pad(blocks, (0, 0) * (blocks.ndim - 2) + (0, missing)).flatten(0, 1)
    columns = nn.functional.pad(factor_out.factor, (0, 0) * (factor_out.factor.ndim - 2) + (0, missing))
    _replace(factor_in, "weight", rows)
    _replace(factor_out, "factor", columns)
    _replace(factor_out, "mixer", nn.functional.pad(factor_out.mixer, (0, missing, 0, missing)))
    for name in ("out_features", "out_channels"):
        if hasattr(factor_in, name):
            setattr(factor_in, name, target_rank)
    factor_out.in_features = factor_out.mixer.shape[-1]


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Put another tensor in the place of a parameter or a buffer."""
    old = getattr(module, name)
    is_parameter = isinstance(old, nn.Parameter)
    setattr(module, name, nn.Parameter(value, requires_grad=old.requires_grad) if is_parameter else value)


@torch.no_grad()
def _pad(factor_in: Any, factor_out: Any, target_rank: int, *, n_groups: int) -> None:
    old_in, old_out = factor_in.coefficients, factor_out.coefficients
    missing = (target_rank - len(old_in)) // n_groups
    if missing:
        # The inner channels of a convolution lie group by group; C_out has those of one group.
        blocks = nn.functional.pad(old_in.unflatten(0, (n_groups, -1)), (0, 0, 0, missing))
        factor_in.coefficients = nn.Parameter(blocks.flatten(0, 1), requires_grad=old_in.requires_grad)
        padded = nn.functional.pad(old_out, (0, missing))
        factor_out.coefficients = nn.Parameter(padded, requires_grad=old_out.requires_grad)
        factor_in.out_features, factor_out.in_features = target_rank, padded.shape[1]
