"""Compress, then merge: a common subspace of K directions on each side, and a sum of the K x K cores in it."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.bases.fitting import fit_bases
from eigenpeft.linalg.cores.spectral import weighted

# The cores are small: let the iteration converge.
_TOL = 1e-10


def compress_then_merge(
    cores: Float[Tensor, "t k_out k_in"],
    *,
    weights: Float[Tensor, " t"] | Sequence[float] | None = None,
    n_components: int = 16,
    beta: float = 0.25,
) -> Float[Tensor, "k_out k_in"]:
    """`Pᵀ (Σ w_t P M_t Qᵀ) Q`, with P and Q fitted by HOOI to the updates at partly equalised norms.

    Compress then Merge (He et al., arXiv 2606.03723) with the sum as its merging rule: the Tucker-2 decomposition of the
    rescaled targets `M_t / ‖M_t‖ · (β ‖M_t‖ + (1 - β) mean ‖M‖)` gives bases of K rows that lose least of them, and the updates
    as they are become the K x K matrices `P M_t Qᵀ` that are merged. The decomposition runs in the core space, which loses nothing
    (theorems 4.1 and 4.3 there). The result has rank K at most.

    Args:
        cores: Updates on common axes.
        weights: One number per update; None for 1.
        n_components: K; more than there are directions takes all of them.
        beta: 1 leaves the norms as they are, 0 makes them equal; the paper's 0.25.

    Raises:
        ValueError: If an argument is out of range or the weights do not fit.

    Example:
        >>> import torch
        >>> cores = torch.stack([torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([2.0, 1.0]))])
        >>> compress_then_merge(cores, n_components=1).abs().round(decimals=4)  # the one direction that loses least
        tensor([[4., 0.],
                [0., 0.]])
    """
    if n_components < 1:
        raise ValueError(f"n_components={n_components} is not a number of components; pass at least 1.")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta} must be between 0 and 1: how much of the differences in norm is kept.")
    updates = weighted(cores, weights)
    norms = torch.linalg.vector_norm(updates, dim=(1, 2))
    levels = beta * norms + (1.0 - beta) * norms.mean()
    equal = updates * torch.where(norms > 0, levels / norms.where(norms > 0, 1.0), 0.0)[:, None, None]
    most = min(
        int(torch.linalg.matrix_rank(equal.flatten(0, 1))), int(torch.linalg.matrix_rank(equal.mT.flatten(0, 1)))
    )
    if n_components >= most:
        return updates.sum(dim=0)  # the bases would span everything: only a pair of equal numbers of rows is fitted
    identity = torch.eye(cores.shape[2], dtype=cores.dtype, device=cores.device)
    bases = fit_bases(
        [(update, identity) for update in equal], n_components=n_components, method="hooi", weighting="none", tol=_TOL
    )
    projected = bases.components_out @ updates.sum(dim=0) @ bases.components_in.mT
    return bases.components_out.mT @ projected @ bases.components_in
