"""Gradients of a weight kept as tokens, `G = Δᵀ X` with one row of each factor per token, and their squared norm in a subspace."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.bases.paired import pair_coefficients
from eigenpeft.linalg.factored import factored_svd
from eigenpeft.linalg.shares import leading_squared_norms


@dataclass(frozen=True)
class SquaredNormSplit:
    """Squared norms of a gradient's parts; shares are quotients with `total`.

    Attributes:
        total: `‖G‖²`.
        in_subspace: Entry K - 1 is `‖V_out G V_inᵀ‖²` for the first K components of both sides.
        diagonal: `Σ_k (v_out,k G v_in,kᵀ)²`, what coefficients on matching components alone can reach.
        best: Entry K - 1 is the most that any K components of each side hold: the K largest squared singular values.
    """

    total: float
    in_subspace: Float[Tensor, " k"]
    diagonal: float
    best: Float[Tensor, " k"]


def append_tokens(
    kept: tuple[Float[Tensor, "t m"], Float[Tensor, "t n"]] | None,
    deltas: Float[Tensor, "s m"],
    inputs: Float[Tensor, "s n"],
) -> tuple[Float[Tensor, "u m"], Float[Tensor, "u n"]]:
    """Add tokens to a gradient; never more rows than the narrower side is wide, and nothing is lost.

    With more rows, `X = Q R` gives `ΔᵀX = (QᵀΔ)ᵀ R` (and likewise for Δ), the same product of fewer rows.

    Args:
        kept: What was gathered so far, or None.
        deltas: Gradients of the loss by the outputs, one row per token.
        inputs: Inputs, one row per token.

    Returns:
        `(Δ, X)` with `ΔᵀX` the sum over all tokens, float64.
    """
    left, right = deltas.to(torch.float64), inputs.to(torch.float64)
    if kept is not None:
        left, right = torch.cat([kept[0], left]), torch.cat([kept[1], right])
    if len(left) <= min(left.shape[1], right.shape[1]):
        return left, right
    if right.shape[1] <= left.shape[1]:
        q, r = torch.linalg.qr(right)
        return q.mT @ left, r
    q, r = torch.linalg.qr(left)
    return r, q.mT @ right


def split_squared_norm(
    deltas: Float[Tensor, "t m"],
    inputs: Float[Tensor, "t n"],
    *,
    components_out: Float[Tensor, "k_out m"],
    components_in: Float[Tensor, "k_in n"],
    paired: bool = False,
) -> SquaredNormSplit:
    """How much of `G = ΔᵀX` a pair of bases holds.

    Args:
        deltas: Δ, as `append_tokens` gives it.
        inputs: X.
        components_out: Orthonormal rows in the output space.
        components_in: Orthonormal rows in the input space.
        paired: Whether the rows are paired directions, of unit norm and not orthogonal; `in_subspace` is then of their spans,
            and `diagonal` of the span of the rank-one matrices `p_out,k p_in,kᵀ`.

    Returns:
        `SquaredNormSplit`.

    Example:
        >>> import torch
        >>> split = split_squared_norm(
        ...     torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]),
        ...     components_out=torch.eye(2)[:1], components_in=torch.eye(2)[:1],
        ... )
        >>> split.total, split.in_subspace.tolist()
        (25.0, [9.0])
    """
    pairs = _pair_squared_norm(deltas, inputs, components_out, components_in) if paired else None
    if paired:
        components_out, components_in = _axes(components_out), _axes(components_in)
    core = (deltas @ components_out.to(deltas).mT).mT @ (inputs @ components_in.to(inputs).mT)
    values = factored_svd(deltas.mT, inputs).S.square()
    in_subspace = leading_squared_norms(core.square())
    # A core has no more singular values than its smaller side.
    best = values.cumsum(0)[: min(core.shape)]
    best = torch.cat([best, best[-1:].expand(len(in_subspace) - len(best))])
    return SquaredNormSplit(
        total=float(values.sum()),
        in_subspace=in_subspace,
        diagonal=float(core.diagonal().square().sum()) if pairs is None else pairs,
        best=best,
    )


def _pair_squared_norm(deltas: Tensor, inputs: Tensor, components_out: Tensor, components_in: Tensor) -> float:
    """`bᵀ H⁻¹ b` of `b_k = p_out,k G p_in,kᵀ` and the pairs' Gram matrix H."""
    products = ((deltas @ components_out.to(deltas).mT) * (inputs @ components_in.to(inputs).mT)).sum(dim=0)
    found = pair_coefficients(deltas.mT, inputs, components_out=components_out, components_in=components_in)
    return float(products @ found.to(products))


def _axes(rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
    """Orthonormal axes whose first k span the first k rows; zeros where a row adds nothing to those before it."""
    q, r = torch.linalg.qr(rows.to(torch.float64).mT)
    return (q * (r.diagonal().abs() > 1e-6)).mT
