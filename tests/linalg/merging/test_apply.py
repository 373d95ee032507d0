"""What is around the rules: the scale, the measures of a merge, and arguments that are refused by name."""

import jaxtyping
import numpy as np
import pytest
import torch

from eigenpeft.linalg.merging import merge_updates


@pytest.fixture
def as_users_run_it(monkeypatch):
    """Without the check of annotations, which runs in the tests alone and would come first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def test_scale_auto_gives_the_mean_norm(adapters, dense):
    factors = adapters()
    found = merge_updates(factors, rule="task_arithmetic", scale="auto")
    norms = [np.linalg.norm(update) for update in dense(factors)]
    np.testing.assert_allclose((found.lora_B @ found.lora_A).norm(), np.mean(norms), rtol=1e-9)
    assert found.scale < 1.0


def test_scale_multiplies_the_result(adapters, dense, close):
    factors = adapters()
    result = merge_updates(factors, rule="task_arithmetic", scale=0.3)
    close(result.lora_B @ result.lora_A, 0.3 * sum(dense(factors)), 1e-6)


@pytest.mark.parametrize("rank", [None, 3])
def test_measures_are_those_of_whole_matrices(rank, adapters, dense):
    factors = adapters(dtype=torch.float64)
    updates, result = dense(factors), merge_updates(factors, scale=0.4, rank=rank)
    total = (result.lora_B @ result.lora_A).numpy()
    measures = result.measures
    np.testing.assert_allclose(
        measures.distances, [np.linalg.norm(total - update) ** 2 for update in updates], rtol=1e-9
    )
    np.testing.assert_allclose(
        measures.inner_products, [[np.sum(a * b) for b in updates] for a in updates], rtol=1e-9, atol=1e-9
    )
    values = np.linalg.svd(0.4 * sum(updates), compute_uv=False)
    np.testing.assert_allclose(measures.squared_norm, (values**2).sum(), rtol=1e-9)
    np.testing.assert_allclose(measures.kept_squared_norm, (values[:rank] ** 2).sum(), rtol=1e-9)
    np.testing.assert_allclose(measures.largest, values[0], rtol=1e-9)


def test_over_counting_is_how_often_a_direction_was_counted(random_factors):
    one = random_factors(30, 20, 4, dtype=torch.float64)
    np.testing.assert_allclose(merge_updates([one] * 3).measures.over_counting, 3.0, rtol=1e-9)
    np.testing.assert_allclose(merge_updates([one] * 3, rule="mean").measures.over_counting, 1.0, rtol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "average"}, "rule='average' is unknown; pass one of 'task_arithmetic', 'mean'"),
        ({"rule": "tsv", "density": 0.5}, "density=0.5 is not an option of rule='tsv', which takes no options"),
        ({"rule": "ties", "density": 0.0}, r"density=0.0 must be above 0 and at most 1"),
        ({"rule": "ties", "density": 1.5}, r"density=1.5 must be above 0 and at most 1"),
        ({"rule": "dare", "drop": 1.0}, r"drop=1.0 must be at least 0 and below 1"),
        ({"rule": "dare", "seeds": [1]}, "1 seeds do not fit 8 updates"),
        ({"rule": "iso_cts", "common_share": 2.0}, r"common_share=2.0 must be between 0 and 1"),
        ({"rule": "boosting", "beta": 0.0}, r"beta=0.0 must be above 0 and at most 1"),
        ({"rule": "wudi", "ridge": 0.0}, r"ridge=0.0 must be above 0"),
        ({"rule": "regmean"}, "rule='regmean' needs statistics"),
        ({"rule": "regmean", "grams": torch.eye(25).double()[None]}, "statistics of 1 tasks do not fit 8 updates"),
        ({"rule": "compress", "n_components": 0}, "n_components=0 is not a number of components"),
        ({"rule": "compress", "beta": -1.0}, r"beta=-1.0 must be between 0 and 1"),
        ({"weights": [1.0, 2.0]}, r"weights=\[1.0, 2.0\] do not fit 8 updates"),
        ({"weights": [float("nan")] * 8}, "pass one finite number for each"),
        ({"rule": "mean", "weights": [0.0] * 8}, "are all 0, so there is no mean"),
        ({"calibrate": ["svd"]}, r"calibrate=\['svd'\] is unknown"),
        ({"scale": "best"}, "scale='best' must be a finite number, 'auto', or None"),
        ({"scale": [1, 2]}, r"scale=\[1, 2\] must be a finite number, 'auto', or None"),
        ({"scale": float("inf")}, "scale=inf must be a finite number"),
        ({"rank": 0}, "rank=0 is not a rank"),
    ],
)
def test_bad_arguments_are_named(arguments, message, adapters, as_users_run_it):
    with pytest.raises(ValueError, match=message):
        merge_updates(adapters(), **arguments)


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        ((6, 2), (3, 5), r"factors\[1\] has lora_B \(6, 2\) and lora_A \(3, 5\)"),
        ((6,), (2, 5), r"factors\[1\] has lora_B \(6,\) and lora_A \(2, 5\)"),
        ((6, 2), (2, 5, 1), r"factors\[1\] has lora_B \(6, 2\) and lora_A \(2, 5, 1\)"),
    ],
)
def test_factors_that_have_no_product_are_named(left, right, message, as_users_run_it):
    whole = (torch.ones(6, 2), torch.ones(2, 5))
    with pytest.raises(ValueError, match=message):
        merge_updates([whole, (torch.ones(left), torch.ones(right))])
