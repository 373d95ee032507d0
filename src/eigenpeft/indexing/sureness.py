"""How sure an answer is: the lead of the first name turned into how often such a lead was right on rows held out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenpeft.linalg.scores.logistic import fit_logistic
from eigenpeft.linalg.scores.nearest_tasks import held_out_queries

_SIZES = (1, 2, 4, 8, 16)
_MOST_QUERIES, _MOST_DRAWS, _FEWEST_QUERIES = 3000, 16, 20
_FAR = 0.05  # share of a task's own held-out rows that are called far
_ROUNDING = 1e-3  # of cosines of embeddings that are kept as float16


@dataclass(frozen=True)
class Sureness:
    """A logistic model of "the first name is right", and what cosines a task's own rows have.

    Attributes:
        lead: Weight of the lead, the largest cosine minus the second.
        size: Weight of the logarithm of the number of rows, to base 2.
        intercept: Intercept of the model.
        far: Number of rows to the cosine that all but 5 % of a task's own rows exceed; one entry per size.
        n_queries: Held-out queries that it was fitted on.
    """

    lead: float
    size: float
    intercept: float
    far: tuple[tuple[int, float], ...]
    n_queries: int

    def probability(self, lead: float, n_rows: int) -> float:
        """How often the first name is right with such a lead.

        Args:
            lead: The largest cosine minus the second.
            n_rows: Rows of the query; beyond the largest number that was tried they count as so many.
        """
        size = min(n_rows, self.far[-1][0])
        logit = self.lead * lead + self.size * math.log2(size) + self.intercept
        return 1.0 / (1.0 + math.exp(-max(min(logit, 30.0), -30.0)))

    def is_far(self, score: float, n_rows: int) -> bool:
        """Whether rows are less like the first task than 95 % of a task's own rows.

        Args:
            score: The largest cosine.
            n_rows: Rows of the query.
        """
        tried = [bound for size, bound in self.far if size <= n_rows] or [self.far[0][1]]
        return score < tried[-1] - _ROUNDING


def fit_sureness(rows: Sequence[Tensor]) -> Sureness | None:
    """From the rows of all tasks in an index; None where there are too few tasks or rows.

    Rows of each task are drawn, left out of its mean, and asked about (`held_out_queries`); a logistic regression with a ridge
    says how often the first name was right. One query that was right and one that was wrong are added at the mean, so that no
    number of good answers makes it certain.

    Args:
        rows: Embeddings (n, d) of each task's rows.
    """
    if len(rows) < 2:
        return None
    possible = [size for size in _SIZES if any(2 * size <= len(each) for each in rows)]
    if not possible:
        return None
    n_draws = max(1, min(_MOST_DRAWS, _MOST_QUERIES // (len(rows) * len(possible))))
    found = held_out_queries(rows, sizes=possible, n_draws=n_draws, generator=torch.Generator().manual_seed(0))
    if len(found.right) < _FEWEST_QUERIES:
        return None
    features = torch.stack([found.margins, found.sizes.log2()], dim=1)
    middle, spread = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    scaled = torch.cat([(features - middle) / spread, torch.zeros(2, 2, dtype=torch.float64)])
    outcomes = torch.cat([found.right, torch.tensor([1.0, 0.0], dtype=torch.float64)])
    weights, intercept = fit_logistic(scaled, outcomes)
    weights = weights / spread
    far = tuple(
        (size, float(found.own[found.sizes == size].quantile(_FAR)))
        for size in possible
        if bool((found.sizes == size).any())
    )
    return Sureness(
        lead=float(weights[0]),
        size=float(weights[1]),
        intercept=intercept - float(weights @ middle),
        far=far,
        n_queries=len(found.right),
    )
