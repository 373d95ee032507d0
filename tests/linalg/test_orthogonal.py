"""Orthonormal rows, their complements, signs and angles."""

import math

import numpy as np
import pytest
import torch

from eigenpeft.linalg.orthogonal import fix_signs, orthonormal_rows, principal_angles, random_complement

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fix_signs_only_flips_and_is_idempotent(dtype):
    rows = normal(9, 14, dtype=dtype)
    fixed = fix_signs(rows)
    assert fixed.dtype == dtype
    assert torch.equal(fixed.abs(), rows.abs())
    assert torch.equal(fix_signs(fixed), fixed)
    assert torch.equal(fix_signs(-rows), fixed)
    peaks = fixed.gather(1, fixed.abs().argmax(dim=1, keepdim=True))
    assert bool((peaks > 0).all())


def test_fix_signs_keeps_zero_rows_and_its_argument():
    rows = torch.tensor([[0.0, 0.0], [-1.0, 0.5]])
    assert fix_signs(rows).tolist() == [[0.0, 0.0], [1.0, -0.5]]
    assert rows[1, 0] == -1.0
    assert fix_signs(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(1, 5), (7, 20), (12, 12)])
def test_orthonormal_rows_span_prefix_by_prefix(k, n, dtype, as_numpy):
    rows = normal(k, n, dtype=dtype)
    result = orthonormal_rows(rows)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eps = 1e-12 if dtype == torch.float64 else 1e-6
    q, x = as_numpy(result), as_numpy(rows)
    np.testing.assert_allclose(q @ q.T, np.eye(k), atol=eps)
    coefficients = x @ q.T
    np.testing.assert_allclose(coefficients @ q, x, atol=20 * eps)
    assert np.abs(np.triu(coefficients, 1)).max(initial=0.0) < 20 * eps  # row j needs the first j + 1 alone
    assert (np.diag(coefficients) > 0).all()


def test_orthonormal_rows_refuses_more_rows_than_columns():
    with pytest.raises(ValueError, match="5 rows of length 3 cannot be orthonormal; pass at most 3"):
        orthonormal_rows(normal(5, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k", "n_pseudo_components", "n"), [(4, 3, 30), (0, 5, 10), (6, 4, 10), (4, 0, 9)])
def test_random_complement_completes(k, n_pseudo_components, n, dtype, as_numpy):
    components = orthonormal_rows(normal(k, n)).to(dtype)
    extra = random_complement(
        components, n_pseudo_components=n_pseudo_components, generator=torch.Generator().manual_seed(3)
    )
    assert extra.shape == (n_pseudo_components, n)
    assert extra.dtype == dtype
    both = np.concatenate([as_numpy(components), as_numpy(extra)])
    np.testing.assert_allclose(
        both @ both.T, np.eye(k + n_pseudo_components), atol=1e-12 if dtype == torch.float64 else 1e-6
    )


def test_random_complement_of_components_that_were_rounded():
    """Float32 components used in float64: a projection on them as they are would leave 1e-7 along them."""
    components = orthonormal_rows(normal(200, 400)).float().double()
    # Another seed than the components': the same numbers would lie in their span, and nothing would be left of them.
    extra = random_complement(components, n_pseudo_components=150, generator=torch.Generator().manual_seed(1))
    assert (extra @ components.mT).abs().amax() < 1e-11


def test_random_complement_follows_its_generator():
    components = orthonormal_rows(normal(3, 20))
    first, again, other = (
        random_complement(components, n_pseudo_components=2, generator=torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("n_pseudo_components", [-1, 4])
def test_random_complement_refuses_what_does_not_fit(n_pseudo_components):
    with pytest.raises(
        ValueError, match=f"n_pseudo_components={n_pseudo_components} directions cannot be added to 7 .*pass 0 to 3"
    ):
        random_complement(
            orthonormal_rows(normal(7, 10)), n_pseudo_components=n_pseudo_components, generator=torch.Generator()
        )


@pytest.mark.parametrize("angle", [1e-12, 1e-7, 1e-3, 0.7, 0.8, 1.5, math.pi / 2])
def test_principal_angles_finds_planted_ones(angle):
    q = orthonormal_rows(normal(6, 25))
    tilted = torch.stack([math.cos(angle) * q[1] + math.sin(angle) * q[4], q[0]])
    mixed = normal(2, 2, seed=1) @ tilted  # any rows with that span
    found = principal_angles(q[:3], mixed)
    np.testing.assert_allclose(found.numpy(), [0.0, angle], rtol=1e-6, atol=1e-14)
    np.testing.assert_allclose(principal_angles(mixed, q[:3]).numpy(), found.numpy(), rtol=1e-6, atol=1e-14)


def test_principal_angles_agree_with_the_cosines_of_large_ones(as_numpy):
    a, b = normal(5, 30, dtype=torch.float32), normal(8, 30, dtype=torch.float32, seed=2)
    (qa, _), (qb, _) = np.linalg.qr(as_numpy(a).T), np.linalg.qr(as_numpy(b).T)
    cosines = np.linalg.svd(qa.T @ qb, compute_uv=False)
    np.testing.assert_allclose(principal_angles(a, b).numpy(), np.arccos(cosines), atol=1e-9)
