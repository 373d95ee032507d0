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
# A unit direction of a new block is dropped when the second projection leaves less than this of it: rounding noise. No
# such limit holds for the first projection, where what is small next to one huge eigenvalue may be all the others.
_LEAST_LEFT = 0.1


@dataclass(frozen=True)
class RitzPairs:
    """Approximate leading eigenpairs of a symmetric positive semi-definite operator.

    Attributes:
        vectors: Orthonormal rows, leading first.
        values: Eigenvalue estimates, descending, float64.
        basis: Orthonormal rows: the whole Krylov basis the vectors were taken from.
        n_passes: Applications of the operator.
        promised_gain: Estimate of what one more pass would add to each wanted value, relative to it; their mean.
    """

    vectors: Float[Tensor, "b d"]
    values: Float[Tensor, " b"]
    basis: Float[Tensor, "size d"]
    n_passes: int
    promised_gain: float


def block_krylov(
    apply: Callable[[Float[Tensor, "q d"]], Float[Tensor, "q d"]],
    start: Float[Tensor, "b d"],
    *,
    n_components: int,
    tol: float,
    rounding: float,
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
        n_components: Number of leading pairs that must converge, at most b.
        tol: Stop when one more pass promises to raise the wanted eigenvalues by at most this much of each, on average.
        rounding: Relative error of `apply`, about the machine epsilon of its products: gains below it are not chased.
        max_passes: Stop after this many applications in any case.

    Returns:
        At most b leading pairs; fewer if the operator's rank is smaller.
    """
    block = _orthonormalize(_orthonormalize(start), least=_LEAST_LEFT)
    b, d = start.shape
    capacity = max(min(_MAX_BLOCKS * b, d), 2 * b)
    basis = block.new_empty(capacity, d)
    projected = torch.zeros(capacity, capacity, dtype=torch.float64, device=block.device)
    size, n_passes = 0, 0
    values, rotation = projected[:0, 0], projected[:0, :0]
    promised_gain = 0.0
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
        promised_gain = _promised_gain(
            values,
            last_rows=rotation[new],
            residual=image,
            block_trace=projected[new, new].trace(),
            n_components=n_components,
            rounding=rounding,
        )
        if promised_gain <= tol:
            break
        block = _orthonormalize(image)
        block = _orthonormalize(block - (block @ basis[:size].mT) @ basis[:size], least=_LEAST_LEFT)
    kept = min(b, size)
    return RitzPairs(
        vectors=rotation[:, :kept].mT.to(basis.dtype) @ basis[:size],
        values=values[:kept].clamp(min=0.0),
        basis=basis[:size],
        n_passes=n_passes,
        promised_gain=0.0 if not len(block) else promised_gain,
    )


def _orthonormalize(rows: Float[Tensor, "b d"], *, least: float = 0.0) -> Float[Tensor, "c d"]:
    """Orthonormal rows, leading first, without directions of norm at most `least`.

    By the eigenvectors of the float64 Gram matrix (SVQB; Stathopoulos and Wu, SIAM J. Sci. Comput. 23, 2002): unlike a
    QR decomposition it shows which directions are noise, and sorts them by size, which keeps large ones out of small.
    """
    wide = rows.to(torch.float64)
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    kept = values > max(least**2, 1e-15 * float(values.amax()) if len(values) else 0.0)
    values, vectors = values[kept].flip(0), vectors[:, kept].flip(1)
    return ((vectors * values.rsqrt()).mT @ wide).to(rows.dtype)


def _promised_gain(
    values: Float[Tensor, " size"],
    *,
    last_rows: Float[Tensor, "c size"],
    residual: Float[Tensor, "c d"],
    block_trace: Float[Tensor, ""],
    n_components: int,
    rounding: float,
) -> float:
    """Mean relative amount by which the next block raises the wanted values, to second order.

    The residual of Ritz pair k is `rho_k = ‖last_rows[:, k]ᵀ residual‖`. A new direction whose Rayleigh quotient is
    `mu` raises value k by `rho_k² / (value_k - mu)`, and never by more than `rho_k` (Weyl). The last block's mean
    quotient stands for `mu`: a heuristic, within a factor of two on decaying and noisy spectra alike. Relative to each
    value, so that one huge one does not declare the others found.
    """
    gram = residual.to(torch.float64)
    gram = gram @ gram.mT
    wanted, last = values[:n_components].clamp(min=0.0), last_rows[:, :n_components]
    # Rounding of `apply = XᵀX` leaves √(value_1 value_k) times its relative error in residual k, with a margin here.
    noise = (5.0 * rounding) ** 2 * values[0]
    squared = ((last * (gram @ last)).sum(dim=0) - noise * wanted).clamp(min=0.0)
    gaps = (wanted - block_trace / len(residual)).clamp(min=torch.finfo(torch.float64).tiny)
    gains = torch.minimum(squared.sqrt(), squared / gaps)
    return float((gains / wanted.clamp(min=max(float(noise), torch.finfo(torch.float64).tiny))).mean())
