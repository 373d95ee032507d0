"""A LoRA that PEFT is making, targeted at the modules of its start and filled with the start's factors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from eigenpeft.collection.formats.keys import without_wrappers
from eigenpeft.collection.opening import some
from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg import Factors
from eigenpeft.subspace.matching import match_modules
from eigenpeft.tuners.host.target_names import excluding, strays
from eigenpeft.tuners.layers.kinds import factor_dicts, kind_of, weight_name
from eigenpeft.tuners.starts.config import StartedLoraConfig


@contextmanager
def injecting(model: nn.Module, config: LoraConfig, adapter_name: str) -> Iterator[None]:
    """What `registration.extend_lora` puts around the making of an adapter's layers; nothing for a LoRA without a start.

    Into the configuration go the targets, where none are named.

    Args:
        model: Model to adapt.
        config: Configuration of the adapter.
        adapter_name: The adapter.

    Raises:
        AdapterConfigError: As `find_modules` and `fill` do.
    """
    if not isinstance(config, StartedLoraConfig) or config.start is None:
        yield
        return
    found = find_modules(model, config.start)
    if config.target_modules is None and not config.target_parameters:
        config.target_modules = set(found)  # pyright: ignore[reportAttributeAccessIssue] (as PEFT itself keeps them)
        config.exclude_modules = excluding(config.exclude_modules, strays(model, found))
    yield
    fill(model, adapter_name, {module: config.start[name] for module, name in found.items()})


def find_modules(model: nn.Module, start: Mapping[str, Factors]) -> dict[str, str]:
    """Modules of a model to those of a start.

    Args:
        model: Model to adapt.
        start: `(B (out_features, q), A (q, in_features))` by module.

    Raises:
        AdapterConfigError: If the model has none of them.
    """
    shapes = {name: (len(columns), rows.shape[1]) for name, (columns, rows) in start.items()}
    found = match_modules(model, shapes, shapes=shapes).found
    if not found:
        raise AdapterConfigError(
            f"None of the {len(shapes)} modules of the start, such as {some(list(shapes))}, is in the model "
            f"({type(model).__name__}). Use a model of the base that they were made for."
        )
    return {without_wrappers(path): name for path, name in found.items()}


@torch.no_grad()
def fill(model: nn.Module, adapter_name: str, start: Mapping[str, Factors]) -> None:
    """Set the factors of an adapter that PEFT has just made.

    Args:
        model: Model with the adapter.
        adapter_name: The adapter.
        start: `(B (out_features, q), A (q, in_features))` by module of the model. The others start as LoRA does.

    Raises:
        AdapterConfigError: If a layer has several updates of its own (groups, experts), or factors of other sizes.
    """
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in factor_dicts(layer)[0]:
            continue
        given = start.get(without_wrappers(weight_name(path, layer)))
        if given is None:
            continue  # a target of the user's own
        columns, rows = given
        kind = kind_of(layer)
        lora_A, lora_B = (getattr(side[adapter_name], "weight", side[adapter_name]) for side in factor_dicts(layer))
        if kind.n_blocks(layer) > 1:
            raise AdapterConfigError(
                f"{path!r} has {kind.n_blocks(layer)} {kind.blocks} with updates of their own, and the start is one matrix; "
                "leave it out with exclude_modules."
            )
        fits = lora_A[0].numel() == rows.shape[1] and lora_B.flatten(1).shape[0] == len(columns)
        if not fits or len(rows) > len(lora_A):
            raise AdapterConfigError(
                f"{path!r} has LoRA factors for {len(lora_B)} x {lora_A[0].numel()} of rank {len(lora_A)}, and the start is "
                f"{len(columns)} x {rows.shape[1]} of rank {len(rows)}; choose r of at least that, and modules of the base "
                "model that the start was made for."
            )
        lora_A.zero_().flatten(1)[: len(rows)] = rows.to(lora_A)
        lora_B.zero_().flatten(1)[:, : columns.shape[1]] = columns.to(lora_B)
