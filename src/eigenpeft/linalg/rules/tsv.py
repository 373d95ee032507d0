"""TSV-M: the leading singular vectors of every task, made orthogonal between the tasks."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.cores.spectral import common_ranks, polar, triplets, weighted


def tsv(
    cores: Float[Tensor, "t k_out k_in"], *, weights: Float[Tensor, " t"] | Sequence[float] | None = None
) -> Float[Tensor, "k_out k_in"]:
    """`polar([U_1 ... U_T]) diag(S_1, ..., S_T) polar([V_1 ... V_T])ᵀ` (TSV-Merge, arXiv 2412.00081, algorithm 1).

    Each `w_t M_t = U_t S_t V_tᵀ` gives its top ⌊q / T⌋ triplets, at least one; q is the rank that all
    updates span together, on the smaller side.

    Args:
        cores: Updates on common axes.
        weights: One number per update; None for 1.

    Raises:
        ValueError: If the weights do not fit.

    Example:
        >>> import torch
        >>> cores = torch.stack([torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))])
        >>> tsv(cores).diagonal().round(decimals=4)
        tensor([3., 1.])
    """
    updates = weighted(cores, weights)
    most = max(1, min(common_ranks(updates)) // len(updates))
    parts = [triplets(update, most=most) for update in updates]
    left, right = torch.cat([part.U for part in parts], dim=1), torch.cat([part.Vh for part in parts])
    values = torch.cat([part.S for part in parts])
    return (polar(left) * values) @ polar(right.mT).mT
