"""Subspace Boosting: the small singular values of the sum are raised, so that the merged update keeps its rank."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.cores.spectral import triplets, weighted


def boosting(
    cores: Float[Tensor, "t k_out k_in"],
    *,
    weights: Float[Tensor, " t"] | Sequence[float] | None = None,
    beta: float = 0.01,
) -> Float[Tensor, "k_out k_in"]:
    """`Σ w_t M_t = U S Vᵀ`; `σ_i := max(σ_i, σ_k)`, k the first index with `Σ_{i≤k} σ_i ≥ β Σσ`.

    Subspace Boosting (Skorobogat et al., "Subspace-Boosted Model Merging", arXiv 2506.16506) of task arithmetic. The
    abstract says what for: a sum of many updates loses rank, and Subspace Boosting "maintains task vector ranks".

    Args:
        cores: Updates on common axes.
        weights: One number per update; None for 1.
        beta: β, above 0 and at most 1; the paper's 0.01 raises nearly all values to the largest, 1 none.

    Raises:
        ValueError: If `beta` is out of range or the weights do not fit.

    Example:
        >>> import torch
        >>> boosting(torch.diag(torch.tensor([4.0, 1.0]))[None], beta=0.5).diagonal()  # 4 is half of 4 + 1: raised to it
        tensor([4., 4.])
    """
    if not 0.0 < beta <= 1.0:
        raise ValueError(
            f"beta={beta} must be above 0 and at most 1: the share of Σσ above which values are left alone."
        )
    total = triplets(weighted(cores, weights).sum(dim=0))
    if not len(total.S):
        return cores[0] * 0.0
    shares = total.S.cumsum(0) / total.S.sum()
    level = total.S[min(int((shares < beta).sum()), len(total.S) - 1)]
    return (total.U * torch.maximum(total.S, level)) @ total.Vh
