"""A merge is the decomposition of everything, as long as nothing was discarded."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg.decompose import top_components
from eigenpeft.linalg.incremental import merge_components
from eigenpeft.linalg.orthogonal import principal_angles


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [30, 200])
@pytest.mark.parametrize("n_new", [1, 12])
def test_merge_without_discards_is_the_whole_batch(n, n_new, dtype, with_spectrum):
    rows = with_spectrum(10 + n_new, n, 1.0 / (1 + np.arange(10 + n_new)), dtype=dtype)
    old = top_components(rows[:10], n_components=10)
    merged = merge_components(old.components, old.singular_values, rows[10:], n_components=6)
    batch = top_components(rows, n_components=6)
    eps = 1e-9 if dtype == torch.float64 else 1e-4
    assert principal_angles(merged.components, batch.components).amax() < eps
    torch.testing.assert_close(merged.singular_values, batch.singular_values, rtol=1e-4, atol=0.0)
    exact = np.linalg.svd(rows.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(merged.discarded_energy, np.sum(exact[6:] ** 2), rtol=1e-3)


def test_error_of_a_merge_is_at_most_what_was_discarded(with_spectrum):
    rows = with_spectrum(40, 60, 1.0 / (1 + np.arange(40)) ** 0.5)
    old = top_components(rows[:25], n_components=8)
    discarded = old.total_energy - float(old.singular_values.square().sum())
    merged = merge_components(old.components, old.singular_values, rows[25:], n_components=8)
    exact = np.linalg.svd(rows.double().numpy(), compute_uv=False)[:8]
    captured = float((rows @ merged.components.mT).square().sum())
    assert np.sum(exact**2) - discarded <= captured <= np.sum(exact**2) * (1 + 1e-6)


def test_nothing_new_changes_nothing(with_spectrum):
    old = top_components(with_spectrum(20, 15, np.linspace(2, 1, 15)), n_components=5)
    merged = merge_components(old.components, old.singular_values, torch.empty(0, 15), n_components=5)
    torch.testing.assert_close(merged.components, old.components, atol=1e-5, rtol=0.0)
    assert merged.discarded_energy == pytest.approx(0.0, abs=1e-5)


def test_more_components_than_the_merged_rank_are_refused(with_spectrum):
    old = top_components(with_spectrum(6, 15, np.ones(6)), n_components=4)
    with pytest.raises(ValueError, match="n_components=9 exceeds the numerical rank 6 of the 6 x 15 stack"):
        merge_components(old.components, old.singular_values, torch.eye(15)[:2], n_components=9)
