"""Cosines of tasks against their definition, and queries of held-out rows that only a fair mean gets wrong."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg.scores.nearest_tasks import held_out_queries, task_cosines


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cosines_are_those_of_the_definition():
    queries, vectors = gaussian(4, 6) + 10, gaussian(3, 6, seed=1) + 10
    found = task_cosines(queries.float(), vectors.float()).numpy()
    middle = vectors.numpy().mean(axis=0)
    for i, query in enumerate(queries.numpy() - middle):
        for j, vector in enumerate(vectors.numpy() - middle):
            expected = query @ vector / np.linalg.norm(query) / np.linalg.norm(vector)
            assert found[i, j] == pytest.approx(expected, abs=1e-5)


def test_one_task_is_not_taken_off_itself():
    assert float(task_cosines(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]))) == pytest.approx(1.0)


def test_rows_are_left_out_of_their_own_mean():
    """Pure noise: a query that stayed in its task's mean would be nearest to it; one that is left out is right by chance."""
    rows = [gaussian(8, 40, seed=seed) for seed in range(10)]
    found = held_out_queries(rows, sizes=(4,), n_draws=16, generator=torch.Generator().manual_seed(0))
    assert len(found.right) == 160
    assert float(found.right.mean()) < 0.3
    inside = task_cosines(
        torch.stack([each[:4].mean(0) for each in rows]), torch.stack([each.mean(0) for each in rows])
    )
    assert bool((inside.argmax(dim=1) == torch.arange(10)).all())


def test_tasks_that_differ_are_found_and_short_ones_are_not_asked():
    rows = [gaussian(n, 10, seed=n) * 0.1 + torch.eye(10, dtype=torch.float64)[n] for n in (3, 8)]
    found = held_out_queries(rows, sizes=(1, 4), n_draws=5, generator=torch.Generator().manual_seed(0))
    assert found.sizes.tolist() == [1.0] * 5 + [1.0] * 5 + [4.0] * 5
    assert float(found.right.min()) == 1.0
    assert float(found.margins.min()) > 0.5
