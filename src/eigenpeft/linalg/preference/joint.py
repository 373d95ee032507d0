"""The joint maximum a posteriori fit of reward basis and user weights, by preconditioned L-BFGS."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from eigenpeft.linalg.decompose import leading_components
from eigenpeft.linalg.preference.objective import JointPrior, joint_gradient, simplex


@dataclass(frozen=True)
class JointFit:
    """Where the joint fit ended.

    Attributes:
        deviations: What each basis row adds to the reference head.
        user_logits: Logits of the user weights.
        value: Negative log posterior there.
        n_evaluations: Passes over the pairs.
        converged: Whether it stopped by itself rather than at `max_iter`.
    """

    deviations: Float[Tensor, "n_basis d"]
    user_logits: Float[Tensor, "n_users n_basis"]
    value: float
    n_evaluations: int
    converged: bool


def fit_joint(
    differences: Float[Tensor, "n d"],
    users: Int[Tensor, " n"],
    *,
    n_users: int,
    n_basis: int,
    offsets: Float[Tensor, " n"],
    prior: JointPrior,
    generator: Generator,
    max_iter: int = 100,
    tol: float = 1e-5,
) -> JointFit:
    """Basis and user weights of least negative log posterior near a start that the data suggest.

    LoRe calls it collaborative ranking (Bose et al., arXiv 2504.14439; abstract: rewards as "weighted combinations of shared basis
    functions"): `min_{R, W} Σ_i -log σ(w_{u(i)}ᵀ R x_i)` with one basis R
    (n_basis, d) for all users and a row w_u of W on the simplex for each; here under the prior of `joint_gradient`. The prior and
    the start are ours.

    First the shared direction alone (a convex problem: every row the same). Then the users' own score vectors at that
    point, projected on their leading directions, say where users differ: the rows start as the vertices of a randomly
    turned simplex in that plane. Both solves are L-BFGS in coordinates divided by the root of the objective's
    diagonal curvature, without which it stalls on features of unequal scale.

    Args:
        differences: Features of the chosen minus features of the rejected, scaled so that the prior is isotropic.
        users: User of each pair, 0 to n_users - 1.
        n_users: Number of users.
        n_basis: Rows of the basis; 1 is one shared Bradley-Terry head.
        offsets: Margins under the reference head; zeros for none.
        prior: Precisions.
        generator: Turns the start, on the CPU; another seed is another restart.
        max_iter: Iterations of the joint solve.
        tol: Stops when an iteration lowers the objective by less than this share of a pair's ln 2, a pair.

    Returns:
        `JointFit` in the precision of `differences`.

    Raises:
        ValueError: If there are no users or no features.
    """
    d = differences.shape[1]
    shared, evaluations, converged = _minimize(
        torch.zeros(1, d, dtype=differences.dtype, device=differences.device),
        torch.zeros(n_users, 1, dtype=differences.dtype, device=differences.device),
        differences=differences,
        users=users,
        offsets=offsets,
        prior=prior,
        max_iter=max_iter,
        tol=tol,
    )
    if n_basis == 1:
        return JointFit(*shared, evaluations, converged)
    start, logits = _spread(
        shared[0],
        differences=differences,
        users=users,
        n_users=n_users,
        n_basis=n_basis,
        offsets=offsets,
        prior=prior,
        generator=generator,
    )
    found, more, converged = _minimize(
        start,
        logits,
        differences=differences,
        users=users,
        offsets=offsets,
        prior=prior,
        max_iter=max_iter,
        tol=tol,
    )
    return JointFit(*found, evaluations + more, converged)


def simplex_vertices(n_basis: int, *, generator: Generator) -> Float[Tensor, "n_basis plane"]:
    """Corners of a regular simplex about the origin in n_basis - 1 dimensions, turned at random, of unit length.

    Args:
        n_basis: Number of corners, at least 2.
        generator: Source of the turn.

    Example:
        >>> import torch
        >>> corners = simplex_vertices(3, generator=torch.Generator().manual_seed(0))
        >>> corners.shape, bool(corners.sum(dim=0).abs().max() < 1e-5)
        (torch.Size([3, 2]), True)
    """
    centred = torch.eye(n_basis, dtype=torch.float64) - 1 / n_basis
    corners = torch.linalg.svd(centred).U[:, : n_basis - 1]
    noise = torch.randn(n_basis - 1, n_basis - 1, generator=generator, dtype=torch.float64)
    turned = corners @ torch.linalg.qr(noise).Q
    return turned / turned.norm(dim=1, keepdim=True)


def _spread(
    shared: Float[Tensor, "1 d"],
    *,
    differences: Float[Tensor, "n d"],
    users: Int[Tensor, " n"],
    n_users: int,
    n_basis: int,
    offsets: Float[Tensor, " n"],
    prior: JointPrior,
    generator: Generator,
) -> tuple[Float[Tensor, "n_basis d"], Float[Tensor, "n_users n_basis"]]:
    """A start around the shared direction: rows along the directions in which the users' scores differ most."""
    slopes = torch.sigmoid(-(offsets + differences @ shared[0]))
    scores = torch.zeros(n_users, differences.shape[1], dtype=differences.dtype, device=differences.device)
    scores.index_add_(0, users, slopes[:, None] * differences)
    scores -= scores.mean(dim=0)
    found = leading_components(scores, n_components=min(n_basis - 1, *scores.shape), generator=generator)
    plane = found.components.to(differences)
    vertices = simplex_vertices(n_basis, generator=generator).to(differences)
    if len(plane) < n_basis - 1:  # fewer directions than rows: one user, or users of one mind
        noise = torch.randn(n_basis - 1, differences.shape[1], generator=generator, dtype=torch.float64)
        plane = torch.cat([plane, torch.nn.functional.normalize(noise.to(differences), dim=1)[len(plane) :]])
    # A row as long as the prior expects it: margins of its standard deviation.
    size = math.sqrt(differences.shape[1] / max(prior.ridge_deviation, 1e-12))
    coordinates = scores @ plane.mT
    coordinates /= coordinates.square().mean().sqrt().clamp(min=1e-12)
    return shared + 0.5 * size * (vertices @ plane), 0.5 * coordinates @ vertices.mT


def _minimize(
    deviations: Float[Tensor, "n_basis d"],
    user_logits: Float[Tensor, "n_users n_basis"],
    *,
    differences: Float[Tensor, "n d"],
    users: Int[Tensor, " n"],
    offsets: Float[Tensor, " n"],
    prior: JointPrior,
    max_iter: int,
    tol: float,
) -> tuple[tuple[Tensor, Tensor, float], int, bool]:
    """L-BFGS with strong Wolfe steps in preconditioned coordinates."""
    # In units of a pair's ln 2, a pair, and with coordinates to match: the tolerances then mean the same for any number.
    unit = max(len(differences), 1) * math.log(2)
    scale_basis, scale_logits = (
        scale * math.sqrt(unit)
        for scale in _preconditioner(
            deviations, user_logits, differences=differences, users=users, offsets=offsets, prior=prior
        )
    )
    split = deviations.numel()
    shapes = deviations.shape, user_logits.shape
    point = torch.cat([(deviations / scale_basis).flatten(), (user_logits / scale_logits).flatten()])
    point.requires_grad_()

    def unpack(flat: Tensor) -> tuple[Tensor, Tensor]:
        return flat[:split].view(shapes[0]) * scale_basis, flat[split:].view(shapes[1]) * scale_logits

    def closure() -> Tensor:
        with torch.no_grad():
            found = joint_gradient(
                *unpack(point.detach()),
                differences=differences,
                users=users,
                offsets=offsets,
                prior=prior,
            )
            gradient = (found.deviations * scale_basis).flatten(), (found.user_logits * scale_logits).flatten()
            point.grad = torch.cat(gradient) / unit
            return torch.tensor(found.value / unit, dtype=torch.float64)

    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=max_iter,
        max_eval=2 * max_iter + 10,
        history_size=20,
        tolerance_grad=0.0,
        tolerance_change=tol,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)  # pyright: ignore[reportArgumentType] (a tensor is what it takes)
    state = optimizer.state[point]
    with torch.no_grad():
        found = tuple(part.clone() for part in unpack(point.detach()))
        value = joint_gradient(*found, differences=differences, users=users, offsets=offsets, prior=prior).value
    evaluations = int(state["func_evals"])
    return (found[0], found[1], value), evaluations + 1, int(state["n_iter"]) < max_iter


