"""What was put into a base model's weights before training: remembered on the model, so that every export contains it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from eigenpeft.linalg import Factors
from eigenpeft.subspace.stores.adapter_files import BASE_START
from eigenpeft.tuners.files.lora_files import LoraUpdate, lora_keys


@dataclass(frozen=True)
class BaseStart:
    """An update in a base model's weights.

    Attributes:
        factors: `(lora_B, lora_A)` by module of the model; the scaling is 1.
        embeddings: Those of the modules that are embeddings.
    """

    factors: Mapping[str, Factors]
    embeddings: frozenset[str]


def remember_start(model: nn.Module, factors: Mapping[str, Factors], *, embeddings: Collection[str] = ()) -> None:
    """Note what was added to a base model's weights.

    Args:
        model: The base model.
        factors: By module of the model.
        embeddings: Those of the modules that are embeddings.
    """
    setattr(model, BASE_START, BaseStart(dict(factors), frozenset(embeddings)))


def start_of(model: nn.Module) -> BaseStart | None:
    """What was added to a base model's weights, or None.

    Args:
        model: The base model.
    """
    return getattr(model, BASE_START, None)


def with_start(updates: Sequence[LoraUpdate], start: BaseStart) -> list[LoraUpdate]:
    """The updates of an adapter on such a base, as updates of the original base: exact, the ranks add up.

    Args:
        updates: Updates of the adapter.
        start: What is in the base's weights.
    """
    found: dict[str, LoraUpdate] = {update.target: update for update in updates}
    for module, (lora_B, lora_A) in start.factors.items():
        own: Any = found.get(module)
        if own is None:
            keys = lora_keys(module, is_embedding=module in start.embeddings)
            found[module] = LoraUpdate(lora_B, lora_A, 1.0, module, keys)
            continue
        columns, rows = (each.to(own.lora_B) for each in (lora_B, lora_A))
        found[module] = replace(
            own,
            lora_B=torch.cat([own.lora_B * own.scaling, columns], dim=1),
            lora_A=torch.cat([own.lora_A, rows]),
            scaling=1.0,
            bias=None if own.bias is None else own.bias * own.scaling,
        )
    return list(found.values())
