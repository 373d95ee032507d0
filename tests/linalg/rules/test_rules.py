"""Every rule against its definition on whole matrices, and its invariance to how and in which order updates are given."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg.merging import RULES, core_space, merge_cores, merge_updates, with_model_inputs
from eigenpeft.linalg.rules.ties import elect
from tests.linalg.rules import oracle

# Factors of 8 adapters with ranks 2, 3, 5 in turn; the last shapes are smaller than the ranks together.
SHAPES = [(40, 56), (56, 40), (12, 40), (40, 9)]
shapes = pytest.mark.parametrize(("m", "n"), SHAPES)
# What each rule is called with here; those without an entry take their defaults.
OPTIONS = {"compress": {"n_components": 5}, "boosting": {"beta": 0.5}}
DATA_FREE = [name for name, rule in RULES.items() if "statistics" not in rule.needs]


def statistics(factors, *, seed=0):
    """Second moments (T, n, n) of inputs within the row spaces, and the same on the core axes."""
    space = core_space(factors)
    k = len(space.components_in)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(factors), 3 * k, k, generator=generator, dtype=torch.float64)
    grams = rows.mT @ rows / rows.shape[1]
    return (space.components_in.mT @ grams @ space.components_in).numpy(), grams


def merged(factors, rule, **options):
    result = merge_updates(factors, rule=rule, **OPTIONS.get(rule, {}), **options)
    return result.lora_B @ result.lora_A


@shapes
@pytest.mark.parametrize("rule", [name for name in DATA_FREE if "dare" not in name and name != "compress"])
def test_rule_is_its_definition_on_whole_matrices(rule, m, n, adapters, dense, close):
    factors = adapters(m=m, n=n, dtype=torch.float64)
    expected = getattr(oracle, rule)(dense(factors), **OPTIONS.get(rule, {}))
    close(merged(factors, rule), expected, 1e-6)


@pytest.mark.parametrize("rule", [name for name in DATA_FREE if "dare" not in name and name != "compress"])
def test_weights_scale_the_updates(rule, adapters, dense, close):
    factors = adapters(dtype=torch.float64)[:4]
    weights = [1.0, 0.5, 2.0, 0.25]
    updates = [weight * update for weight, update in zip(weights, dense(factors), strict=True)]
    expected = getattr(oracle, rule)(updates, **OPTIONS.get(rule, {}))
    if rule == "mean":
        expected = expected * 4 / sum(weights)
    close(merged(factors, rule, weights=weights), expected, 1e-6)


def test_negative_weights_subtract(adapters, dense, close):
    factors = adapters()[:2]
    one, other = dense(factors)
    close(merged(factors, "task_arithmetic", weights=[1.0, -0.5]), one - 0.5 * other, 1e-6)


@shapes
def test_regmean_is_its_definition_on_whole_matrices(m, n, adapters, dense, close):
    factors = adapters(m=m, n=n, dtype=torch.float64)
    moments, grams = statistics(factors)
    found = merged(factors, "regmean", grams=grams, shrink=1.0)
    close(found, oracle.regmean(dense(factors), moments), 1e-6)


def test_regmean_reproduces_what_agrees_on_the_rows(adapters, dense, close):
    # Two tasks whose inputs lie in orthogonal halves: the minimiser is each task's own update on its half.
    factors = adapters(dtype=torch.float64)[:2]
    space = core_space(factors)
    k = len(space.components_in)
    halves = torch.diag_embed(torch.stack([torch.arange(k) < k // 2, torch.arange(k) >= k // 2]).double())
    found = merged(factors, "regmean", grams=halves, ridge=1e-12)
    in_side = space.components_in.numpy()
    expected = sum(
        update @ in_side.T @ half.numpy() @ in_side for update, half in zip(dense(factors), halves, strict=True)
    )
    close(found, expected, 1e-6)


def test_regmean_without_rows_is_the_mean(adapters, dense, close):
    factors = adapters()[:3]
    k = core_space(factors).cores.shape[2]
    close(
        merged(factors, "regmean", grams=torch.zeros(3, k, k, dtype=torch.float64)), oracle.mean(dense(factors)), 1e-6
    )


def test_regmean_of_equal_statistics_and_weights_is_the_weighted_mean(adapters, dense, close):
    factors = adapters(dtype=torch.float64)[:2]
    k = core_space(factors).cores.shape[2]
    grams = torch.eye(k, dtype=torch.float64).expand(2, k, k)
    one, other = dense(factors)
    found = merged(factors, "regmean", grams=grams, weights=[3.0, -1.0])
    close(found, (3 * one - other) / 4, 1e-6)


def test_compress_finds_what_an_independent_iteration_finds(adapters, dense, close):
    factors = adapters(dtype=torch.float64)
    found = merged(factors, "compress")
    assert np.linalg.matrix_rank(found.numpy(), tol=1e-8) <= 5
    close(found, oracle.compress(dense(factors), 5), 1e-4)


def test_compress_with_all_components_is_the_sum(adapters, dense, close):
    factors = adapters()[:3]
    found = merge_updates(factors, rule="compress", n_components=100)
    close(found.lora_B @ found.lora_A, sum(dense(factors)), 1e-6)


@pytest.mark.parametrize("rule", ["dare", "dare_ties"])
def test_dare_keeps_the_expected_update_and_draws_by_seed(rule, adapters):
    space = core_space(adapters())
    one, same = (merge_cores(space.cores, rule=rule, drop=0.5, seeds=range(8)) for _ in range(2))
    other = merge_cores(space.cores, rule=rule, drop=0.5, seeds=range(8, 16))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_dare_is_right_on_average(adapters):
    cores = core_space(adapters(scale_spread=1.0)).cores
    draws = [merge_cores(cores, rule="dare", drop=0.5, seeds=range(8 * i, 8 * i + 8)) for i in range(400)]
    error = (torch.stack(draws).mean(0) - cores.sum(0)).norm() / cores.sum(0).norm()
    # The standard error of 400 draws: √(Σ‖M_t‖² / 400) relative to the sum.
    assert error < 2 * float((cores.square().sum() / 400).sqrt() / cores.sum(0).norm())


def test_dare_that_drops_nothing_is_the_sum(adapters, dense, close):
    factors = adapters()
    close(merged(factors, "dare", drop=0.0), sum(dense(factors)), 1e-6)


@pytest.mark.parametrize("rule", DATA_FREE)
def test_rule_depends_on_the_updates_alone(rule, adapters, regauge, close):
    factors = adapters(dtype=torch.float64)
    close(merged(regauge(factors), rule), merged(factors, rule).numpy(), 1e-6)


@pytest.mark.parametrize("rule", DATA_FREE)
def test_rule_does_not_depend_on_the_order(rule, adapters, close):
    factors = adapters(dtype=torch.float64)
    weights = torch.linspace(0.5, 1.5, len(factors))
    seeds = {"seeds": range(8)} if "seeds" in RULES[rule].needs else {}
    turned = {"seeds": range(7, -1, -1)} if seeds else {}
    expected = merged(factors, rule, weights=weights, **seeds)
    close(merged(factors[::-1], rule, weights=weights.flip(0), **turned), expected.numpy(), 1e-6)


def test_regmean_depends_on_the_updates_alone_and_not_on_the_order(adapters, regauge, close):
    factors = adapters(dtype=torch.float64)
    grams = statistics(factors)[1]
    expected = merged(factors, "regmean", grams=grams).numpy()
    close(merged(regauge(factors), "regmean", grams=grams), expected, 1e-6)
    close(merged(factors[::-1], "regmean", grams=grams.flip(0)), expected, 1e-6)


# What flattens a spectrum, drops entries or cuts off changes even one update; these must not.
@pytest.mark.parametrize("rule", ["task_arithmetic", "mean", "tsv", "svc", "pico", "wudi"])
def test_one_update_comes_back(rule, random_factors, dense, close):
    factors = [random_factors(30, 20, 4, dtype=torch.float64)]
    close(merged(factors, rule), dense(factors)[0], 1e-9)


@pytest.mark.parametrize("rule", DATA_FREE)
def test_updates_of_zero_merge_to_zero(rule):
    factors = [(torch.zeros(6, 2), torch.ones(2, 4)), (torch.zeros(6, 3), torch.ones(3, 4))]
    result = merge_updates(factors, rule=rule, rank=2)
    assert not result.lora_A.any()
    assert (result.lora_B.shape, result.lora_A.shape) == ((6, 2), (2, 4))


@pytest.mark.parametrize("rule", DATA_FREE)
def test_an_untrained_adapter_among_others(rule, adapters):
    factors = [*adapters()[:3], (torch.zeros(40, 4), torch.ones(4, 56))]
    assert merged(factors, rule).isfinite().all()


@pytest.mark.parametrize("rule", DATA_FREE)
def test_identical_adapters(rule, random_factors):
    # One direction counted three times: the polar factors and residues are degenerate here.
    factors = [random_factors(30, 20, 4, dtype=torch.float64)] * 3
    assert merged(factors, rule).isfinite().all()


@pytest.mark.parametrize("rule", DATA_FREE)
def test_pico_and_svc_go_around_any_rule(rule, adapters, dense, close):
    factors = adapters(dtype=torch.float64)
    options = {"seeds": range(8)} if "seeds" in RULES[rule].needs else {}
    options |= OPTIONS.get(rule, {})
    space = core_space(factors)
    if RULES[rule].model_inputs:
        space = with_model_inputs(space)
    plain = merge_cores(space.cores, rule=rule, **options)
    around = merge_cores(space.cores, rule=rule, calibrate=["pico", "svc"], **options)
    assert around.shape == plain.shape
    assert around.isfinite().all()


def test_svc_turns_down_what_is_counted_three_times(random_factors, dense, close):
    factors = [random_factors(30, 20, 4, dtype=torch.float64)] * 3
    close(merged(factors, "svc"), dense(factors)[0], 1e-9)


def test_unknown_agreement_is_named(unannotated):
    with pytest.raises(ValueError, match="agreement='vote' is unknown; pass 'mean' or 'sum'"):
        unannotated(elect)(torch.ones(2, 3, 3), agreement="vote")


@pytest.mark.parametrize("rule", ["tsv", "iso_c", "iso_cts", "boosting", "svc", "pico", "wudi"])
def test_rounding_apart_of_a_common_subspace_is_no_room_for_more_directions(rule, close):
    # Adapters exported from one subspace: their row spaces are the same up to float32, and the core space has twice the axes.
    generator = torch.Generator().manual_seed(0)
    out, in_side = (torch.linalg.qr(torch.randn(n, 6, generator=generator).double())[0] for n in (30, 40))
    cores = torch.randn(3, 6, 6, generator=generator).double()
    exact = [(out @ core, in_side.mT) for core in cores]
    rounded = [
        ((out @ turn).float(), (turn.mT @ core @ in_side.mT).float()) for core, turn in zip(cores, turns(), strict=True)
    ]
    assert core_space(rounded).cores.shape[1] > 6
    close(merged(rounded, rule), merged(exact, rule).numpy(), 1e-4)


def turns():
    """Three orthogonal matrices, so that the factors of equal subspaces are rounded differently."""
    generator = torch.Generator().manual_seed(1)
    return [torch.linalg.qr(torch.randn(6, 6, generator=generator).double())[0] for _ in range(3)]
