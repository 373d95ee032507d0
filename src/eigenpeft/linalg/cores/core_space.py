"""The core space of many updates of one weight: orthonormal axes that span all of them, and each update on these axes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigenpeft.linalg.bases.stacking import Factors
from eigenpeft.linalg.cores.axes import Axes, generic_direction, gram
from eigenpeft.linalg.cores.spectral import count_present
from eigenpeft.linalg.factored import Balancing, FactoredSvd, factored_svd

# Singular values below this share of the largest are rounding noise of float64, for one update and for a stack of many.
EXACT = 1e-13
# Squared condition numbers up to which a Gram matrix gives axes that are orthonormal to a few times 1e-13.
_GRAM_LIMIT = 1000.0


@dataclass(frozen=True)
class CoreSpace:
    """Updates of one weight as small matrices: `ΔW_t = components_outᵀ cores[t] components_in`, float64.

    Attributes:
        axes_out: Orthonormal rows in the output space.
        axes_in: Orthonormal rows in the input space; None where the cores are on the model's own input coordinates.
        cores: One matrix per update.
    """

    axes_out: Axes
    axes_in: Axes | None
    cores: Float[Tensor, "t k_out k_in"]

    @property
    def components_out(self) -> Float[Tensor, "k_out m"]:
        """The axes of the output side, formed anew."""
        return self.axes_out.rows()

    @property
    def components_in(self) -> Float[Tensor, "k_in n"] | None:
        """The axes of the input side, formed anew; None as `axes_in`."""
        return None if self.axes_in is None else self.axes_in.rows()


def core_space(factors: Sequence[Factors]) -> CoreSpace:
    """The core space of updates given as factors; no information is lost and no (m, n) matrix is formed.

    Core Space (Panariello et al., arXiv 2509.17786, whose abstract claims a common basis without loss of information) on balanced
    factors: `M_t = U_Bᵀ ΔW_t V_A`, with U_B and V_A the singular
    vectors of all B side by side and of all A on top of each other. With `ΔW_t = U_t S_t V_tᵀ`, the axes of the input side are
    the right singular vectors of the stack of all `(S_t / ‖S_t‖)^{1/2} V_tᵀ`, those of the output side the left singular
    vectors of all `U_t (S_t / ‖S_t‖)^{1/2}`; `Axes.signed` says which way they point. The published method takes the raw
    factors and forgets lora_alpha: its axes depend on how an update is split into factors, and every rule that works entry by
    entry depends on the axes. These depend on the updates alone: `(B G⁻¹, G A)`, another scale of an update, or another
    order of the updates leaves them where they are. Costs `O((m + n) R² + R³)` with `R = Σ r_t`.

    Args:
        factors: `(lora_B (m, r_t), lora_A (r_t, n))` of each update, the scaling folded into lora_B; ranks may differ.

    Returns:
        `CoreSpace` with at most min(R, m) and min(R, n) axes; none where every update is zero.

    Raises:
        ValueError: If there are no factors, a pair is no `(m, r_t)` and `(r_t, n)` of finite numbers, or their outer sizes
            differ.

    Example:
        >>> import torch
        >>> B, A = torch.randn(6, 2), torch.randn(2, 5)
        >>> space = core_space([(B, A), (B, 2 * A)])
        >>> space.cores.shape
        torch.Size([2, 2, 2])
        >>> update = space.components_out.mT @ space.cores[1] @ space.components_in
        >>> torch.allclose(update, 2 * B.double() @ A.double())
        True
    """
    _check_pairs(factors)
    shapes = {(len(lora_B), lora_A.shape[1]) for lora_B, lora_A in factors}
    if len(shapes) != 1:
        raise ValueError(
            f"factors of {len(factors)} updates of shapes (out, in) {sorted(shapes)} have no common core space; pass at "
            "least one update, all of one shape."
        )
    return _by_grams(factors) or _by_decompositions(factors)


def with_model_inputs(space: CoreSpace) -> CoreSpace:
    """The same updates on the model's own input coordinates: `ΔW_t = components_outᵀ cores[t]`, cores (T, K_out, n).

    For rules that are defined on the entries of input vectors (KnOTS, arXiv 2410.19735, section 4); as large as T lora_A factors of
    rank K_out.

    Args:
        space: From `core_space`.

    Examples:
        >>> import torch
        >>> B, A = torch.randn(6, 2), torch.randn(2, 5)
        >>> space = core_space([(B, A), (B, 2 * A)])
        >>> moved = with_model_inputs(space)
        >>> moved.cores.shape, torch.allclose(moved.components_out.mT @ moved.cores[1], 2 * (B @ A).double(), atol=1e-5)
        (torch.Size([2, 2, 5]), True)
    """
    if space.axes_in is None:
        return space
    return replace(space, axes_in=None, cores=space.cores @ space.axes_in.rows())


def core_factors(
    parts: FactoredSvd, *, space: CoreSpace, rank: int | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Float[Tensor, "m rank"], Float[Tensor, "rank n"]]:
    """A core `M = U S Vᵀ` as LoRA factors of equal norms, `lora_B lora_A = components_outᵀ M components_in`, scaling 1.

    The singular value decomposition of the small core alone gives that of the update, so that cutting it off at `rank` is the
    best approximation of that rank in the Frobenius norm (Eckart and Young, Psychometrika 1, 1936).

    Args:
        parts: Singular triplets of the core on the axes of `space`, leading first.
        space: The axes.
        rank: Rank of the factors, filled up with zeros where the core has less; None takes all triplets.
        dtype: Dtype of the factors; the last product, with the axes, is made in it.

    Returns:
        `(lora_B, lora_A)`.

    Raises:
        ValueError: If `rank` is less than 1.

    Examples:
        >>> import torch
        >>> B, A = torch.randn(6, 2), torch.randn(2, 5)
        >>> space = core_space([(B, A), (B, 2 * A)])
        >>> parts = FactoredSvd(*torch.linalg.svd(space.cores[0], full_matrices=False))
        >>> lora_B, lora_A = core_factors(parts, space=space)
        >>> torch.allclose(lora_B @ lora_A, (B @ A).double(), atol=1e-5)
        True
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} is not a rank of LoRA factors; pass at least 1.")
    kept = len(parts.S) if rank is None else min(rank, len(parts.S))
    roots = parts.S[:kept].sqrt()
    rows = roots[:, None] * parts.Vh[:kept]
    lora_A = rows.to(dtype) if space.axes_in is None else space.axes_in.combined(rows, dtype=dtype)
    lora_B = space.axes_out.combined((parts.U[:, :kept] * roots).mT, dtype=dtype).mT
    missing = 0 if rank is None else rank - kept
    if missing:
        lora_B, lora_A = nn.functional.pad(lora_B, (0, missing)), nn.functional.pad(lora_A, (0, 0, 0, missing))
    return lora_B, lora_A


