"""Heads of users apart: each is the minimum that scikit-learn's logistic regression finds."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from eigenpeft.linalg.preference.heads import fit_user_heads


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("ridge", [0.05, 1.0, 20.0])
@pytest.mark.parametrize(("n_pairs", "d"), [(6, 20), (30, 4)], ids=["wide", "tall"])
def test_heads_are_those_of_logistic_regression(ridge, n_pairs, d):
    differences = 3 * normal(4, n_pairs, d)
    present = torch.ones(4, n_pairs, dtype=torch.bool)
    present[2, 3:] = False
    differences[2, 3:] = 0
    found = fit_user_heads(differences, present, offsets=torch.zeros(4, n_pairs), ridge=ridge)
    for head, x, there in zip(found, differences, present, strict=True):
        x = x[there].numpy()
        rows, labels = [*x, *-x], [1] * len(x) + [0] * len(x)  # each pair both ways, at half weight
        expected = LogisticRegression(C=0.5 / ridge, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(rows, labels)
        torch.testing.assert_close(head, torch.from_numpy(expected.coef_[0]), atol=2e-4, rtol=1e-3)


def test_offsets_and_no_pairs():
    differences, present = normal(2, 3, 5), torch.tensor([[True] * 3, [False] * 3])
    differences[1] = 0
    confident = fit_user_heads(differences, present, offsets=torch.full((2, 3), 50.0), ridge=1.0)
    torch.testing.assert_close(confident, torch.zeros(2, 5, dtype=torch.float64), atol=1e-9, rtol=0)
