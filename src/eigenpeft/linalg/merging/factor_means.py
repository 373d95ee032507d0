"""The mean of LoRA factors, and its difference from the mean update."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.bases.stacking import Factors


def mean_of_factors(
    factors: Sequence[Factors], *, weights: Sequence[float]
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    """`(Σ p_i B_i, Σ p_i A_i)`: what averaging adapters number by number does.

    FedIT (arXiv 2305.05644) averages the adapters' parameters as FedAvg does (arXiv 1602.05629, algorithm 1), weighted by the
    clients' rows, `p_i = n_i / Σ n`. Their
    product is not the mean of the updates `Σ p_i B_i A_i`; it depends on how each update is split into factors.

    Args:
        factors: `(lora_B (m, r), lora_A (r, n))` of each update, all of one rank.
        weights: p_i.

    Returns:
        `(lora_B, lora_A)`, float64.

    Raises:
        ValueError: If there is not one weight for each.

    Example:
        >>> import torch
        >>> one, minus = torch.ones(1, 1), -torch.ones(1, 1)
        >>> lora_B, lora_A = mean_of_factors([(one, one), (minus, minus)], weights=[0.5, 0.5])
        >>> (lora_B @ lora_A).item()  # both updates are 1, and so is their mean
        0.0
    """
    lora_B = sum(weight * B.to(torch.float64) for weight, (B, _) in zip(weights, factors, strict=True))
    lora_A = sum(weight * A.to(torch.float64) for weight, (_, A) in zip(weights, factors, strict=True))
    assert isinstance(lora_B, Tensor)
    assert isinstance(lora_A, Tensor)
    return lora_B, lora_A


def residual_of_factor_mean(
    factors: Sequence[Factors], *, weights: Sequence[float]
) -> tuple[Float[Tensor, "m q"], Float[Tensor, "q n"]]:
    """`Σ p_i B_i A_i - (Σ p_i B_i)(Σ p_i A_i)` as factors of rank Σ r_i + r, exactly (FedEx-LoRA, arXiv 2410.09432, eq. 7).

    Added to the base weight, it makes the mean of the factors the mean of the updates.

    Args:
        factors: As for `mean_of_factors`.
        weights: p_i.

    Returns:
        `(residual_B, residual_A)`, float64.

    Raises:
        ValueError: If there is not one weight for each.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1)
        >>> left, right = residual_of_factor_mean([(one, one), (3 * one, 3 * one)], weights=[0.5, 0.5])
        >>> round((left @ right).item(), 4)  # the mean of 1 and 9, minus 2 times 2
        1.0
    """
    mean_B, mean_A = mean_of_factors(factors, weights=weights)
    left = [weight * B.to(torch.float64) for weight, (B, _) in zip(weights, factors, strict=True)]
    right = [A.to(torch.float64) for _, A in factors]
    return torch.cat([*left, -mean_B], dim=1), torch.cat([*right, mean_A])
