"""Heads that a low-rank reward model is compared with: one for everybody, and one for each user."""

from collections.abc import Sequence

import torch
from torch import Tensor

from eigenpeft.linalg.preference.heads import fit_user_heads
from eigenpeft.linalg.preference.objective import bradley_terry_nll
from eigenpeft.linalg.preference.users import pad_by_user

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)


def user_heads(
    differences: Tensor, rows: Tensor, *, n_users: int, start: Tensor, scale: float, total_variance: float
) -> Tensor:
    """One head per user, `start` plus the user's own deviation; users share nothing but the start.

    Args:
        differences: (n, n_features).
        rows: (n,) user of each pair.
        n_users: Number of users.
        start: (n_features,) what each deviation is added to.
        scale: Prior standard deviation, in logits, of a deviation's margins.
        total_variance: Mean squared length of a difference.

    Returns:
        (n_users, n_features).
    """
    heads = start.repeat(n_users, 1)
    # Blocks of users, for the padded copies of their features.
    for block in torch.arange(n_users).split(100):
        mask = (rows >= block[0]) & (rows <= block[-1])
        padded = pad_by_user(differences[mask], rows[mask] - block[0], n_users=len(block))
        offsets = padded.margins @ start
        deviations = fit_user_heads(padded.margins, padded.present, offsets=offsets, ridge=total_variance / scale**2)
        heads[block] += deviations.float()
    return heads


def choose_scale(
    differences: Tensor,
    rows: Tensor,
    *,
    n_users: int,
    start: Tensor,
    total_variance: float,
    seed: int,
    scales: Sequence[float] = SCALES,
) -> float:
    """The scale of users' own heads that predicts held-out comparisons of theirs best.

    Args:
        differences: (n, n_features).
        rows: (n,) user of each pair.
        n_users: Number of users.
        start: (n_features,).
        total_variance: Mean squared length of a difference.
        seed: Seed of the split.
        scales: To choose from.
    """
    held = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)) < 0.2
    losses = []
    for scale in scales:
        heads = user_heads(
            differences[~held], rows[~held], n_users=n_users, start=start, scale=scale, total_variance=total_variance
        )
        margins = (differences[held] * heads[rows[held]]).sum(dim=1)
        losses.append(float(bradley_terry_nll(margins).sum()))
    return scales[losses.index(min(losses))]
