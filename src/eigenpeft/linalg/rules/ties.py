"""TIES: trim small entries, elect a sign for each entry, and merge the updates that agree with it."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.cores.spectral import weighted

Agreement = Literal["mean", "sum"]


def ties(
    cores: Float[Tensor, "t k_out k_in"],
    *,
    weights: Float[Tensor, " t"] | Sequence[float] | None = None,
    density: float = 0.2,
    agreement: Agreement = "mean",
) -> Float[Tensor, "k_out k_in"]:
    """Merge entry by entry (Yadav et al., "TIES-Merging", arXiv 2306.01708, algorithm 1).

    `P_t` keeps the share `density` of largest entries of `w_t M_t` (more where several are as large as the least of them);
    `γ = sign(Σ P_t)`; an entry of the result is the mean (or the sum) of the entries of `P_t` whose sign is γ. The paper works
    on entries of the weights; here they are entries in the core space, whose axes depend on the updates alone.

    Args:
        cores: Updates on common axes.
        weights: One number per update; None for 1.
        density: Share of the entries to keep, above 0 and at most 1; the paper's 0.2.
        agreement: "mean" (the paper's) or "sum" of the entries that agree.

    Raises:
        ValueError: If an argument is out of range or the weights do not fit.

    Example:
        >>> import torch
        >>> ties(torch.tensor([[[4.0, 0.1]], [[-1.0, 2.0]], [[2.0, 2.0]]]), density=1.0)  # -1 is outvoted; means of the others
        tensor([[3.0000, 1.3667]])
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density={density} must be above 0 and at most 1: the share of the entries to keep.")
    updates = weighted(cores, weights)
    kept = max(1, int(density * updates[0].numel()))
    sizes = updates.abs()
    least = sizes.flatten(1).kthvalue(updates[0].numel() - kept + 1, dim=1).values
    trimmed = torch.where(sizes >= least[:, None, None], updates, 0.0)
    return elect(trimmed, agreement=agreement)


def elect(trimmed: Float[Tensor, "t k_out k_in"], *, agreement: Agreement = "mean") -> Float[Tensor, "k_out k_in"]:
    """The mean or sum of the entries whose sign is that of the sum over the updates.

    Args:
        trimmed: Updates with zeros where an entry does not vote.
        agreement: "mean" or "sum".

    Raises:
        ValueError: If `agreement` is unknown.

    Example:
        >>> import torch
        >>> elect(torch.tensor([[[4.0]], [[-1.0]], [[2.0]]]))
        tensor([[3.]])
    """
    if agreement not in ("mean", "sum"):
        raise ValueError(f"agreement={agreement!r} is unknown; pass 'mean' or 'sum'.")
    sign = trimmed.sum(dim=0).sign()
    votes = (trimmed * sign).clamp_(min=0.0)  # sizes of the entries that agree
    total = sign * votes.sum(dim=0)
    return total / votes.sign_().sum(dim=0).clamp(min=1.0) if agreement == "mean" else total
