"""Logistic regression with a ridge penalty, and the Brier score of the probabilities that it gives."""

import torch
from jaxtyping import Float
from torch import Tensor

_TOLERANCE, _MAX_STEPS, _MAX_HALVINGS = 1e-10, 100, 30


def fit_logistic(
    features: Float[Tensor, "n d"], outcomes: Float[Tensor, " n"], *, ridge: float = 1.0
) -> tuple[Float[Tensor, " d"], float]:
    """Weights w and intercept b that minimise `Σ_i log(1 + exp(-y_i (wᵀx_i + b))) + ridge/2 ‖w‖²`, with y_i = ±1.

    Newton's method with halved steps (Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, section 4.4.1);
    the intercept is not penalised.

    Args:
        features: One row per observation; scale them to like sizes first, since the penalty treats them alike.
        outcomes: 1 where the event happened, 0 where not.
        ridge: Weight of the penalty, above 0, so that there is a minimum also where the classes can be separated.

    Returns:
        `(w, b)` in float64.

    Examples:
        >>> import torch
        >>> w, b = fit_logistic(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.0, 1.0]))
        >>> bool(w[0] > 0), abs(round(b, 6))
        (True, 0.0)
    """
    wide = torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    signs = 2.0 * outcomes.double() - 1.0
    penalty = torch.full((wide.shape[1],), float(ridge), dtype=torch.float64)
    penalty[-1] = 0.0

    def loss(weights: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-signs * (wide @ weights)).sum() + 0.5 * (penalty * weights.square()).sum()

    weights = torch.zeros(wide.shape[1], dtype=torch.float64)
    for _ in range(_MAX_STEPS):
        chance = torch.sigmoid(wide @ weights)
        gradient = wide.mT @ (chance - outcomes.double()) + penalty * weights
        hessian = (wide * (chance * (1.0 - chance))[:, None]).mT @ wide + torch.diag(penalty + 1e-12)
        step = torch.linalg.solve(hessian, gradient)
        now, size = loss(weights), 1.0
        for _ in range(_MAX_HALVINGS):
            if loss(weights - size * step) <= now:
                break
            size /= 2.0
        weights = weights - size * step
        if float((size * step).abs().max()) < _TOLERANCE:
            break
    return weights[:-1], float(weights[-1])


def brier_score(probabilities: Float[Tensor, " n"], outcomes: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Each observation's squared distance between probability and outcome; its mean is the Brier score (Brier 1950).

    Args:
        probabilities: Probabilities of the event, 0 to 1.
        outcomes: 1 where it happened, 0 where not.

    Examples:
        >>> import torch
        >>> brier_score(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 1.0])).tolist()
        [0.25, 0.0]
    """
    return (probabilities.double() - outcomes.double()).square()
