"""Bases of the four methods against what NumPy makes of the products in float64."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg import decompose
from eigenpeft.linalg.bases import fitting
from eigenpeft.linalg.bases.fitting import METHODS, WEIGHTINGS, explained_share_curve, fit_bases, stack_rows
from eigenpeft.linalg.bases.incremental import merge_components
from eigenpeft.linalg.orthogonal import principal_angles

ORTHONORMAL = [
    name for name, fit in METHODS.items() if not fit.paired
]  # pairs have tests of their own, in test_paired.py
methods = pytest.mark.parametrize("method", ORTHONORMAL)
weightings = pytest.mark.parametrize("weighting", WEIGHTINGS)
gauge_free = pytest.mark.parametrize("method", ["balanced", "hosvd", "hooi"])


def weighted_products(factors, weighting):
    products = [lora_B.double().numpy() @ lora_A.double().numpy() for lora_B, lora_A in factors]
    norms = [np.linalg.norm(product) if weighting == "equal" else 1.0 for product in products]
    return [product / norm for product, norm in zip(products, norms, strict=True)]


def oracle_share(factors, fitted, weighting, k):
    """Explained share by its definition, from dense products."""
    products = weighted_products(factors, weighting)
    v_in, v_out = (side[:k].double().numpy() for side in (fitted.components_in, fitted.components_out))
    explained = sum(np.sum((v_out @ product @ v_in.T) ** 2) for product in products)
    return explained / sum(np.sum(product**2) for product in products)


def oracle_rows(factors, method, weighting):
    """Input-side rows of a method from dense singular value decompositions."""
    rows = []
    for product, (_, lora_A) in zip(weighted_products(factors, weighting), factors, strict=True):
        _, s, vh = np.linalg.svd(product)
        power = {"balanced": 0.5, "hosvd": 1.0}[method]
        rows.append(s[: len(lora_A), None] ** power * vh[: len(lora_A)])
    return np.concatenate(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(40, 56), (56, 40), (20, 20)])
@weightings
@methods
def test_bases_are_orthonormal_and_explain_what_they_say(method, weighting, size, dtype, adapters):
    factors = adapters(6, m=size[0], n=size[1], dtype=dtype)
    fitted = fit_bases(factors, n_components=7, method=method, weighting=weighting)
    for components, length in ((fitted.components_in, size[1]), (fitted.components_out, size[0])):
        assert components.shape == (7, length)
        assert components.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        components = components.double().numpy()
        np.testing.assert_allclose(components @ components.T, np.eye(7), atol=1e-6)
        assert (components[np.arange(7), np.abs(components).argmax(axis=1)] > 0).all()
    expected = [oracle_share(factors, fitted, weighting, k) for k in range(1, 8)]
    curve = fitted.explained_variance_ratio.double().cumsum(0).numpy()
    np.testing.assert_allclose(curve, expected, rtol=1e-4)
    measured = explained_share_curve(
        factors, components_in=fitted.components_in, components_out=fitted.components_out, weighting=weighting
    )
    np.testing.assert_allclose(measured.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["balanced", "hosvd"])
@weightings
def test_bases_are_the_singular_vectors_of_the_rows(method, weighting, dtype, adapters):
    factors = adapters(6, dtype=dtype)
    transposed = [(lora_A.mT, lora_B.mT) for lora_B, lora_A in factors]
    fitted = fit_bases(factors, n_components=5, method=method, weighting=weighting)
    sides = ((factors, fitted.components_in, fitted.singular_values_in),) + (
        (transposed, fitted.components_out, fitted.singular_values_out),
    )
    for pairs, components, values in sides:
        _, s, vh = np.linalg.svd(oracle_rows(pairs, method, weighting))
        assert principal_angles(components, torch.from_numpy(vh[:5].copy())).amax() < 1e-4
        np.testing.assert_allclose(values.double().numpy(), s[:5], rtol=1e-4)


def test_eigenlorax_spans_the_mean_and_the_centred_rows_as_they_are(adapters):
    factors = adapters(6)
    fitted = fit_bases(factors, n_components=5, method="eigenlorax")
    rows_in = np.concatenate([lora_A.double().numpy() for _, lora_A in factors])
    rows_out = np.concatenate([lora_B.double().numpy().T for lora_B, _ in factors])
    for rows, components in ((rows_in, fitted.components_in), (rows_out, fitted.components_out)):
        mean = rows.mean(axis=0)
        span = np.concatenate([mean[None], np.linalg.svd(rows - mean)[2][:4]])
        assert principal_angles(components, torch.from_numpy(span)).amax() < 1e-3
        assert abs(components[0].double().numpy() @ mean) == pytest.approx(np.linalg.norm(mean), rel=1e-5)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("seed", range(3))
@gauge_free
def test_bases_depend_on_the_updates_alone(method, seed, dtype, largest, adapters, regauge):
    factors = adapters(6, n_shared=8, noise=0.02, dtype=dtype, seed=seed)
    fitted = fit_bases(factors, n_components=8, method=method)
    turned = fit_bases(regauge(factors, condition=30.0, seed=seed), n_components=8, method=method)
    assert principal_angles(fitted.components_in, turned.components_in).amax() < largest
    assert principal_angles(fitted.components_out, turned.components_out).amax() < largest


def test_eigenlorax_depends_on_the_split(adapters, regauge):
    """The reason for "balanced"; if this fails, the test above tests nothing."""
    factors = adapters(6, n_shared=8)
    fitted, turned = (fit_bases(pairs, n_components=4, method="eigenlorax") for pairs in (factors, regauge(factors)))
    assert principal_angles(fitted.components_in, turned.components_in).amax() > 0.1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.05, 0.5])
@pytest.mark.parametrize("k", [3, 6, 10])
@weightings
def test_closer_fits_explain_more(weighting, k, noise, seed, adapters):
    factors = adapters(9, noise=noise, seed=seed)
    share = {
        method: fit_bases(factors, n_components=k, method=method, weighting=weighting).explained_variance_ratio.sum()
        for method in ORTHONORMAL
    }
    assert share["hooi"] >= share["hosvd"] - 1e-6
    assert share["hosvd"] >= max(share["balanced"], share["eigenlorax"]) - 1e-6
    # HOSVD keeps at least 1 - tail_in - tail_out, and no pair of bases keeps more than 1 - max(tail_in, tail_out).
    values = [np.linalg.svd(np.concatenate(weighted_products(factors, weighting), axis=axis))[1] for axis in (0, 1)]
    tails = [np.sum(s[k:] ** 2) / np.sum(s**2) for s in values]
    assert 1 - sum(tails) - 1e-6 <= share["hosvd"] <= share["hooi"] + 1e-6 <= 1 - max(tails) + 2e-6


@methods
def test_all_components_explain_everything(method, adapters):
    factors = adapters(4)
    rank = sum(len(lora_A) for _, lora_A in factors)
    fitted = fit_bases(factors, n_components=rank, method=method)
    assert float(fitted.explained_variance_ratio.sum()) == pytest.approx(1.0, abs=1e-5)


@gauge_free
def test_equal_weights_forget_scale_and_squared_norm_weights_do_not(method, adapters):
    factors = adapters(6)
    louder = [(1000.0 * factors[0][0], factors[0][1]), *factors[1:]]
    for weighting, moved in (("equal", False), ("none", True)):
        one, other = (
            fit_bases(pairs, n_components=3, method=method, weighting=weighting) for pairs in (factors, louder)
        )
        assert bool(principal_angles(one.components_in, other.components_in).amax() > 0.1) == moved


@weightings
@methods
@pytest.mark.parametrize("share", [0.3, 0.8, 0.99])
def test_a_share_takes_the_fewest_components_that_reach_it(share, method, weighting, adapters, monkeypatch):
    monkeypatch.setattr(fitting, "_FIRST_TRIAL", 2)
    factors = adapters(8)
    fitted = fit_bases(factors, n_components=share, method=method, weighting=weighting)
    k = len(fitted.components_in)
    assert float(fitted.explained_variance_ratio.sum()) >= share - 2e-6
    exact = fit_bases(factors, n_components=k, method=method, weighting=weighting)
    assert principal_angles(fitted.components_in, exact.components_in).amax() < 0.05
    if k > 1:
        fewer = fit_bases(factors, n_components=k - 1, method=method, weighting=weighting)
        assert float(fewer.explained_variance_ratio.sum()) < share


def test_hooi_reaches_a_share_with_fewer_components(adapters):
    factors = adapters(20, noise=2.0)
    hosvd, hooi = (fit_bases(factors, n_components=0.4, method=method) for method in ("hosvd", "hooi"))
    k = len(hooi.components_in)
    assert k < len(hosvd.components_in)
    fewer = fit_bases(factors, n_components=k - 1, method="hooi")
    assert float(fewer.explained_variance_ratio.sum()) < 0.4 <= float(hooi.explained_variance_ratio.sum())


@methods
def test_a_share_of_1_takes_all_components(method, adapters):
    factors = adapters(4)
    fitted = fit_bases(factors, n_components=1.0, method=method)
    assert len(fitted.components_in) == sum(len(lora_A) for _, lora_A in factors)


@methods
def test_updates_of_zero_are_left_out(method, adapters):
    factors = adapters(4)
    untrained = (torch.zeros_like(factors[0][0]), factors[0][1])
    with_it, without = (fit_bases(pairs, n_components=3, method=method) for pairs in ([*factors, untrained], factors))
    assert torch.equal(with_it.components_in, without.components_in)
    assert torch.equal(with_it.explained_variance_ratio, without.explained_variance_ratio)


@methods
def test_nothing_but_zeros_is_refused(method, adapters):
    untrained = [(torch.zeros_like(lora_B), lora_A) for lora_B, lora_A in adapters(3)]
    with pytest.raises(ValueError, match="every adapter's update is zero, so there is nothing to fit"):
        fit_bases(untrained, n_components=1, method=method)
    with pytest.raises(ValueError, match="every adapter's update is zero"):
        explained_share_curve(untrained, components_in=torch.eye(56)[:1], components_out=torch.eye(40)[:1])


def frozen_a(adapters):
    """Adapters that share one lora_A: rank 2 on the input side, 10 on the output side."""
    pairs = adapters(5)
    return [(lora_B[:, :2], pairs[0][1]) for lora_B, _ in pairs]


@methods
def test_too_many_components_name_the_side_and_both_numbers(method, adapters):
    factors = adapters(4)
    rank = sum(len(lora_A) for _, lora_A in factors)
    with pytest.raises(
        ValueError,
        match=rf"n_components=30 exceeds the numerical rank {rank} of the 'in' side \({rank} rows of length 56 from 4 "
        rf"adapters with an update\); pass at most {rank}, or add adapters",
    ):
        fit_bases(factors, n_components=30, method=method)
    with pytest.raises(ValueError, match="n_components=3 exceeds the numerical rank 2 of the 'in' side"):
        fit_bases(frozen_a(adapters), n_components=3, method=method)
    with pytest.raises(ValueError, match="n_components=3 exceeds the numerical rank 2 of the 'out' side"):
        fit_bases([(a.mT, b.mT) for b, a in frozen_a(adapters)], n_components=3, method=method)


@methods
def test_a_share_out_of_reach_names_what_can_be_had(method, adapters):
    with pytest.raises(
        ValueError, match=r"n_components=1.0 cannot be reached: 2 components, .* 'in' side, explain 0\.\d+; pass"
    ):
        fit_bases(frozen_a(adapters), n_components=1.0, method=method)


@methods
@pytest.mark.parametrize("n_components", [0, -3, 0.0, 1.5, -0.5, float("nan")])
def test_impossible_numbers_of_components_are_refused(n_components, method, adapters):
    with pytest.raises(ValueError, match=rf"n_components={n_components} must be a whole number >= 1, or a share"):
        fit_bases(adapters(3), n_components=n_components, method=method)


def test_unknown_methods_are_refused(adapters, unannotated):
    for call in (lambda f: unannotated(fit_bases)(f, n_components=2, method="pca"), lambda f: stack("pca", f)):
        with pytest.raises(ValueError, match="method='pca' is unknown; pass one of 'balanced', 'hosvd', 'hooi', 'eig"):
            call(adapters(3))


def stack(method, factors):
    return getattr(stack_rows, "__wrapped__", stack_rows)(factors, method=method)


@pytest.mark.parametrize("method", ["balanced", "hosvd"])
@weightings
def test_merged_rows_give_the_bases_of_all(method, weighting, adapters):
    factors = adapters(8)
    options = {"method": method, "weighting": weighting}
    first = fit_bases(factors[:4], n_components=12, **options)  # all of their rank, so nothing is lost
    everything = fit_bases(factors, n_components=5, **options)
    rows_in, rows_out = stack_rows(factors[4:], **options)
    for old, values, rows, expected in (
        (first.components_in, first.singular_values_in, rows_in, everything.components_in),
        (first.components_out, first.singular_values_out, rows_out, everything.components_out),
    ):
        merged = merge_components(old, singular_values=values, rows=rows, n_components=5)
        assert principal_angles(merged.components, expected).amax() < 1e-3


@methods
def test_large_and_small_stacks_give_the_same_bases(method, adapters, monkeypatch):
    factors = adapters(40, m=150, n=200)
    dense = fit_bases(factors, n_components=4, method=method)
    monkeypatch.setattr(decompose, "_DENSE_LIMIT", 10)
    krylov = fit_bases(factors, n_components=4, method=method, generator=torch.Generator().manual_seed(3))
    assert principal_angles(dense.components_in, krylov.components_in).amax() < 0.02
    torch.testing.assert_close(
        dense.explained_variance_ratio.sum(), krylov.explained_variance_ratio.sum(), rtol=1e-5, atol=0.0
    )


@methods
def test_same_input_same_bases(method, adapters):
    one, again = (fit_bases(adapters(5), n_components=4, method=method) for _ in range(2))
    assert torch.equal(one.components_in, again.components_in)
    assert torch.equal(one.components_out, again.components_out)
