"""What the others' subspace holds of an adapter: leave-one-out curves from one decomposition, without refitting.

Let R be the stacked rows of one side and `R = T V` with `TᵀT = diag(λ)`, from one eigenproblem of the smaller Gram matrix.
Without the rows T_h of what is left out, the components are the leading eigenvectors of `diag(λ) - T_hᵀT_h`, a diagonal
matrix less one of small rank: nothing as long as a row is touched again.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eigenpeft.linalg.bases.stacking import Stacks
from eigenpeft.linalg.scores.update_cosines import update_cosines
from eigenpeft.linalg.shares import leading_squared_norms

# Leading directions kept beyond K in the reduced space of a large problem; see `_remaining_directions`.
_SPARE = 24
# Stacks whose smaller side is larger than this are decomposed in their own precision.
_LARGE = 512
# Eigenvalues of what remains below this share of the largest of the whole are rounding, or directions that only the
# adapters left out have: counting those would explain an adapter by itself.
_NOISE = 1e-7
# See `choose_n_components`.
_ENOUGH = 0.9
_KNEE = 0.2


@dataclass(frozen=True)
class HeldOut:
    """Cumulative shares of each adapter's `‖ω ΔW‖²` for K = 1, 2, ... components fitted without it.

    Attributes:
        both: Inside the subspaces of both sides, `‖V_out ΔW V_inᵀ‖²`.
        input: With the input side projected alone, `‖ΔW V_inᵀ‖²`: what a common lora_A gives.
        output: With the output side projected alone, `‖V_out ΔW‖²`: lora_B starts at zero, no seed can make it alike.
    """

    both: Float[Tensor, "n_adapters k"]
    input: Float[Tensor, "n_adapters k"]
    output: Float[Tensor, "n_adapters k"]


def held_out_curves(
    stacks: Stacks,
    *,
    n_components: int,
    groups: Sequence[Hashable] | None = None,
    hidden: Bool[Tensor, "n_adapters n_adapters"] | None = None,
) -> HeldOut:
    """Share of each `‖ω ΔW_i‖²` that K = 1, 2, ... components explain which were fitted without adapter i.

    Every side is decomposed once; what each adapter left out takes away is solved in the coordinates of that
    decomposition, exactly for small collections and to about 1e-4 for large ones.

    Args:
        stacks: Rows of the adapters, balanced or of second moments.
        n_components: Largest K. Where fewer directions are left, the curve stays at its last value.
        groups: A label for each adapter of the stacks; adapters of one label are left out together. None: each alone.
        hidden: Instead of `groups`: row i marks the adapters that the components which meet adapter i have not seen.

    Returns:
        `HeldOut`, float64, 0 where nothing is left to fit.

    Raises:
        ValueError: If `groups` or `hidden` has another length than there are adapters in the stacks.
    """
    count = len(stacks.sizes)
    if hidden is None:
        labels = list(groups) if groups is not None else list(range(count))
        if len(labels) != count:
            raise ValueError(f"groups has {len(labels)} labels for {count} adapters; pass one each.")
        hidden = torch.tensor([[one == other for other in labels] for one in labels], dtype=torch.bool)
    if hidden.shape != (count, count):
        raise ValueError(
            f"hidden of shape {tuple(hidden.shape)} does not fit {count} adapters; pass {count} x {count}."
        )
    sides = [_coordinates(rows) for rows in (stacks.rows_in, stacks.rows_out)]
    owner = torch.repeat_interleave(torch.arange(count), torch.tensor(stacks.sizes, dtype=torch.long))
    middle = stacks.middle.to(torch.float64)
    shares = [torch.zeros(count, n_components, dtype=torch.float64) for _ in range(3)]
    patterns, which = torch.unique(hidden, dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        directions = [_remaining_directions(*side, pattern[owner], n_components) for side in sides]
        for i in (which == number).nonzero()[:, 0].tolist():
            own = owner == i
            curves = _curves(sides[0][0][own], middle[own, None] * sides[1][0][own], *directions)
            for target, curve in zip(shares, curves, strict=True):
                target[i, : len(curve)] = curve
                target[i, len(curve) :] = curve[-1] if len(curve) else 0.0
    return HeldOut(*shares)


def choose_n_components(share: Float[Tensor, " k"], *, chance: Float[Tensor, " k"]) -> int:
    """Where the held-out gain over chance stops growing.

    Held-out shares never fall with K, because the bases are nested, and so what random directions explain is counted
    off. The result is the fewest components that have both nine tenths of the best gain, and a knee: a further
    component, up to the best, adds less than a fifth of what one has added so far. Both numbers are rules of thumb that
    find planted subspaces of 2 to 40 directions under noise.

    Args:
        share: Held-out share at K = 1, 2, ..., mean over adapters.
        chance: Share that as many random directions explain.

    Returns:
        A number of components, at least 1; 1 where nothing is gained over chance.

    Example:
        >>> import torch
        >>> choose_n_components(torch.tensor([0.45, 0.85, 0.86]), chance=torch.tensor([0.01, 0.02, 0.03]))
        2
    """
    gain = (share - chance).to(torch.float64)
    best = int(gain.argmax()) + 1
    if float(gain[best - 1]) <= 0.0:
        return 1
    steps = torch.arange(1, best + 1, dtype=torch.float64)
    gain = gain[:best]
    still_to_come = (gain[-1] - gain) / (best - steps).clamp(min=1.0)
    reached = (gain >= _ENOUGH * gain[-1]) & (still_to_come < _KNEE * gain / steps)
    return int(reached.nonzero()[0]) + 1


def cosines(stacks: Stacks) -> Float[Tensor, "n_adapters n_adapters"]:
    """`⟨ΔW_i, ΔW_j⟩ / (‖ΔW_i‖ ‖ΔW_j‖)` of every pair, from the Gram matrices of the rows.

    Args:
        stacks: Rows of the adapters.

    Returns:
        Symmetric, ones on the diagonal, float64.

    Example:
        >>> import torch
        >>> from eigenpeft.linalg.bases.stacking import stack_factors
        >>> B, A = torch.ones(3, 1), torch.ones(1, 2)
        >>> cosines(stack_factors([(B, A), (-B, A)], rows="balanced", weighting="equal")).round(decimals=4)
        tensor([[ 1., -1.],
                [-1.,  1.]], dtype=torch.float64)
    """
    rows_in = stacks.rows_in.to(torch.float64)
    rows_out = stacks.middle.to(torch.float64)[:, None] * stacks.rows_out.to(torch.float64)
    products = (rows_in @ rows_in.mT) * (rows_out @ rows_out.mT)
    blocks = [[block.sum() for block in row.split(stacks.sizes, dim=1)] for row in products.split(stacks.sizes, dim=0)]
    inner = torch.tensor([[float(value) for value in row] for row in blocks], dtype=torch.float64)
    squares = inner.diagonal()[:, None].expand_as(inner)
    return update_cosines(inner[None], squares[None], squares.mT[None])


def overlaps(stacks: Stacks) -> Float[Tensor, "n_adapters n_adapters"]:
    """How much the row spaces of every pair overlap, 0 to 1, weighted by their singular values.

    Of one side `‖R_i R_jᵀ‖² / (‖R_i R_iᵀ‖ ‖R_j R_jᵀ‖)`, and of both the geometric mean.

    Args:
        stacks: Rows of the adapters.

    Returns:
        Symmetric, ones on the diagonal, float64.
    """
    owner = torch.repeat_interleave(torch.arange(len(stacks.sizes)), torch.tensor(stacks.sizes))
    member = torch.nn.functional.one_hot(owner, len(stacks.sizes)).to(torch.float64)  # (rows, n_adapters)
    product = torch.ones((), dtype=torch.float64)
    for rows in (stacks.rows_in, stacks.rows_out):
        wide = rows.to(torch.float64)
        block = member.mT @ (wide @ wide.mT).square() @ member
        product = product * block / (block.diagonal()[:, None] * block.diagonal()).sqrt()
    return product.sqrt()


def _coordinates(rows: Float[Tensor, "p n"]) -> tuple[Float[Tensor, "p d"], Float[Tensor, " d"]]:
    """T and λ of `R = T V`, `TᵀT = diag(λ)`, descending, of the numerical rank; float64.

    Large stacks of float32 rows are decomposed in float32, in half the time. Eigenvectors whose eigenvalues are close are then
    less exact, but this changes the held-out shares by less than the reduced space of `_remaining_directions` does.
    """
    p, n = rows.shape
    exact = rows if min(p, n) > _LARGE else rows.to(torch.float64)
    gram = exact @ exact.mT if p <= n else exact.mT @ exact
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).to(torch.float64), vectors.flip(1)
    floor = values[0] * torch.finfo(rows.dtype).eps if len(values) else 0.0
    kept = int((values > floor).sum())
    values, vectors = values[:kept], vectors[:, :kept]
    return vectors.to(torch.float64) * values.sqrt() if p <= n else (exact @ vectors).to(torch.float64), values


def _remaining_directions(
    rows: Float[Tensor, "p d"], values: Float[Tensor, " d"], hidden: Bool[Tensor, " p"], n_components: int
) -> Float[Tensor, "d k"]:
    """Leading eigenvectors of `diag(λ) - T_hᵀT_h`, without those of eigenvalue zero.

    Small problems are solved as they are. In large ones the space is reduced to the leading coordinates and, for the
    others together, the span of T_h and diag(λ) T_h there: an eigenvector's tail is `(diag(λ) - μ)⁻¹ T_hᵀ c`, of which
    these are the first terms in λ/μ. The Ritz values are never too large.
    """
    held = rows[hidden]
    d, leading = len(values), n_components + _SPARE
    if d == 0:
        return values.new_zeros(0, 0)
    if leading + 2 * len(held) >= d:
        ritz, vectors = torch.linalg.eigh(torch.diag(values) - held.mT @ held)
    else:
        tail = held[:, leading:]
        extra = torch.linalg.qr(torch.cat([tail, tail * (values[leading:] / values[leading])]).mT).Q  # (d - leading, e)
        reduced = torch.cat([held[:, :leading], tail @ extra], dim=1)
        operator = -(reduced.mT @ reduced)
        operator.diagonal()[:leading] += values[:leading]
        operator[leading:, leading:] += extra.mT @ (values[leading:, None] * extra)
        ritz, small = torch.linalg.eigh(operator)
        vectors = torch.cat([small[:leading], extra @ small[leading:]])
    kept = int((ritz > _NOISE * values[0]).sum())
    return vectors.flip(1)[:, : min(kept, n_components)]


def _curves(
    rows_in: Float[Tensor, "r d_in"],
    rows_out: Float[Tensor, "r d_out"],
    directions_in: Float[Tensor, "d_in k_in"],
    directions_out: Float[Tensor, "d_out k_out"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of `‖rows_outᵀ rows_in‖²` by both sides, by the input side, by the output side."""
    coefficients_in, coefficients_out = rows_in @ directions_in, rows_out @ directions_out
    gram_in, gram_out = rows_in @ rows_in.mT, rows_out @ rows_out.mT
    norm = (gram_in * gram_out).sum()
    side_in = (coefficients_in * (gram_out @ coefficients_in)).sum(0).cumsum(0)
    side_out = (coefficients_out * (gram_in @ coefficients_out)).sum(0).cumsum(0)
    core = (coefficients_out.mT @ coefficients_in).square()
    # Where one side has fewer directions left, the pairs end there.
    both = leading_squared_norms(core)[: min(core.shape)] if core.numel() else core.new_zeros(0)
    return both / norm, side_in / norm, side_out / norm
