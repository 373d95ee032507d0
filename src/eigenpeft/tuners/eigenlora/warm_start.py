"""Cores and heads to start from, taken from an existing adapter or a merge of several, and what no core holds of it."""

import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.functional import pad

from eigenpeft.collection.formats.keys import canonical_module
from eigenpeft.collection.opening import some
from eigenpeft.errors import AdapterConfigError, SubspaceError
from eigenpeft.linalg import Factors
from eigenpeft.linalg.coefficients import remainder
from eigenpeft.linalg.factored import frobenius_norm
from eigenpeft.linalg.merging import RULES
from eigenpeft.subspace import AdapterMember, AdapterStore, Core, PrincipalSubspace
from eigenpeft.subspace.cores import CoreKind, Parts
from eigenpeft.subspace.stores.adapter_files import read_adapter
from eigenpeft.tuners.eigenlora.merged_start import merged_updates, open_adapters
from eigenpeft.tuners.files.lora_files import MERGE_REPORT
from eigenpeft.tuners.layers.shared_bases import FrozenBank

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WarmStart:
    """Where an adapter lies in the subspace, by the subspace's module names.

    Attributes:
        source: As the user named it.
        modules: The adapter's core by module; modules that the adapter does not have start as usual.
        left_out: Modules of the adapter that the subspace has no bases for.
        kept_aside: What the adapter trained besides updates of weights, by the keys of its file: heads, biases, tokens.
        updates: The whole update by module, where it may be more than the core: `(lora_B, lora_A)`, scaling included.
        keeps_offset: Whether what a core does not hold is kept as an offset.
        lost: Squared norms of a module's update and of what its new core does not hold, filled as layers start.
    """

    source: str
    modules: Mapping[str, Core]
    left_out: tuple[str, ...] = ()
    kept_aside: Mapping[str, Tensor] = field(default_factory=dict)
    updates: Mapping[str, Factors] = field(default_factory=dict)
    keeps_offset: bool = False
    lost: dict[str, tuple[float, float]] = field(default_factory=dict)

    def report(self, placed: Iterable[str], unused: Iterable[str]) -> None:
        """Warn of everything in the adapter that the new one does not start from, by name.

        Args:
            placed: Modules of the subspace that the new adapter adapts.
            unused: As `fill_heads` returned it.
        """
        placed = set(placed)
        untargeted = [module for module in self.modules if module not in placed]
        parts = (
            (self.left_out, "modules that are not in the subspace (use one that has them)"),
            (untargeted, "modules that the new adapter does not adapt (name them in target_modules)"),
            (
                tuple(unused),
                "tensors that are not updates of weights (heads, biases or tokens; name a head in modules_to_save)",
            ),
        )
        lost = [f"{len(names)} {what}: {some(names)}" for names, what in parts if names]
        if lost:
            warnings.warn(
                f"init_from={self.source!r}: the new adapter starts without {'; '.join(lost)}.",
                stacklevel=2,
            )
        whole = sum(square for square, _ in self.lost.values())
        share = sum(square for _, square in self.lost.values()) / whole if whole else 0.0
        if share > _NOTHING:
            kept = "kept as a frozen offset" if self.keeps_offset else "left out (init_offset=True keeps it)"
            level = logging.INFO if self.keeps_offset else logging.WARNING
            logger.log(
                level,
                "init_from=%r: the cores hold %.4f of the update's squared norm; the rest is %s.",
                self.source,
                1 - share,
                kept,
            )

    def offset(
        self, module: str, parts: Parts, *, core: CoreKind, scaling: float, frozen_bank: FrozenBank
    ) -> Factors | None:
        """What the new core of a module does not hold, divided by the new scaling; None where it holds all or that is left out.

        Args:
            module: Module of the subspace.
            parts: Parts of the new core, from `parts`.
            core: Its kind.
            scaling: `s` of the new adapter.
            frozen_bank: Its components.
        """
        coefficients_out, coefficients_in = core.to_factors(parts)
        whole = self.updates[module]
        left, right = remainder(
            *whole,
            coefficients_out=coefficients_out * scaling,
            coefficients_in=coefficients_in,
            components_out=frozen_bank.components_out.cpu(),
            components_in=frozen_bank.components_in.cpu(),
        )
        self.lost[module] = float(frobenius_norm(*whole)) ** 2, float(frobenius_norm(left, right)) ** 2
        if not self.keeps_offset or not len(right):
            return None
        return (left / scaling).float(), right.float()

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
        fitted = core.from_factors(left, right, rank=rank)
        if not core.is_factored:
            return fitted
        # What the rank leaves free adds nothing: one side of it is zero, that which a start has at zero (embeddings' A).
        coefficients_in, coefficients_out = start["coefficients_in"].clone(), start["coefficients_out"].clone()
        if coefficients_in.any():
            coefficients_out.zero_()
        coefficients_in[:rank], coefficients_out[:, :rank] = fitted["coefficients_in"], fitted["coefficients_out"]
        return {"coefficients_in": coefficients_in, "coefficients_out": coefficients_out}

    @torch.no_grad()
    def fill_heads(self, model: nn.Module, adapter_name: str) -> list[str]:
        """Start the modules that the new adapter trains in full (`modules_to_save`) where the old one left them.

        Args:
            model: Model with the new adapter.
            adapter_name: The new adapter.

        Returns:
            Keys of what the old adapter trained and the new one has no place of that shape for.
        """
        keys = {canonical_module(key): key for key in self.kept_aside}
        used = set()
        for path, module in model.named_modules():
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                for name, own in module.modules_to_save[adapter_name].state_dict().items():
                    key = keys.get(f"{path}.{name}", "")
                    if key in self.kept_aside and self.kept_aside[key].shape == own.shape:
                        own.copy_(self.kept_aside[key])
                        used.add(key)
        return [key for key in self.kept_aside if key not in used]


