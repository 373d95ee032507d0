"""Frozen tensors in an adapter's own file: offsets, which no core holds, and the cores that a mixture weighs."""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg import Factors
from eigenpeft.tuners.eigenlora.bases import adapted_layers
from eigenpeft.tuners.layers.kinds import factor_dicts, kind_of, weight_name, weight_shape

_PREFIX = "base_model.model."
_PARTS = ("offset", "cores")


def check_one_core(layer: LoraLayer, module: str, *, what: str, instead: str) -> None:
    """Refuse what is defined for one matrix alone.

    Args:
        layer: LoRA layer.
        module: Name of the adapted weight.
        what: What was asked for, as its user wrote it.
        instead: What else to do.

    Raises:
        AdapterConfigError: If the layer is a convolution or a bare parameter.
    """
    kind = kind_of(layer)
    if not kind.has_one_core:
        raise AdapterConfigError(
            f"{what} is for linear layers and embeddings, and {module!r} is of the kind {kind.name!r}; leave it out with "
            f"exclude_modules, or {instead}."
        )


def empty_offset(layer: LoraLayer, rank: Any, *, module: str) -> Factors | None:
    """Zeros for the offset that an adapter's own file is about to bring, or None where it has none.

    Args:
        layer: LoRA layer.
        rank: What the adapter's config says of its rank; None where there is none.
        module: Name of the adapted weight, for messages.

    Raises:
        AdapterConfigError: If the file says an impossible rank.
    """
    if rank is None:
        return None
    out_features, in_features = weight_shape(layer)
    if type(rank) is not int or not 1 <= rank <= min(out_features, in_features) or not kind_of(layer).has_one_core:
        raise AdapterConfigError(
            f"offset_ranks[{module!r}]={rank!r} must be a whole number between 1 and {min(out_features, in_features)}, of a "
            "linear layer or an embedding: the config was altered. Get a fresh copy of the adapter."
        )
    return torch.zeros(out_features, rank), torch.zeros(rank, in_features)


def offset_ranks(model: nn.Module, adapter_name: str) -> dict[str, int] | None:
    """Rank of the offset by adapted weight, as `EigenLoraConfig.offset_ranks` records it; None where there is none.

    Args:
        model: Adapted model.
        adapter_name: Adapter.
    """
    ranks = {}
    for path, layer, _ in adapted_layers(model, adapter_name):
        offset = factor_dicts(layer)[0][adapter_name].offset
        if offset is not None:
            ranks[weight_name(path, layer)] = len(offset)
    return ranks or None


def check_frozen(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse an adapter's file whose frozen tensors are not those that the adapter has a place for.

    Args:
        model: Adapted model.
        adapter_name: Adapter.
        tensors: Tensors of the file, by key without the adapter's name.

    Raises:
        AdapterConfigError: If some are missing, too many, of another shape, or not finite.
    """
    expected: dict[str, Tensor] = {}
    for path, layer, _ in adapted_layers(model, adapter_name):
        for container, factors in zip(kind_of(layer).attributes, factor_dicts(layer), strict=True):
            for part in _PARTS:
                held = getattr(factors[adapter_name], part, None)
                if held is not None:
                    expected[f"{path.removeprefix(_PREFIX)}.{container}.{part}"] = held
    found = {
        key.removeprefix(_PREFIX): tensor
        for key, tensor in tensors.items()
        if key.endswith(tuple(f".{part}" for part in _PARTS)) and ".lora_" in key
    }
    if found.keys() != expected.keys():
        key = sorted(found.keys() ^ expected.keys())[0]
        what = "lacks" if key in expected else "has, and its config does not say,"
        raise AdapterConfigError(
            f"The file of adapter {adapter_name!r} {what} {key!r}, which is a frozen part of its update: it was altered or "
            "cut short. Get a fresh copy."
        )
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise AdapterConfigError(
                f"The file of adapter {adapter_name!r} has {key!r} of shape {tuple(tensor.shape)} and dtype {tensor.dtype}, "
                f"where {tuple(expected[key].shape)} finite numbers are expected: it was altered. Get a fresh copy."
            )
