"""The mean of factors and its residual, beside the mean of dense updates in float64."""

import torch

from eigenpeft.linalg.merging.factor_means import mean_of_factors, residual_of_factor_mean


def adapters(n, rank=3):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(9, rank, generator=generator), torch.randn(rank, 7, generator=generator)) for _ in range(n)]


def test_mean_and_residual_add_up_to_the_mean_of_the_updates():
    factors, weights = adapters(4), [0.1, 0.2, 0.3, 0.4]
    expected = sum(w * (B.double() @ A.double()) for w, (B, A) in zip(weights, factors, strict=True))
    B, A = mean_of_factors(factors, weights=weights)
    rest_B, rest_A = residual_of_factor_mean(factors, weights=weights)
    assert rest_B.shape == (9, 15)
    torch.testing.assert_close(B @ A + rest_B @ rest_A, expected, rtol=0, atol=1e-12)
    assert torch.linalg.norm(rest_B @ rest_A) > 0.5 * torch.linalg.norm(expected), (
        "factors that mean nothing to each other"
    )


def test_one_adapter_has_no_residual():
    ((B, A),) = factors = adapters(1)
    mean = mean_of_factors(factors, weights=[1.0])
    assert torch.equal(mean[0], B.double())
    assert torch.equal(mean[1], A.double())
    rest_B, rest_A = residual_of_factor_mean(factors, weights=[1.0])
    torch.testing.assert_close(rest_B @ rest_A, torch.zeros(9, 7, dtype=torch.float64))
