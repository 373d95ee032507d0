"""Adaptive block Krylov iteration: leading eigenvectors of an operator too large for a dense solver."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Blocks the basis holds before it is compressed to its Ritz vectors. More blocks converge in fewer passes, but their
# orthogonalisation costs more than it saves beyond about eight. Eight blocks of 72 x 4096 float32 are 9 MB.
_MAX_BLOCKS = 8
_MAX_PASSES = 100
# A direction of a new block is dropped when less than this is left of it, relative to the operator's norm in the first
# round of orthogonalisation and to 1 in the second: what is left is rounding noise.
_NOISE_FIRST, _NOISE_SECOND = 1e-7, 0.1


@dataclass(frozen=True)
class RitzPairs:
    """Approximate leading eigenpairs of a symmetric positive semi-definite operator.

    Attributes:
        vectors: Orthonormal rows, leading first.
        values: Eigenvalue estimates, descending, float64.
        basis: Orthonormal rows: the whole Krylov basis the vectors were taken from.
        n_passes: Applications of the operator.
        missing_share: Estimate of what one more pass would add to the sum of the wanted values, relative to it.
    """

    vectors: Float[Tensor, "b d"]
    values: Float[Tensor, "b"]
    basis: Float[Tensor, "size d"]
    n_passes: int
    missing_share: float


def block_krylov(
    apply: Callable[[Tensor], Tensor],
    start: Float[Tensor, "b d"],
    *,
    n_wanted: int,
    tol: float,
    max_passes: int = _MAX_PASSES,
) -> RitzPairs:
    """Leading eigenpairs of a positive semi-definite operator by block Lanczos with thick restarts.

    Every new block is orthogonalised twice against the whole basis and twice within itself, in the order project,
    orthonormalise, project, orthonormalise: with the two projections first, a fast-decaying spectrum silently leaves a
    basis that is not orthogonal. Rayleigh-Ritz steps are solved in float64. A basis of eight blocks is compressed to
    its leading Ritz vectors (thick restart; Wu and Simon, SIAM J. Matrix Anal. Appl. 22, 2000).

    Args:
        apply: Maps rows Q (b, d) to Q C for the operator C (d, d).
        start: Rows that span the first block; need not be orthonormal. Their number is the block size.
        n_wanted: Number of leading pairs that must converge, at most b.
        tol: Stop when one more pass promises to add at most this share to the sum of the wanted eigenvalues.
        max_passes: Stop after this many applications in any case.

    Returns:
        At most b leading pairs; fewer if the operator's rank is smaller.
    """
    block = _orthonormalise(_orthonormalise(start, floor=0.0), floor=_NOISE_SECOND)
    b, d = start.shape
    capacity = max(min(_MAX_BLOCKS * b, d), 2 * b)
    basis = block.new_empty(capacity, d)
    projected = torch.zeros(capacity, capacity, dtype=torch.float64, device=block.device)
    size, n_passes = 0, 0
    values, rotation = projected[:0, 0], projected[:0, :0]
    missing_share = 0.0
    while len(block) and n_passes < max_passes:
        if size + len(block) > capacity:
            basis[:b] = rotation[:, :b].mT.to(basis.dtype) @ basis[:size]
            projected.zero_()
            projected[:b, :b].diagonal().copy_(values[:b])
            size = b
        new = slice(size, size + len(block))
        size += len(block)
        basis[new] = block
        image = apply(block)
        n_passes += 1
        couplings = image @ basis[:size].mT
        projected[new, :size] = couplings.to(torch.float64)
        projected[:size, new] = projected[new, :size].mT
        projected[new, new] = (projected[new, new] + projected[new, new].mT) / 2
        image = image - couplings @ basis[:size]

        values, rotation = torch.linalg.eigh(projected[:size, :size])
        values, rotation = values.flip(0), rotation.flip(1)
        missing_share = _promised_gain(values, rotation[new], image, projected[new, new].trace(), n_wanted)
        if missing_share <= tol:
            break
        block = _orthonormalise(image, floor=_NOISE_FIRST * float(values[0]))
        block = _orthonormalise(block - (block @ basis[:size].mT) @ basis[:size], floor=_NOISE_SECOND)
    kept = min(b, size)
    return RitzPairs(
        vectors=rotation[:, :kept].mT.to(basis.dtype) @ basis[:size],
        values=values[:kept].clamp(min=0.0),
        basis=basis[:size],
        n_passes=n_passes,
        missing_share=0.0 if not len(block) else missing_share,
    )


def _orthonormalise(rows: Float[Tensor, "b d"], *, floor: float) -> Float[Tensor, "c d"]:
    """Orthonormal rows, leading first, without directions of norm at most `floor`.

    By the eigenvectors of the float64 Gram matrix (SVQB; Stathopoulos and Wu, SIAM J. Sci. Comput. 23, 2002): unlike a
    QR decomposition it shows which directions are noise, and sorts them by size, which keeps large ones out of small.
    """
    wide = rows.to(torch.float64)
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    kept = values > max(floor**2, 1e-15 * float(values.amax()) if len(values) else 0.0)
    values, vectors = values[kept].flip(0), vectors[:, kept].flip(1)
    return ((vectors * values.rsqrt()).mT @ wide).to(rows.dtype)


def _promised_gain(
    values: Float[Tensor, "size"],
    last_rows: Float[Tensor, "c size"],
    residual: Float[Tensor, "c d"],
    block_trace: Float[Tensor, ""],
    n_wanted: int,
) -> float:
    """Estimate, to second order, of what the next block adds to the sum of the wanted values, relative to that sum.

    The residual of Ritz pair k is `rho_k = ‖last_rows[:, k]ᵀ residual‖`. A new direction whose Rayleigh quotient is
    `mu` raises value k by `rho_k² / (value_k - mu)`, and never by more than `rho_k` (Weyl). The last block's mean
    quotient stands for `mu`: a heuristic, within a factor of two on decaying and noisy spectra alike.
    """
    gram = residual.to(torch.float64)
    gram = gram @ gram.mT
    wanted = last_rows[:, :n_wanted]
    squared = (wanted * (gram @ wanted)).sum(dim=0).clamp(min=0.0)
    gaps = (values[:n_wanted] - block_trace / len(residual)).clamp(min=torch.finfo(torch.float64).tiny)
    total = float(values[:n_wanted].sum())
    return float(torch.minimum(squared.sqrt(), squared / gaps).sum()) / total if total > 0.0 else 0.0
