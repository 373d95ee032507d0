"""A merge is the decomposition of everything, as long as nothing was discarded."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg.bases.incremental import empty_sketch, extend_sketch, merge_components
from eigenpeft.linalg.decompose import leading_components
from eigenpeft.linalg.orthogonal import principal_angles


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [30, 200])
@pytest.mark.parametrize("n_new", [1, 12])
def test_merge_without_discards_is_the_whole_batch(n, n_new, dtype, with_spectrum):
    rows = with_spectrum(10 + n_new, n, 1.0 / (1 + np.arange(10 + n_new)), dtype=dtype)
    old = leading_components(rows[:10], n_components=10)
    merged = merge_components(old.components, singular_values=old.singular_values, rows=rows[10:], n_components=6)
    batch = leading_components(rows, n_components=6)
    eps = 1e-9 if dtype == torch.float64 else 1e-4
    assert principal_angles(merged.components, batch.components).amax() < eps
    torch.testing.assert_close(merged.singular_values, batch.singular_values, rtol=1e-4, atol=0.0)
    exact = np.linalg.svd(rows.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(merged.discarded_squared_norm, np.sum(exact[6:] ** 2), rtol=1e-3)


def test_error_of_a_merge_is_at_most_what_was_discarded(with_spectrum):
    rows = with_spectrum(40, 60, 1.0 / (1 + np.arange(40)) ** 0.5)
    old = leading_components(rows[:25], n_components=8)
    discarded = old.total_squared_norm - float(old.singular_values.square().sum())
    merged = merge_components(old.components, singular_values=old.singular_values, rows=rows[25:], n_components=8)
    exact = np.linalg.svd(rows.double().numpy(), compute_uv=False)[:8]
    captured = float((rows @ merged.components.mT).square().sum())
    assert np.sum(exact**2) - discarded <= captured <= np.sum(exact**2) * (1 + 1e-6)


def test_nothing_new_changes_nothing(with_spectrum):
    old = leading_components(with_spectrum(20, 15, np.linspace(2, 1, 15)), n_components=5)
    merged = merge_components(
        old.components, singular_values=old.singular_values, rows=torch.empty(0, 15), n_components=5
    )
    torch.testing.assert_close(merged.components, old.components, atol=1e-5, rtol=0.0)
    assert merged.discarded_squared_norm == pytest.approx(0.0, abs=1e-5)


def test_more_components_than_the_merged_rank_are_refused(with_spectrum):
    old = leading_components(with_spectrum(6, 15, np.ones(6)), n_components=4)
    with pytest.raises(ValueError, match="n_components=9 exceeds the numerical rank 6 of the 6 x 15 stack"):
        merge_components(old.components, singular_values=old.singular_values, rows=torch.eye(15)[:2], n_components=9)


def sketch_of(rows, *, size, n_parts):
    sketch = empty_sketch(rows.shape[1], dtype=torch.float32, device=torch.device("cpu"))
    for part in rows.tensor_split(n_parts):
        sketch = extend_sketch(sketch, part, size=size)
    return sketch


@pytest.mark.parametrize("decay", [0.2, 1.0, 2.0])
@pytest.mark.parametrize("n_parts", [1, 3, 10])
def test_a_sketch_misses_no_more_than_its_bound(n_parts, decay, with_spectrum):
    rows = with_spectrum(120, 80, 1.0 / (1 + np.arange(80)) ** decay)
    sketch = sketch_of(rows, size=16, n_parts=n_parts)
    exact = np.linalg.svd(rows.double().numpy(), compute_uv=False) ** 2
    assert sketch.total_squared_norm == pytest.approx(exact.sum(), rel=1e-5)
    for k in (1, 8, 16):
        captured = np.linalg.norm(rows.double().numpy() @ sketch.components[:k].double().numpy().T) ** 2
        missed = exact[:k].sum() - captured
        assert -1e-5 <= missed <= sketch.missed_squared_norm_bound(k) + 1e-5
    # The bound says something: it is far below everything that was thrown away where the spectrum decays.
    if decay == 2.0:
        assert sketch.missed_squared_norm_bound(8) < 0.02 * sketch.total_squared_norm


def test_a_sketch_as_large_as_the_rank_is_exact(with_spectrum):
    rows = with_spectrum(60, 40, np.linspace(2, 1, 12))
    sketch = sketch_of(rows, size=12, n_parts=4)
    batch = leading_components(rows, n_components=12)
    assert principal_angles(sketch.components, batch.components).amax() < 1e-5
    assert sketch.missed_squared_norm_bound(12) < 1e-5 * sketch.total_squared_norm


def test_no_rows_leave_a_sketch_as_it_is(with_spectrum):
    sketch = sketch_of(with_spectrum(20, 10, np.ones(10)), size=3, n_parts=1)
    assert extend_sketch(sketch, torch.empty(0, 10), size=3) is sketch
