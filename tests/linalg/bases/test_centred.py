"""Centred components keep the mean."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg.bases.centred import centred_components
from eigenpeft.linalg.orthogonal import principal_angles


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(60, 20), (20, 60)])
@pytest.mark.parametrize("k", [1, 2, 9])
def test_span_is_the_mean_and_the_principal_components(shape, k, dtype, as_numpy):
    rows = (normal(*shape) * torch.linspace(3, 1, shape[1], dtype=torch.float64) + 0.5).to(dtype)
    found = centred_components(rows, n_components=k)
    matrix, components = as_numpy(rows), as_numpy(found.components)
    mean = matrix.mean(axis=0)
    principal = np.linalg.svd(matrix - mean)
    np.testing.assert_allclose(components @ components.T, np.eye(k), atol=1e-6)
    np.testing.assert_allclose(np.abs(components[0] @ mean), np.linalg.norm(mean), rtol=1e-5)
    expected = np.concatenate([mean[None], principal[2][: k - 1]])
    assert principal_angles(found.components, torch.from_numpy(expected)).amax() < 1e-3
    expected_values = [np.linalg.norm(mean) * shape[0] ** 0.5, *principal[1][: k - 1]]
    np.testing.assert_allclose(found.singular_values.double().numpy(), expected_values, rtol=1e-4)


@pytest.mark.parametrize("k", [2, 3, 5, 9])
def test_a_mean_inside_the_principal_components_is_counted_once(k):
    basis = torch.linalg.qr(normal(30, 6)).Q.mT
    spread = torch.diag(torch.arange(9.0, 3.0, -1.0, dtype=torch.float64)) @ basis
    rows = torch.cat([spread, -spread]) + 2.0 * basis[1]  # the mean is the second principal component
    found = centred_components(rows, n_components=k)
    n_found = min(k, 6)
    assert found.components.shape == (n_found, 30)
    torch.testing.assert_close(found.components @ found.components.mT, torch.eye(n_found, dtype=torch.float64))
    assert principal_angles(found.components, basis[:n_found]).amax() < 1e-6


def test_no_more_components_than_the_rank():
    rows = normal(5, 30)
    assert centred_components(rows, n_components=9).components.shape == (5, 30)
    assert centred_components(rows[:1].expand(4, 30).contiguous(), n_components=9).components.shape == (1, 30)


def test_a_mean_of_zero_is_left_out():
    rows = normal(4, 12)
    found = centred_components(torch.cat([rows, -rows]), n_components=4)
    assert found.components.shape == (4, 12)
    assert bool((found.singular_values.diff() <= 0).all())
    assert principal_angles(found.components, rows).amax() < 1e-6
