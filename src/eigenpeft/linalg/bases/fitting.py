"""From the factors of many adapters of one weight to a pair of bases: balanced, hosvd, hooi, eigenlorax, paired."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from eigenpeft.linalg.bases.alternating import refine
from eigenpeft.linalg.bases.centred import centred_components
from eigenpeft.linalg.bases.paired import fit_pairs, leading_pairs, pair_curve
from eigenpeft.linalg.bases.stacking import WEIGHTINGS as WEIGHTINGS
from eigenpeft.linalg.bases.stacking import ManyFactors, Rows, Stacks, Weighting, share_curve, stack_factors
from eigenpeft.linalg.decompose import Decomposition, leading_components
from eigenpeft.linalg.shares import added_shares

Method = Literal["balanced", "hosvd", "hooi", "eigenlorax", "paired"]


@dataclass(frozen=True)
class Fit:
    """One row of `METHODS`.

    Attributes:
        rows: Which rows of the adapters are stacked: of their balanced factors, their second moments, or the raw ones.
        centred: Whether the mean is taken off and its direction kept as the first component.
        refined: Whether the bases are refined towards the least error of the projected updates.
        mergeable: Whether the bases come from one growing stack, so that more rows can be merged into them.
        paired: Whether row k of one side belongs to row k of the other, for cores that are diagonal; such rows have unit norm
            and are not orthogonal.
    """

    rows: Rows
    centred: bool = False
    refined: bool = False
    mergeable: bool = False
    paired: bool = False


METHODS: dict[str, Fit] = {
    # Directions of the balanced factors S^{1/2} Vᵀ and S^{1/2} Uᵀ of each ω ΔW = U S Vᵀ: of the updates alone, so that
    # (B G⁻¹, G A) gives the bases of (B, A).
    "balanced": Fit("balanced", mergeable=True),
    # Leading eigenvectors of Σ ω²ΔWᵀΔW and Σ ω²ΔWΔWᵀ: the higher-order singular value decomposition of the stack of updates
    # (De Lathauwer, De Moor and Vandewalle, SIAM J. Matrix Anal. Appl. 21, 2000), as in the Universal Weight Subspace
    # Hypothesis; its error is within √2 of the least.
    "hosvd": Fit("moments", mergeable=True),
    # Bases of the largest Σ ω²‖V_out ΔW V_inᵀ‖²: higher-order orthogonal iteration (the same authors; JD-Full of arXiv
    # 2407.00066), from the better of "hosvd" and "balanced", never worse than either.
    "hooi": Fit("moments", refined=True),
    # Algorithm 1 of EigenLoRAx (arXiv 2502.04700), except that the subtracted mean is not lost: its direction is the first
    # component, and the leading K - 1 principal components follow, made orthogonal to it. Depends on how an update is split
    # into factors; kept for comparison.
    "eigenlorax": Fit("raw", centred=True),
    # K pairs of directions of the least Σ ω²‖ΔW - P_outᵀ diag(d) P_in‖², one number per adapter and pair (JD-Diag of arXiv
    # 2407.00066), by alternating least squares from three starts: the bases of "hooi", those of "balanced", and the leading
    # singular triplets of the updates; never worse than the diagonal on the bases of either.
    "paired": Fit("moments", paired=True),
}
"""The methods of `fit_bases`."""
MERGEABLE = tuple(name for name, fit in METHODS.items() if fit.mergeable)

# A share is reached when it is missed by no more than the rounding of float32 data and the truncation of noise.
_SHARE_SLACK = 1e-6
# The first number of components that the search for a share tries.
_FIRST_TRIAL = 32


class TooFewDirectionsError(ValueError):
    """The adapters of a module span fewer directions than asked for.

    Args:
        message: What was asked, and what there is.
        rank: How many there are.
    """

    def __init__(self, message: str, *, rank: int):
        super().__init__(message)
        self.rank = rank


@dataclass(frozen=True, kw_only=True)
class FittedBases:
    """Bases of the input and the output side of one weight, K components each.

    Attributes:
        components_in: Rows in the input space, leading first: orthonormal, or for "paired" of unit norm alone.
        components_out: Rows in the output space, likewise.
        singular_values_in: Singular values of the stack the input side was fitted to, descending; for "eigenlorax" the first is
            √p ‖mean‖ of the p rows and only the rest descends; for "paired" `√(Σ ω²d²)` of each pair, on both sides.
        singular_values_out: The same for the output side.
        explained_variance_ratio: Entry k is what component k + 1, on both sides, adds to the explained share of
            `Σ ω²‖ΔW‖²` (for "paired" with a diagonal core); the sum is the share that all K explain, the cumulative sum the
            curve.
        norms: ‖ΔW‖ of every adapter, in the order given; they come with the stacking.
        paired: Whether row k of one side belongs to row k of the other and rows are not orthogonal.
    """

    components_in: Float[Tensor, "k n"]
    components_out: Float[Tensor, "k m"]
    singular_values_in: Float[Tensor, " k"]
    singular_values_out: Float[Tensor, " k"]
    explained_variance_ratio: Float[Tensor, " k"]
    norms: tuple[float, ...]
    paired: bool = False


def fit_bases(
    factors: ManyFactors,
    *,
    n_components: int | float,
    method: Method = "balanced",
    weighting: Weighting = "equal",
    tol: float = 1e-4,
    generator: Generator | None = None,
) -> FittedBases:
    """Fit the two bases of one weight to the factors of its adapters.

    V_out (K, m) and V_in (K, n), orthonormal rows, are to make `Σ_i ω_i² ‖ΔW_i - V_outᵀV_out ΔW_i V_inᵀV_in‖²` small: the
    objective of JD-Full in "Compress then Serve" (arXiv 2407.00066, appendix A.1, case 1), which "hooi" minimises. "eigenlorax"
    is algorithm 1 of EigenLoRAx (arXiv 2502.04700), "paired" JD-Diag (case 2).

    Args:
        factors: `(lora_B (m, r_i), lora_A (r_i, n))` of each adapter, the scaling folded into lora_B; ranks may differ.
            Adapters whose update is zero are left out. A `FactorStream` reads them as they are needed ("hooi": 3 times).
        n_components: An int K takes exactly K components on both sides. A float in (0, 1] takes the fewest components
            whose explained share of `Σ ω²‖ΔW‖²` reaches it.
        method: "balanced" (default), "hosvd", "hooi", "eigenlorax" or "paired"; `METHODS` says what they are.
        weighting: "equal" (default) weighs every adapter by `ω = 1 / ‖ΔW‖`, "none" by 1. With "eigenlorax" it weighs
            the explained share alone: that recipe stacks the rows as they are.
        tol: Tolerance of the iterative solver and of the refinement.
        generator: Source of the iterative solver's start; None always takes the same.

    Returns:
        `FittedBases`; float64 if a factor is, else float32.

    Raises:
        ValueError: If an argument is out of range, shapes differ, all updates are zero, a side's numerical rank
            is below K, or the share cannot be reached with as many components as the smaller rank.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> B, A = torch.randn(6, 2), torch.randn(2, 5)
        >>> fitted = fit_bases([(B, A)], n_components=2)
        >>> fitted.components_in.shape, round(fitted.explained_variance_ratio.sum().item(), 4)
        (torch.Size([2, 5]), 1.0)
    """
    fit = _row(method)
    if fit.refined or fit.paired:
        solve = _fit_refined if fit.refined else _fit_paired
        return solve(factors, n_components=n_components, weighting=weighting, tol=tol, generator=generator)
    stacks = stack_factors(factors, rows=fit.rows, weighting=weighting)
    return _fit_stacks(stacks, n_components=n_components, tol=tol, generator=generator, centred=fit.centred)


def stack_rows(
    factors: ManyFactors, *, method: Method, weighting: Weighting = "equal"
) -> tuple[Float[Tensor, "p n"], Float[Tensor, "p m"]]:
    """The rows whose leading right singular vectors are a method's bases.

    For "hooi" those of its start, for "eigenlorax" not centred.

    Args:
        factors: As for `fit_bases`.
        method: As for `fit_bases`.
        weighting: As for `fit_bases`.

    Returns:
        `(rows_in, rows_out)`, weights included; no rows if all updates are zero.

    Raises:
        ValueError: If an argument is unknown or shapes differ.

    Examples:
        >>> import torch
        >>> rows_in, rows_out = stack_rows([(torch.randn(6, 2), torch.randn(2, 5))] * 3, method="balanced")
        >>> rows_in.shape, rows_out.shape
        (torch.Size([6, 5]), torch.Size([6, 6]))
    """
    stacks = stack_factors(factors, rows=_row(method).rows, weighting=weighting)
    return stacks.rows_in, stacks.rows_out


def explained_share_curve(
    factors: ManyFactors,
    *,
    components_in: Float[Tensor, "k n"],
    components_out: Float[Tensor, "k m"],
    weighting: Weighting = "equal",
) -> Float[Tensor, " k"]:
    """Share of `Σ ω²‖ΔW‖²` that the first 1, 2, ..., K components of both sides explain.

    Entry K - 1 is `Σ_i ω_i² ‖V_out ΔW_i V_inᵀ‖² / Σ_i ω_i² ‖ΔW_i‖²` with the first K rows of V_out and V_in: a share of 1, as
    scikit-learn's `explained_variance_ratio_`, summed.

    Args:
        factors: As for `fit_bases`.
        components_in: Orthonormal rows in the input space.
        components_out: Orthonormal rows in the output space, as many.
        weighting: As for `fit_bases`.

    Returns:
        The cumulative share, in the components' dtype.

    Raises:
        ValueError: If the weighting is unknown, shapes differ, or all updates are zero.

    Examples:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> explained_share_curve(
        ...     [(eye, torch.tensor([[3.0, 0.0], [0.0, 4.0]]))], components_in=eye, components_out=eye
        ... )
        tensor([0.3600, 1.0000])
    """
    stacks = stack_factors(factors, rows="raw", weighting=weighting)
    _check_not_zero(stacks)
    return share_curve(stacks, components_in, components_out).to(components_in.dtype)


def _fit_stacks(
    stacks: Stacks, *, n_components: int | float, tol: float, generator: Generator | None, centred: bool = False
) -> FittedBases:
    """Components of both stacks, K of them or as many as a share needs.

    The bases of fewer components are prefixes of those of more, so a share takes one curve per doubling of K.
    """
    _check_not_zero(stacks)
    decompose = centred_components if centred else leading_components
    is_share = isinstance(n_components, float)
    if not (0.0 < n_components <= 1.0 if is_share else n_components >= 1):
        raise ValueError(f"n_components={n_components} must be a whole number >= 1, or a share in (0, 1].")
    trial = _FIRST_TRIAL if is_share else int(n_components)
    while True:
        found_in, found_out = (
            decompose(rows, n_components=trial, tol=tol, generator=generator)
            for rows in (stacks.rows_in, stacks.rows_out)
        )
        rank = min(len(found_in.singular_values), len(found_out.singular_values))
        if not is_share:
            _check_rank(stacks, found_in, found_out, trial)
        fitted = _bases(stacks, found_in, found_out, rank)
        if not is_share:
            return fitted
        curve = fitted.explained_variance_ratio.to(torch.float64).cumsum(0)
        reached = (curve >= n_components - _SHARE_SLACK).nonzero()
        if len(reached) and (n_components < 1.0 or rank < trial):
            return fitted if n_components == 1.0 else _truncated(fitted, int(reached[0]) + 1)
        if rank < trial:
            side = "in" if len(found_in.singular_values) <= len(found_out.singular_values) else "out"
            raise ValueError(
                f"n_components={n_components} cannot be reached: {rank} components, the numerical rank of the {side!r} "
                f"side, explain {float(curve[-1]):.4f}; pass a smaller share, or {rank} for all of them."
            )
        trial *= 2


def _fit_refined(
    factors: ManyFactors,
    *,
    n_components: int | float,
    weighting: Weighting,
    tol: float,
    generator: Generator | None,
) -> FittedBases:
    """The bases of "hooi"; for a share, the number of components is found by bisection."""
    solver: dict[str, Any] = {"tol": tol, "generator": generator}
    starts = [
        _fit_stacks(stack_factors(factors, rows=rows, weighting=weighting), n_components=n_components, **solver)
        for rows in ("moments", "balanced")
    ]
    stacks = stack_factors(factors, rows="moments", weighting=weighting)
    # The fewest components, then the largest share: with a number of components all have as many.
    start = min(starts, key=lambda fitted: (len(fitted.components_in), -float(fitted.explained_variance_ratio.sum())))
    most = len(start.components_in)
    fitted = _refined(stacks, start, tol=tol)
    if n_components >= 1:  # a number of components, or the share of all of them
        return fitted
    fewest = 1
    while fewest < most:
        middle = (fewest + most) // 2
        trial = _refined(stacks, _truncated(start, middle), tol=tol)
        if float(trial.explained_variance_ratio.sum()) >= n_components - _SHARE_SLACK:
            fitted, most = trial, middle
        else:
            fewest = middle + 1
    return fitted


def _fit_paired(
    factors: ManyFactors,
    *,
    n_components: int | float,
    weighting: Weighting,
    tol: float,
    generator: Generator | None,
) -> FittedBases:
    """The pairs of "paired"."""
    if isinstance(n_components, float):
        raise ValueError(
            f"n_components={n_components} is a share, and method='paired' takes a whole number: pairs of fewer are not a part "
            "of pairs of more; pass such a number and look at the explained share."
        )
    rest: dict[str, Any] = {"weighting": weighting, "tol": tol, "generator": generator}
    bases = [fit_bases(factors, n_components=n_components, method=name, **rest) for name in ("hooi", "balanced")]
    stacks = stack_factors(factors, rows="moments", weighting=weighting)
    starts = [(each.components_in, each.components_out) for each in bases] + [leading_pairs(stacks, n_components)]
    pairs = fit_pairs(stacks, starts, tol=tol)
    dtype, values = stacks.rows_in.dtype, pairs.coefficients.norm(dim=0)
    return FittedBases(
        components_in=pairs.components_in.to(dtype),
        components_out=pairs.components_out.to(dtype),
        singular_values_in=values.to(dtype),
        singular_values_out=values.to(dtype),
        explained_variance_ratio=added_shares(pair_curve(stacks, pairs.components_in, pairs.components_out)).to(dtype),
        norms=stacks.norms,
        paired=True,
    )


def _row(method: str) -> Fit:
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; pass one of {', '.join(map(repr, METHODS))}.")
    return METHODS[method]


def _check_not_zero(stacks: Stacks) -> None:
    if not stacks.sizes:
        raise ValueError("every adapter's update is zero, so there is nothing to fit; pass trained adapters.")


def _check_rank(stacks: Stacks, found_in: Decomposition, found_out: Decomposition, n_components: int) -> None:
    ranks = {"in": len(found_in.singular_values), "out": len(found_out.singular_values)}
    side = min(ranks, key=lambda name: ranks[name])
    if ranks[side] < n_components:
        rows = stacks.rows_in if side == "in" else stacks.rows_out
        raise TooFewDirectionsError(
            f"n_components={n_components} exceeds the numerical rank {ranks[side]} of the {side!r} side "
            f"({rows.shape[0]} rows of length {rows.shape[1]} from {len(stacks.sizes)} adapters with an update); "
            f"pass at most {ranks[side]}, or add adapters.",
            rank=ranks[side],
        )


def _bases(stacks: Stacks, found_in: Decomposition, found_out: Decomposition, k: int) -> FittedBases:
    components_in, components_out = found_in.components[:k], found_out.components[:k]
    curve = share_curve(stacks, components_in, components_out)
    return FittedBases(
        components_in=components_in,
        components_out=components_out,
        singular_values_in=found_in.singular_values[:k],
        singular_values_out=found_out.singular_values[:k],
        explained_variance_ratio=added_shares(curve).to(components_in.dtype),
        norms=stacks.norms,
    )


def _truncated(fitted: FittedBases, k: int) -> FittedBases:
    return FittedBases(
        components_in=fitted.components_in[:k],
        components_out=fitted.components_out[:k],
        singular_values_in=fitted.singular_values_in[:k],
        singular_values_out=fitted.singular_values_out[:k],
        explained_variance_ratio=fitted.explained_variance_ratio[:k],
        norms=fitted.norms,
    )


def _refined(stacks: Stacks, start: FittedBases, *, tol: float) -> FittedBases:
    found_in, found_out = refine(stacks, start.components_in, start.components_out, tol=tol)
    return _bases(stacks, found_in, found_out, len(start.components_in))
