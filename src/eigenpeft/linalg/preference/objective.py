"""Bradley-Terry preferences under mixed rewards: likelihood, simplex map, the joint objective and its gradient."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True)
class JointGradient:
    """Value and gradient of the joint objective.

    Attributes:
        value: The objective.
        deviations: Gradient with respect to the basis.
        user_logits: Gradient with respect to the logits of the user weights.
    """

    value: float
    deviations: Float[Tensor, "n_basis d"]
    user_logits: Float[Tensor, "n_users n_basis"]


@dataclass(frozen=True)
class JointPrior:
    """Precisions of the prior of the joint fit, in units of negative log-likelihood.

    Attributes:
        ridge_shared: Precision of the mean of the basis rows about the reference head.
        ridge_deviation: Precision of each basis row about that mean.
        concentration: Dirichlet pseudo-counts of a user's weights, spread evenly over the basis.
    """

    ridge_shared: float
    ridge_deviation: float
    concentration: float


def bradley_terry_nll(margins: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Negative log-likelihood `-log σ(margin)` of each observed preference, without overflow at any margin.

    Args:
        margins: Reward of the chosen minus reward of the rejected.

    Example:
        >>> import torch
        >>> bradley_terry_nll(torch.tensor([0.0, 1000.0, -1000.0]))
        tensor([6.9315e-01, 0.0000e+00, 1.0000e+03])
    """
    return softplus(-margins)


def dirichlet_penalty(
    log_weights: Float[Tensor, "*n b"], pseudo_count: float | Float[Tensor, " b"]
) -> Float[Tensor, "*n"]:
    """`-Σ_b c_b log w_b`: negative log density of a Dirichlet prior in the softmax basis, but for a constant.

    The mode of the prior lies inside the simplex for every c > 0 (MacKay, Machine Learning 33, 1998).

    Args:
        log_weights: log w.
        pseudo_count: c, one for all b or one for each.

    Example:
        >>> import torch
        >>> dirichlet_penalty(torch.tensor([0.5, 0.5]).log(), 1.0)
        tensor(1.3863)
    """
    return -(pseudo_count * log_weights).sum(dim=-1)


def batch_prior(
    log_weights: Float[Tensor, "n b"],
    n_pairs: Float[Tensor, " n"] | Int[Tensor, " n"],
    *,
    pseudo_count: float | Float[Tensor, " b"],
) -> Float[Tensor, ""]:
    """A batch's share of the users' prior, `(1/n) Σ_i P(w_u(i)) / n_u(i)`, where P is `dirichlet_penalty`.

    Each comparison i carries 1 / n_u of the prior of its user u, who has n_u comparisons. Summed over the N comparisons of
    an epoch this is `Σ_u P(w_u)`, each user's prior once, as in the joint objective (`joint_gradient`) divided by N.

    Args:
        log_weights: log w of the user of each comparison in the batch.
        n_pairs: n_u, how many comparisons of all the training rows are that user's; at least 1.
        pseudo_count: As for `dirichlet_penalty`.

    Example:
        >>> import torch
        >>> logs = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()  # a penalty of 1.3863 each
        >>> batch_prior(logs, torch.tensor([2, 4]), pseudo_count=1.0)
        tensor(0.5199)
    """
    return (dirichlet_penalty(log_weights, pseudo_count) / n_pairs).mean()


def simplex(logits: Float[Tensor, "*n b"]) -> Float[Tensor, "*n b"]:
    """Softmax over the last axis: weights that are positive and sum to one.

    Args:
        logits: Any real numbers.

    Example:
        >>> import torch
        >>> simplex(torch.zeros(1, 4))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    return logits.softmax(dim=-1)


def simplex_logits(weights: Float[Tensor, "*n b"]) -> Float[Tensor, "*n b"]:
    """Logits of mean zero whose `simplex` the weights are; zeros are taken as the smallest normal number.

    Args:
        weights: On the simplex.

    Example:
        >>> import torch
        >>> simplex(simplex_logits(torch.tensor([0.2, 0.8])))
        tensor([0.2000, 0.8000])
    """
    logs = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
    return logs - logs.mean(dim=-1, keepdim=True)


def simplex_pullback(weights: Float[Tensor, "*n b"], gradient: Float[Tensor, "*n b"]) -> Float[Tensor, "*n b"]:
    """Gradient with respect to the logits from the gradient with respect to the weights.

    Args:
        weights: `simplex(logits)`.
        gradient: With respect to `weights`.
    """
    return weights * (gradient - (weights * gradient).sum(dim=-1, keepdim=True))


def column_scales(features: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """Root mean square of each column; one for a column of zeros, which then stays as it is.

    Args:
        features: One row per observation, any number of them.

    Example:
        >>> import torch
        >>> column_scales(torch.tensor([[3.0, 0.0], [-3.0, 0.0]]))
        tensor([3., 1.])
    """
    scales = features.square().mean(dim=0).sqrt()
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def joint_gradient(
    deviations: Float[Tensor, "n_basis d"],
    user_logits: Float[Tensor, "n_users n_basis"],
    *,
    differences: Float[Tensor, "n d"],
    users: Int[Tensor, " n"],
    offsets: Float[Tensor, " n"],
    prior: JointPrior,
) -> JointGradient:
    """Negative log posterior of basis and user weights together, and its gradient written out by hand.

    With `w_u = simplex(user_logits[u])` and `x_i` the difference of the features of pair i, margins are
    `m_i = o_i + x_i Δᵀ w_u`: LoRe's low-rank reward model `w_uᵀ R e(x)` (arXiv 2504.14439, abstract: "weighted
    combinations of shared basis functions") with the basis R as
    `reference + Δ`. The value is

        Σ_i -log σ(m_i) + λ_s/2 ‖mean_b Δ_b‖² + λ_d/2 Σ_b ‖Δ_b - mean_b Δ_b‖² - (c/B) Σ_ub log w_ub.

    The Dirichlet term is `dirichlet_penalty`.

    Args:
        deviations: Δ, what the basis adds to the reference head.
        user_logits: One row per user.
        differences: Features of the chosen minus features of the rejected.
        users: Row of `user_logits` of each pair.
        offsets: `x_i · reference`.
        prior: Precisions.

    Returns:
        Value and gradients, in the precision of the arguments. The pass over `differences` is two products.
    """
    n_basis = len(deviations)
    weights = simplex(user_logits)
    of_pair = weights[users]
    basis_margins = differences @ deviations.mT  # (n, n_basis)
    margins = offsets + (basis_margins * of_pair).sum(dim=1)
    slopes = -torch.sigmoid(-margins)  # d value / d margin
    shared = deviations.mean(dim=0)
    apart = deviations - shared
    pseudo_count = prior.concentration / n_basis
    value = (
        bradley_terry_nll(margins).sum()
        + 0.5 * prior.ridge_shared * shared.square().sum()
        + 0.5 * prior.ridge_deviation * apart.square().sum()
        + dirichlet_penalty(user_logits.log_softmax(dim=-1), pseudo_count).sum()
    )
    # (Gᵀ X): the small factor on the left; XᵀG is several times slower.
    for_basis = (slopes[:, None] * of_pair).mT.contiguous() @ differences
    for_basis += prior.ridge_shared / n_basis * shared + prior.ridge_deviation * apart
    for_weights = torch.zeros_like(weights).index_add_(0, users, slopes[:, None] * basis_margins)
    for_logits = simplex_pullback(weights, for_weights) - pseudo_count * (1 - n_basis * weights)
    return JointGradient(float(value), for_basis, for_logits)
