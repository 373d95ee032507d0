"""Bases from chunks of adapters: exact where nothing is discarded, within the told bound elsewhere."""

import pytest
import torch

from eigenpeft.linalg.bases.chunked import fit_chunks
from eigenpeft.linalg.bases.fitting import explained_share_curve, fit_bases, stack_rows
from eigenpeft.linalg.orthogonal import principal_angles


def chunked(factors, size):
    return lambda: (factors[start : start + size] for start in range(0, len(factors), size))


@pytest.mark.parametrize("method", ["balanced", "hosvd"])
@pytest.mark.parametrize("weighting", ["equal", "none"])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_exact_where_two_k_directions_hold_everything(adapters, method, weighting, size):
    factors = adapters(8, noise=0.0)  # six shared directions a side
    found = fit_chunks(chunked(factors, size), n_components=6, method=method, weighting=weighting)
    whole = fit_bases(factors, n_components=6, method=method, weighting=weighting)
    for side in ("components_in", "components_out"):
        assert principal_angles(getattr(found.bases, side), getattr(whole, side)).amax() < 1e-4
    torch.testing.assert_close(found.bases.explained_variance_ratio, whole.explained_variance_ratio, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.bases.singular_values_in, whole.singular_values_in, rtol=1e-4, atol=0)
    assert found.bases.norms == pytest.approx(whole.norms)
    assert max(found.missed_bound_in, found.missed_bound_out) < 1e-6


@pytest.mark.parametrize("size", [1, 3])
def test_what_a_single_pass_misses_is_within_the_bound(adapters, size):
    factors = adapters(12, noise=0.6)
    found = fit_chunks(chunked(factors, size), n_components=5)
    whole = fit_bases(factors, n_components=5)
    rows = stack_rows(factors, method="balanced")
    for rows_of_side, side, bound in zip(
        rows, ("in", "out"), (found.missed_bound_in, found.missed_bound_out), strict=True
    ):
        squared_norms = [
            float((rows_of_side.double() @ getattr(bases, f"components_{side}").double().mT).square().sum())
            for bases in (whole, found.bases)
        ]
        missed = (squared_norms[0] - squared_norms[1]) / float(rows_of_side.double().square().sum())
        assert -1e-6 < missed <= bound
    curve = explained_share_curve(
        factors, components_in=found.bases.components_in, components_out=found.bases.components_out
    )
    torch.testing.assert_close(found.bases.explained_variance_ratio.cumsum(0), curve, atol=1e-5, rtol=0)


def test_refusals(adapters):
    factors = adapters(3, noise=0.0)
    with pytest.raises(ValueError, match="n_components=30 exceeds the numerical rank 6 of the 'in' side"):
        fit_chunks(chunked(factors, 1), n_components=30)
    with pytest.raises(ValueError, match="every adapter's update is zero"):
        fit_chunks(lambda: [[(torch.zeros(4, 2), torch.ones(2, 6))]], n_components=1)
