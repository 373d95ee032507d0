"""Logistic regression: the minimum that another optimiser finds, also where classes separate; the Brier score by hand."""

import numpy as np
import pytest
import torch
from scipy import optimize

from eigenpeft.linalg.scores.logistic import brier_score, fit_logistic


def by_scipy(x, y, ridge):
    signs = 2 * y - 1

    def loss(w):
        return np.logaddexp(0, -signs * (x @ w[:-1] + w[-1])).sum() + 0.5 * ridge * (w[:-1] ** 2).sum()

    return optimize.minimize(loss, np.zeros(x.shape[1] + 1), method="BFGS", options={"gtol": 1e-9}).x


@pytest.mark.parametrize("ridge", [0.1, 1.0, 10.0])
def test_the_minimum_is_the_one_that_scipy_finds(ridge):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(60, 3))
    y = (generator.uniform(size=60) < 1 / (1 + np.exp(-(x @ [1.0, -2.0, 0.0] + 0.5)))).astype(float)
    w, b = fit_logistic(torch.tensor(x), torch.tensor(y), ridge=ridge)
    np.testing.assert_allclose([*w.tolist(), b], by_scipy(x, y, ridge), atol=1e-5)


def test_separable_classes_have_finite_weights():
    x = torch.linspace(-3, 3, 20)[:, None] * 10
    w, b = fit_logistic(x, (x[:, 0] > 0).double())
    assert torch.isfinite(w).all()
    assert w[0] > 0
    assert abs(b) < 1e-6


def test_one_class_alone_gives_its_probability():
    _, b = fit_logistic(torch.zeros(8, 1), torch.ones(8))
    assert 1 / (1 + np.exp(-b)) > 0.99


def test_brier_scores():
    found = brier_score(torch.tensor([0.2, 0.7, 0.0]), torch.tensor([0.0, 1.0, 1.0]))
    np.testing.assert_allclose(found, [0.04, 0.09, 1.0], atol=1e-6)
