"""Shares of a squared norm: what the first 1, 2, ... components of both sides hold, and what each of them adds."""

import torch
from jaxtyping import Float
from torch import Tensor


def leading_squared_norms(squares: Float[Tensor, "k_out k_in"]) -> Float[Tensor, " k"]:
    """`‖V_out[:k] ΔW V_in[:k]ᵀ‖²` for k = 1, 2, ..., max(K_out, K_in), as prefix sums.

    The squared norm of the leading k x k block of the core. A side with fewer components than k takes part with all of them.

    Args:
        squares: Squared entries of the core `V_out ΔW V_inᵀ`, or their sum over many updates.

    Returns:
        Never falling; its last entry is the sum of all squares.

    Example:
        >>> import torch
        >>> leading_squared_norms(torch.tensor([[4.0, 1.0], [1.0, 2.0], [0.0, 3.0]]))
        tensor([ 4.,  8., 11.])
    """
    sums = squares.cumsum(0).cumsum(1)
    n_out, n_in = squares.shape
    last = torch.arange(max(n_out, n_in), device=squares.device)
    return sums[last.clamp(max=n_out - 1), last.clamp(max=n_in - 1)]


def added_shares(curve: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """What each component adds to a cumulative curve; the inverse of `cumsum`.

    Args:
        curve: Share of the first 1, 2, ... components.

    Returns:
        The first share, then the differences.

    Example:
        >>> import torch
        >>> added_shares(torch.tensor([0.5, 0.75, 0.875]))
        tensor([0.5000, 0.2500, 0.1250])
    """
    return torch.diff(curve, prepend=curve.new_zeros(1))
