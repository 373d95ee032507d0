"""Cosines over all modules against those of the dense updates in one vector, in NumPy float64."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg.factored import frobenius_norm, inner_product
from eigenpeft.linalg.scores.update_cosines import update_cosines

SHAPES = [(30, 12), (8, 40), (5, 5)]


def products(pairs):
    """⟨U, V⟩, ‖U‖² and ‖V‖² of each module, as they are computed from factors."""
    rows = [
        (inner_product(*u, other_B=v[0], other_A=v[1]), frobenius_norm(*u) ** 2, frobenius_norm(*v) ** 2)
        for u, v in pairs
    ]
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64).mT[..., None]


def updates(random_factors, *, scale=1.0):
    pairs = [
        (random_factors(m, n, 3, dtype=torch.float64, seed=i), random_factors(m, n, 2, dtype=torch.float64, seed=i + 9))
        for i, (m, n) in enumerate(SHAPES)
    ]
    return [(u, (scale * v[0], v[1])) for u, v in pairs]


def in_one_vector(pairs, side, as_numpy):
    return np.concatenate([(as_numpy(pair[side][0]) @ as_numpy(pair[side][1])).ravel() for pair in pairs])


@pytest.mark.parametrize("scale", [1.0, -3.0, 1e-30, 1e30])
def test_it_is_the_cosine_of_the_dense_updates_in_one_vector(scale, random_factors, as_numpy):
    pairs = updates(random_factors, scale=scale)
    u, v = (in_one_vector(pairs, side, as_numpy) for side in (0, 1))
    expected = u @ v / (np.linalg.norm(u) * np.linalg.norm(v))
    np.testing.assert_allclose(update_cosines(*products(pairs)).item(), expected, rtol=1e-10)


def test_rows_of_modules_and_one_row_of_their_sums_give_the_same(random_factors):
    of_modules = products(updates(random_factors))
    np.testing.assert_allclose(update_cosines(*of_modules), update_cosines(*of_modules.sum(dim=1, keepdim=True)))


def test_it_is_not_the_mean_of_the_modules_cosines():
    """Of two modules, the one with the larger updates counts for more."""
    squares = torch.tensor([[100.0], [1.0]])
    assert update_cosines(torch.tensor([[100.0], [0.0]]), squares, squares).item() == pytest.approx(100 / 101)


def test_an_update_that_is_zero_has_none():
    zeros, ones = torch.zeros(2, 1), torch.ones(2, 1)
    assert update_cosines(zeros, zeros, ones).isnan().all()
    assert update_cosines(zeros, ones, zeros).isnan().all()


def test_pairs_of_many_updates_are_a_matrix(as_numpy):
    rows = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = rows @ rows.mT
    squares = gram.diagonal()[:, None].expand(4, 4)
    unit = as_numpy(rows) / np.linalg.norm(as_numpy(rows), axis=1, keepdims=True)
    expected = unit @ unit.T
    np.testing.assert_allclose(update_cosines(gram[None], squares[None], squares.mT[None]), expected, rtol=1e-12)
