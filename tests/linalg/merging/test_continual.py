"""OPCM beside its definition on whole matrices, in NumPy float64 with full bases."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg.merging import core_space
from eigenpeft.linalg.merging.continual import add_off_directions, mean_norm_scale


def low_rank(seed, *, m=9, n=7, rank=3):
    draw = np.random.default_rng(seed)
    return draw.standard_normal((m, rank)), draw.standard_normal((rank, n))


def by_definition(total, update, share):
    """The sum over pairs of singular vectors, one after another, with full bases of both spaces."""
    u, s, vt = np.linalg.svd(total)
    rank = int((s > 1e-9 * s[0]).sum())
    r = next(k for k in range(rank + 1) if s[:k].sum() >= share * s.sum() * (1 - 1e-12))
    kept = np.zeros_like(update)
    for p in range(u.shape[1]):
        for q in range(len(vt)):
            if (p < r and q < r) or (p == q and p < rank):
                continue
            kept += (u[:, p] @ update @ vt[q]) * np.outer(u[:, p], vt[q])
    return total + kept


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(9, 7), (5, 8), (6, 6)])
def test_a_sequence_is_that_of_the_definition(share, shape):
    updates = [B @ A for B, A in (low_rank(seed, m=shape[0], n=shape[1]) for seed in range(3))]
    expected, found = updates[0], torch.from_numpy(updates[0])
    for update in updates[1:]:
        expected = by_definition(expected, update, share)
        found = add_off_directions(found, torch.from_numpy(update), left_out_share=share)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-11)


def test_in_the_core_space_of_loras_it_is_the_same_update():
    factors = [low_rank(seed) for seed in range(2)]
    space = core_space([(torch.from_numpy(B), torch.from_numpy(A)) for B, A in factors])
    merged = add_off_directions(space.cores[0], space.cores[1])
    assert space.components_in is not None
    dense = space.components_out.mT @ merged @ space.components_in
    np.testing.assert_allclose(dense.numpy(), by_definition(*(B @ A for B, A in factors), 0.5), atol=1e-11)


def test_what_is_added_is_orthogonal_to_the_total():
    first, second = (torch.from_numpy(B @ A) for B, A in (low_rank(0), low_rank(1)))
    added = add_off_directions(first, second) - first
    assert abs(float((added * first).sum())) < 1e-11
    assert float(added.norm()) > 0.3 * float(second.norm()), "something is left to be added"
    torch.testing.assert_close(add_off_directions(first, 3 * first), first, rtol=0, atol=1e-11)


def test_nothing_before_and_nothing_after():
    B, A = low_rank(0)
    update = torch.from_numpy(B @ A)
    assert torch.equal(add_off_directions(torch.zeros_like(update), update), update)
    torch.testing.assert_close(add_off_directions(update, torch.zeros_like(update)), update)


def test_the_scale_gives_the_mean_norm_over_all_weights():
    totals = [torch.tensor([[3.0]]), torch.tensor([[0.0, 4.0]])]
    assert mean_norm_scale(totals, [1.0, 2.0]) == pytest.approx(1.5 / 5)
    assert mean_norm_scale([torch.zeros(2, 2)], [0.0]) == 1.0


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"left_out_share=.* must be in \[0, 1\]"):
        add_off_directions(torch.eye(2), torch.eye(2), left_out_share=share)
