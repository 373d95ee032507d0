"""User weights on the simplex given the reward basis: batched Newton, posterior covariance, the next pair to ask."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eigenpeft.linalg.preference.objective import bradley_terry_nll, dirichlet_penalty


@dataclass(frozen=True)
class PaddedPairs:
    """Pairs in one rectangular block, a row per user.

    Attributes:
        margins: Margins of each basis row, zeros where there is no pair.
        present: Whether there is a pair.
    """

    margins: Float[Tensor, "n_users n_pairs n_basis"]
    present: Bool[Tensor, "n_users n_pairs"]


def pad_by_user(basis_margins: Float[Tensor, "n n_basis"], users: Int[Tensor, " n"], *, n_users: int) -> PaddedPairs:
    """Gather the pairs of each user into one row, keeping their order.

    Args:
        basis_margins: `R (e_chosen - e_rejected)`, one row per pair.
        users: User of each pair, 0 to n_users - 1.
        n_users: Number of rows; a user without pairs has a row without any.
    """
    counts = torch.bincount(users, minlength=n_users)
    order = users.argsort(stable=True)
    first = counts.cumsum(0) - counts
    place = torch.arange(len(users), device=users.device) - first[users[order]]
    widest = int(counts.max()) if n_users else 0
    padded = basis_margins.new_zeros(n_users, widest, basis_margins.shape[1])
    present = torch.zeros(n_users, widest, dtype=torch.bool, device=users.device)
    padded[users[order], place] = basis_margins[order]
    present[users[order], place] = True
    return PaddedPairs(padded, present)


def fit_user_weights(
    margins: Float[Tensor, "n_users n_pairs n_basis"],
    present: Bool[Tensor, "n_users n_pairs"],
    *,
    concentration: Float[Tensor, " n_basis"],
    max_iter: int = 100,
    tol: float = 1e-9,
) -> Float[Tensor, "n_users n_basis"]:
    """Weights of many users at once: the minimum over the simplex of `Σ_i -log σ(z_i · w) - Σ_b c_b log w_b`.

    The few-shot adaptation that LoRe's abstract names (arXiv 2504.14439), `min_w Σ_i -log σ(wᵀ R x_i)` with the basis R held:
    `z_i = R x_i`. The Dirichlet prior is ours.

    The problem is strictly convex and its minimum is inside the simplex. Newton's method for all users together, in
    coordinates relative to the present weights, with the sum held at one; steps that leave the simplex or do not
    lower the objective enough are halved; users who have arrived are left alone. Without pairs the minimum is
    `c / Σc`, the population.

    Args:
        margins: z, margins of each basis row; `pad_by_user` makes it.
        present: Which pairs exist.
        concentration: c, Dirichlet pseudo-counts of the population, positive.
        max_iter: Newton steps at most.
        tol: A user has arrived when half its squared Newton decrement (the promised decrease) is below this.

    Returns:
        Weights, float64.

    Example:
        >>> import torch
        >>> margins, present = torch.zeros(1, 0, 2), torch.ones(1, 0, dtype=torch.bool)
        >>> fit_user_weights(margins, present, concentration=torch.tensor([3.0, 1.0])).tolist()  # without pairs: the population
        [[0.75, 0.25]]
    """
    margins, concentration = margins.double(), concentration.double()
    mask = present.double()
    weights = (concentration / concentration.sum()).expand(len(margins), -1).clone()
    active = mask.any(dim=1).nonzero()[:, 0]
    z, kept = margins[active], mask[active]
    for _ in range(max_iter):
        if not len(active):
            break
        w = weights[active]
        step, decrement = _newton_step(w, z, kept, concentration)
        w = _search(w, step=step, decrement=decrement, z=z, mask=kept, concentration=concentration)
        weights[active] = w / w.sum(dim=1, keepdim=True)
        going = decrement / 2 > tol
        if not bool(going.all()):
            active, z, kept = active[going], z[going], kept[going]
    return weights


def fit_all_user_weights(
    basis_margins: Float[Tensor, "n n_basis"],
    users: Int[Tensor, " n"],
    *,
    n_users: int,
    concentration: Float[Tensor, " n_basis"],
    block_numbers: int = 4_000_000,
) -> Float[Tensor, "n_users n_basis"]:
    """`fit_user_weights` of any number of users: in blocks of bounded memory, histories of like size together.

    Args:
        basis_margins: Margins of each basis row, one row per pair, in any order.
        users: User of each pair, 0 to n_users - 1.
        n_users: Number of users.
        concentration: Dirichlet pseudo-counts of the population.
        block_numbers: Numbers a padded block may hold; one user's history always fits.

    Returns:
        Weights, float64.
    """
    n_basis = basis_margins.shape[1]
    counts, order = torch.bincount(users, minlength=n_users).sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(n_users, device=users.device)
    places, by_place = place[users].sort(stable=True)
    basis_margins = basis_margins[by_place]
    ends = [0, *counts.cumsum(0).tolist()]
    sizes = counts.tolist()
    weights = torch.zeros(n_users, n_basis, dtype=torch.float64, device=basis_margins.device)
    start = 0
    while start < n_users:
        stop = start + 1
        # Sizes ascend, so the last user of a block is its widest.
        while stop < n_users and (stop + 1 - start) * sizes[stop] * n_basis <= block_numbers:
            stop += 1
        pairs = slice(ends[start], ends[stop])
        padded = pad_by_user(basis_margins[pairs], places[pairs] - start, n_users=stop - start)
        weights[order[start:stop]] = fit_user_weights(padded.margins, padded.present, concentration=concentration)
        start = stop
    return weights


def laplace_covariance(
    weights: Float[Tensor, "n_users n_basis"],
    margins: Float[Tensor, "n_users n_pairs n_basis"],
    present: Bool[Tensor, "n_users n_pairs"],
    *,
    concentration: Float[Tensor, " n_basis"],
) -> Float[Tensor, "n_users n_basis n_basis"]:
    """Covariance of each user's weights: the inverse curvature at the minimum, within the plane of sum one.

    Args:
        weights: From `fit_user_weights` on the same pairs.
        margins: Margins of each basis row.
        present: Which pairs exist.
        concentration: Dirichlet pseudo-counts.

    Returns:
        Positive semidefinite matrices with rows that sum to zero, float64.
    """
    weights, margins, concentration = weights.double(), margins.double(), concentration.double()
    _, scaled = _scaled_curvature(weights, margins, present.double(), concentration)
    factor = torch.linalg.cholesky(scaled)
    inverse = torch.cholesky_inverse(factor) * weights[:, :, None] * weights[:, None, :]
    towards = inverse.sum(dim=2)
    return inverse - towards[:, :, None] * towards[:, None, :] / towards.sum(dim=1)[:, None, None]


def next_pair(
    weights: Float[Tensor, " n_basis"],
    covariance: Float[Tensor, "n_basis n_basis"],
    *,
    candidates: Float[Tensor, "n n_basis"],
) -> Int[Tensor, " n"]:
    """Candidate comparisons, the one that would teach most about this user first.

    The gain of an answer to pair z is `½ log(1 + p (1 - p) zᵀ Σ z)`, p the present guess: how much the volume of the
    posterior shrinks (D-optimal design in the Laplace approximation). The order is that of its argument.

    Args:
        weights: The user's weights.
        covariance: Their covariance Σ.
        candidates: Margins of each basis row, one row per pair.

    Returns:
        Indices of the candidates, best first.

    Example:
        >>> import torch
        >>> candidates = torch.tensor([[0.1, 0.0], [2.0, -2.0]])
        >>> next_pair(torch.tensor([0.5, 0.5]), torch.eye(2), candidates=candidates).tolist()  # where rows differ most
        [1, 0]
    """
    z = candidates.double()
    chances = torch.sigmoid(z @ weights.double())
    gain = chances * (1 - chances) * ((z @ covariance.double()) * z).sum(dim=1)
    return gain.argsort(descending=True, stable=True)


def _objective(w: Tensor, z: Tensor, mask: Tensor, concentration: Tensor) -> Tensor:
    margins = (z @ w[:, :, None])[:, :, 0]
    return (bradley_terry_nll(margins) * mask).sum(dim=1) + dirichlet_penalty(w.log(), concentration)


def _scaled_curvature(w: Tensor, z: Tensor, mask: Tensor, concentration: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian in coordinates y with step = w * y, where the barrier's part is a constant diagonal."""
    scaled = z * w[:, None, :]
    miss = torch.sigmoid(-scaled.sum(dim=2)) * mask
    gradient = -(scaled * miss[:, :, None]).sum(dim=1) - concentration
    curvature = (miss * (1 - miss))[:, :, None] * scaled
    return gradient, scaled.mT @ curvature + torch.diag(concentration)


