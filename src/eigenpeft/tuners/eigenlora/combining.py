"""Weighted combination of EigenLoRA adapters in coefficient space, where it is exact."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from eigenpeft.linalg.factored import truncate
from eigenpeft.tuners.convolution_factors import is_convolution
from eigenpeft.tuners.eigenlora.bases import adapted_layers
from eigenpeft.tuners.eigenlora.config import EigenLoraConfig
from eigenpeft.tuners.swapping import factor_dicts

_LINEAR_ALGEBRA = ("linear", "cat", "svd")


def can_combine(model: nn.Module, configs: Sequence[Any], adapters: Sequence[str], combination: str) -> bool:
    """Whether a combination is exact in coefficient space: one core, the same bases in every layer, linear algebra.

    Args:
        model: Adapted model.
        configs: Of the adapters.
        adapters: Their names.
        combination: PEFT's word.
    """
    if combination not in _LINEAR_ALGEBRA or not all(isinstance(config, EigenLoraConfig) for config in configs):
        return False
    if len({config.core for config in configs}) > 1 or any(config.use_dora for config in configs):
        return False
    if len({(config.subspace_sha256, config.n_components) for config in configs}) > 1:
        return False
    if configs[0].core != "low_rank":
        return True
    layers = [layer for name in adapters for _, layer, _ in adapted_layers(model, name)]
    # The channels of a grouped convolution's B are bound to the groups; ranks that differ within one layer do not add.
    bases: list[Any] = [layer.get_base_layer() for layer in layers]
    grouped = any(is_convolution(base) and base.groups > 1 for base in bases)
    ranks = [{layer.r[name] for name in adapters if name in layer.r} for layer in layers]
    return not grouped and (combination != "linear" or all(len(each) == 1 for each in ranks))


@torch.no_grad()
def combine(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], new: str, *, combination: str) -> None:
    """Fill the coefficients of a new adapter, whose scaling is 1.

    Args:
        model: Adapted model that has the new adapter already.
        adapters: Sources.
        weights: One a source.
        new: Name of the new adapter.
        combination: "linear" (PEFT's: both factors are summed with the root of the weight), "cat" (exact, the ranks add
            up) or "svd" (the nearest of the new adapter's rank).
    """
    for _, layer, _ in adapted_layers(model, new):
        parts = [
            (weight * layer.scaling[name], *_coefficients(layer, name))
            for name, weight in zip(adapters, weights, strict=True)
            if name in factor_dicts(layer)[0]
        ]
        target_in, target_out = _coefficients(layer, new)
        if target_in is None:
            target_out.copy_(sum((weight * outside for weight, _, outside in parts), torch.zeros_like(target_out)))
            continue
        inside, outside = _combined(parts, combination, rank=len(target_in))
        target_in.zero_()[: len(inside)] = inside
        target_out.zero_()[:, : len(inside)] = outside


def _combined(parts: Sequence[Any], combination: str, *, rank: int) -> tuple[Tensor, Tensor]:
    if combination == "linear":
        roots = [math.sqrt(abs(weight)) for weight, _, _ in parts]
        inside = [math.copysign(root, part[0]) * part[1] for root, part in zip(roots, parts, strict=True)]
        outside = [root * part[2] for root, part in zip(roots, parts, strict=True)]
        return torch.stack(inside).sum(dim=0), torch.stack(outside).sum(dim=0)
    inside = torch.cat([weight * inside for weight, inside, _ in parts])
    outside = torch.cat([outside for _, _, outside in parts], dim=1)
    if combination == "svd":
        outside, inside = truncate(outside.float(), inside.float(), rank=min(rank, len(inside)))
    return inside, outside


def _coefficients(layer: LoraLayer, adapter_name: str) -> tuple[Tensor | None, Tensor]:
    inputs, outputs = factor_dicts(layer)
    return inputs[adapter_name].coefficients, outputs[adapter_name].coefficients
