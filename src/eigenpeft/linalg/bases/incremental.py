"""Merging a decomposition with new rows, without the rows it was made from: once, or over and over in one pass."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.decompose import leading_components

# Of the solver in a merge whose truncation costs far more: 1e-4 misses as much in the end and takes 1.6 times as long.
_TOL = 1e-2


@dataclass(frozen=True)
class Merged:
    """Leading components of an old decomposition and new rows together.

    Attributes:
        components: Orthonormal rows, leading first, signs fixed.
        singular_values: Singular values of the merged stack, descending.
        discarded_squared_norm: Squared Frobenius norm of what this merge left out, in units of the rows squared. What earlier
            truncations left out is not known here and not in it.
    """

    components: Float[Tensor, "k n"]
    singular_values: Float[Tensor, " k"]
    discarded_squared_norm: float


def merge_components(
    components: Float[Tensor, "k_old n"],
    *,
    singular_values: Float[Tensor, " k_old"],
    rows: Float[Tensor, "p n"],
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
        >>> merged = merge_components(
        ...     torch.eye(3)[:1], singular_values=torch.ones(1), rows=2 * torch.eye(3)[1:2], n_components=1
        ... )
        >>> merged.components, merged.discarded_squared_norm
        (tensor([[0., 1., 0.]]), 1.0)
    """
    dtype = torch.promote_types(torch.promote_types(components.dtype, rows.dtype), torch.float32)
    old_rows = singular_values.to(dtype)[:, None] * components.to(dtype)
    found = leading_components(torch.cat([old_rows, rows.to(dtype)]), n_components=n_components, allow_fewer=False)
    kept_squared_norm = float(found.singular_values.to(torch.float64).square().sum())
    return Merged(
        components=found.components,
        singular_values=found.singular_values,
        discarded_squared_norm=max(found.total_squared_norm - kept_squared_norm, 0.0),
    )


@dataclass(frozen=True)
class Sketch:
    """The leading components of rows seen one part at a time, and what each part's truncation threw away.

    With S = `diag(singular_values) components`, the Gram matrix of all rows seen is SᵀS + Σ_t E_t: one positive
    semi-definite E_t per part, of trace e_t and of largest eigenvalue λ_t.

    Attributes:
        components: Orthonormal rows, leading first.
        singular_values: Singular values of the sketch, descending.
        total_squared_norm: ‖rows‖_F² of all rows seen.
        discarded_squared_norm: Σ e_t.
        discarded_peak: Σ λ_t.
    """

    components: Float[Tensor, "k n"]
    singular_values: Float[Tensor, " k"]
    total_squared_norm: float
    discarded_squared_norm: float
    discarded_peak: float

    def missed_squared_norm_bound(self, n_components: int) -> float:
        """Upper bound on the squared norm that the first K components miss, compared with the best K directions of all rows.

        For any K orthonormal directions V, `tr V (Σ E_t) Vᵀ` is at most Σ e_t and at most K Σ λ_t, and among the
        directions of the sketch its own first K are the best; so the smaller of the two bounds what is missed.

        Args:
            n_components: K, at most the number of components of the sketch.
        """
        return min(self.discarded_squared_norm, n_components * self.discarded_peak)


def empty_sketch(n_features: int, *, dtype: torch.dtype, device: torch.device) -> Sketch:
    """The sketch of no rows.

    Args:
        n_features: Length of the rows to come.
        dtype: float32 or float64.
        device: Where they will be.
    """
    return Sketch(
        components=torch.zeros(0, n_features, dtype=dtype, device=device),
        singular_values=torch.zeros(0, dtype=dtype, device=device),
        total_squared_norm=0.0,
        discarded_squared_norm=0.0,
        discarded_peak=0.0,
    )


def extend_sketch(sketch: Sketch, rows: Float[Tensor, "p n"], *, size: int) -> Sketch:
    """A sketch that has seen more rows: those of the old one and the new ones, decomposed and cut to `size` components.

    One step of merge-and-truncate (Levy and Lindenbaum, IEEE Trans. Image Processing 9, 2000). Its size bounds the
    memory; twice the number of components wanted keeps what is missed small where the spectrum decays.

    Args:
        sketch: What was seen before.
        rows: New rows, perhaps none.
        size: Components to keep, at least 1.

    Returns:
        `Sketch` with at most `size` components, up to the tolerance of the iterative solver.

    Raises:
        ValueError: If `n_components` is less than 1.

    Example:
        >>> import torch
        >>> sketch = empty_sketch(3, dtype=torch.float32, device=torch.device("cpu"))
        >>> sketch = extend_sketch(sketch, torch.diag(torch.tensor([3.0, 2.0, 1.0])), size=2)
        >>> sketch.singular_values, sketch.total_squared_norm, sketch.missed_squared_norm_bound(1)
        (tensor([3., 2.]), 14.0, 1.0)
    """
    if not len(rows):
        return sketch
    merged = torch.cat([sketch.singular_values[:, None] * sketch.components, rows.to(sketch.components.dtype)])
    found = leading_components(merged, n_components=size + 1, tol=_TOL)  # one more tells the largest discarded one
    squared_norms = found.singular_values.to(torch.float64).square()
    discarded = max(found.total_squared_norm - float(squared_norms[:size].sum()), 0.0)
    peak = float(squared_norms[size]) if len(squared_norms) > size else 0.0
    old_squared_norm = float(sketch.singular_values.to(torch.float64).square().sum())
    return Sketch(
        components=found.components[:size],
        singular_values=found.singular_values[:size],
        total_squared_norm=sketch.total_squared_norm + found.total_squared_norm - old_squared_norm,
        discarded_squared_norm=sketch.discarded_squared_norm + discarded,
        discarded_peak=sketch.discarded_peak + min(peak, discarded),
    )
