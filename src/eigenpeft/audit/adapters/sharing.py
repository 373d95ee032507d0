"""What one bank for all layers of a kind would cost: held-out shares and bytes beside those of a bank per module."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigenpeft.audit.adapters.averages import by_adapter
from eigenpeft.audit.adapters.measures import ModuleMeasures, trained_stacks
from eigenpeft.building.sharing import group_of
from eigenpeft.collection import AdapterCollection
from eigenpeft.linalg.bases.stacking import stack_factors
from eigenpeft.linalg.scores.leave_one_out import held_out_curves
from eigenpeft.linalg.scores.nulls import matched_null
from eigenpeft.subspace.seeding import seeded_generator

_SHOWN = (2, 4, 8, 16, 32, 64, 128, 256)
_N_BOOTSTRAP, _NUMBER = 1000, 4  # draws; bytes of a float32


@dataclass(frozen=True, kw_only=True)
class SharingRow:
    """Shared and own banks of one size.

    Attributes:
        n_components: K of every bank.
        own: Held-out share in a bank per module, mean over modules and adapters.
        own_null: The same of random adapters with the same singular values and shapes.
        shared: Held-out share in banks that the modules of a kind share.
        shared_null: The same of such random adapters.
        low: Lower end of the 90 % bootstrap interval, over adapters, of `own - shared`.
        high: Upper end.
        own_bytes: Bytes of the components, a bank per module, float32.
        shared_bytes: The same of shared banks.
    """

    n_components: int
    own: float
    own_null: float
    shared: float
    shared_null: float
    low: float
    high: float
    own_bytes: int
    shared_bytes: int


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """One bank for all modules of a kind and shape, beside a bank per module.

    Attributes:
        text: What it costs, in words.
        n_modules: Modules, and own banks.
        n_banks: Shared banks.
        rows: By K.
    """

    text: str
    n_modules: int
    n_banks: int
    rows: tuple[SharingRow, ...]


def sharing_cost(
    collection: AdapterCollection,
    *,
    share: str | Sequence[str] | Callable[[str], str],
    measured: Mapping[str, ModuleMeasures],
    names: Sequence[str],
    groups: Mapping[str, Hashable],
    at: int,
    n_nulls: int,
    seed: int,
) -> Sharing:
    """Leave each adapter out, with its group, of the bank that all modules of a kind share.

    A shared bank is fitted to the updates of every adapter on every of its modules, each counting equally (as
    `build_shared_subspace` does); an adapter is left out with all its layers.

    Args:
        collection: Read once more.
        share: As for `SubspaceBuilder`.
        measured: Module to its measures, a bank per module.
        names: Trained adapters.
        groups: Adapter to the label of its group.
        at: K that the words are about.
        n_nulls: Draws of random adapters.
        seed: Seed of the draws.

    Raises:
        SubspaceError: If `share` is none of what it may be.
        CollectionError: If a tensor cannot be read or is not finite.
    """
    kind_of = group_of(share)
    kinds: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for module, found in measured.items():
        kinds.setdefault((kind_of(module), found.shape), []).append(module)
    most = next(iter(measured.values())).real.held_out.both.shape[1]
    parts, *nulls = _shared_parts(
        collection, kinds=kinds, measured=measured, groups=groups, n_components=most, n_nulls=n_nulls, seed=seed
    )
    own = by_adapter(names, [(m.adapters, m.real.held_out.both) for m in measured.values()])
    own_null = torch.stack(
        [by_adapter(names, [(m.adapters, m.nulls[i].held_out.both) for m in measured.values()]) for i in range(n_nulls)]
    )
    shared, shared_null = by_adapter(names, parts), torch.stack([by_adapter(names, draw) for draw in nulls])
    resample = torch.randint(len(names), (_N_BOOTSTRAP, len(names)), generator=torch.Generator().manual_seed(seed))
    lost = (own - shared)[resample].nanmean(dim=1)
    low, high = lost.nanquantile(0.05, dim=0), lost.nanquantile(0.95, dim=0)
    width = sum(sum(found.shape) for found in measured.values())
    shared_width = sum(sum(shape) for _, shape in kinds)
    rows = tuple(
        SharingRow(
            n_components=n_components,
            own=float(own[:, n_components - 1].nanmean()),
            own_null=float(own_null[..., n_components - 1].nanmean()),
            shared=float(shared[:, n_components - 1].nanmean()),
            shared_null=float(shared_null[..., n_components - 1].nanmean()),
            low=float(low[n_components - 1]),
            high=float(high[n_components - 1]),
            own_bytes=_NUMBER * n_components * width,
            shared_bytes=_NUMBER * n_components * shared_width,
        )
        for n_components in sorted({*(size for size in _SHOWN if size <= most), at})
    )
    found = Sharing(text="", n_modules=len(measured), n_banks=len(kinds), rows=rows)
    return replace(found, text=_words(found, at))


def _shared_parts(
    collection: AdapterCollection,
    *,
    kinds: Mapping[tuple[str, tuple[int, int]], Sequence[str]],
    measured: Mapping[str, ModuleMeasures],
    groups: Mapping[str, Hashable],
    n_components: int,
    n_nulls: int,
    seed: int,
) -> list[list[tuple[tuple[str, ...], Tensor]]]:
    """Adapters and their held-out curves in shared banks: of the real ones, then of each draw."""
    parts: list[tuple[tuple[str, ...], Tensor]] = []
    nulls: list[list[tuple[tuple[str, ...], Tensor]]] = [[] for _ in range(n_nulls)]
    for (kind, shape), modules in kinds.items():
        if len(modules) == 1:  # its bank is its own either way
            own = measured[modules[0]]
            parts.append((own.adapters, own.real.held_out.both))
            for draw, found in zip(nulls, own.nulls, strict=True):
                draw.append((own.adapters, found.held_out.both))
            continue
        trained = [each for module in modules for each in trained_stacks(collection.factors(module))[0]]
        trained = [each for each in trained if each.adapter in groups]
        owners = [each.adapter for each in trained]
        pairs = [(each.lora_B, each.lora_A) for each in trained]
        generator = seeded_generator(seed, f"{kind} {shape}", "shared null")
        draws = [pairs, *(matched_null(pairs, generator=generator) for _ in range(n_nulls))]
        labels = [groups[owner] for owner in owners]
        for place, drawn in zip([parts, *nulls], draws, strict=True):
            stacks = stack_factors(drawn, rows="balanced", weighting="equal")
            curves = held_out_curves(stacks, n_components=n_components, groups=labels).both
            place += [((owner,), curve[None]) for owner, curve in zip(owners, curves, strict=True)]
    return [parts, *nulls]


def _words(found: Sharing, at: int) -> str:
    if found.n_banks == found.n_modules:
        return f"No two of the {found.n_modules} modules are of one kind and shape, so that no bank would be shared."
    row = next(row for row in found.rows if row.n_components == at)
    return (
        f"{found.n_banks} shared banks in the place of {found.n_modules} would take {row.shared_bytes / 1e6:.2f} MB instead of "
        f"{row.own_bytes / 1e6:.2f} at K = {at}, and hold {row.shared:.3f} of an adapter that they were not fitted to (by chance "
        f"{row.shared_null:.3f}) where a bank per module holds {row.own:.3f} (by chance {row.own_null:.3f}): "
        f"{row.own - row.shared:+.3f} of ‖ΔW‖² is what sharing costs (90 % interval {row.low:+.3f} to {row.high:+.3f})."
    )
