"""SVC: singular values of a merged update, calibrated by how often each direction was counted."""

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.cores.spectral import triplets
from eigenpeft.linalg.factored import FactoredSvd


def svc(
    merged: Float[Tensor, "k_out k_in"], cores: Float[Tensor, "t k_out k_in"], *, least_response: float = 0.1
) -> Float[Tensor, "k_out k_in"]:
    """`M = Σ γ_r σ_r u_r v_rᵀ`, `γ_r = T / Σ_t max(α, s_t^r)`: directions that many updates share are counted once.

    Singular Value Calibration (arXiv 2602.05536, algorithm 1); `s_t^r` is `response`. Calibrates the result of any rule.

    Args:
        merged: Result of a rule.
        cores: The updates that were merged, weights included.
        least_response: α, the least response that counts, above 0; the paper's 0.1.

    Raises:
        ValueError: If `least_response` is not above 0.

    Example:
        >>> import torch
        >>> alike = torch.stack([torch.diag(torch.tensor([1.0, 0.0]))] * 2)
        >>> svc(alike.sum(dim=0), alike).diagonal().round(decimals=4)  # what both have is counted once
        tensor([1., 0.])
    """
    if not least_response > 0.0:
        raise ValueError(f"least_response={least_response} must be above 0: it bounds how far a direction is raised.")
    parts = triplets(merged)
    gains = len(cores) / response(parts, cores).clamp(min=least_response).sum(dim=0)
    return (parts.U * (gains * parts.S)) @ parts.Vh


def response(parts: FactoredSvd, cores: Float[Tensor, "t k_out k_in"]) -> Float[Tensor, "t k"]:
    """`s_t^r = ⟨σ_r v_r, u_rᵀM_t⟩ / ‖u_rᵀM_t‖²`: how strongly the merged update acts along u_r, in units of update t.

    The projection coefficient of Singular Value Calibration (arXiv 2602.05536, equation 8).

    Args:
        parts: Singular triplets of the merged update.
        cores: The updates.

    Returns:
        1 where the merged update does what update t does, more where it was counted more often; 0 where update t has
        nothing along u_r.
    """
    along = parts.U.mT @ cores
    squared_norm = torch.linalg.vector_norm(along, dim=2).square()
    overlap = parts.S * (along * parts.Vh).sum(dim=2)
    there = squared_norm > 1e-14 * torch.linalg.vector_norm(cores, dim=(1, 2)).square()[:, None]
    return torch.where(there, overlap / squared_norm.where(there, 1.0), 0.0)
