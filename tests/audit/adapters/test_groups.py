"""Average linkage against its definition, computed anew at every step."""

import pytest
import torch

from eigenpeft.audit.adapters.groups import CLUSTER_OVERLAP, clusters


def by_definition(overlap):
    groups = [[i] for i in range(len(overlap))]
    while len(groups) > 1:
        pairs = [(i, j) for j in range(len(groups)) for i in range(j)]
        means = {(i, j): float(overlap[groups[i]][:, groups[j]].mean()) for i, j in pairs}
        i, j = max(pairs, key=lambda pair: means[pair])
        if means[i, j] < CLUSTER_OVERLAP:
            break
        groups[i] += groups.pop(j)
    return {frozenset(group) for group in groups}


@pytest.mark.parametrize("seed", range(5))
def test_joins_the_groups_of_largest_mean_overlap(seed):
    overlap = torch.rand(14, 14, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 2 * 0.7
    overlap = (overlap + overlap.mT) / 2
    overlap.fill_diagonal_(1.0)
    found = clusters([str(i) for i in range(14)], overlap)
    assert {frozenset(map(int, group)) for group in found} == by_definition(overlap)
    assert 1 < len(found) < 14
    assert [len(group) for group in found] == sorted((len(group) for group in found), reverse=True)
