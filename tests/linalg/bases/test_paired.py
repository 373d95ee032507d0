"""Pairs of directions against dense float64 algebra: the nearest coefficients, the alternation, and what it can degenerate to."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg.bases.fitting import fit_bases
from eigenpeft.linalg.bases.paired import fit_pairs, leading_pairs, pair_coefficients, pair_curve, pair_gram
from eigenpeft.linalg.bases.stacking import stack_factors
from eigenpeft.linalg.factored import frobenius_norm
from eigenpeft.linalg.orthogonal import orthonormal_rows

WEIGHTINGS = pytest.mark.parametrize("weighting", ["equal", "none"])


def dense_updates(factors, weighting):
    updates = [lora_B.double().numpy() @ lora_A.double().numpy() for lora_B, lora_A in factors]
    return [update / np.linalg.norm(update) if weighting == "equal" else update for update in updates]


def dense_loss(updates, rows_out, rows_in):
    """Least squares on the flattened rank-one matrices, without a Gram matrix."""
    atoms = np.stack([np.outer(left, right).ravel() for left, right in zip(rows_out, rows_in, strict=True)], axis=1)
    losses = []
    for update in updates:
        found = np.linalg.lstsq(atoms, update.ravel(), rcond=None)[0]
        losses.append(np.sum((update.ravel() - atoms @ found) ** 2))
    return sum(losses)


def dense_alternation(updates, rows_in, rows_out, *, sweeps):
    """The equations on whole matrices, by least squares on the unfolded tensor."""
    tensor = np.stack(updates)
    for _ in range(sweeps):
        kron = np.stack([np.outer(a, b).ravel() for a, b in zip(rows_out, rows_in, strict=True)], axis=1)
        weights = np.linalg.lstsq(kron, tensor.reshape(len(tensor), -1).T, rcond=None)[0].T
        kron = np.stack([np.outer(w, b).ravel() for w, b in zip(weights.T, rows_in, strict=True)], axis=1)
        rows_out = np.linalg.lstsq(kron, tensor.transpose(0, 2, 1).reshape(-1, tensor.shape[1]), rcond=None)[0]
        kron = np.stack([np.outer(w, a).ravel() for w, a in zip(weights.T, rows_out, strict=True)], axis=1)
        rows_in = np.linalg.lstsq(kron, tensor.reshape(-1, tensor.shape[2]), rcond=None)[0]
    return rows_in, rows_out


def unit_rows(k, n, seed, dtype=torch.float64):
    rows = torch.randn(k, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (rows / rows.norm(dim=1, keepdim=True)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_coefficients_are_those_of_the_nearest_sum_of_pairs(dtype, random_factors):
    lora_B, lora_A = random_factors(20, 30, 4, dtype=dtype)
    rows_out, rows_in = unit_rows(6, 20, 0), unit_rows(6, 30, 1)
    found = pair_coefficients(lora_B, lora_A, components_out=rows_out, components_in=rows_in)
    atoms = np.stack([np.outer(a, b).ravel() for a, b in zip(rows_out.numpy(), rows_in.numpy(), strict=True)], axis=1)
    update = lora_B.double().numpy() @ lora_A.double().numpy()
    expected = np.linalg.lstsq(atoms, update.ravel(), rcond=None)[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(pair_gram(rows_out, rows_in).numpy(), atoms.T @ atoms, atol=1e-12)


def test_on_orthonormal_rows_the_coefficients_are_the_diagonal_of_the_core(random_factors):
    lora_B, lora_A = random_factors(20, 30, 4, dtype=torch.float64)
    rows_out, rows_in = orthonormal_rows(unit_rows(5, 20, 0)), orthonormal_rows(unit_rows(5, 30, 1))
    found = pair_coefficients(lora_B, lora_A, components_out=rows_out, components_in=rows_in)
    torch.testing.assert_close(found, (rows_out @ lora_B @ lora_A @ rows_in.mT).diagonal(), rtol=1e-7, atol=1e-9)


@WEIGHTINGS
@pytest.mark.parametrize("size", [(12, 14), (30, 20)])
def test_shares_are_those_of_dense_least_squares_for_every_prefix(weighting, size, adapters):
    factors = adapters(6, m=size[0], n=size[1])
    fitted = fit_bases(factors, n_components=6, method="paired", weighting=weighting)
    updates = dense_updates(factors, weighting)
    squared_norm = sum(np.sum(update**2) for update in updates)
    rows_out, rows_in = fitted.components_out.double().numpy(), fitted.components_in.double().numpy()
    np.testing.assert_allclose(np.linalg.norm(rows_out, axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows_in, axis=1), 1.0, atol=1e-6)
    expected = [1 - dense_loss(updates, rows_out[:k], rows_in[:k]) / squared_norm for k in range(1, 7)]
    np.testing.assert_allclose(fitted.explained_variance_ratio.double().cumsum(0).numpy(), expected, atol=2e-6)
    assert bool((fitted.singular_values_in.diff() <= 0).all())


@pytest.mark.parametrize("seed", range(3))
def test_the_result_is_a_fixed_point_of_the_dense_alternation(seed, adapters):
    factors = adapters(7, noise=0.5, seed=seed)
    stacks = stack_factors(factors, rows="moments", weighting="equal")
    start = (unit_rows(4, 56, seed), unit_rows(4, 40, seed + 9))
    pairs = fit_pairs(stacks, [start], tol=1e-9)
    updates = dense_updates(factors, "equal")
    found = dense_loss(updates, pairs.components_out.numpy(), pairs.components_in.numpy())
    assert found == pytest.approx(pairs.loss, abs=1e-6)
    rows_in, rows_out = dense_alternation(updates, pairs.components_in.numpy(), pairs.components_out.numpy(), sweeps=3)
    assert dense_loss(updates, rows_out, rows_in) == pytest.approx(found, abs=2e-5)


def test_a_few_sweeps_are_those_of_the_dense_alternation(adapters, monkeypatch):
    monkeypatch.setattr("eigenpeft.linalg.bases.paired._MAX_SWEEPS", 4)
    factors = adapters(7, noise=0.5)
    stacks = stack_factors(factors, rows="moments", weighting="equal")
    rows = (stacks.rows_in.double(), stacks.rows_out.double())
    start = [unit_rows(4, len(each), 3) @ each for each in rows]  # in the span of the updates, as all starts are
    start = [each / each.norm(dim=1, keepdim=True) for each in start]
    pairs = fit_pairs(stacks, [tuple(start)], tol=1e-12)
    updates = dense_updates(factors, "equal")
    rows_in, rows_out = dense_alternation(updates, start[0].numpy(), start[1].numpy(), sweeps=3)
    assert pairs.loss == pytest.approx(dense_loss(updates, rows_out, rows_in), rel=1e-4)
    before = dense_loss(updates, start[1].numpy(), start[0].numpy())
    assert pairs.loss < before - 0.1


@WEIGHTINGS
@pytest.mark.parametrize("seed", range(3))
def test_updates_made_of_pairs_are_found_exactly(weighting, seed):
    """Five atoms, not orthogonal, seven tasks with dense weights: K numbers a task hold all of it, K² bases no more."""
    rows_in, rows_out = unit_rows(5, 30, seed), unit_rows(5, 24, seed + 50)
    weights = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    factors = [(rows_out.mT * row, rows_in) for row in weights]
    fitted = fit_bases(factors, n_components=5, method="paired", weighting=weighting)
    assert float(fitted.explained_variance_ratio.sum()) > 1 - 1e-5
    overlaps = (fitted.components_in.double() @ rows_in.mT).abs() * (fitted.components_out.double() @ rows_out.mT).abs()
    assert float(overlaps.amax(dim=1).min()) > 1 - 1e-3
    balanced = fit_bases(factors, n_components=5, method="balanced", weighting=weighting)
    stacks = stack_factors(factors, rows="moments", weighting=weighting)
    assert float(pair_curve(stacks, balanced.components_in, balanced.components_out)[-1]) < 0.9


@WEIGHTINGS
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("seed", range(2))
def test_pairs_hold_at_least_the_diagonal_of_every_start(weighting, k, seed, adapters):
    factors = adapters(8, noise=1.0, seed=seed)
    stacks = stack_factors(factors, rows="moments", weighting=weighting)
    share = float(
        fit_bases(factors, n_components=k, method="paired", weighting=weighting).explained_variance_ratio.sum()
    )
    for method in ("balanced", "hooi"):
        bases = fit_bases(factors, n_components=k, method=method, weighting=weighting)
        assert share >= float(pair_curve(stacks, bases.components_in, bases.components_out)[-1]) - 1e-6
    assert share >= float(pair_curve(stacks, *leading_pairs(stacks, k))[-1]) - 1e-6


def test_factors_of_the_same_updates_give_the_same_pairs(adapters, regauge):
    factors = adapters(6, dtype=torch.float64)
    one, other = (fit_bases(each, n_components=4, method="paired") for each in (factors, regauge(factors)))
    torch.testing.assert_close(one.components_in, other.components_in, atol=1e-5, rtol=0)
    again = fit_bases(factors, n_components=4, method="paired")
    assert torch.equal(one.components_out, again.components_out)


def degenerate_collections():
    a, b = torch.eye(6, dtype=torch.float64)[:2]
    # A tensor of rank 3 that tensors of rank 2 come as near as one likes, with ever larger terms that cancel (De Silva and
    # Lim, SIAM J. Matrix Anal. Appl. 30, 2008).
    yield "no best pairs", [((torch.stack([a, b], 1)), torch.stack([b, a])), (a[:, None], a[None])]
    one = (unit_rows(6, 2, 0), unit_rows(2, 8, 1))
    yield "copies of one adapter", [one] * 5
    yield "opposite adapters", [one, (-one[0], one[1])]
    yield "one adapter", [one]
    yield "a zero among them", [one, (0 * one[0], one[1]), (unit_rows(6, 2, 2), unit_rows(2, 8, 3))]


@pytest.mark.parametrize("case", degenerate_collections(), ids=lambda case: case[0])
def test_degenerate_collections_do_not_diverge(case):
    factors = case[1]
    fitted = fit_bases(factors, n_components=2, method="paired", tol=1e-8)
    assert bool(fitted.components_in.isfinite().all())
    assert bool(fitted.components_out.isfinite().all())
    assert 0.0 < float(fitted.explained_variance_ratio.sum()) <= 1 + 1e-6
    for lora_B, lora_A in factors:
        norm = float(frobenius_norm(lora_B, lora_A))
        found = pair_coefficients(
            lora_B, lora_A, components_out=fitted.components_out, components_in=fitted.components_in
        )
        assert float(found.abs().max()) <= 1e4 * max(norm, 1e-300)
        # As a store keeps it, in float32: what is read back is no further from the update than zero is.
        rest = fitted.components_out.float().mT @ torch.diag(found.float()) @ fitted.components_in.float()
        assert float((lora_B @ lora_A - rest.double()).norm()) <= norm * (1 + 1e-5)


def test_a_share_is_refused(adapters):
    with pytest.raises(ValueError, match="n_components=0.9 is a share, and method='paired' takes a whole number"):
        fit_bases(adapters(3), n_components=0.9, method="paired")


def test_more_pairs_than_directions_are_refused(adapters):
    with pytest.raises(ValueError, match="exceeds the numerical rank 5"):
        fit_bases(adapters(2), n_components=6, method="paired")
