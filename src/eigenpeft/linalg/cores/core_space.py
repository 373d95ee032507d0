"""The core space of many updates of one weight: orthonormal axes that span all of them, and each update on these axes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.bases.stacking import Factors
from eigenpeft.linalg.cores.spectral import count_present
from eigenpeft.linalg.factored import FactoredSvd, factored_svd
from eigenpeft.linalg.orthogonal import fix_signs

# Singular values below this share of the largest are rounding noise of float64, for one update and for a stack of many.
EXACT = 1e-13


@dataclass(frozen=True)
class CoreSpace:
    """Updates of one weight as small matrices: `ΔW_t = components_outᵀ cores[t] components_in`, float64.

    Attributes:
        components_out: Orthonormal rows in the output space.
        components_in: Orthonormal rows in the input space; None where the cores are on the model's own input coordinates.
        cores: One matrix per update.
    """

    components_out: Float[Tensor, "k_out m"]
    components_in: Float[Tensor, "k_in n"] | None
    cores: Float[Tensor, "t k_out k_in"]


def core_space(factors: Sequence[Factors]) -> CoreSpace:
    """The core space of updates given as factors; no information is lost and no (m, n) matrix is formed.

    Core Space (arXiv 2509.17786) on balanced factors. With `ΔW_t = U_t S_t V_tᵀ`, the axes of the input side are the
    right singular vectors of the stack of all `(S_t / ‖S_t‖)^{1/2} V_tᵀ`, those of the output side the left singular vectors
    of all `U_t (S_t / ‖S_t‖)^{1/2}`; the entry of largest magnitude of each is positive. The published method takes the raw
    factors and forgets lora_alpha: its axes depend on how an update is split into factors, and every rule that works entry by
    entry depends on the axes. These depend on the updates alone: `(B G⁻¹, G A)`, another scale of an update, or another
    order of the updates leaves them where they are. Costs `O((m + n) R² + R³)` with `R = Σ r_t`.

    Args:
        factors: `(lora_B (m, r_t), lora_A (r_t, n))` of each update, the scaling folded into lora_B; ranks may differ.

    Returns:
        `CoreSpace` with at most min(R, m) and min(R, n) axes; none where every update is zero.

    Raises:
        ValueError: If there are no factors, or their outer sizes differ.

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
    shapes = {(len(lora_B), lora_A.shape[1]) for lora_B, lora_A in factors}
    if len(shapes) != 1:
        raise ValueError(
            f"factors of {len(factors)} updates of shapes (out, in) {sorted(shapes)} have no common core space; pass at "
            "least one update, all of one shape."
        )
    outs, ins, roots = [], [], []
    for lora_B, lora_A in factors:
        svd = factored_svd(lora_B.to(torch.float64), lora_A.to(torch.float64))
        rank = count_present(svd.S, noise=EXACT)
        outs.append(svd.U[:, :rank].mT)
        ins.append(svd.Vh[:rank])
        roots.append(svd.S[:rank])
    weights = torch.cat([(values / values.norm()).sqrt() if len(values) else values for values in roots])
    components_out, components_in = (_axes(weights[:, None] * torch.cat(sides)) for sides in (outs, ins))
    cores = [
        (components_out @ out.mT * values) @ (inside @ components_in.mT)
        for out, inside, values in zip(outs, ins, roots, strict=True)
    ]
    return CoreSpace(components_out=components_out, components_in=components_in, cores=torch.stack(cores))


def with_model_inputs(space: CoreSpace) -> CoreSpace:
    """The same updates on the model's own input coordinates: `ΔW_t = components_outᵀ cores[t]`, cores (T, K_out, n).

    For rules that are defined on the entries of input vectors (KnOTS); as large as T lora_A factors of rank K_out.

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
    if space.components_in is None:
        return space
    return replace(space, components_in=None, cores=space.cores @ space.components_in)


def core_factors(
    parts: FactoredSvd, space: CoreSpace, *, rank: int | None = None
) -> tuple[Float[Tensor, "m rank"], Float[Tensor, "rank n"]]:
    """A core `M = U S Vᵀ` as LoRA factors of equal norms, `lora_B lora_A = components_outᵀ M components_in`, scaling 1.

    The singular value decomposition of the small core alone gives that of the update, so that cutting it off at `rank` is the
    best approximation of that rank in the Frobenius norm (Eckart and Young, Psychometrika 1, 1936).

    Args:
        parts: Singular triplets of the core on the axes of `space`, leading first.
        space: The axes.
        rank: Rank of the factors, filled up with zeros where the core has less; None takes all triplets.

    Returns:
        `(lora_B, lora_A)`, float64.

    Raises:
        ValueError: If `rank` is less than 1.

    Examples:
        >>> import torch
        >>> B, A = torch.randn(6, 2), torch.randn(2, 5)
        >>> space = core_space([(B, A), (B, 2 * A)])
        >>> parts = FactoredSvd(*torch.linalg.svd(space.cores[0], full_matrices=False))
        >>> lora_B, lora_A = core_factors(parts, space)
        >>> torch.allclose(lora_B @ lora_A, (B @ A).double(), atol=1e-5)
        True
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} is not a rank of LoRA factors; pass at least 1.")
    kept = len(parts.S) if rank is None else min(rank, len(parts.S))
    roots = parts.S[:kept].sqrt()
    rows = roots[:, None] * parts.Vh[:kept]
    if space.components_in is not None:
        rows = rows @ space.components_in
    lora_B = rows.new_zeros(space.components_out.shape[1], kept if rank is None else rank)
    lora_A = rows.new_zeros(lora_B.shape[1], rows.shape[1])
    lora_B[:, :kept] = space.components_out.mT @ (parts.U[:, :kept] * roots)
    lora_A[:kept] = rows
    return lora_B, lora_A


def _axes(rows: Float[Tensor, "p n"]) -> Float[Tensor, "k n"]:
    """All right singular vectors of a stack, leading first, signs fixed; by QR, because a Gram matrix loses the last ones."""
    q, r = torch.linalg.qr(rows.mT)
    left, values, _ = torch.linalg.svd(r, full_matrices=False)
    rank = count_present(values, noise=EXACT)
    return fix_signs((q @ left[:, :rank]).mT.contiguous())
