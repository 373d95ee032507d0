"""RegMean: the update whose outputs are nearest to those of every task on that task's own inputs."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.cores.spectral import weighted
from eigenpeft.linalg.rules.sums import mean


def regmean(
    cores: Float[Tensor, "t k_out k_in"],
    *,
    weights: Float[Tensor, " t"] | Sequence[float] | None = None,
    grams: Float[Tensor, "s k_in k_in"],
    shrink: float = 0.95,
    ridge: float = 1e-4,
) -> Float[Tensor, "k_out k_in"]:
    """`M = (Σ |w_t| M_t C_t + ρ M̄)(Σ |w_t| C_t + ρ I)⁻¹` (RegMean; Jin et al., arXiv 2212.09849, equation 2).

    `C_t = V E_t[x xᵀ] Vᵀ` are second moments of the inputs of task t on the axes V, their off-diagonal entries times
    `shrink`; `M̄` is the weighted mean, `ρ = ridge · trace(Σ |w_t| C_t) / K_in`. The minimiser of
    `Σ |w_t| E_t‖(M - sign(w_t) M_t) V x‖²`: a weight is a task's importance, and a negative one asks for the opposite update.
    MaTS (arXiv 2312.04339) minimises the same with input Grams. The ridge and the weights are ours.

    Args:
        cores: Updates on common axes.
        weights: One number per update; None for 1.
        grams: C_t without the shrinking, symmetric.
        shrink: Factor of the off-diagonal entries, from 0 to 1; the paper's 0.9 to 0.95.
        ridge: Weight of the mean, above 0.

    Raises:
        ValueError: If an argument is out of range, or weights or statistics do not fit.

    Example:
        >>> import torch
        >>> cores = torch.stack([torch.eye(2), 3 * torch.eye(2)])
        >>> grams = torch.stack([torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))])
        >>> regmean(cores, grams=grams).diagonal().round(decimals=2)  # each task decides where its own inputs are
        tensor([1., 3.])
    """
    if not 0.0 <= shrink <= 1.0:
        raise ValueError(f"shrink={shrink} must be between 0 and 1: the factor of the off-diagonal second moments.")
    if not ridge > 0.0:
        raise ValueError(f"ridge={ridge} must be above 0: it decides where the rows of no task say anything.")
    if len(grams) != len(cores):
        raise ValueError(f"statistics of {len(grams)} tasks do not fit {len(cores)} updates; pass those of each.")
    signed = weighted(cores, weights)
    importance = torch.ones(len(cores)) if weights is None else torch.as_tensor(weights).abs()
    importance = importance.to(cores)[:, None, None]
    moments = importance * (shrink * grams + (1.0 - shrink) * torch.diag_embed(grams.diagonal(dim1=1, dim2=2)))
    total = moments.sum(dim=0)
    rho = ridge * total.diagonal().mean()
    if not rho > 0.0:
        return mean(cores, weights=weights)  # no rows were seen, or none reaches these axes
    turned = torch.where(importance > 0, signed / importance, 0.0)
    goal = (turned @ moments).sum(dim=0) + rho * mean(cores, weights=weights)
    return torch.linalg.solve(
        total + rho * torch.eye(len(total), dtype=total.dtype, device=total.device), goal, left=False
    )
