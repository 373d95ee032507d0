"""Simulated users with known basis and weights: what a fit can be measured against."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from eigenpeft.linalg.orthogonal import unit_rows


@dataclass(frozen=True, eq=False)
class SimulatedPairs:
    """Comparisons of simulated users, answered by the Bradley-Terry model.

    Attributes:
        chosen: (n, n_features).
        rejected: (n, n_features).
        user_ids: User of each comparison.
        true_margins: (n,) true reward of the chosen minus that of the rejected.
    """

    chosen: Tensor
    rejected: Tensor
    user_ids: list[str]
    true_margins: Tensor


class SimulatedUsers:
    """Users whose rewards mix a known basis with weights from a Dirichlet distribution.

    Features are Gaussian with variances that fall as 1/k along randomly turned axes; the basis lies in the leading
    `n_signal` of them: one shared direction, and one of its own for each row.

    Args:
        n_users: Number of users.
        n_features: Width of the features.
        n_basis: Rows of the true basis.
        n_signal: Leading axes that carry reward; n_features for all.
        margin_scale: Standard deviation of a true margin under one basis row.
        shared: Share of its variance that all rows have in common.
        concentration: Dirichlet parameter; small means that users are near the corners.
        reference_noise: Length of the noise in the reference head, relative to that head.
        seed: Seed of everything.

    Examples:
        >>> from eigenpeft.reward import SimulatedUsers
        >>> users = SimulatedUsers(n_users=3, n_features=8, n_basis=2, seed=0)
        >>> pairs = users.pairs(5, seed=1)
        >>> pairs.chosen.shape, pairs.user_ids[4:6]
        (torch.Size([15, 8]), ['user-0', 'user-1'])
    """

    def __init__(
        self,
        n_users: int,
        *,
        n_features: int,
        n_basis: int,
        n_signal: int = 64,
        margin_scale: float = 6.0,
        shared: float = 0.5,
        concentration: float = 0.25,
        reference_noise: float = 0.5,
        seed: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)
        n_signal = min(n_signal, n_features)
        self.n_users = n_users
        self._axes = torch.linalg.qr(_normal(n_features, n_features, generator=generator)).Q
        self._deviations = torch.arange(1, n_features + 1).float().rsqrt()
        common = unit_rows(_normal(1, n_signal, generator=generator))
        own = unit_rows(_normal(n_basis, n_signal, generator=generator))
        # Differences of two texts have twice the variance; every signal axis carries the same share of a margin.
        whitened = math.sqrt(shared) * common + math.sqrt(1 - shared) * own
        on_axes = torch.zeros(n_basis, n_features)
        on_axes[:, :n_signal] = margin_scale / math.sqrt(2) * whitened / self._deviations[:n_signal]
        self.reward_basis = on_axes @ self._axes.mT
        parameters = torch.full((n_users, n_basis), concentration)
        self.user_weights = torch._sample_dirichlet(parameters, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
        mean = on_axes.mean(dim=0)
        noise = torch.zeros(n_features)
        noise[:n_signal] = _normal(n_signal, generator=generator) / self._deviations[:n_signal]
        size = (mean * self._deviations).norm() / (noise * self._deviations).norm()
        self.reference_head = (mean + reference_noise * size * noise) @ self._axes.mT

    def pairs(
        self, n_pairs: int, *, seed: int, users: range | None = None, dtype: torch.dtype = torch.float32
    ) -> SimulatedPairs:
        """New comparisons of new texts.

        Args:
            n_pairs: Comparisons per user.
            seed: Seed of texts and answers.
            users: Which users; None for all.
            dtype: Data type of the features.
        """
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.tensor(list(range(self.n_users) if users is None else users)).repeat_interleave(n_pairs)
        n = len(numbers)
        first, second = (
            (_normal(n, len(self._deviations), generator=generator) * self._deviations) @ self._axes.mT
            for _ in range(2)
        )
        margins = (((first - second) @ self.reward_basis.mT) * self.user_weights[numbers]).sum(dim=1)
        swap = torch.rand(n, generator=generator) > torch.sigmoid(margins)
        chosen = torch.where(swap[:, None], second, first).to(dtype)
        rejected = torch.where(swap[:, None], first, second).to(dtype)
        return SimulatedPairs(
            chosen, rejected, [f"user-{number}" for number in numbers.tolist()], torch.where(swap, -margins, margins)
        )


def _normal(*shape: int, generator: Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)
