"""Clusters of adapters by the overlap of their row spaces."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# Mean overlap at which two groups still count as one; independent adapters of rank r have about r / n.
CLUSTER_OVERLAP = 0.2


def clusters(names: Sequence[str], overlap: Float[Tensor, "adapters adapters"]) -> tuple[tuple[str, ...], ...]:
    """Average-linkage clusters: the two groups of largest mean overlap are joined until it falls below 0.2.

    Args:
        names: Adapters.
        overlap: Overlap of their row spaces, 0 to 1.

    Returns:
        All adapters, single ones included, largest cluster first.
    """
    groups, means = [[i] for i in range(len(names))], overlap.to(torch.float64).clone().fill_diagonal_(-1.0)
    while len(groups) > 1:
        i, j = sorted(divmod(int(means.argmax()), len(groups)))
        if means[i, j] < CLUSTER_OVERLAP:
            break
        # The mean over pairs of a joined group: that of its parts, weighted by their sizes (Lance and Williams, 1967).
        sizes = len(groups[i]), len(groups[j])
        means[i] = means[:, i] = (sizes[0] * means[i] + sizes[1] * means[j]) / sum(sizes)
        means[i, i] = -1.0
        left = torch.arange(len(groups)) != j
        means = means[left][:, left]
        groups[i] += groups.pop(j)
    ordered = sorted(groups, key=lambda group: (-len(group), min(group)))
    return tuple(tuple(names[i] for i in sorted(group)) for group in ordered)
