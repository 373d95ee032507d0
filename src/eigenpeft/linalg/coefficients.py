"""Coefficients of factored matrices on a pair of bases, and back."""

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
