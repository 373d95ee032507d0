"""A LoRA configuration whose adapter starts at given factors; for PEFT it is a plain LoRA, on disk too."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from eigenpeft.collection.formats.keys import without_wrappers
from eigenpeft.collection.opening import some
from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg import Factors
from eigenpeft.subspace.matching import match_modules
from eigenpeft.tuners.host.target_names import exclude, strays
from eigenpeft.tuners.layers.kinds import factor_dicts, kind_of, weight_name


@dataclass(frozen=True)
class Start:
    """Factors by module.

    Attributes:
        shapes: (out_features, in_features) of each module.
        factors: Takes a module's name; `(B (out_features, q), A (q, in_features))` with q at most the adapter's rank, zeros
            filling the rest. The adapter's scaling multiplies them.
    """

    shapes: Mapping[str, tuple[int, int]]
    factors: Callable[[str], Factors]


class StartedLoraConfig(LoraConfig):
    """LoRA's own configuration, and what its adapter starts at as soon as PEFT has put it into a model.

    Everything but the start is PEFT's: the adapter is plain LoRA in memory and on disk, and its file says nothing of the start.
    """

    start: Start | None = None
    _found: Mapping[str, str] = MappingProxyType({})

    def choose_targets(self, model: nn.Module) -> None:
        """Target the start's modules of a model, where no targets are named.

        Args:
            model: Model to adapt.

        Raises:
            AdapterConfigError: If the model has none of them.
        """
        if self.start is None:
            return
        found = match_modules(model, self.start.shapes, shapes=self.start.shapes).found
        if not found:
            raise AdapterConfigError(
                f"None of the {len(self.start.shapes)} modules of the start, such as {some(list(self.start.shapes))}, is in the "
                f"model ({type(model).__name__}). Use a model of the base that they were made for."
            )
        self._found = {without_wrappers(path): name for path, name in found.items()}
        if self.target_modules is None and not self.target_parameters:
            names = set(self._found)
            self.target_modules = names  # pyright: ignore[reportAttributeAccessIssue] (as PEFT itself keeps them)
            exclude(self, strays(model, names))

    @torch.no_grad()
    def fill(self, model: nn.Module, adapter_name: str) -> None:
        """Set the factors of an adapter that PEFT has just made.

        Args:
            model: Model with the adapter.
            adapter_name: The adapter.

        Raises:
            AdapterConfigError: If a layer has several updates of its own (groups, experts), or factors of other sizes.
        """
        start = self.start
        if start is None:
            return
        for path, layer in model.named_modules():
            if not isinstance(layer, LoraLayer) or adapter_name not in factor_dicts(layer)[0]:
                continue
            name = self._found.get(without_wrappers(weight_name(path, layer)))
            if name is None:
                continue  # a target of the user's own, which starts as LoRA does
            columns, rows = start.factors(name)
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


def before_injection(config: LoraConfig, model: nn.Module) -> None:
    """What `registration.extend_lora` calls before PEFT makes an adapter's layers.

    Args:
        config: Configuration of the adapter.
        model: Model to adapt.
    """
    if isinstance(config, StartedLoraConfig):
        config.choose_targets(model)


def after_injection(config: LoraConfig, model: nn.Module, adapter_name: str) -> None:
    """What `registration.extend_lora` calls when PEFT has made an adapter's layers.

    Args:
        config: Configuration of the adapter.
        model: Model with the adapter.
        adapter_name: The adapter.
    """
    if isinstance(config, StartedLoraConfig):
        config.fill(model, adapter_name)
