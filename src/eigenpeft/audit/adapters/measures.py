"""The numbers of one module: spectra, explained and held-out shares, of real and of random adapters."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenpeft.collection.adapter import AdapterFactors
from eigenpeft.linalg.bases.paired import paired_shares
from eigenpeft.linalg.bases.stacking import Factors, Stacks, share_curve, stack_factors
from eigenpeft.linalg.decompose import leading_components
from eigenpeft.linalg.factored import factored_svd
from eigenpeft.linalg.scores.leave_one_out import HeldOut, cosines, held_out_curves, overlaps
from eigenpeft.linalg.scores.nulls import effective_rank, matched_null

# Paired directions are fitted anew for each number of them.
PAIRED_COUNTS = (8, 16, 32, 64)
_PAIRED_TOL = 0.02


@dataclass(frozen=True)
class Shares:
    """One draw of adapters, real or random; K components, n adapters.

    Attributes:
        explained: (K,), of all adapters together, in a subspace fitted to them.
        held_out: (n, K) shares, each adapter left out with its group.
        held_out_alone: The same, each left out alone.
        effective_ranks: Effective ranks of the input and the output side.
    """

    explained: Tensor
    held_out: HeldOut
    held_out_alone: HeldOut
    effective_ranks: tuple[float, float]


@dataclass(frozen=True)
class ModuleMeasures:
    """One module.

    Attributes:
        shape: (out_features, in_features).
        adapters: Those with an update there.
        real: Figures of the adapters.
        nulls: Figures of random adapters with the same singular values, one per draw.
        seed_nulls: The same, adapters of one group sharing their input directions; empty where no group has two.
        similarity: (n, n) cosines of ΔW.
        overlap: (n, n) overlaps of the row spaces.
        n_lora_parameters: Numbers of all adapters' factors together.
        paired: Number of paired directions to the share of ‖ΔW‖² that diagonal cores on them hold, of all adapters together.
        ranks: Rank of each adapter's factors, in the order of `adapters`.
        truncated: Share of ‖ΔW‖² that each adapter keeps, cut to rank 1, 2, ... on its own; mean over the adapters.
    """

    shape: tuple[int, int]
    adapters: tuple[str, ...]
    real: Shares
    nulls: tuple[Shares, ...]
    seed_nulls: tuple[Shares, ...]
    similarity: Tensor
    overlap: Tensor
    n_lora_parameters: int
    paired: Mapping[int, float]
    ranks: tuple[int, ...]
    truncated: tuple[float, ...]


def measure(
    factors: Sequence[AdapterFactors],
    *,
    n_components: int,
    groups: Mapping[str, Hashable],
    n_nulls: int,
    generator: torch.Generator,
) -> ModuleMeasures | None:
    """Measure one module; None where fewer than two adapters have an update.

    Args:
        factors: As the collection reads them.
        n_components: Largest K.
        groups: Adapter to the label of its group.
        n_nulls: Draws of each null.
        generator: Source of the draws.
    """
    trained, stacks = trained_stacks(factors)
    if len(trained) < 2:
        return None
    pairs = _pairs(trained)
    labels = [groups[each.adapter] for each in trained]
    grouped = len(set(labels)) < len(labels)

    def draw(common_start: Sequence[Hashable] | None) -> Shares:
        null = matched_null(pairs, generator=generator, common_start=common_start)
        return _shares(_stacked(null), n_components, labels)

    return ModuleMeasures(
        shape=(len(trained[0].lora_B), trained[0].lora_A.shape[1]),
        adapters=tuple(each.adapter for each in trained),
        real=_shares(stacks, n_components, labels),
        nulls=tuple(draw(None) for _ in range(n_nulls)),
        seed_nulls=tuple(draw(labels) for _ in range(n_nulls)) if grouped else (),
        similarity=cosines(stacks),
        overlap=overlaps(stacks),
        n_lora_parameters=sum(each.lora_A.numel() + each.lora_B.numel() for each in trained),
        paired=paired_shares(
            stack_factors(pairs, rows="moments", weighting="equal"),
            [count for count in PAIRED_COUNTS if count <= n_components],
            tol=_PAIRED_TOL,
        ),
        ranks=tuple(len(each.lora_A) for each in trained),
        truncated=_truncated(pairs),
    )


def trained_stacks(factors: Sequence[AdapterFactors]) -> tuple[list[AdapterFactors], Stacks]:
    """The adapters that change a module, and the rows of exactly those.

    Args:
        factors: As the collection reads them, of one module.
    """
    trained = [each for each in factors if bool(each.lora_B.any()) and bool(each.lora_A.any())]
    stacks = _stacked(_pairs(trained or factors))
    if len(stacks.sizes) != len(trained):  # factors that cancel: no update although neither is zero
        trained = [each for each in trained if _stacked(_pairs([each])).sizes]
    return trained, stacks


def _truncated(pairs: Sequence[Factors]) -> tuple[float, ...]:
    """Mean share of ‖ΔW‖² in the leading 1, 2, ... singular values of each update."""
    most = max(len(lora_A) for _, lora_A in pairs)
    total = torch.zeros(most, dtype=torch.float64)
    for lora_B, lora_A in pairs:
        squares = factored_svd(lora_B, lora_A).S.double().square()
        curve = squares.cumsum(dim=0) / squares.sum()
        total += torch.cat([curve, curve.new_ones(most - len(curve))])
    return tuple((total / len(pairs)).tolist())


def _pairs(factors: Sequence[AdapterFactors]) -> list[Factors]:
    return [(each.lora_B, each.lora_A) for each in factors]


def _stacked(pairs: Sequence[Factors]) -> Stacks:
    return stack_factors(pairs, rows="balanced", weighting="equal")


def _shares(stacks: Stacks, n_components: int, labels: Sequence[Hashable]) -> Shares:
    sides = [leading_components(rows, n_components=n_components) for rows in (stacks.rows_in, stacks.rows_out)]
    least = min(len(side.singular_values) for side in sides)
    explained = share_curve(stacks, sides[0].components[:least], sides[1].components[:least])
    alone = held_out_curves(stacks, n_components=n_components)
    grouped = len(set(labels)) < len(labels)
    return Shares(
        explained=_extended(explained, n_components),
        held_out=held_out_curves(stacks, n_components=n_components, groups=labels) if grouped else alone,
        held_out_alone=alone,
        effective_ranks=(_effective_rank(stacks.rows_in), _effective_rank(stacks.rows_out)),
    )


def _extended(curve: Tensor, n_components: int) -> Tensor:
    """A curve that ends where the rank does, with its last value repeated."""
    return torch.cat([curve, curve[-1:].expand(n_components - len(curve))])


def _effective_rank(rows: Tensor) -> float:
    smaller = rows if len(rows) <= rows.shape[1] else rows.mT
    wide = smaller.to(torch.float64)
    return effective_rank(torch.linalg.eigvalsh(wide @ wide.mT).clamp(min=0.0).sqrt())
