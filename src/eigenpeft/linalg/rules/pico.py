"""Pico: output directions that many updates share are turned down before a merge; and its rule for the merged norm."""

import torch
from jaxtyping import Float
from torch import Tensor


def pico(cores: Float[Tensor, "t k_out k_in"]) -> Float[Tensor, "t k_out k_in"]:
    """`B'_t := (I + U diag(a - 1) Uᵀ) B'_t` for balanced `M_t = B'_t A'_t`, `a_k = 1 / (1 + (T - 1) c_k)`.

    Pico's calibration of shared directions (Tang and Yang, arXiv 2604.16826, section 4.1), there on the raw factors.
    `[B'_1 ... B'_T] = U σ Vᵀ` and `c_k = σ_k² / Σσ²`. Since `B'_t B'_tᵀ = (M_t M_tᵀ)^{1/2}`, U and σ² are the eigenvectors and
    eigenvalues of `Σ (M_t M_tᵀ)^{1/2}`: a function of the updates alone.

    Args:
        cores: Updates on common axes, weights included.

    Returns:
        The calibrated updates, to be merged by any rule.

    Example:
        >>> import torch
        >>> alike = torch.stack([torch.diag(torch.tensor([1.0, 0.0]))] * 2)
        >>> pico(alike).sum(dim=0).diagonal().round(decimals=4)  # one direction, shared by both, is counted once
        tensor([1., 0.])
    """
    left, values, _ = torch.linalg.svd(cores, full_matrices=False)
    gram = ((left * values[:, None, :]) @ left.mT).sum(dim=0)
    squared_norms, directions = torch.linalg.eigh(gram)
    shares = squared_norms.clamp(min=0.0) / squared_norms.sum().where(squared_norms.sum() > 0, 1.0)
    factors = 1.0 / (1.0 + (len(cores) - 1) * shares)
    return ((directions * factors) @ directions.mT) @ cores


def norm_scale(merged: Float[Tensor, "k_out k_in"], *, cores: Float[Tensor, "t k_out k_in"]) -> Float[Tensor, ""]:
    """λ with `‖λ M‖ = mean ‖M_t‖` (Pico's magnitude rescaling, arXiv 2604.16826, section 4.2): as strong as one update.

    Args:
        merged: Result of a rule.
        cores: The updates that were merged, weights included.

    Returns:
        λ, or 1 where the merged update is zero.

    Examples:
        >>> import torch
        >>> norm_scale(2 * torch.eye(2), cores=torch.stack([torch.eye(2), 3 * torch.eye(2)])).item()
        1.0
    """
    return scale_to_mean(merged.norm(), torch.linalg.vector_norm(cores, dim=(1, 2)))


def scale_to_mean(norm: Float[Tensor, ""], norms: Float[Tensor, " t"]) -> Float[Tensor, ""]:
    """λ with `λ ‖M‖ = mean_t ‖M_t‖`, or 1 where ‖M‖ is zero.

    Args:
        norm: ‖M‖, norm of what is scaled.
        norms: ‖M_t‖, norms of the updates.

    Example:
        >>> import torch
        >>> scale_to_mean(torch.tensor(4.0), torch.tensor([1.0, 3.0])).item()
        0.5
    """
    return torch.where(norm > 0, norms.mean() / norm.where(norm > 0, 1.0), 1.0)
