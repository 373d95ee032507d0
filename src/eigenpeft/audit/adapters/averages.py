"""Means over the modules that an adapter, or a pair of adapters, has."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def by_adapter(names: Sequence[str], parts: Iterable[tuple[Sequence[str], Tensor]]) -> Tensor:
    """(n, K): the mean of each adapter's curves, NaN where it has none.

    Args:
        names: All n adapters.
        parts: Parts of each module the adapters measured there and their curves (adapters, K); NaN rows do not count.
    """
    index = {name: i for i, name in enumerate(names)}
    total, count = torch.zeros(len(names), 0, dtype=torch.float64), torch.zeros(len(names), 1)
    for adapters, curves in parts:
        if total.shape[1] == 0:
            total = torch.zeros(len(names), curves.shape[1], dtype=torch.float64)
        counts = curves.isfinite().all(dim=1)
        where = torch.tensor([index[name] for name in adapters])[counts]
        total[where] += curves[counts]
        count[where] += 1
    return total / count


def by_pair(names: Sequence[str], parts: Iterable[tuple[Sequence[str], Tensor]]) -> Tensor:
    """(n, n): the mean over the modules that both adapters have; 0 where they have none in common.

    Args:
        names: All n adapters.
        parts: For each module the k adapters measured there, and a value (k, k) for every pair of them.
    """
    index = {name: i for i, name in enumerate(names)}
    total, count = (torch.zeros(len(names), len(names), dtype=torch.float64) for _ in range(2))
    for adapters, values in parts:
        where = torch.tensor([index[name] for name in adapters])
        total[where[:, None], where[None, :]] += values
        count[where[:, None], where[None, :]] += 1
    return total / count.clamp(min=1)
