"""Which subspace, modules and bases an EigenLoRA adapter uses."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from eigenpeft.collection.opening import some
from eigenpeft.errors import AdapterConfigError
from eigenpeft.subspace import AdapterStore, ModuleSubspace, PrincipalSubspace
from eigenpeft.subspace.cores import CoreKind
from eigenpeft.subspace.matching import ModuleMatches
from eigenpeft.tuners.eigenlora.config import NO_STORE
from eigenpeft.tuners.eigenlora.merged_start import open_adapters
from eigenpeft.tuners.eigenlora.mixture import Mixture
from eigenpeft.tuners.eigenlora.warm_start import WarmStart
from eigenpeft.tuners.layers.kinds import factor_dicts, weight_shape
from eigenpeft.tuners.layers.linear import InputFactor
from eigenpeft.tuners.layers.shared_bases import FrozenBank, attach_bank, attach_empty_bank, recall, resolve


@dataclass(frozen=True)
class Injection:
    """What is found once for an adapter and handed to each of its layers.

    Attributes:
        subspace: The subspace; None for components that the adapter's own file brings.
        warm_start: Where `init_from` leads; None for a start at zero.
        mixture: The sources of a mixture; None for the other cores.
        names: Modules of the model to those of the subspace, where these are known.
        core: The kind of core.
        n_components: K asked for; None for all that the subspace has.
        embedded: (K_in, K_out) or K by module, of components that the adapter's own file brings.
        fingerprint: Fingerprint of the subspace that the components are of; "" where it is not known.
        placed: Modules of the subspace to those of the model, as far as they have been adapted.
        cut: Banks cut to the number of components asked for, filled as layers need them.
        shared: Components in memory that layers share, filled as layers need them.
    """

    subspace: PrincipalSubspace | None
    warm_start: WarmStart | None
    mixture: Mixture | None
    names: Mapping[str, str]
    core: CoreKind
    n_components: int | None = None
    embedded: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    placed: dict[str, str] = field(default_factory=dict)
    cut: dict[str, ModuleSubspace] = field(default_factory=dict)
    shared: dict[Any, FrozenBank] = field(default_factory=dict)

    def place(self, name: str, module: str) -> None:
        """Note that a module of the model takes the bases of a module of the subspace.

        Args:
            name: Module of the subspace.
            module: Module of the model.

        Raises:
            AdapterConfigError: If another module of the model has taken them.
        """
        other = self.placed.setdefault(name, module)
        if other != module:
            raise AdapterConfigError(
                f"{other!r} and {module!r} are both targeted and both fit the subspace's one module {name!r}. Name the one "
                "that is meant in full with target_modules=[...], or leave the other out with exclude_modules=[...]."
            )


@dataclass(frozen=True)
class Bases:
    """What a configuration names, opened.

    Attributes:
        subspace: The subspace; None for components that the adapter's own file brings.
        sources: The store whose members a mixture weighs; None for the other cores, and for a mixture that is read back.
    """

    subspace: PrincipalSubspace | None
    sources: AdapterStore | None


def find_bases(
    *,
    held: PrincipalSubspace | None = None,
    subspace: str | None = None,
    revision: str | None = None,
    fingerprint: str | None = None,
    sources: AdapterStore | str | None = None,
    is_embedded: bool = False,
    adapter: Path | None = None,
    is_from_file: bool = False,
) -> Bases:
    """Open the subspace and the sources that a configuration names (`EigenLoraConfig.named_bases`).

    Where it names sources and no subspace, the subspace is theirs.

    Args:
        held: The subspace itself, where it was passed open.
        subspace: Folder or Hub id of the subspace; None where it was never saved.
        revision: Its Hub revision.
        fingerprint: Fingerprint that it must have; None takes any.
        sources: Store whose members a mixture weighs, or its place.
        is_embedded: Whether the adapter's own file brings the components, so that no subspace is needed.
        adapter: Folder that the adapter was read from.
        is_from_file: Whether a file says all this, which warns of one without a fingerprint.

    Raises:
        AdapterConfigError: If no subspace is named at all, or the sources of a mixture are not a store.
        SubspaceNotFoundError: If it is nowhere.
        ArtifactError: If the store or the subspace is damaged.
        SubspaceError: If the tensors of the bases do not fit each other.
        CollectionError: If `sources` names adapters that cannot be read.
    """
    store = _open_sources(sources)
    if store is not None and subspace is None and fingerprint is None:
        return Bases(store.subspace, store)
    found = recall(fingerprint) if held is None else held
    if found is None and not is_embedded:
        found = _find_subspace(
            subspace, revision=revision, fingerprint=fingerprint, adapter=adapter, is_from_file=is_from_file
        )
    return Bases(found, store)


def _open_sources(given: AdapterStore | str | None) -> AdapterStore | None:
    if given is None:
        return None
    found = open_adapters(given)
    if not isinstance(found, AdapterStore):
        raise AdapterConfigError(NO_STORE.format(given))
    return found


def _find_subspace(
    place: str | None, *, revision: str | None, fingerprint: str | None, adapter: Path | None, is_from_file: bool
) -> PrincipalSubspace:
    if place is None and fingerprint is None:
        raise AdapterConfigError(
            "EigenLoRA needs a subspace: pass EigenLoraConfig(subspace=...) a path, a Hub id, or the "
            "PrincipalSubspace that SubspaceBuilder made."
        )
    subspace = resolve(place, revision=revision, fingerprint=fingerprint, adapter=adapter)
    if fingerprint is None and is_from_file:
        warnings.warn(
            f"The adapter's config has no fingerprint of its subspace (subspace_sha256), so that nothing says whether "
            f"{place!r} holds the components that it was trained on. Its outputs are right only if it does; write "
            f"{subspace.fingerprint!r} into its config once you know.",
            stacklevel=2,
        )
    return subspace


def matching_modules(
    model: nn.Module,
    matches: ModuleMatches,
    *,
    layers_to_transform: list[int] | int | None = None,
    layers_pattern: list[str] | str | None = None,
) -> set[str]:
    """The modules of a model that the subspace, or the adapter's own file, has bases for: the default targets.

    Args:
        model: Model to adapt, with or without other adapters.
        matches: What the model has of the subspace's modules.
        layers_to_transform: Chooses among them, as for LoRA; default: all.
        layers_pattern: Name of the list of layers that the numbers count in, as for LoRA.

    Raises:
        AdapterConfigError: If no module matches, or one module of the subspace matches several of the model.
    """
    if matches.contested:
        name, paths = next(iter(matches.contested.items()))
        raise AdapterConfigError(
            f"{len(matches.contested)} modules of the subspace fit several of {type(model).__name__}: {name!r} could be "
            f"{' or '.join(map(repr, paths[:4]))}. Name the modules that are meant with target_modules=[...]."
        )
    if not matches.found:
        raise AdapterConfigError(
            f"None of the subspace's {len(matches.missing)} modules, such as {matches.missing[0]!r}, is in the model "
            f"({type(model).__name__}). Use a model of the base that the subspace was built for."
        )
    if matches.missing:
        n_modules = len(matches.found) + len(matches.missing)
        warnings.warn(
            f"{len(matches.missing)} of the subspace's {n_modules} modules are not in the model ({type(model).__name__}) and "
            f"are not adapted: {some(matches.missing)}. To adapt all, use a model of the base that the subspace was built for.",
            stacklevel=2,
        )
    wanted = {name for name in matches.found if _in_layers(name, layers_to_transform, layers_pattern)}
    if not wanted:
        raise AdapterConfigError(
            f"layers_to_transform={layers_to_transform!r} with layers_pattern={layers_pattern!r} leaves none of "
            f"the {len(matches.found)} modules that the subspace and the model have in common, such as "
            f"{next(iter(matches.found))!r}. Name layers that are among those, or leave both out."
        )
    return wanted


def _in_layers(
    module: str, layers_to_transform: list[int] | int | None, layers_pattern: list[str] | str | None
) -> bool:
    """Whether `layers_to_transform` takes a module, by PEFT's own rule.

    PEFT asks it of targets that are the end of a name only, and the subspace's are whole names.
    """
    if layers_to_transform is None or "." not in module:
        return True
    rule = SimpleNamespace(
        target_modules=[module.rpartition(".")[2]],
        target_parameters=None,
        layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern,
    )
    return bool(check_target_module_exists(rule, module))


def bank_for(layer: LoraLayer, given: Injection, module: str) -> tuple[str, FrozenBank]:
    """The subspace's name of a module, and the layer's shared copy of its bases.

    Args:
        layer: LoRA layer of the module.
        given: What was found for the whole adapter.
        module: Name of the adapted weight in the model.

    Raises:
        AdapterConfigError: If the subspace has no bases for it, or bases of another shape.
        SubspaceError: If `n_components` is more than the subspace has.
    """
    shape, subspace = weight_shape(layer), given.subspace
    if subspace is None:
        count = given.embedded.get(module)
        if count is None:
            raise AdapterConfigError(
                f"The adapter embeds no components for {module!r}; it has them for "
                f"{sorted(given.embedded)[:3]}. Load it onto the base model that it was trained on."
            )
        pair = _embedded_pair(count, shape, module)
        return module, attach_empty_bank(layer, shape=shape, n_components=pair, fingerprint=given.fingerprint)
    name = given.names.get(module) or subspace.find(module)
    if name is None:
        raise AdapterConfigError(
            f"{module!r} is targeted but not in the subspace of {len(subspace)} modules, such as {subspace.modules[0]!r}. "
            "Leave target_modules out to adapt exactly the subspace's modules."
        )
    bank = subspace[name]
    if (bank.out_features, bank.in_features) != shape:
        raise AdapterConfigError(
            f"{module!r} is {shape[0]} x {shape[1]} in the model and {bank.out_features} x "
            f"{bank.in_features} in the subspace: it was built for another base model. Load that one, or build a "
            "subspace from adapters of this one."
        )
    if bank.paired:
        _check_paired(bank, given)
    if given.n_components is not None:
        place = subspace.bank_of[name]
        if place not in given.cut:
            given.cut[place] = bank.truncate(given.n_components)
        bank = given.cut[place]
    return name, attach_bank(layer, bank, fingerprint=given.fingerprint, shared=given.shared)


def _check_paired(bank: ModuleSubspace, given: Injection) -> None:
    """Refuse what paired directions, whose rows are not orthogonal, have no right answer for."""
    if given.core.is_matrix and not given.core.weighs_sources:  # a mixture of diagonals is one
        raise AdapterConfigError(
            f"core={given.core.name!r}: the subspace was built with method='paired', whose directions belong together two by two "
            "and are not orthogonal; use core='diagonal', or a subspace of another method."
        )
    if given.warm_start is not None and (given.n_components or bank.n_components) < bank.n_components:
        raise AdapterConfigError(
            f"n_components={given.n_components} with init_from={given.warm_start.source!r}: the coefficients of an adapter on "
            f"fewer of the {bank.n_components} paired directions are not the first of those on all. Leave n_components out, or "
            "build a subspace of so many pairs."
        )


def adapted_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLayer, FrozenBank]]:
    """(path, layer, bank) of every layer that has EigenLoRA factors of an adapter.

    Args:
        model: Adapted model, of PEFT's class or the base's own.
        adapter_name: Adapter.
    """
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            factor = dict(factor_dicts(layer)[0].items()).get(adapter_name)
            if isinstance(factor, InputFactor):
                yield path, layer, factor.frozen_bank


def _embedded_pair(count: Any, shape: tuple[int, int], module: str) -> tuple[int, int]:
    """(K_in, K_out) as a config file says them: checked, since a file may say anything."""
    pair = [count, count] if isinstance(count, int) else count
    if (
        not isinstance(pair, list)
        or len(pair) != 2
        or not all(type(each) is int and 1 <= each <= width for each, width in zip(pair, reversed(shape), strict=True))
    ):
        raise AdapterConfigError(
            f"embedded_n_components[{module!r}]={count!r} must be a number of components, or one for the input and one for "
            f"the output, of at least 1 and at most the {shape[1]} and {shape[0]} features of the weight. Get a fresh copy "
            "of the adapter."
        )
    return pair[0], pair[1]
