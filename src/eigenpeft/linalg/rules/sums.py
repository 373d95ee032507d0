"""Weighted sums of updates: task arithmetic and the mean."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.cores.spectral import weighted


def task_arithmetic(
    cores: Float[Tensor, "t k_out k_in"], *, weights: Float[Tensor, " t"] | Sequence[float] | None = None
) -> Float[Tensor, "k_out k_in"]:
    """`M = Σ w_t M_t` (Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089, section 2).

    Exact: the merged update is the weighted sum of the updates. A negative weight subtracts a task (forgetting).

    Args:
        cores: Updates on common axes.
        weights: One number per update; None for 1.

    Raises:
        ValueError: If the weights do not fit.

    Example:
        >>> import torch
        >>> task_arithmetic(torch.stack([torch.eye(2), torch.eye(2)]), weights=[1.0, -0.25]).diagonal()
        tensor([0.7500, 0.7500])
    """
    return weighted(cores, weights).sum(dim=0)


def mean(
    cores: Float[Tensor, "t k_out k_in"], *, weights: Float[Tensor, " t"] | Sequence[float] | None = None
) -> Float[Tensor, "k_out k_in"]:
    """`M = Σ w_t M_t / Σ |w_t|`: the mean of the updates, not of their factors.

    Args:
        cores: Updates on common axes.
        weights: One number per update; None for equal weights.

    Raises:
        ValueError: If the weights do not fit or all are 0.

    Example:
        >>> import torch
        >>> mean(torch.stack([torch.eye(2), 3 * torch.eye(2)])).diagonal()
        tensor([2., 2.])
    """
    total = float(len(cores)) if weights is None else float(torch.as_tensor(weights, dtype=torch.float64).abs().sum())
    if total == 0.0:
        raise ValueError(
            f"weights={list(map(float, weights or []))} are all 0, so there is no mean; pass one that is not."
        )
    return task_arithmetic(cores, weights=weights) / total
