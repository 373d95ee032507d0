"""Merging a decomposition with new rows, without the rows it was made from."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.decompose import top_components


@dataclass(frozen=True)
class Merged:
    """Leading components of an old decomposition and new rows together.

    Attributes:
        components: Orthonormal rows, leading first, signs fixed.
        singular_values: Of the merged stack, descending.
        discarded_energy: Squared Frobenius norm of what this merge left out, in units of the rows squared. What earlier
            truncations left out is not known here and not in it.
    """

    components: Float[Tensor, "k n"]
    singular_values: Float[Tensor, "k"]
    discarded_energy: float


def merge_components(
    components: Float[Tensor, "k_old n"],
    singular_values: Float[Tensor, "k_old"],
    rows: Float[Tensor, "p n"],
    *,
    n_components: int,
) -> Merged:
    """Top-K components of the stack of `diag(singular_values) @ components` and new rows.

    One step of the sequential Karhunen-Loève transform (Levy and Lindenbaum, IEEE Trans. Image Processing 9, 2000), not
    centred. It is exact as long as nothing of the old stack was discarded; else the error is at most what was.

    Args:
        components: Orthonormal rows of the old decomposition.
        singular_values: Their singular values.
        rows: New rows.
        n_components: K, from 1 to the numerical rank of the merged stack.

    Returns:
        `Merged`; float64 if an argument is, else float32.

    Raises:
        ValueError: If `n_components` is less than 1 or above the numerical rank.

    Example:
        >>> import torch
        >>> merged = merge_components(torch.eye(3)[:1], torch.ones(1), 2 * torch.eye(3)[1:2], n_components=1)
        >>> merged.components, merged.discarded_energy
        (tensor([[0., 1., 0.]]), 1.0)
    """
    dtype = torch.promote_types(torch.promote_types(components.dtype, rows.dtype), torch.float32)
    old_rows = singular_values.to(dtype)[:, None] * components.to(dtype)
    found = top_components(torch.cat([old_rows, rows.to(dtype)]), n_components=n_components)
    kept_energy = float(found.singular_values.to(torch.float64).square().sum())
    return Merged(
        components=found.components,
        singular_values=found.singular_values,
        discarded_energy=max(found.total_energy - kept_energy, 0.0),
    )
