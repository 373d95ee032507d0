"""The block iteration on operators with known eigenvalues."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg.krylov import block_krylov


def start(b, d, seed=0):
    return torch.randn(b, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diagonal(eigenvalues):
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    return lambda block: block * values.to(block.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [1.0, 0.5, 0.1])
def test_finds_the_leading_eigenpairs_on_an_orthonormal_basis(dtype, decay):
    eigenvalues = np.exp(-decay * np.arange(200))
    found = block_krylov(
        diagonal(eigenvalues), start(12, 200).to(dtype), n_components=6, tol=1e-12, rounding=torch.finfo(dtype).eps
    )
    eps = 1e-6 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(found.values[:6].numpy(), eigenvalues[:6], rtol=1e-4, atol=eps)
    for rows in (found.vectors, found.basis):
        rows = rows.double().numpy()
        np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=10 * eps)
    np.testing.assert_allclose(np.sum(found.vectors[:6, :6].double().numpy() ** 2), 6.0, atol=1e-3)


def test_estimate_of_what_is_missing_is_of_the_right_size():
    eigenvalues = 1.0 / (1 + np.arange(500))
    for max_passes in (2, 3, 4):
        found = block_krylov(
            diagonal(eigenvalues), start(16, 500), n_components=8, tol=0.0, rounding=1e-16, max_passes=max_passes
        )
        missing = np.mean(eigenvalues[:8] / found.values[:8].numpy() - 1.0)
        assert found.n_passes == max_passes
        assert missing / 10 < found.promised_gain < missing * 10


def test_stops_at_the_tolerance():
    passes = [
        block_krylov(
            diagonal(1.0 / (1 + np.arange(500))), start(16, 500), n_components=8, tol=tol, rounding=1e-16
        ).n_passes
        for tol in (1e-1, 1e-4, 1e-10)
    ]
    assert passes == sorted(passes)
    assert passes[0] < passes[-1]


def test_an_operator_of_small_rank_ends_the_iteration():
    found = block_krylov(
        diagonal([3.0, 2.0, 1.0] + [0.0] * 50),
        start(10, 53) @ torch.diag(torch.tensor([1.0] * 3 + [0.0] * 50, dtype=torch.float64)),
        n_components=8,
        tol=0.0,
        rounding=1e-16,
    )
    assert found.values.tolist() == pytest.approx([3.0, 2.0, 1.0])
    assert found.promised_gain == 0.0
    assert found.n_passes < 4


def test_a_start_of_zeros_finds_nothing():
    found = block_krylov(diagonal([1.0] * 5), torch.zeros(2, 5), n_components=1, tol=1e-6, rounding=1e-7)
    assert (found.vectors.shape, found.values.shape, found.n_passes) == ((0, 5), (0,), 0)
