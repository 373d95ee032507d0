"""Factored matrices against their products, formed in NumPy float64."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg.decompose import numerical_rank
from eigenpeft.linalg.factored import (
    balance,
    factored_svd,
    frobenius_norm,
    inner_product,
    projection_residual,
    truncate,
)
from eigenpeft.linalg.orthogonal import orthonormal_rows

# (m, n, r, rank): tall, wide, square products; ranks above a side; factors of smaller rank than they look.
SHAPES = [(30, 12, 4, None), (12, 30, 4, None), (16, 16, 5, 2), (6, 20, 9, None), (20, 6, 9, 3), (7, 5, 1, None)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]

shapes = pytest.mark.parametrize(("m", "n", "r", "rank"), SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def tolerance(dtype):
    return 1e-12 if dtype == torch.float64 else 1e-6


@shapes
@dtypes
def test_frobenius_norm_is_that_of_the_product(m, n, r, rank, dtype, random_factors, as_numpy):
    lora_B, lora_A = random_factors(m, n, r, rank=rank, dtype=dtype)
    norm = frobenius_norm(lora_B, lora_A)
    assert norm.dtype == torch.float64
    np.testing.assert_allclose(norm.item(), np.linalg.norm(as_numpy(lora_B) @ as_numpy(lora_A)), rtol=1e-12)


def test_frobenius_norm_survives_a_bad_split(random_factors, regauge, as_numpy):
    [(lora_B, lora_A)] = regauge([random_factors(30, 20, 6)], condition=1e3)
    np.testing.assert_allclose(
        frobenius_norm(lora_B, lora_A).item(), np.linalg.norm(as_numpy(lora_B) @ as_numpy(lora_A)), rtol=1e-6
    )


@shapes
@dtypes
def test_inner_product_is_that_of_the_products(m, n, r, rank, dtype, random_factors, as_numpy):
    one = random_factors(m, n, r, rank=rank, dtype=dtype)
    other = random_factors(m, n, r + 2, dtype=dtype, seed=1)
    products = [as_numpy(lora_B) @ as_numpy(lora_A) for lora_B, lora_A in (one, other)]
    found = inner_product(*one, other_B=other[0], other_A=other[1])
    np.testing.assert_allclose(found.item(), np.sum(products[0] * products[1]), rtol=1e-10)


@shapes
@dtypes
def test_factored_svd_is_that_of_the_product(m, n, r, rank, dtype, random_factors, as_numpy):
    lora_B, lora_A = random_factors(m, n, r, rank=rank, dtype=dtype)
    svd, k, eps = factored_svd(lora_B, lora_A), min(m, n, r), tolerance(dtype)
    assert svd.U.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (svd.U.shape, svd.S.shape, svd.Vh.shape) == ((m, k), (k,), (k, n))
    product, u, s, vh = as_numpy(lora_B) @ as_numpy(lora_A), *map(as_numpy, (svd.U, svd.S, svd.Vh))
    expected = np.linalg.svd(product, compute_uv=False)
    np.testing.assert_allclose(s, expected[:k], atol=eps * expected[0])
    np.testing.assert_allclose((u * s) @ vh, product, atol=10 * eps * expected[0])
    np.testing.assert_allclose(u.T @ u, np.eye(k), atol=eps)
    np.testing.assert_allclose(vh @ vh.T, np.eye(k), atol=eps)


@shapes
@dtypes
def test_balance_splits_the_product_evenly(m, n, r, rank, dtype, random_factors, as_numpy):
    lora_B, lora_A = random_factors(m, n, r, rank=rank, dtype=dtype)
    balanced_B, balanced_A = map(as_numpy, balance(lora_B, lora_A))
    product = as_numpy(lora_B) @ as_numpy(lora_A)
    expected, eps = np.linalg.svd(product, compute_uv=False), tolerance(dtype)
    if dtype != torch.bfloat16:  # its rounding gives rank-deficient factors full rank
        assert len(balanced_A) == min(m, n, r if rank is None else rank)
    np.testing.assert_allclose(balanced_B @ balanced_A, product, atol=10 * eps * expected[0])
    spectrum = np.diag(expected[: len(balanced_A)])
    np.testing.assert_allclose(balanced_B.T @ balanced_B, spectrum, atol=10 * eps * expected[0])
    np.testing.assert_allclose(balanced_A @ balanced_A.T, spectrum, atol=10 * eps * expected[0])


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_balance_depends_on_the_product_alone(dtype, eps, random_factors, regauge):
    pair = random_factors(40, 30, 6, dtype=dtype)
    [turned] = regauge([pair], condition=30.0)
    for one, other in zip(balance(*pair), balance(*turned), strict=True):
        torch.testing.assert_close(one, other, atol=eps * one.abs().max().item(), rtol=0.0)


def test_float64_factors_are_not_squared(random_factors, regauge):
    """Gram matrices of a split of condition 1e6 would leave errors of 1e-4."""
    pair = random_factors(40, 30, 6, dtype=torch.float64)
    [turned] = regauge([pair], condition=1e6)
    for one, other in zip(balance(*pair), balance(*turned), strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=0.0)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_balance_levels_scales_that_differ_greatly(scale, random_factors, as_numpy):
    lora_B, lora_A = random_factors(20, 30, 4)
    balanced_B, balanced_A = balance(lora_B * scale, lora_A / scale)
    np.testing.assert_allclose(as_numpy(balanced_B @ balanced_A), as_numpy(lora_B) @ as_numpy(lora_A), atol=1e-5 * 20)
    np.testing.assert_allclose(balanced_B.norm().item(), balanced_A.norm().item(), rtol=1e-5)


def test_balance_of_nothing_has_rank_0(random_factors):
    lora_B, lora_A = random_factors(8, 10, 3)
    for pair in [(torch.zeros_like(lora_B), lora_A), (lora_B, torch.zeros_like(lora_A))]:
        balanced_B, balanced_A = balance(*pair)
        assert (balanced_B.shape, balanced_A.shape) == ((8, 0), (0, 10))


def test_balance_of_factors_that_cancel_has_rank_0(random_factors):
    lora_B, lora_A = random_factors(8, 10, 3)
    assert balance(torch.cat([lora_B, lora_B], dim=1), torch.cat([lora_A, -lora_A]))[1].shape == (0, 10)


@shapes
@dtypes
@pytest.mark.parametrize("kept", [1, 3, 40])
def test_truncate_is_the_best_of_its_rank(m, n, r, rank, dtype, kept, random_factors, as_numpy):
    lora_B, lora_A = random_factors(m, n, r, rank=rank, dtype=dtype)
    truncated_B, truncated_A = truncate(lora_B, lora_A, rank=kept)
    assert (truncated_B.shape, truncated_A.shape) == ((m, kept), (kept, n))
    product = as_numpy(lora_B) @ as_numpy(lora_A)
    spectrum, eps = np.linalg.svd(product, compute_uv=False), tolerance(dtype)
    error = np.linalg.norm(product - as_numpy(truncated_B) @ as_numpy(truncated_A))
    np.testing.assert_allclose(error, np.linalg.norm(spectrum[kept:]), atol=10 * eps * spectrum[0])
    grams = as_numpy(truncated_B).T @ as_numpy(truncated_B), as_numpy(truncated_A) @ as_numpy(truncated_A).T
    np.testing.assert_allclose(*grams, atol=10 * eps * spectrum[0])


def test_truncate_refuses_rank_0(random_factors):
    with pytest.raises(ValueError, match="rank=0 is not a rank of LoRA factors; pass at least 1"):
        truncate(*random_factors(5, 5, 2), rank=0)


@dtypes
@pytest.mark.parametrize(("m", "n", "k_out", "k_in"), [(30, 20, 4, 6), (20, 30, 1, 1), (12, 12, 12, 5)])
def test_projection_residual_is_that_of_the_product(m, n, k_out, k_in, dtype, random_factors, as_numpy):
    lora_B, lora_A = random_factors(m, n, 3, dtype=dtype)
    components_out, components_in = (
        orthonormal_rows(torch.randn(k, size, generator=torch.Generator().manual_seed(k)))
        for k, size in ((k_out, m), (k_in, n))
    )
    product, out, into = as_numpy(lora_B) @ as_numpy(lora_A), as_numpy(components_out), as_numpy(components_in)
    expected = np.linalg.norm(product - out.T @ out @ product @ into.T @ into)
    found = projection_residual(lora_B, lora_A, components_out=components_out, components_in=components_in)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.item(), expected, rtol=1e-6)


@pytest.mark.parametrize("residual", [1e-1, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("side", ["in", "out", "both"])
def test_projection_residual_is_right_to_1_percent_when_small(residual, side, as_numpy):
    """Subtracting squared norms in float32 fails this from 1e-3 downwards."""
    generator = torch.Generator().manual_seed(0)
    v_in, v_out = (orthonormal_rows(torch.randn(9, size, generator=generator)) for size in (300, 200))
    tilt_in, tilt_out = residual * (side != "out"), residual * (side != "in")
    # Rows of A in the span of the first 8 components but for a planted part along the ninth; B likewise.
    lora_A = v_in[:8] + tilt_in * v_in[8] / 8**0.5 * torch.ones(8, 1)
    lora_B = (v_out[:8] + tilt_out * v_out[8] / 8**0.5 * torch.ones(8, 1)).mT
    product, out, into = as_numpy(lora_B) @ as_numpy(lora_A), as_numpy(v_out[:8]), as_numpy(v_in[:8])
    expected = np.linalg.norm(product - out.T @ out @ product @ into.T @ into)
    assert expected > 0.3 * residual
    found = projection_residual(lora_B, lora_A, components_out=v_out[:8], components_in=v_in[:8])
    np.testing.assert_allclose(found.item(), expected, rtol=0.01)


def test_projection_residual_vanishes_on_the_span(random_factors):
    lora_B, lora_A = random_factors(30, 40, 4, dtype=torch.float64)
    out, into = orthonormal_rows(lora_B.mT.contiguous()), orthonormal_rows(lora_A)
    assert projection_residual(lora_B, lora_A, components_out=out, components_in=into) < 1e-12 * frobenius_norm(
        lora_B, lora_A
    )


def test_rank_of_balanced_factors_follows_the_one_rule(with_spectrum):
    pair = torch.eye(20), with_spectrum(20, 30, [1.0, 1e-2, 1e-4, 1e-6, 1e-8], dtype=torch.float64).float()
    spectrum = torch.tensor([1.0, 1e-2, 1e-4, 1e-6, 1e-8])
    assert len(balance(*pair)[1]) == numerical_rank(spectrum) == 3
