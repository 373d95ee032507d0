"""Second moments of a weight's inputs, kept on the updates' own input directions: R x R numbers, from which C_t follows."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.bases.stacking import Factors
from eigenpeft.linalg.cores.core_space import EXACT
from eigenpeft.linalg.cores.spectral import count_present
from eigenpeft.linalg.factored import factored_svd
from eigenpeft.linalg.orthogonal import fix_signs


def input_directions(factors: Factors) -> Float[Tensor, "rank n"]:
    """Right singular vectors of one update, leading first, signs fixed: a function of the update alone.

    Args:
        factors: `(lora_B, lora_A)`.

    Examples:
        >>> import torch
        >>> input_directions((torch.ones(3, 1), torch.tensor([[0.0, -2.0]]))).abs().tolist()
        [[0.0, 1.0]]
    """
    svd = factored_svd(factors[0].to(torch.float64), factors[1].to(torch.float64))
    return fix_signs(svd.Vh[: count_present(svd.S, noise=EXACT)])


def moments_on_axes(
    gram: Float[Tensor, "r r"],
    *,
    directions: Sequence[Float[Tensor, "_rank n"]],
    components_in: Float[Tensor, "k_in n"],
) -> Float[Tensor, "k_in k_in"]:
    """`V E[x xᵀ] Vᵀ` from `Z E[x xᵀ] Zᵀ`, Z the directions of all updates, V axes that they span.

    `V = W Z`, so that the moments are `W (Z E[x xᵀ] Zᵀ) Wᵀ`, with `W = V Q R⁻ᵀ` by the decomposition `Zᵀ = Q R`.

    Args:
        gram: `Z E[x xᵀ] Zᵀ`.
        directions: Rows of Z, update by update, as `input_directions` gives them.
        components_in: V.

    Examples:
        >>> import torch
        >>> eye = torch.eye(2).double()
        >>> gram = torch.diag(torch.tensor([4.0, 1.0])).double()  # of x along both directions
        >>> moments_on_axes(gram, directions=[eye[:1], eye[1:]], components_in=eye[1:]).round(decimals=6).tolist()
        [[1.0]]
    """
    q, r = torch.linalg.qr(torch.cat(list(directions)).mT)
    turn = (components_in @ q) @ torch.linalg.pinv(r, rtol=1e-10).mT
    return turn @ gram @ turn.mT
