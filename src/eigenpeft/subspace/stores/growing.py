"""A subspace that grows by the directions that it lacks of new adapters, its own components first and unchanged."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from huggingface_hub.utils import tqdm
from torch.nn.functional import pad

from eigenpeft.collection.reader import AdapterCollection
from eigenpeft.errors import SubspaceError
from eigenpeft.linalg.bases.absorbing import Growth, lacking_directions
from eigenpeft.linalg.bases.stacking import Factors
from eigenpeft.subspace.info import SubspaceInfo
from eigenpeft.subspace.lineage import entry_of
from eigenpeft.subspace.module import ModuleSubspace
from eigenpeft.subspace.principal import PrincipalSubspace
from eigenpeft.subspace.seeding import seeded_generator


@dataclass(frozen=True)
class Grown:
    """A subspace with the old components first, and what was found while it grew.

    Attributes:
        subspace: The new bases.
        shares: Bank to the share of the new adapters that the old bases held, and that the new ones hold.
    """

    subspace: PrincipalSubspace
    shares: Mapping[str, tuple[float, float]]


def grow(subspace: PrincipalSubspace, collection: AdapterCollection, *, held_share: float) -> Grown:
    """The subspace with the directions that it lacks of new adapters behind the ones it has.

    Modules that it lacks get banks of their own. The old banks are the first components of the new ones, so that every core
    in the old bases is one in the new ones as it is.

    Args:
        subspace: The old bases.
        collection: New adapters.
        held_share: As for `lacking_directions`, for every bank.

    Raises:
        SubspaceError: If shapes differ, or `held_share` is out of range.
        CollectionError: If a tensor cannot be read.
    """
    groups = _groups(subspace, collection)
    changed, shares = {}, {}
    for bank, modules in tqdm(groups.items(), desc="Growing", unit="bank"):
        factors = [pair for module in modules for pair in factors_of(collection, module)]
        old = subspace.get(bank)
        try:
            growth = _growth(old, factors, held_share=held_share, name=bank)
        except ValueError as error:
            raise SubspaceError(f"{bank}: {error}") from error
        shares[bank] = growth.share_before, growth.share_after
        changed[bank] = _appended(old, growth)
    kept = subspace.map_banks(lambda name, bank: changed.get(name) or bank)
    added = {name: bank for name, bank in changed.items() if name not in subspace and bank is not None}
    entry = entry_of(subspace.fingerprint, subspace, n_sources=len(subspace.info.sources))
    info = _info(subspace, collection, added)
    grown = PrincipalSubspace({**kept, **added}, info=info)
    if grown != subspace:
        grown.info = replace(info, grown_from=(*info.grown_from, entry))
    return Grown(grown, shares)


def factors_of(collection: AdapterCollection, module: str) -> Iterator[Factors]:
    """`(lora_B, lora_A)` of every adapter that has a module, one after another.

    Args:
        collection: The adapters.
        module: Name of the module in it.

    Raises:
        KeyError: If no adapter adapts the module.
        CollectionError: If a tensor cannot be read or is not finite.
    """
    return ((pair.lora_B, pair.lora_A) for pair in collection.each_factors(module))


def _groups(subspace: PrincipalSubspace, collection: AdapterCollection) -> dict[str, list[str]]:
    """The collection's modules by the bank that holds them, or their own name where there is none."""
    groups: dict[str, list[str]] = {}
    for module in collection.modules:
        own = subspace.find(module)
        shape = collection.shapes[module]
        if own is not None and shape != (subspace[own].out_features, subspace[own].in_features):
            raise SubspaceError(
                f"Cannot absorb {module!r} of shape {shape[0]} x {shape[1]}: it is {subspace[own].out_features} x "
                f"{subspace[own].in_features} in the subspace. Use adapters of the same base model."
            )
        groups.setdefault(subspace.bank_of[own] if own is not None else module, []).append(module)
    return groups


def _growth(old: ModuleSubspace | None, factors: list[Factors], *, held_share: float, name: str) -> Growth:
    lora_B, lora_A = factors[0]
    return lacking_directions(
        factors,
        components_in=old.components_in if old else torch.zeros(0, lora_A.shape[1]),
        components_out=old.components_out if old else torch.zeros(0, len(lora_B)),
        held_share=held_share,
        generator=seeded_generator(0, name, "absorb"),
    )


def _appended(old: ModuleSubspace | None, growth: Growth) -> ModuleSubspace | None:
    """The bank with the growth appended: unchanged if nothing was added, None if there is neither a bank nor growth."""
    if old is None:
        if not len(growth.components_in):
            return None
        shares = torch.zeros(len(growth.singular_values_in))
        shares[-1] = growth.share_after
        return ModuleSubspace(
            growth.components_in,
            growth.components_out,
            singular_values_in=growth.singular_values_in,
            singular_values_out=growth.singular_values_out,
            explained_variance_ratio=shares,
        )
    if not len(growth.components_in) and not len(growth.components_out):
        return old
    sides = []
    for components, spectrum, new, values in (
        (old.components_in, old.singular_values_in, growth.components_in, growth.singular_values_in),
        (old.components_out, old.singular_values_out, growth.components_out, growth.singular_values_out),
    ):
        # Pseudo-components have no singular value; once principal ones stand behind them, theirs is zero.
        filled = pad(spectrum, (0, len(components) - len(spectrum))) if len(new) else spectrum
        sides.append((torch.cat([components, new]), torch.cat([filled, values.to(spectrum.dtype)])))
    (components_in, spectrum_in), (components_out, spectrum_out) = sides
    # What new components add to the adapters that were measured before is not known, and counts as nothing.
    shares = old.explained_variance_ratio
    shares = pad(shares, (0, max(len(spectrum_in), len(spectrum_out)) - len(shares)))
    return ModuleSubspace(
        components_in,
        components_out,
        singular_values_in=spectrum_in,
        singular_values_out=spectrum_out,
        explained_variance_ratio=shares,
    )


def _info(subspace: PrincipalSubspace, collection: AdapterCollection, added: Iterable[str]) -> SubspaceInfo:
    info, added = subspace.info, list(added)
    records = [adapter.record() for adapter in collection.adapters]
    return replace(
        info,
        sources=(*info.sources, *(record for record in records if record not in info.sources)),
        fan_in_fan_out=(*info.fan_in_fan_out, *(name for name in added if collection.fan_in_fan_out(name))),
        embeddings=(*info.embeddings, *(name for name in added if collection.is_embedding(name))),
    )