def _check_pairs(factors: Sequence[Factors]) -> None:
    for position, (lora_B, lora_A) in enumerate(factors):
        left, right = tuple(lora_B.shape), tuple(lora_A.shape)
        if (len(left), len(right)) != (2, 2) or left[1] != right[0]:
            raise ValueError(
                f"factors[{position}] has lora_B {left} and lora_A {right}, whose product is no update; pass lora_B (m, r) and "
                "lora_A (r, n) of one rank r."
            )
        for name, side in (("lora_B", lora_B), ("lora_A", lora_A)):
            broken = side.numel() - int(side.isfinite().sum())
            if broken:
                raise ValueError(
                    f"{broken} of the {side.numel()} numbers in {name} of factors[{position}] are NaN or infinite; leave "
                    "this update out."
                )


def _signed(axes: Sequence[Axes], alongs: Sequence[Tensor], cores: Sequence[Tensor]) -> CoreSpace:
    """The space whose axes point the same way whatever decomposition they came from."""
    (axes_out, signs_out), (axes_in, signs_in) = (side.signed(along) for side, along in zip(axes, alongs, strict=True))
    return CoreSpace(axes_out, axes_in, torch.stack(list(cores)) * (signs_out[:, None] * signs_in))


def _by_grams(factors: Sequence[Factors]) -> CoreSpace | None:
    """From Gram matrices of the factors alone, where they are conditioned well enough; None elsewhere.

    With the balanced rows `Z' = T Z` of all updates (T block diagonal) and `T Z Zᵀ Tᵀ = E Λ Eᵀ`, the axes are
    `Λ^{-1/2} Eᵀ T Z`, and the rows of update t lie on them as `Λ^{1/2} E_tᵀ`.
    """
    blocks_out, blocks_in = tuple(lora_B.mT for lora_B, _ in factors), tuple(lora_A for _, lora_A in factors)
    ranks = [len(lora_A) for lora_A in blocks_in]
    if min(ranks) == 0 or sum(ranks) > min(blocks_out[0].shape[1], blocks_in[0].shape[1]):
        return None
    (gram_out, along_out), (gram_in, along_in) = gram(blocks_out), gram(blocks_in)
    balanced = _balanced(gram_out, gram_in, ranks)
    if balanced is None:
        return None
    turns_out, turns_in, norms = balanced
    axes, sides = [], []
    for whole, turns, blocks in ((gram_out, turns_out, blocks_out), (gram_in, turns_in, blocks_in)):
        turn = torch.block_diag(*turns)
        values, rows = _eigen(turn @ whole @ turn.mT)
        if not _conditioned(values):
            return None
        roots = values.sqrt()[:, None]
        axes.append(Axes(rows @ turn / roots, blocks))
        sides.append((roots * rows).split(ranks, dim=1))
    cores = [norm * (rows_out @ rows_in.mT) for norm, rows_out, rows_in in zip(norms, *sides, strict=True)]
    return _signed(axes, (along_out, along_in), cores)