def read_warm_start(
    source: str,
    subspace: PrincipalSubspace,
    *,
    adapters: Any = None,
    scale: float | None = None,
    options: Mapping[str, Any] | None = None,
    keeps_offset: bool | None = None,
) -> WarmStart:
    """Read what `init_from` names: an adapter or a merge on disk or the Hub, a member of a store, or adapters to merge.

    Args:
        source: `init_from`: a folder, a Hub id, "STORE#member", or the rule by which `adapters` are merged.
        subspace: The new adapter's bases.
        adapters: What a rule merges, opened.
        scale: λ that the update is multiplied by; default: 1, and of a rule its own.
        options: The rule's options.
        keeps_offset: Whether what the core cannot hold is kept beside it; default: of merges.

    Raises:
        SubspaceNotFoundError, ArtifactError: If a store, or the subspace of an adapter, is not there or is damaged.
        AdapterConfigError: If it has other bases, the adapter has none of the subspace's modules, or two that fit one.
        CollectionError: If an adapter cannot be read.
        SubspaceError: If the tensors of a store's bases do not fit each other.
    """
    if source in RULES and adapters is not None:
        embeddings = bool(subspace.info.embeddings)
        updates = merged_updates(adapters, rule=source, scale=scale, options=options, embeddings=embeddings)
        return _of_updates(source, updates, subspace, keeps_offset=keeps_offset is not False)
    scale = 1.0 if scale is None else float(scale)
    member, is_merge = _member(source, subspace)
    if scale != 1.0:
        cores = {module: Core(core.kind, core.parts, core.scaling * scale) for module, core in member.cores.items()}
        member = replace(member, cores=cores)
    updates = _whole(source, member, subspace, scale=scale)
    is_merge = is_merge or "mixture" in member.kinds
    return WarmStart(
        source,
        dict(member),
        tuple(member.record.get("left_out") or ()),
        member.kept_aside,
        updates,
        is_merge if keeps_offset is None else keeps_offset,
    )


def _of_updates(
    source: str, updates: Mapping[str, Factors], subspace: PrincipalSubspace, *, keeps_offset: bool
) -> WarmStart:
    found = {module: subspace.find(module) for module in updates}
    covered: dict[str, Factors] = {}
    for module, own in found.items():
        if own in covered:
            raise AdapterConfigError(
                f"init_from={source!r}: several adapted modules, such as {module!r}, fit the subspace's one {own!r}. Build a "
                "subspace that has them apart."
            )
        if own is not None:
            covered[own] = updates[module]
    if not covered:
        raise AdapterConfigError(
            f"init_from={source!r}: none of the adapters' {len(updates)} modules, such as {some(list(updates))}, is in the "
            "subspace. Use a subspace of these adapters' base model."
        )
    try:
        cores = subspace.project({own: (left.float(), right.float()) for own, (left, right) in covered.items()})
    except (SubspaceError, RuntimeError) as error:
        raise AdapterConfigError(f"init_from={source!r}: {error}") from error
    left_out = tuple(module for module, own in found.items() if own is None)
    return WarmStart(source, dict(cores), left_out, {}, covered, keeps_offset)


def _whole(source: str, member: AdapterMember, subspace: PrincipalSubspace, *, scale: float) -> dict[str, Factors]:
    """The update of each module in full: of a LoRA from its file, of a core from its bases."""
    if member.relative_errors and not _names_member(source):
        collection: Any = open_adapters([source], embeddings=bool(subspace.info.embeddings))
        with collection:
            pairs = {
                subspace.find(name): (scale * read.lora_B, read.lora_A)
                for name in collection.modules
                for read in collection.factors(name)
            }
        return {module: pairs[module] for module in member.cores}
    return subspace.reconstruct(member.cores)


def _names_member(source: str) -> bool:
    return "#" in source and not Path(source).exists()


def _member(source: str, subspace: PrincipalSubspace) -> tuple[AdapterMember, bool]:
    """The adapter, and whether a merge wrote it."""
    if _names_member(source):
        place, _, name = source.partition("#")
        store = AdapterStore.from_pretrained(place)
        if store.subspace.fingerprint != subspace.fingerprint:
            raise AdapterConfigError(
                f"init_from={source!r}: that store's bases have fingerprint {store.subspace.fingerprint}, the adapter's "
                f"have {subspace.fingerprint}. Pass the adapter itself to have it projected."
            )
        return store[name], False
    try:
        member = read_adapter(source, subspace, allow_different_base_models=True, in_part=True)[1]
    except SubspaceError as error:
        raise AdapterConfigError(f"init_from={source!r}: {error}") from error
    return member, (Path(source) / MERGE_REPORT).is_file()


# Share of the squared norm that float32 leaves behind.
_NOTHING = 1e-8
