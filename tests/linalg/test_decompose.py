"""Top-K components against NumPy's float64 singular value decomposition."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg import decompose, krylov
from eigenpeft.linalg.decompose import full_spectrum, leading_components, numerical_rank
from eigenpeft.linalg.orthogonal import principal_angles

SPECTRA = {
    "fast": lambda q: 10.0 ** (-np.arange(q) / 16),
    "power": lambda q: 1.0 / (1 + np.arange(q)) ** 0.5,
    "near_flat": lambda q: 1.0 - 0.1 * np.arange(q) / q,
    "deficient": lambda q: 1.0 / (1 + np.arange(q // 2)),
}
SHAPES = [(150, 90), (90, 150), (100, 100)]
METHODS = ["dense", "krylov"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def check(found, rows, n_components, *, missed=3e-6):
    """Orthonormal, optimal to `missed` of the squared norm, and honest about its singular values."""
    matrix, components = rows.to(torch.float64).numpy(), found.components.to(torch.float64).numpy()
    exact = np.linalg.svd(matrix, compute_uv=False)
    assert found.components.shape == (n_components, rows.shape[1])
    assert found.components.dtype == (torch.float64 if rows.dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(components @ components.T, np.eye(n_components), atol=1e-6)
    captured, best = np.sum((matrix @ components.T) ** 2), np.sum(exact[:n_components] ** 2)
    assert captured >= best * (1 - missed)
    # To second order in what is missed; a cluster of nearly equal values may be off by its width.
    np.testing.assert_allclose(found.singular_values.numpy(), exact[:n_components], rtol=5e-3)
    np.testing.assert_allclose(found.total_squared_norm, np.sum(exact**2), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("n_components", [1, 12, 40])
def test_components_are_the_leading_ones(spectrum, shape, method, dtype, n_components, with_spectrum):
    rows = with_spectrum(*shape, SPECTRA[spectrum](min(shape)), dtype=dtype)
    before = rows.clone()
    check(leading_components(rows, n_components=n_components, method=method), rows, n_components)
    assert torch.equal(rows, before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(500, 300), (300, 500)])
def test_fast_decay_keeps_components_orthonormal_and_right(shape, method, with_spectrum):
    """Projecting twice before orthonormalising loses 2e-2 of the squared norm here; squaring in float32 the small values."""
    rows = with_spectrum(*shape, 10.0 ** (-np.arange(300) / 16))
    found = leading_components(rows, n_components=72, method=method)
    check(found, rows, 72)
    assert found.n_iterations <= 6  # rounding is not chased; two of them may be rough ones in bfloat16
    exact = np.linalg.svd(rows.double().numpy())[2][:72]
    assert principal_angles(found.components, torch.from_numpy(exact))[-1] < 0.05
    assert principal_angles(found.components[:40], torch.from_numpy(exact[:40]))[-1] < 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(20, 13), (13, 20)])
def test_every_number_of_components_up_to_all(shape, method, with_spectrum):
    rows = with_spectrum(*shape, np.linspace(2.0, 1.0, 13))
    for n_components in range(1, 14):
        check(leading_components(rows, n_components=n_components, method=method), rows, n_components)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(200, 48), (48, 200)])
def test_more_components_than_the_rank_are_refused_by_both_numbers(shape, dtype, method, with_spectrum):
    rows = with_spectrum(*shape, np.linspace(3.0, 1.0, 24), dtype=dtype)
    with pytest.raises(
        ValueError,
        match=f"n_components=40 exceeds the numerical rank 24 of the {shape[0]} x {shape[1]} stack; pass at most 24",
    ):
        leading_components(rows, n_components=40, method=method, allow_fewer=False)
    check(leading_components(rows, n_components=40, method=method), rows, 24)
    check(leading_components(rows, n_components=24, method=method), rows, 24)


def test_more_components_than_rows_are_refused(with_spectrum):
    with pytest.raises(ValueError, match="n_components=6 exceeds the numerical rank 5 of the 5 x 30 stack"):
        leading_components(with_spectrum(5, 30, np.ones(5)), n_components=6, allow_fewer=False)


@pytest.mark.parametrize("method", METHODS)
def test_a_stack_of_zeros_has_no_components(method):
    with pytest.raises(ValueError, match="n_components=1 exceeds the numerical rank 0 .* stack of zeros"):
        leading_components(torch.zeros(40, 30), n_components=1, method=method, allow_fewer=False)
    assert leading_components(torch.zeros(40, 30), n_components=3, method=method).components.shape == (0, 30)


def test_invalid_arguments_are_named(unannotated):
    rows = torch.eye(4)
    with pytest.raises(ValueError, match="n_components=0 is not a number of components; pass at least 1"):
        leading_components(rows, n_components=0)
    with pytest.raises(ValueError, match="method='lanczos' is unknown; pass 'auto', 'dense' or 'krylov'"):
        unannotated(leading_components)(rows, n_components=1, method="lanczos")


@pytest.mark.parametrize("shape", [(220, 160), (160, 220)])
def test_restarts_do_not_hurt(shape, monkeypatch):
    """Pure noise needs many passes, so that a basis of three blocks is compressed again and again."""
    monkeypatch.setattr(krylov, "_MAX_BLOCKS", 3)
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    found = leading_components(rows, n_components=8, method="krylov")
    assert found.n_iterations > 6
    check(found, rows, 8, missed=1e-5)


def test_one_huge_adapter_does_not_drown_the_rest(with_spectrum):
    rows = with_spectrum(300, 200, np.concatenate([[1e4], np.linspace(1.0, 0.2, 199)]))
    check(leading_components(rows, n_components=20, method="krylov"), rows, 20)
    exact = np.linalg.svd(rows.double().numpy())[2][:20]
    captured = np.sum((rows.double().numpy() @ exact[1:].T) ** 2)
    components = leading_components(rows, n_components=20, method="krylov").components[1:].double().numpy()
    assert np.sum((rows.double().numpy() @ components.T) ** 2) > 0.999 * captured


def test_what_rounding_hides_is_not_chased(with_spectrum):
    """Next to 1e5 float32 passes cannot order values around 1: the iteration must end, not run to its last pass."""
    rows = with_spectrum(600, 500, np.concatenate([[1e5], np.linspace(1.0, 0.2, 499)]))
    found = leading_components(rows, n_components=20, method="krylov")
    assert found.n_iterations < 20
    check(found, rows, 1)  # the others are below the numerical rank


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_bfloat16_passes_are_those_in_float32_but_for_rounding(shape, with_spectrum):
    rows = with_spectrum(*shape, SPECTRA["power"](200), dtype=torch.bfloat16)
    block = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    exact, rounded = decompose._apply_gram(rows, block), decompose._apply_gram_bfloat16(rows, block)
    assert rounded.dtype == torch.float32
    assert 1e-6 < (rounded - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_bfloat16_rows_are_decomposed_as_float32(fast, shape, with_spectrum, monkeypatch):
    monkeypatch.setattr(decompose, "_multiplies_bfloat16", lambda device: fast)
    rows = with_spectrum(*shape, SPECTRA["power"](200), dtype=torch.bfloat16)
    check(leading_components(rows, n_components=16, method="krylov"), rows, 16)


def test_large_stacks_are_iterated_on_in_chunks(with_spectrum, monkeypatch):
    monkeypatch.setattr(decompose, "_DENSE_LIMIT", 50)
    monkeypatch.setattr(decompose, "_CHUNK_BYTES", 8 * 90 * 7)  # seven rows of the (150, 90) stack
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            rows = with_spectrum(*shape, SPECTRA["fast"](90), dtype=dtype)
            found = leading_components(rows, n_components=3)
            assert found.n_iterations > 1  # that is, not the dense method
            check(found, rows, 3)
            dense = leading_components(rows, n_components=60)
            assert dense.n_iterations == 1  # most of the space: the iteration would not be cheaper
            if dtype == torch.float32:
                np.testing.assert_allclose(
                    full_spectrum(rows).numpy(), np.linalg.svd(rows.double().numpy(), compute_uv=False), atol=1e-5
                )


def test_same_seed_same_components(with_spectrum):
    rows = with_spectrum(150, 90, SPECTRA["power"](90))
    runs = [
        leading_components(rows, n_components=9, method="krylov", generator=generator).components
        for generator in (None, None, torch.Generator().manual_seed(7), torch.Generator().manual_seed(7))
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[2], runs[3])
    torch.testing.assert_close(runs[0], runs[2], atol=1e-2, rtol=0.0)  # signs included


def test_tolerance_trades_passes_for_squared_norm():
    rows = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    rough, fine = (leading_components(rows, n_components=6, method="krylov", tol=tol) for tol in (1e-1, 1e-6))
    assert rough.n_iterations < fine.n_iterations
    assert rough.relative_residual > fine.relative_residual
    check(fine, rows, 6, missed=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_spectrum_is_numpys(shape, dtype, with_spectrum):
    rows = with_spectrum(*shape, SPECTRA["power"](min(shape)), dtype=dtype)
    exact = np.linalg.svd(rows.to(torch.float64).numpy(), compute_uv=False)
    np.testing.assert_allclose(full_spectrum(rows).numpy(), exact, rtol=1e-5)


def test_numerical_rank_depends_on_the_precision():
    values = torch.tensor([2.0, 1e-4, 3e-5, 1e-5, 0.0], dtype=torch.float64)
    assert numerical_rank(values) == 4
    assert numerical_rank(values.float()) == 3
    assert numerical_rank(values[-1:]) == 0
    assert numerical_rank(values[:0]) == 0
