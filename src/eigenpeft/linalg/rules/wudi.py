"""WUDI in closed form: the merged update interferes least with each task's own input directions."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.cores.spectral import common_ranks, weighted


def wudi(
    cores: Float[Tensor, "t k_out k_in"],
    *,
    weights: Float[Tensor, " t"] | Sequence[float] | None = None,
    ridge: float = 1e-3,
) -> Float[Tensor, "k_out k_in"]:
    """`M = (Σ M_t G_t + ρ Σ M_t)(Σ G_t + ρ I)⁻¹`, `G_t = M_tᵀM_t / ‖M_t‖²` (WUDI-Merging, arXiv 2503.08099).

    The paper descends `Σ ‖(M - M_t) M_tᵀ‖² / ‖M_t‖²` (its section 3.3) from `M = Σ M_t`; this is its minimiser, with a ridge
    towards that start where the updates say nothing. `ρ = ridge · trace(Σ G_t)` per direction that the updates span on the input
    side.

    Args:
        cores: Updates on common axes.
        weights: One number per update, which scales it before everything else; None for 1.
        ridge: Weight of the start, above 0.

    Raises:
        ValueError: If `ridge` is not above 0 or the weights do not fit.

    Example:
        >>> import torch
        >>> cores = torch.stack([torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))])
        >>> wudi(cores).diagonal().round(decimals=2)
        tensor([3., 1.])
    """
    if not ridge > 0.0:
        raise ValueError(f"ridge={ridge} must be above 0: without it the least interference has many solutions.")
    updates = weighted(cores, weights)
    norms = torch.linalg.vector_norm(updates, dim=(1, 2)).square()
    scaled = updates / norms.where(norms > 0, 1.0).sqrt()[:, None, None]
    grams = scaled.mT @ scaled
    total = grams.sum(dim=0)
    rho = ridge * total.trace() / max(1, common_ranks(updates)[1])
    goal = (updates @ grams).sum(dim=0) + rho * updates.sum(dim=0)
    if rho == 0.0:
        return goal  # every update is zero
    return torch.linalg.solve(
        total + rho * torch.eye(len(total), dtype=total.dtype, device=total.device), goal, left=False
    )
