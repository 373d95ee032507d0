"""Merging one update after another: what a new one has on the earlier ones' directions is taken off (OPCM)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.cores.spectral import triplets
from eigenpeft.linalg.rules.pico import scale_to_mean


def add_off_directions(
    total: Float[Tensor, "a b"], update: Float[Tensor, "a b"], *, left_out_share: float = 0.5
) -> Float[Tensor, "a b"]:
    """`S_t = S_{t-1} + P(ΔW_t)`: P takes off what ΔW_t has on the directions of S_{t-1} (OPCM, arXiv 2501.09522).

    OPCM's abstract: new updates are projected "onto subspaces orthogonal to existing merged parameter updates", with an "adaptive
    scaling mechanism", which is `mean_norm_scale`.

    Let `S_{t-1} = U S Vᵀ`, and let r be the smallest number with `Σ_{p≤r} σ_p ≥ α Σσ`. P sets two parts of `Uᵀ ΔW_t V` to zero: the
    leading r × r block and the diagonal. The zero diagonal gives `⟨P(ΔW_t), S_{t-1}⟩ = 0`. The merged update is `λ_t S_t`, with λ_t
    from `mean_norm_scale` (the paper writes 1 / λ_t); nothing but S_t is kept of the earlier tasks.

    Where `σ_p = 0`, u_p and v_p are arbitrary. P leaves the diagonal there as it is, so that the result depends on the updates
    alone. The authors' code sets a block of r - 1 directions to zero.

    Args:
        total: S_{t-1}: the first update itself, then what this function returned. LoRAs: both on the axes of one `core_space`.
        update: ΔW_t on the same axes.
        left_out_share: α in [0, 1], the share of the singular values whose block is left out; 0 takes only the diagonal off.

    Returns:
        S_t.

    Raises:
        ValueError: If `left_out_share` is out of range.

    Example:
        >>> import torch
        >>> first = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> add_off_directions(first, torch.ones(2, 2))
        tensor([[2., 1.],
                [1., 1.]])
    """
    if not 0.0 <= left_out_share <= 1.0:
        raise ValueError(
            f"left_out_share={left_out_share} must be in [0, 1]: the share of the singular values whose block is left out."
        )
    parts = triplets(total)
    if not len(parts.S):
        return total + update
    shares = parts.S.cumsum(0) / parts.S.sum()
    leading = min(int((shares < left_out_share - 1e-12).sum()) + 1, len(parts.S)) if left_out_share > 0 else 0
    seen = parts.U.mT @ update @ parts.Vh.mT
    left_out = torch.diag(seen.diagonal())
    left_out[:leading, :leading] = seen[:leading, :leading]
    return total + update - parts.U @ left_out @ parts.Vh


def mean_norm_scale(totals: Sequence[Float[Tensor, "_a _b"]], norms: Sequence[float]) -> float:
    """λ_t with `‖λ_t S_t‖ = mean_{s≤t} ‖ΔW_s‖` over all weights of a model: OPCM's scale.

    Args:
        totals: S_t of every weight.
        norms: `‖ΔW_s‖` of every task so far, over all weights.

    Returns:
        λ_t, or 1 where all S_t are zero.
    """
    length = sum(float(total.square().sum()) for total in totals) ** 0.5
    return float(scale_to_mean(torch.tensor(length, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64)))