def _newton_step(w: Tensor, z: Tensor, mask: Tensor, concentration: Tensor) -> tuple[Tensor, Tensor]:
    """Newton step that keeps the sum, and its squared decrement."""
    gradient, hessian = _scaled_curvature(w, z, mask, concentration)
    sides = torch.stack([gradient, w], dim=2)
    solved = torch.cholesky_solve(sides, torch.linalg.cholesky(hessian))
    multiplier = (w * solved[:, :, 0]).sum(dim=1) / (w * solved[:, :, 1]).sum(dim=1)
    y = multiplier[:, None] * solved[:, :, 1] - solved[:, :, 0]
    return w * y, -(gradient * y).sum(dim=1)


def _search(w: Tensor, *, step: Tensor, decrement: Tensor, z: Tensor, mask: Tensor, concentration: Tensor) -> Tensor:
    """The longest of the steps 1, 1/2, 1/4, ... that stays inside and lowers the objective as Armijo asks."""
    shrink = torch.where(step < 0, -0.99 * w / step, torch.inf).amin(dim=1).clamp(max=1.0)
    before = _objective(w, z, mask, concentration)
    slack = 1e-12 * before.abs().clamp(min=1.0)
    for _ in range(40):
        trial = w + shrink[:, None] * step
        bad = _objective(trial, z, mask, concentration) > before - 1e-4 * shrink * decrement + slack
        if not bool(bad.any()):
            return trial
        shrink = torch.where(bad, shrink / 2, shrink)
    return torch.where(bad[:, None], w, trial)
