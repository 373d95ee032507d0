"""Standard errors, and bootstrap intervals that are honest with few observations: the expanded percentile interval."""

import math
from collections.abc import Sequence

import torch

_LARGE = 1000  # degrees of freedom beyond which Student's t is the normal distribution to three digits


def mean_error(values: Sequence[float]) -> float:
    """Standard error of a mean, `s / sqrt(n)` with s over n - 1; NaN below two values.

    Args:
        values: Independent observations.

    Example:
        >>> round(mean_error([0.2, 0.1, 0.3]), 3)
        0.058
    """
    if len(values) < 2:
        return math.nan
    return float(torch.tensor(values, dtype=torch.float64).std()) / math.sqrt(len(values))


def share_error(share: float, n: int) -> float:
    """Standard error of a share, `sqrt(p (1 - p) / n)`; NaN without observations.

    Args:
        share: p, between 0 and 1.
        n: Observations that it was counted on.

    Example:
        >>> round(share_error(0.5, 100), 3)
        0.05
    """
    return math.sqrt(share * (1 - share) / n) if n else math.nan


def expanded_tail(n: int, *, tail: float = 0.025) -> float:
    """Share to cut off at each end of n observations' bootstrap means, so that the interval covers as one of Student's t does.

    `Φ(-sqrt(n / (n - 1)) t)` with t the upper `tail` point of Student's t with n - 1 degrees of freedom: the plain percentile
    interval, which cuts off `tail`, is too narrow by both factors (Hesterberg, "What Teachers Should Know About the Bootstrap", The
    American Statistician 69, 2015, section 5.1).

    Args:
        n: Observations, at least 2.
        tail: Share outside each end of the interval.

    Example:
        >>> round(expanded_tail(10), 4), round(expanded_tail(10000), 4)
        (0.0086, 0.025)
    """
    return math.erfc(math.sqrt(n / (n - 1)) * student_quantile(1 - tail, n - 1) / math.sqrt(2)) / 2


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4, inverted).

    Args:
        probability: In (0.5, 1).
        degrees: At least 1.

    Example:
        >>> round(student_quantile(0.975, 1), 3), round(student_quantile(0.975, 9), 3)
        (12.706, 2.262)
    """
    if degrees > _LARGE:
        return float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, degrees) < 2 * probability - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _inside(angle: float, degrees: int) -> float:
    """P(|T| <= t) for `t = sqrt(degrees) tan(angle)`."""
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = degrees % 2
    total, term = 0.0, cosine if is_odd else 1.0
    for k in range(1, degrees // 2 + 1):
        total += term
        term *= cosine**2 * (2 * k / (2 * k + 1) if is_odd else (2 * k - 1) / (2 * k))
    return (angle + sine * total) * 2 / math.pi if is_odd else sine * total
