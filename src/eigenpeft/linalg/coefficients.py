"""Coefficients of factored matrices on a pair of bases, back, and from one pair of bases to another."""

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.factored import factored_svd, frobenius_norm


def project(
    lora_B: Float[Tensor, "m r"],
    lora_A: Float[Tensor, "r n"],
    *,
    components_out: Float[Tensor, "k_out m"],
    components_in: Float[Tensor, "k_in n"],
) -> tuple[Float[Tensor, "k_out r"], Float[Tensor, "r k_in"]]:
    """Coefficients of `B A` on orthonormal components: `C_out = V_out B`, `C_in = A V_inᵀ`.

    They are those of the orthogonal projection `V_outᵀV_out (B A) V_inᵀV_in`, the closest matrix with rows in the span
    of `components_in` and columns in the span of `components_out` (EigenLoRAx, arXiv 2502.04700, section 3).

    Args:
        lora_B: Left factor, scaling included.
        lora_A: Right factor.
        components_out: Orthonormal rows in the output space.
        components_in: Orthonormal rows in the input space.

    Returns:
        `(coefficients_out, coefficients_in)`, in the components' dtype.

    Examples:
        >>> import torch
        >>> eye = torch.eye(3)
        >>> out, into = project(torch.ones(3, 1), torch.ones(1, 3), components_out=eye[:2], components_in=eye[:1])
        >>> out.tolist(), into.tolist()
        ([[1.0], [1.0]], [[1.0]])
    """
    dtype = components_in.dtype
    return components_out @ lora_B.to(dtype), lora_A.to(dtype) @ components_in.mT


def reconstruct(
    coefficients_out: Float[Tensor, "k_out r"],
    coefficients_in: Float[Tensor, "r k_in"],
    *,
    components_out: Float[Tensor, "k_out m"],
    components_in: Float[Tensor, "k_in n"],
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    """Factors from coefficients: `B = V_outᵀ C_out`, `A = C_in V_in`; the inverse of `project` on the subspace.

    EigenLoRAx (arXiv 2502.04700, section 3) reconstructs a task's factors so.

    Args:
        coefficients_out: Coefficients of the left factor.
        coefficients_in: Coefficients of the right factor.
        components_out: Orthonormal rows in the output space.
        components_in: Orthonormal rows in the input space.

    Returns:
        `(lora_B, lora_A)`, ordinary LoRA factors of the same rank.

    Examples:
        >>> import torch
        >>> eye = torch.eye(3)
        >>> B, A = reconstruct(torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0]]), components_out=eye[:2], components_in=eye[:1])
        >>> (B @ A).tolist()
        [[2.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    return components_out.mT @ coefficients_out, coefficients_in @ components_in


def change_of_bases(
    *,
    old_out: Float[Tensor, "k_out m"],
    old_in: Float[Tensor, "k_in n"],
    new_out: Float[Tensor, "l_out m"],
    new_in: Float[Tensor, "l_in n"],
) -> tuple[Float[Tensor, "l_out k_out"], Float[Tensor, "k_in l_in"]]:
    """What moves a core to other bases: `M' = L M R` with `L = V'_out V_outᵀ` and `R = V_in V'_inᵀ`.

    `V'_outᵀ M' V'_in` is the orthogonal projection of `V_outᵀ M V_in` on the new bases: exact while the old span lies in the
    new one, as when components were added, else the nearest that the new bases hold. "Shared LoRA
    Subspaces" (arXiv 2602.06043) projects earlier tasks on its new basis in this way, in its merge phase.

    Args:
        old_out: V_out.
        old_in: V_in.
        new_out: V'_out, orthonormal rows.
        new_in: V'_in, orthonormal rows.

    Returns:
        `(L, R)`.

    Example:
        >>> import torch
        >>> eye = torch.eye(3)
        >>> left, right = change_of_bases(old_out=eye[:1], old_in=eye[:1], new_out=eye[:2], new_in=eye[:2])
        >>> left @ torch.tensor([[5.0]]) @ right  # the core in the larger bases
        tensor([[5., 0.],
                [0., 0.]])
    """
    return new_out @ old_out.mT, old_in @ new_in.mT


def remainder(
    lora_B: Float[Tensor, "m r"],
    lora_A: Float[Tensor, "r n"],
    *,
    coefficients_out: Float[Tensor, "k_out q"],
    coefficients_in: Float[Tensor, "q k_in"],
    components_out: Float[Tensor, "k_out m"],
    components_in: Float[Tensor, "k_in n"],
    noise: float = 1e-6,
) -> tuple[Float[Tensor, "m s"], Float[Tensor, "s n"]]:
    """What a core does not hold of an update: `B A - V_outᵀ C_out C_in V_in`, as balanced factors of its numerical rank.

    Its rank is at most r + q; it is r - q where the core holds q singular triplets of `B A` itself.

    Args:
        lora_B: Left factor of the update, scaling included.
        lora_A: Right factor.
        coefficients_out: C_out of the core.
        coefficients_in: C_in of the core.
        components_out: Rows in the output space.
        components_in: Rows in the input space.
        noise: Singular values of at most this times `‖B A‖` are zero.

    Returns:
        Two factors, float64, of equal norm; with no columns and rows where the core holds everything.

    Example:
        >>> import torch
        >>> eye, one = torch.eye(3), torch.ones(1, 1)
        >>> left, right = remainder(
        ...     eye[:, :2], eye[:2], coefficients_out=one, coefficients_in=one, components_out=eye[:1], components_in=eye[:1]
        ... )
        >>> (left @ right).diagonal().round(decimals=6).abs().tolist()  # of diag(1, 1, 0) the core holds the first
        [0.0, 1.0, 0.0]
    """
    left, right, rows_out, rows_in = (
        tensor.to(torch.float64) for tensor in (lora_B, lora_A, coefficients_out, coefficients_in)
    )
    columns = torch.cat([left, -components_out.to(torch.float64).mT @ rows_out], dim=1)
    rows = torch.cat([right, rows_in @ components_in.to(torch.float64)])
    parts = factored_svd(columns, rows)
    floor = noise * frobenius_norm(left, right)
    kept = int(torch.count_nonzero(parts.S.gt(floor)))
    roots = parts.S[:kept].sqrt()
    return parts.U[:, :kept] * roots, roots[:, None] * parts.Vh[:kept]
