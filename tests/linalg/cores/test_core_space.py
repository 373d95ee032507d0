"""The core space loses nothing, depends on the updates alone, and cuts off optimally."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg.factored import FactoredSvd
from eigenpeft.linalg.merging import core_factors, core_space, with_model_inputs

# (m, n): tall, wide, and smaller than the ranks together (2 + 3 + 5 + 2 + 3 + 5 + 2 + 3 = 25).
SHAPES = [(40, 56), (56, 40), (12, 40), (40, 9), (7, 8)]
shapes = pytest.mark.parametrize(("m", "n"), SHAPES)


def rebuilt(space, core):
    return space.components_out.mT @ core @ space.components_in


@shapes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_is_lost(m, n, dtype, adapters, dense, close):
    factors = adapters(m=m, n=n, dtype=dtype)
    space = core_space(factors)
    assert space.cores.dtype == torch.float64
    assert len(space.components_out) <= min(25, m)
    assert len(space.components_in) <= min(25, n)
    for basis in (space.components_out, space.components_in):
        np.testing.assert_allclose(basis @ basis.mT, np.eye(len(basis)), atol=1e-13)
    for core, update in zip(space.cores, dense(factors), strict=True):
        close(rebuilt(space, core), update, 1e-12)


def test_nothing_is_lost_beside_a_diverged_adapter(random_factors, dense, close):
    # Real adapters' norms were seen to differ by a factor of 300,000.
    factors = [random_factors(30, 20, 3, dtype=torch.float64, seed=seed) for seed in range(3)]
    factors[0] = (factors[0][0] * 1e9, factors[0][1])
    space = core_space(factors)
    for core, update in zip(space.cores, dense(factors), strict=True):
        close(rebuilt(space, core), update, 1e-12)


def test_the_axes_depend_on_the_updates_alone(adapters, regauge):
    factors = adapters(dtype=torch.float64)
    expected = core_space(factors)
    turned = core_space(regauge(factors))
    scaled = core_space([(3.0 * lora_B, lora_A) for lora_B, lora_A in factors])
    shuffled = core_space(factors[::-1])
    for space in (turned, scaled, shuffled):
        torch.testing.assert_close(space.components_in, expected.components_in, atol=1e-8, rtol=0)
        torch.testing.assert_close(space.components_out, expected.components_out, atol=1e-8, rtol=0)
    torch.testing.assert_close(shuffled.cores.flip(0), expected.cores, atol=1e-8, rtol=0)


def test_sides_may_have_different_numbers_of_axes(random_factors):
    shared_A = random_factors(30, 20, 3)[1]
    factors = [(random_factors(30, 20, 3, seed=seed)[0], shared_A) for seed in range(4)]
    assert core_space(factors).cores.shape == (4, 12, 3)


def test_an_update_of_zero_counts_and_adds_no_axis(random_factors):
    lora_B, lora_A = random_factors(30, 20, 3)
    space = core_space([(lora_B, lora_A), (torch.zeros(30, 5), torch.ones(5, 20))])
    assert space.cores.shape == (2, 3, 3)
    assert not space.cores[1].any()


def test_updates_of_zero_alone_have_no_axes():
    space = core_space([(torch.zeros(6, 2), torch.ones(2, 4))])
    assert space.cores.shape == (1, 0, 0)


def test_shapes_must_agree(random_factors):
    with pytest.raises(ValueError, match=r"factors of 2 updates of shapes .* no common core space"):
        core_space([random_factors(6, 5, 2), random_factors(6, 4, 2)])
    with pytest.raises(ValueError, match="at least one update"):
        core_space([])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("side", "name", "size"), [(0, "lora_B", 12), (1, "lora_A", 10)])
def test_factors_must_be_finite(random_factors, value, side, name, size):
    factors = [random_factors(6, 5, 2, seed=seed) for seed in range(2)]
    factors[1][side][0, 1] = value
    with pytest.raises(ValueError, match=rf"1 of the {size} numbers in {name} of factors\[1\] are NaN or infinite"):
        core_space(factors)


@shapes
def test_model_inputs_are_the_same_updates(m, n, adapters, dense, close):
    factors = adapters(m=m, n=n)
    space = with_model_inputs(core_space(factors))
    for core, update in zip(space.cores, dense(factors), strict=True):
        close(space.components_out.mT @ core, update, 1e-12)


@shapes
@pytest.mark.parametrize("rank", [1, 4, 60])
def test_factors_are_the_best_of_their_rank(m, n, rank, adapters, dense, close):
    factors = adapters(m=m, n=n)
    space = core_space(factors)
    parts = FactoredSvd(*torch.linalg.svd(space.cores.sum(0), full_matrices=False))
    lora_B, lora_A = core_factors(parts, space=space, rank=rank)
    assert (lora_B.shape, lora_A.shape) == ((m, rank), (rank, n))
    u, s, vt = np.linalg.svd(sum(dense(factors)), full_matrices=False)
    close(lora_B @ lora_A, (u[:, :rank] * s[:rank]) @ vt[:rank], 1e-9)
    np.testing.assert_allclose(lora_B.norm(dim=0), lora_A.norm(dim=1), atol=1e-9)


def test_rank_must_be_positive(random_factors):
    space = core_space([random_factors(6, 5, 2)])
    parts = FactoredSvd(*torch.linalg.svd(space.cores[0], full_matrices=False))
    with pytest.raises(ValueError, match="rank=0 is not a rank"):
        core_factors(parts, space=space, rank=0)
