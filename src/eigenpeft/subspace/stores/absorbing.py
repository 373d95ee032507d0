"""What becomes of a store's bases and members when later adapters are absorbed: grown, or fitted anew within a bound."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from huggingface_hub.utils import tqdm
from torch import Tensor
from torch.nn.functional import pad

from eigenpeft.collection.reader import AdapterCollection
from eigenpeft.errors import SubspaceError
from eigenpeft.linalg.bases.fitting import MERGEABLE, FittedBases, TooFewDirectionsError, fit_bases
from eigenpeft.linalg.bases.stacking import Factors
from eigenpeft.linalg.factored import frobenius_norm, projection_residual
from eigenpeft.subspace.core import Core
from eigenpeft.subspace.info import SubspaceInfo
from eigenpeft.subspace.module import ModuleSubspace
from eigenpeft.subspace.principal import PrincipalSubspace
from eigenpeft.subspace.seeding import seeded_generator
from eigenpeft.subspace.stores.adapter_files import relative_error
from eigenpeft.subspace.stores.growing import Grown, factors_of, grow
from eigenpeft.subspace.stores.member import AdapterMember
from eigenpeft.subspace.stores.members import AdapterMembers
from eigenpeft.subspace.stores.moving import moved_core

Shape = tuple[int, int]


@dataclass(frozen=True)
class AbsorbReport:
    """What `AdapterStore.absorb` did.

    Attributes:
        absorbed: Names of the new members.
        n_components: Bank to `(K_in, K_out)` before, zeros for a module that the subspace did not have, and after.
        held_before: Mean over the banks of the share of the new adapters' squared ΔW norms that the old bases held.
        held_after: The same for the new bases.
        lost: Old member to ‖ΔW - ΔW'‖ / ‖ΔW‖ of all its modules together, ΔW being what the store had; empty where the old
            bases are the first components of the new ones, so that no member changed at all.
        errors: New member to the mean of its modules' relative errors against the adapter itself.
        fingerprint_before: Fingerprint of the old bases.
        fingerprint_after: Fingerprint of the new ones.
    """

    absorbed: tuple[str, ...]
    n_components: Mapping[str, tuple[Shape, Shape]]
    held_before: float
    held_after: float
    lost: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    fingerprint_before: str = ""
    fingerprint_after: str = ""

    @property
    def is_exact(self) -> bool:
        """Whether every old member is what it was, bit for bit."""
        return not self.lost


def absorb(
    members: AdapterMembers,
    collection: AdapterCollection,
    *,
    held_share: float,
    max_components: int | None,
) -> tuple[PrincipalSubspace, AbsorbReport, dict[str, bytes]]:
    """The bases that hold new adapters, and what becomes of the members.

    Args:
        members: The members of a store, with its `subspace`; they are read only if they have to move.
        collection: New adapters, named otherwise.
        held_share: As for `AdapterStore.absorb`.
        max_components: As for `AdapterStore.absorb`.

    Returns:
        The new bases; the report; and the bytes of the old members, empty where these stay as they are.

    Raises:
        SubspaceError: If shapes differ, or an argument is out of range.
        CollectionError: If a tensor cannot be read.
        ArtifactError: If a member cannot be read.
    """
    subspace = members.subspace
    if subspace.paired_banks:
        raise SubspaceError(
            "Paired directions cannot absorb further adapters: pairs of more adapters are others, not the old ones and more. Build "
            "a subspace with method='paired' from all adapters and move the store there with rebase()."
        )
    if max_components is not None and (type(max_components) is not int or max_components < 1):
        raise SubspaceError(
            f"max_components={max_components!r} must be a whole number of at least 1, or None for no bound."
        )
    grown = grow(subspace, collection, held_share=held_share)
    new, moved, lost = grown.subspace, {}, {}
    if max_components is not None and any(bank.n_components > max_components for bank in new.banks.values()):
        grown = grow(subspace, collection, held_share=1.0)
        read = {name: members[name] for name in members if name not in collection.names}
        new = within_bound(grown, read, collection, max_components=max_components)
        changes: dict[str, tuple[Tensor, Tensor]] = {}
        for name, member in tqdm(read.items(), desc="Moving", unit="adapter"):
            member, lost[name] = turned(member, grown.subspace, new, changes=changes)
            moved[name] = replace(member, subspace_sha256=new.fingerprint).to_bytes()
    return new, _report(subspace, grown=grown, new=new, collection=collection, lost=lost), moved


def within_bound(
    grown: Grown, members: Mapping[str, AdapterMember], collection: AdapterCollection, *, max_components: int
) -> PrincipalSubspace:
    """Bases of at most `max_components` components, fitted to all members and the new adapters within a grown subspace.

    Everything is a core of the grown bases, so that the fit is one of small matrices, and the new components are rotations
    of the grown ones.

    Args:
        grown: What holds all of the new adapters.
        members: The old members.
        collection: The new adapters.
        max_components: Largest K of a side.

    Raises:
        CollectionError: If a tensor cannot be read or is not finite.
        SubspaceError: If an adapter does not fit the bases.
    """
    wide, info = grown.subspace, grown.subspace.info
    cores: dict[str, list[Factors]] = {bank: [] for bank in wide.banks}
    for member in members.values():
        for module, core in member.items():
            cores[wide.bank_of[module]].append(_padded(core, wide[module]))
    for module in collection.modules:
        own = wide.find(module) or module
        for pair in factors_of(collection, module):
            core = wide.project({own: pair})[own]
            cores[wide.bank_of[own]].append((core.coefficients_out, core.coefficients_in))

    def smaller(name: str, bank: ModuleSubspace) -> ModuleSubspace:
        if bank.n_components <= max_components:
            return bank
        fitted = _fitted([pair for pair in cores[name] if float(frobenius_norm(*pair))], max_components, info, name)
        if fitted is None:
            return bank.truncate(max_components)
        return ModuleSubspace(
            components_in=fitted.components_in @ bank.components_in,
            components_out=fitted.components_out @ bank.components_out,
            singular_values_in=fitted.singular_values_in,
            singular_values_out=fitted.singular_values_out,
            explained_variance_ratio=fitted.explained_variance_ratio,
        )

    measured = (*members, *collection.names)
    info = replace(info, n_components=max_components, grown_from=(), measured_on=measured)
    return PrincipalSubspace(wide.map_banks(smaller), info=info)


def turned(
    member: AdapterMember, wide: PrincipalSubspace, new: PrincipalSubspace, *, changes: dict[str, tuple[Tensor, Tensor]]
) -> tuple[AdapterMember, float]:
    """A member of the old bases in bases that lie within the grown ones, and what that loses.

    The work is that of cores, whatever the size of the weights.

    Args:
        member: Member in the first components of the grown bases.
        wide: The grown bases.
        new: Bases that lie in their span.
        changes: Bank to the new components as rows of coefficients on the grown ones, of the input side (K'_in, K_in) and of the
            output side (K'_out, K_out); filled here.

    Returns:
        The member, what it lost added to its relative errors; and ‖ΔW - ΔW'‖ / ‖ΔW‖ of all its modules together.
    """
    cores, errors = {}, {}
    lost = total = 0.0
    for module, core in member.items():
        bank, old = wide.bank_of[module], wide[module]
        if bank not in changes:
            pairs = ((new[module].components_in, old.components_in), (new[module].components_out, old.components_out))
            changes[bank] = tuple(one @ other.mT for one, other in pairs)  # pyright: ignore[reportArgumentType]
        rows_in, rows_out = changes[bank]
        cores[module] = moved_core(core, rows_out[:, : core.n_components_out], rows_in[:, : core.n_components_in].mT)
        factor_out, factor_in = _padded(core, old)
        norm = float(frobenius_norm(factor_out, factor_in))
        residual = float(projection_residual(factor_out, factor_in, components_out=rows_out, components_in=rows_in))
        lost, total = lost + residual**2, total + norm**2
        # By the triangle inequality; the norm of a projection is no larger.
        errors[module] = min(1.0, member.relative_errors.get(module, 0.0) + (residual / norm if norm else 0.0))
    moved = replace(member, cores=cores, relative_errors=errors, subspace_sha256=None)
    return moved, (lost / total) ** 0.5 if total else 0.0


def _report(
    old: PrincipalSubspace,
    *,
    grown: Grown,
    new: PrincipalSubspace,
    collection: AdapterCollection,
    lost: Mapping[str, float],
) -> AbsorbReport:
    errors: dict[str, list[float]] = {name: [] for name in collection.names}
    held: dict[str, list[float]] = {bank: [] for bank in grown.shares}
    for module in collection.modules:
        own = new.find(module) or module
        for pair in collection.each_factors(module) if own in new else ():
            error = relative_error(pair.lora_B, pair.lora_A, new[own])
            errors[pair.adapter].append(error)
            held[new.bank_of[own]].append(1.0 - error**2)
    counts = {bank: ((0, 0) if bank not in old else old[bank].sides, new[bank].sides) for bank in new.banks}
    before = [share for share, _ in grown.shares.values()]
    after = [sum(shares) / len(shares) for shares in held.values() if shares]
    return AbsorbReport(
        absorbed=collection.names,
        n_components=counts,
        held_before=sum(before) / len(before),
        held_after=sum(after) / len(after) if after else 1.0,
        lost=dict(lost),
        errors={name: sum(each) / len(each) if each else 0.0 for name, each in errors.items()},
        fingerprint_before=old.fingerprint,
        fingerprint_after=new.fingerprint,
    )


def _padded(core: Core, bank: ModuleSubspace) -> Factors:
    """`(C_out, C_in)` of a core that may use the first components alone, zeros for the others."""
    factor_out, factor_in = core.factors()
    return (
        pad(factor_out.float(), (0, 0, 0, bank.n_components_out - len(factor_out))),
        pad(factor_in.float(), (0, bank.n_components_in - factor_in.shape[1])),
    )


def _fitted(pairs: list[Factors], n_components: int, info: SubspaceInfo, name: str) -> FittedBases | None:
    """A fit in the space of cores; fewer components where there are fewer directions, None where there is no update."""
    if not pairs:
        return None
    # "eigenlorax" takes a mean off raw factors, and cores have other factors than their adapters had.
    method = info.method if info.method in (*MERGEABLE, "hooi") else "balanced"
    options: dict[str, Any] = {"method": method, "weighting": info.weighting}
    options["generator"] = seeded_generator(info.seed, name, "solver")
    try:
        return fit_bases(pairs, n_components=n_components, **options)
    except TooFewDirectionsError as error:
        return fit_bases(pairs, n_components=error.rank, **options)
