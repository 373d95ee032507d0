"""Are probabilities of preferences what they say: observed shares by predicted probability."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class ReliabilityCurve:
    """Predicted and observed shares by bin of confidence; bins without comparisons are left out.

    Attributes:
        confidence: Mean predicted probability of the answer thought likelier, from 1/2 to 1, a bin.
        accuracy: Share of comparisons that were answered so, a bin.
        counts: Comparisons, a bin.
        error: Expected calibration error: mean of |accuracy - confidence|, weighted by the counts.
    """

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    counts: tuple[int, ...]
    error: float


def calibration(
    margins: Float[Tensor, " n"], asked: Bool[Tensor, " n"] | None = None, *, n_bins: int = 10
) -> ReliabilityCurve:
    """Reliability of the Bradley-Terry probabilities `σ(margin)`, and their expected calibration error.

    Which text of a pair comes first says nothing, so each comparison counts by the answer that the model thinks
    likelier: predicted with probability `σ(|margin|)`, and right where the margin is positive (Guo et al., arXiv
    1706.04599, equation 3, with bins of equal width on [1/2, 1]).

    Args:
        margins: Reward of the chosen minus reward of the rejected.
        asked: Comparisons that count; None for all.
        n_bins: Bins.

    Raises:
        ValueError: If no comparison counts.

    Example:
        >>> import torch
        >>> calibration(torch.tensor([2.0, 2.0, 2.0, -2.0])).accuracy
        (0.75,)
    """
    margins = margins.to(torch.float64) if asked is None else margins[asked].to(torch.float64)
    if not len(margins):
        raise ValueError("there are no comparisons to calibrate on; pass at least one.")
    confidence = torch.sigmoid(margins.abs())
    right = (margins > 0).to(torch.float64) + 0.5 * (margins == 0).to(torch.float64)
    bins = ((confidence - 0.5) * 2 * n_bins).long().clamp(max=n_bins - 1)
    counts = torch.bincount(bins, minlength=n_bins)
    filled = counts > 0
    predicted, observed = (
        torch.bincount(bins, weights=values, minlength=n_bins)[filled] / counts[filled]
        for values in (confidence, right)
    )
    error = (counts[filled] * (predicted - observed).abs()).sum() / len(margins)
    return ReliabilityCurve(
        tuple(predicted.tolist()), tuple(observed.tolist()), tuple(counts[filled].tolist()), float(error)
    )
