"""Comparisons as features: reading them in parts from whatever holds them, checking them, numbering their users."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eigenpeft.errors import RewardModelError
from eigenpeft.reward.artifact.users import UserId

# (n, n_features): a tensor, a NumPy array or memory map, a column of a `datasets.Dataset`; anything with len and slices.
Features = Any

CHUNK_BYTES = 64 * 2**20


def difference_chunks(chosen: Features, rejected: Features) -> Iterator[tuple[int, Tensor]]:
    """Differences `chosen - rejected` in consecutive parts of about 64 MB, checked; nothing else is held.

    Args:
        chosen: (n, n_features).
        rejected: (n, n_features).

    Yields:
        First row and (rows, n_features) float32.

    Raises:
        RewardModelError: If lengths or widths differ, or a value is not finite.
    """
    n = len(chosen)
    if n != len(rejected):
        raise RewardModelError(f"{n} chosen but {len(rejected)} rejected features; give one of each per pair.")
    width = None
    start = 0
    step = 1
    while start < n:
        first, second = (read_rows(side, start, min(start + step, n)) for side in (chosen, rejected))
        if first.ndim != 2 or first.shape != second.shape or (width is not None and first.shape[1] != width):
            raise RewardModelError(
                f"chosen {tuple(first.shape)} and rejected {tuple(second.shape)} features must both be "
                f"(n, {width or 'n_features'})."
            )
        width = first.shape[1]
        part = first - second
        # One sum tells nearly always; only one that is not finite has to be looked into, as finite parts may overflow.
        if not bool(torch.isfinite(part.sum())) and not bool(torch.isfinite(part).all()):
            bad = (~torch.isfinite(part).all(dim=1)).nonzero()[:, 0]
            raise RewardModelError(
                f"Features of pair {start + int(bad[0])} are NaN or infinite (and of {len(bad) - 1} more pairs nearby); "
                "embed these texts again or leave the pairs out."
            )
        yield start, part
        start += len(part)
        step = max(1, CHUNK_BYTES // (4 * max(width, 1)))


def pair_margins(chosen: Features, rejected: Features, reward_basis: Tensor) -> Tensor:
    """Margins of every pair under every row of a reward basis.

    Args:
        chosen: (n, n_features).
        rejected: (n, n_features).
        reward_basis: (n_basis, n_features).

    Returns:
        (n, n_basis) float32.

    Raises:
        RewardModelError: If shapes do not fit or a value is not finite.
    """
    margins = torch.zeros(len(chosen), len(reward_basis))
    for start, part in difference_chunks(chosen, rejected):
        if part.shape[1] != reward_basis.shape[1]:
            raise RewardModelError(
                f"Features of width {part.shape[1]} do not fit a basis of width {reward_basis.shape[1]}; embed the texts with the "
                "model that the basis was fitted on."
            )
        margins[start : start + len(part)] = part @ reward_basis.mT
    return margins


def index_users(user_ids: Sequence[UserId], *, n_pairs: int) -> tuple[list[str], Tensor]:
    """Distinct users in order of first appearance, and the number of the user of each pair, (n_pairs,) int64.

    Args:
        user_ids: One per pair; a tensor is (n_pairs,).
        n_pairs: Number of pairs.

    Raises:
        RewardModelError: If the lengths differ.
    """
    if isinstance(user_ids, str) or len(user_ids) != n_pairs:
        raise RewardModelError(f"{len(user_ids)} user_ids for {n_pairs} pairs; give the user of each pair.")
    if isinstance(user_ids, Tensor):
        user_ids = user_ids.tolist()
    numbers: dict[str, int] = {}
    rows = [numbers.setdefault(str(user_id), len(numbers)) for user_id in user_ids]
    return list(numbers), torch.tensor(rows, dtype=torch.long)


def read_rows(side: Features, start: int, stop: int) -> Tensor:
    """Some rows of features as (rows, n_features) float32 on the CPU, copied where they lie in a file.

    Args:
        side: (n, n_features).
        start: First row.
        stop: Row after the last.
    """
    part = side[start:stop]
    if not isinstance(part, Tensor):
        # A copy, as memory maps may be read-only. torch widens half precision twice as fast as NumPy.
        half = getattr(part, "dtype", None) == np.float16
        part = torch.from_numpy(np.array(part, dtype=np.float16 if half else np.float32))
    return part.detach().float().cpu()
