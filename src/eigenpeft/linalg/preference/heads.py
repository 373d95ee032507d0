"""One Bradley-Terry head per user, fitted apart from the others: the control that shares nothing."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eigenpeft.linalg.preference.objective import bradley_terry_nll


def fit_user_heads(
    differences: Float[Tensor, "n_users n_pairs d"],
    present: Bool[Tensor, "n_users n_pairs"],
    *,
    offsets: Float[Tensor, "n_users n_pairs"],
    ridge: float,
    max_iter: int = 50,
    tol: float = 1e-8,
) -> Float[Tensor, "n_users d"]:
    """Each user's own minimum of `Σ_i -log σ(o_i + x_i · h) + λ/2 ‖h‖²`, for all users at once.

    With fewer pairs than features the work is in the pairs' Gram matrices: `h = Xᵀ a`, and Newton's method on
    `f = X h` as for a Gaussian process classifier (Rasmussen and Williams, Gaussian Processes for Machine Learning,
    algorithm 3.1), with halved steps where the objective does not fall.

    Args:
        differences: X, one block per user, zeros where there is no pair.
        present: Which pairs exist.
        offsets: Margins of whatever the heads are added to.
        ridge: λ, positive.
        max_iter: Newton steps at most.
        tol: Stops when no user's objective falls by more.

    Returns:
        Heads, float64.

    Example:
        >>> import torch
        >>> pairs, present = torch.ones(1, 3, 1), torch.ones(1, 3, dtype=torch.bool)
        >>> bool(fit_user_heads(pairs, present, offsets=torch.zeros(1, 3), ridge=1.0) > 0)  # all three prefer the larger feature
        True
    """
    x, mask, offsets = differences.double(), present.double(), offsets.double()
    gram = x @ x.mT / ridge
    identity = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)

    def objective(dual: Tensor, f: Tensor) -> Tensor:
        return (bradley_terry_nll(offsets + f) * mask).sum(dim=1) + 0.5 * (dual * f).sum(dim=1)

    dual = torch.zeros_like(mask)
    f = torch.zeros_like(mask)
    value = objective(dual, f)
    for _ in range(max_iter):
        miss = torch.sigmoid(-(offsets + f)) * mask
        curvature = miss * (1 - miss)
        root = curvature.sqrt()
        target = curvature * f + miss
        inner = identity + root[:, :, None] * gram * root[:, None, :]
        right = root * (gram @ target[:, :, None])[:, :, 0]
        solved = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(inner))[:, :, 0]
        step = target - root * solved - dual
        size = torch.ones(len(x), 1, dtype=torch.float64, device=x.device)
        for _ in range(30):
            trial = dual + size * step
            trial_f = (gram @ trial[:, :, None])[:, :, 0]
            after = objective(trial, trial_f)
            bad = after > value + 1e-12 * value.abs()
            if not bool(bad.any()):
                break
            size = torch.where(bad[:, None], size / 2, size)
        fallen = value - after
        dual, f, value = trial, trial_f, after
        if not bool((fallen > tol).any()):
            break
    return (dual[:, None, :] @ x)[:, 0, :] / ridge
