"""Cores and heads to start from, taken from an existing adapter."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.functional import pad

from eigenpeft.collection.formats.keys import canonical_module
from eigenpeft.collection.opening import some
from eigenpeft.errors import AdapterConfigError, SubspaceError
from eigenpeft.subspace import AdapterMember, AdapterStore, Core, PrincipalSubspace
from eigenpeft.subspace.cores import CoreKind, Parts
from eigenpeft.subspace.stores.adapter_files import read_adapter


@dataclass(frozen=True)
class WarmStart:
    """Where an adapter lies in the subspace, by the subspace's module names.

    Attributes:
        source: As the user named it.
        modules: The adapter's core by module; modules that the adapter does not have start as usual.
        left_out: Modules of the adapter that the subspace has no bases for.
        kept: What the adapter trained besides updates of weights, by the keys of its file: heads, biases, tokens.
    """

    source: str
    modules: Mapping[str, Core]
    left_out: tuple[str, ...] = ()
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def report(self, placed: Iterable[str], unused: Iterable[str]) -> None:
        """Warn of everything in the adapter that the new one does not start from, by name.

        Args:
            placed: Modules of the subspace that the new adapter adapts.
            unused: As `fill_heads` returned it.
        """
        placed = set(placed)
        untargeted = [module for module in self.modules if module not in placed]
        parts = (
            (self.left_out, "modules that are not in the subspace"),
            (untargeted, "modules that the new adapter does not adapt"),
            (tuple(unused), "tensors that are no updates of weights (heads, biases or tokens)"),
        )
        lost = [f"{len(names)} {what}: {some(names)}" for names, what in parts if names]
        if lost:
            warnings.warn(
                f"init_from={self.source!r}: the new adapter starts without {'; '.join(lost)}.",
                stacklevel=2,
            )

    def parts(self, module: str, *, start: Parts, core: CoreKind, scaling: float) -> Parts:
        """The core of a module in the form of a kind, the adapter's own scaling divided by the new one.

        Args:
            module: Module of the subspace.
            start: The usual start, which gives the shapes and fills what the adapter's rank leaves free.
            core: The kind; a factored one gets the optimal truncation when the adapter's rank is larger.
            scaling: `s` of the new adapter.
        """
        if module not in self.modules:
            return start
        old, (n_in, n_out, free) = self.modules[module], core.sizes(start)
        if old.kind == core.name and {name: tensor.shape for name, tensor in old.parts.items()} == {
            name: tensor.shape for name, tensor in start.items()
        }:  # the very numbers, where the form is the same
            ratio = old.scaling / scaling
            return {
                name: tensor.float() * ratio if name == "coefficients_out" and ratio != 1.0 else tensor.float()
                for name, tensor in old.parts.items()
            }
        left, right = old.factors()
        left, right = left[:n_out].float() / scaling, right[:, :n_in].float()
        left, right = pad(left, (0, 0, 0, n_out - len(left))), pad(right, (0, n_in - right.shape[1]))
        rank = min(free, len(right))
        fitted = core.from_factors(left, right, rank)
        if not core.is_factored:
            return fitted
        # What the rank leaves free adds nothing: one side of it is zero, that which a start has at zero (embeddings' A).
        inside, outside = start["coefficients_in"].clone(), start["coefficients_out"].clone()
        if inside.any():
            outside.zero_()
        inside[:rank], outside[:, :rank] = fitted["coefficients_in"], fitted["coefficients_out"]
        return {"coefficients_in": inside, "coefficients_out": outside}

    @torch.no_grad()
    def fill_heads(self, model: nn.Module, adapter_name: str) -> list[str]:
        """Start the modules that the new adapter trains in full (`modules_to_save`) where the old one left them.

        Args:
            model: Model with the new adapter.
            adapter_name: The new adapter.

        Returns:
            Keys of what the old adapter trained and the new one has no place of that shape for.
        """
        keys = {canonical_module(key): key for key in self.kept}
        used = set()
        for path, module in model.named_modules():
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                for name, own in module.modules_to_save[adapter_name].state_dict().items():
                    key = keys.get(f"{path}.{name}", "")
                    if key in self.kept and self.kept[key].shape == own.shape:
                        own.copy_(self.kept[key])
                        used.add(key)
        return [key for key in self.kept if key not in used]


def read_warm_start(source: str, subspace: PrincipalSubspace) -> WarmStart:
    """Read `'<store>#<member>'`, or the EigenLoRA or LoRA adapter at a folder or Hub id, the latter projected.

    Args:
        source: Where to start from.
        subspace: Bases of the new adapter.

    Raises:
        AdapterConfigError: If it has other bases, the adapter has none of the subspace's modules, or two that fit one.
        CollectionError: If the adapter cannot be read.
    """
    member = _member(source, subspace)
    return WarmStart(source, dict(member), tuple(member.record.get("left_out") or ()), member.kept)


def _member(source: str, subspace: PrincipalSubspace) -> AdapterMember:
    if "#" in source and not Path(source).exists():
        place, _, name = source.partition("#")
        store = AdapterStore.from_pretrained(place)
        if store.subspace.fingerprint != subspace.fingerprint:
            raise AdapterConfigError(
                f"init_from={source!r}: that store's bases have fingerprint {store.subspace.fingerprint}, the adapter's "
                f"have {subspace.fingerprint}. Pass the adapter itself to have it projected."
            )
        return store[name]
    try:
        return read_adapter(source, subspace, allow_different_base_models=True, in_part=True)[1]
    except SubspaceError as error:
        raise AdapterConfigError(f"init_from={source!r}: {error}") from error
