"""Shares of comparisons in the right order, with intervals over users."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eigenpeft.linalg.scores.intervals import expanded_tail


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of comparisons in the right order, or a difference of two, each user counting the same.

    Attributes:
        mean: Mean over users.
        low: Lower end of the 95 % interval over users: of the bootstrap, expanded for few users (`expanded_tail`); of a single
            user, whom nothing can be drawn from, the lowest value there is.
        high: Its upper end.
        n_users: Users that were asked.
        n_pairs: Their comparisons.
    """

    mean: float
    low: float
    high: float
    n_users: int
    n_pairs: int


class Bootstrap:
    """Shares with intervals: users are drawn with replacement, each user's comparisons stay together.

    Args:
        rows: (n,) user of each comparison.
        n_users: How many there are.
        n_bootstrap: Draws of users.
        seed: Seed of the draws.
    """

    def __init__(self, rows: Tensor, *, n_users: int, n_bootstrap: int, seed: int):
        self.rows, self.n_users, self.n_bootstrap = rows, n_users, n_bootstrap
        self.seed = seed

    def share(self, margins: Tensor, *, mask: Tensor) -> Share:
        """Share in the right order.

        Args:
            margins: (n,) reward of the chosen text minus that of the rejected one.
            mask: (n,) comparisons that count.
        """
        return self._of(_right(margins), mask, lowest=0.0)

    def gain(self, margins: Tensor, *, others: Tensor, mask: Tensor) -> Share:
        """Difference of two shares, taken comparison by comparison.

        Args:
            margins: (n,) of the one.
            others: (n,) of the other.
            mask: (n,) comparisons that count.
        """
        return self._of(_right(margins) - _right(others), mask, lowest=-1.0)

    def _of(self, values: Tensor, mask: Tensor, *, lowest: float) -> Share:
        rows = self.rows[mask]
        counts = torch.bincount(rows, minlength=self.n_users)
        sums = torch.zeros(self.n_users, dtype=torch.float64).index_add_(0, rows, values[mask].double())
        of_users = sums[counts > 0] / counts[counts > 0]
        n_users, mean = len(of_users), float(of_users.mean())
        if n_users < 2:
            return Share(mean=mean, low=lowest, high=1.0, n_users=n_users, n_pairs=len(rows))
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(n_users, (self.n_bootstrap, n_users), generator=generator)
        tail = expanded_tail(n_users)
        ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
        low, high = torch.quantile(of_users[drawn].mean(dim=1), ends).tolist()
        return Share(mean=mean, low=min(low, mean), high=max(high, mean), n_users=n_users, n_pairs=len(rows))


def _right(margins: Tensor) -> Tensor:
    return (margins > 0).double() + 0.5 * (margins == 0).double()