def _preconditioner(
    deviations: Float[Tensor, "n_basis d"],
    user_logits: Float[Tensor, "n_users n_basis"],
    *,
    differences: Float[Tensor, "n d"],
    users: Int[Tensor, " n"],
    offsets: Float[Tensor, " n"],
    prior: JointPrior,
) -> tuple[Float[Tensor, "n_basis d"], Float[Tensor, "n_users n_basis"]]:
    """One over the root of the objective's diagonal curvature at the start (columns and weights taken apart)."""
    weights = simplex(user_logits)
    basis_margins = differences @ deviations.mT
    margins = offsets + (basis_margins * weights[users]).sum(dim=1)
    chances = torch.sigmoid(margins)
    curvature = chances * (1 - chances)
    n_basis = len(deviations)
    columns = differences.square().mean(dim=0)
    of_basis = (curvature[:, None] * weights[users].square()).sum(dim=0)
    ridge = prior.ridge_shared if n_basis == 1 else prior.ridge_deviation
    basis = of_basis[:, None] * columns + ridge
    centred = basis_margins - (basis_margins * weights[users]).sum(dim=1, keepdim=True)
    slopes = curvature[:, None] * (weights[users] * centred).square()
    of_logits = torch.zeros_like(weights).index_add_(0, users, slopes)
    logits = of_logits + prior.concentration * weights * (1 - weights) + 1e-3
    return basis.clamp(min=1e-12).rsqrt(), logits.rsqrt()