def _balanced(gram_out: Tensor, gram_in: Tensor, ranks: Sequence[int]) -> tuple[list[Tensor], ...] | None:
    """What turns each update's factors into balanced rows of norm 1, on both sides, and ‖ΔW_t‖; None if conditioned badly."""
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    starts = torch.tensor([0, *ranks[:-1]]).cumsum(0)
    for rank in set(ranks):  # updates of one rank are decomposed together
        members = [i for i, own in enumerate(ranks) if own == rank]
        places = (starts[members][:, None] + torch.arange(rank)).to(gram_out.device)
        (values_out, rows_out), (values_in, rows_in) = (
            _eigen(whole[places[:, :, None], places[:, None, :]]) for whole in (gram_out, gram_in)
        )
        if not (_conditioned(values_out) and _conditioned(values_in)):
            return None
        turned = Balancing.of_roots(values_out.sqrt()[..., None] * rows_out, values_in.sqrt()[..., None] * rows_in)
        norms = turned.singular_values.norm(dim=1)
        roots = norms.sqrt()[:, None, None]
        found |= zip(members, zip(turned.out_side.mT / roots, turned.in_side / roots, norms, strict=True), strict=True)
    sides = zip(*(found[i] for i in range(len(ranks))), strict=True)
    return tuple(list(side) for side in sides)


def _eigen(symmetric: Float[Tensor, "*t k k"]) -> tuple[Float[Tensor, "*t k"], Float[Tensor, "*t k k"]]:
    """Eigenvalues, largest first, and eigenvectors as rows."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(-1), vectors.mT.flip(-2)


def _conditioned(values: Float[Tensor, "*t k"]) -> bool:
    return bool((values[..., -1] * _GRAM_LIMIT > values[..., 0]).all())


def _by_decompositions(factors: Sequence[Factors]) -> CoreSpace:
    """From QR and singular value decompositions: for factors that depend on each other, nearly or wholly."""
    # Updates on an orthonormal basis of all lora_B and all lora_A; everything after this is R x R.
    (directions_out, left), (directions_in, right) = (
        torch.linalg.qr(torch.cat([side.to(torch.float64) for side in sides], dim=1))
        for sides in ([lora_B for lora_B, _ in factors], [lora_A.mT for _, lora_A in factors])
    )
    ranks = [len(lora_A) for _, lora_A in factors]
    outs, ins, roots = [], [], []
    for block_out, block_in in zip(left.split(ranks, dim=1), right.split(ranks, dim=1), strict=True):
        svd = factored_svd(block_out, block_in.mT)
        rank = count_present(svd.S, noise=EXACT)
        outs.append(svd.U[:, :rank].mT)
        ins.append(svd.Vh[:rank])
        roots.append(svd.S[:rank])
    weights = torch.cat([(values / values.norm()).sqrt() if len(values) else values for values in roots])
    turn_out, turn_in = (_row_axes(weights[:, None] * torch.cat(sides)) for sides in (outs, ins))
    cores = [
        (turn_out @ rows_out.mT * values) @ (rows_in @ turn_in.mT)
        for rows_out, rows_in, values in zip(outs, ins, roots, strict=True)
    ]
    axes = Axes(turn_out, (directions_out.mT,)), Axes(turn_in, (directions_in.mT,))
    sides = (directions_out, directions_in)
    return _signed(axes, [side.mT @ generic_direction(len(side)).to(side) for side in sides], cores)


def _row_axes(rows: Float[Tensor, "p n"]) -> Float[Tensor, "k n"]:
    """All right singular vectors of a stack, leading first; by QR, because a Gram matrix loses the last ones."""
    q, r = torch.linalg.qr(rows.mT)
    left, values, _ = torch.linalg.svd(r, full_matrices=False)
    return (q @ left[:, : count_present(values, noise=EXACT)]).mT
