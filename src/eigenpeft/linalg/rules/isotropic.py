"""Isotropic merging: equal singular values for all directions of the sum, with or without directions of single tasks."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.cores.spectral import common_ranks, polar, triplets, weighted


def iso_c(
    cores: Float[Tensor, "t k_out k_in"], *, weights: Float[Tensor, " t"] | Sequence[float] | None = None
) -> Float[Tensor, "k_out k_in"]:
    """`Σ w_t M_t = U S Vᵀ`; the result is `mean(S) U Vᵀ` (Marczak et al., arXiv 2502.04959, equations 7 and 8).

    Args:
        cores: Updates on common axes.
        weights: One number per update; None for 1.

    Raises:
        ValueError: If the weights do not fit.

    Example:
        >>> import torch
        >>> iso_c(torch.stack([torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))]))
        tensor([[2., 0.],
                [0., 2.]])
    """
    total = triplets(weighted(cores, weights).sum(dim=0))
    return total.S.mean().nan_to_num() * (total.U @ total.Vh)


def iso_cts(
    cores: Float[Tensor, "t k_out k_in"],
    *,
    weights: Float[Tensor, " t"] | Sequence[float] | None = None,
    common_share: float = 0.8,
) -> Float[Tensor, "k_out k_in"]:
    """`iso_c` whose last directions are those of single tasks (Iso-CTS, arXiv 2502.04959, algorithm 2).

    With q the rank that all updates span together: `d = round((q - int(common_share q)) / T)` directions for each task and
    `k = q - T d` common ones. The common ones are the top k triplets of `Σ w_t M_t`, those of a task the top d of
    `R_t = w_t M_t - U_c U_cᵀ w_t M_t` (equation 10). All left and all right vectors are made orthonormal by their polar factors
    (equation 11); every singular value is the mean of all (equations 12 and 13).

    Args:
        cores: Updates on common axes.
        weights: One number per update; None for 1.
        common_share: Share of the directions that are common; the paper's 0.8.

    Raises:
        ValueError: If `common_share` is not between 0 and 1, or the weights do not fit.

    Example:
        >>> import torch
        >>> cores = torch.stack([torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))])
        >>> torch.linalg.svdvals(iso_cts(cores)).round(decimals=4)  # all directions weigh alike
        tensor([2., 2.])
    """
    if not 0.0 <= common_share <= 1.0:
        raise ValueError(f"common_share={common_share} must be between 0 and 1: the share of common directions.")
    updates = weighted(cores, weights)
    q = min(common_ranks(updates))
    per_task = round((q - int(common_share * q)) / len(updates))
    common = triplets(updates.sum(dim=0), most=max(0, q - len(updates) * per_task))
    parts = [common]
    for update in updates:
        rest = update - common.U @ (common.U.mT @ update)
        # What the common directions hold of an update wholly leaves rounding noise, which is not a direction of the task.
        if per_task and float(rest.norm()) > 1e-7 * float(update.norm()):
            parts.append(triplets(rest, most=per_task))
    left, right = torch.cat([part.U for part in parts], dim=1), torch.cat([part.Vh for part in parts])
    level = torch.cat([part.S for part in parts]).mean().nan_to_num()
    return level * (polar(left) @ polar(right.mT).mT)
