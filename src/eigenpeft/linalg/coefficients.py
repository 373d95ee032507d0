"""Coefficients of factored matrices on a pair of bases, back, and from one pair of bases to another."""

from jaxtyping import Float
from torch import Tensor


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

    Args:
        coefficients_out: Coefficients of the left factor.
        coefficients_in: Coefficients of the right factor.
        components_out: Orthonormal rows in the output space.
        components_in: Orthonormal rows in the input space.

    Returns:
        `(lora_B, lora_A)`, ordinary LoRA factors of the same rank.
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
    new one, as when components were added, else the nearest that the new bases hold ("Shared LoRA Subspaces", arXiv
    2602.06043, for growing subspaces).

    Args:
        old_out: V_out.
        old_in: V_in.
        new_out: V'_out, orthonormal rows.
        new_in: V'_in, orthonormal rows.

    Returns:
        `(L, R)`.
    """
    return new_out @ old_out.mT, old_in @ new_in.mT
